"""What is lost as more and more MLPs of a model are replaced: whether errors compound.

The blocks are replaced one by one, from the first on and from the last back, by their layers; beside it by
each MLP's mean output over the text, and by zero.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from typing_extensions import Self

from mxd_lens.analysis.sequences import Text, token_batches, token_sequences_of
from mxd_lens.artifacts.files import write_json
from mxd_lens.artifacts.tables import Cell, Table, Tabular
from mxd_lens.evals.harness import Forward, Target, zero
from mxd_lens.hooks.replace import Replaced, Replacement

Order = Literal["first", "last"]
Baseline = Literal["mean", "zero"]
With = Literal["layers", "mean", "zero"]


class ReplacementPoint(NamedTuple):
    """The model with some MLPs replaced."""

    order: Order
    """Whether the first blocks are replaced, or the last."""
    n_replaced: int
    """How many."""
    replaced_with: With
    """Their layers, their mean outputs, or zero."""
    ce_loss: float
    """Cross-entropy of the next token, nats per token."""
    kl_divergence: float
    """KL(unmodified || replaced) of the next-token distributions, nats per token."""
    top1_agreement: float
    """Share of tokens at which both have the same likeliest next token."""


@dataclass(frozen=True, repr=False)
class ReplacementReport(Tabular):
    """What `evaluate_replacement` measured."""

    points: list[ReplacementPoint]
    """The curves: by order, number of blocks and what replaces them."""
    ce_loss: float
    """Cross-entropy of the unmodified model, nats per token."""
    blocks: list[int]
    """The blocks that have layers."""
    n_tokens: int
    """Predictions counted."""
    n_sequences: int
    """Sequences they are in."""
    model_name: str
    """The language model."""
    architectures: list[str]
    """The layers' architectures."""

    def curve(self, order: Order, replaced_with: With) -> list[ReplacementPoint]:
        """The points of one curve, by the number of blocks."""
        found = [p for p in self.points if (p.order, p.replaced_with) == (order, replaced_with)]
        return sorted(found, key=lambda p: p.n_replaced)

    @property
    def all_replaced(self) -> ReplacementPoint:
        """Every block that has a layer, replaced by it."""
        return self.curve("first", "layers")[-1]

    @property
    def tables(self) -> list[Table]:
        columns = ["blocks replaced", "with layers", "KL", "same top token", "with means", "with zero"]
        tables = []
        for order in get_args(Order):
            by_n: dict[int, dict[str, ReplacementPoint]] = {}
            for point in self.points:
                if point.order == order:
                    by_n.setdefault(point.n_replaced, {})[point.replaced_with] = point
            rows: list[list[Cell]] = []
            for n, of in sorted(by_n.items()):
                layers, mean, none = (of.get(name) for name in get_args(With))
                rows.append(
                    [
                        n,
                        layers and layers.ce_loss,
                        layers and layers.kl_divergence,
                        layers and layers.top1_agreement,
                        mean and mean.ce_loss,
                        none and none.ce_loss,
                    ]
                )
            title = (
                f"{self.model_name}: cross-entropy with the {order} blocks replaced; unmodified "
                f"{self.ce_loss:.3f} nats, {self.n_tokens:,} tokens"
            )
            if rows:
                tables.append(Table(columns, rows, title))
        return tables

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"points": [point._asdict() for point in self.points]}

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a report that `save` wrote."""
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {field.name: facts[field.name] for field in fields(cls)}
        return cls(**known | {"points": [ReplacementPoint(**point) for point in facts["points"]]})


class Tally:
    """Sums over the counted predictions of one way to run the model."""

    def __init__(self) -> None:
        self.loss = self.divergence = self.agreement = 0.0
        self.n = 0

    def add(
        self,
        log_probabilities: Float[Tensor, "n vocabulary"],
        unmodified: Float[Tensor, "n vocabulary"],
        next_tokens: Float[Tensor, " n"],
    ) -> None:
        self.loss += F.nll_loss(log_probabilities, next_tokens, reduction="sum").item()
        divergence = F.kl_div(log_probabilities, unmodified, reduction="sum", log_target=True)
        self.divergence += divergence.item()
        self.agreement += int((log_probabilities.argmax(-1) == unmodified.argmax(-1)).sum())
        self.n += len(next_tokens)


@torch.no_grad()
def evaluate_replacement(
    model: Any,
    layers: Mapping[int, SAE[Any]],
    text: Text,
    counts: Sequence[int] | None = None,
    orders: Collection[Order] = get_args(Order),
    baselines: Collection[Baseline] = get_args(Baseline)[:1],
    batch_size: int = 8,
    progress: bool = True,
) -> ReplacementReport:
    """Measure a model with more and more of its MLPs replaced.

    Tokens that a layer's training excluded keep their MLP's output. A prediction counts where no layer
    excluded its token.

    Args:
        model: any hooked model.
        layers: the layers by block.
        text: a string, strings, or token ids.
        counts: how many blocks to replace. Default: 1, 2, ... all.
        orders: whether to begin with the first block, with the last, or both.
        baselines: what else to put in the place of the same MLPs: "mean" (each MLP's mean output over the
            text), "zero".
        batch_size: sequences in a forward pass. It does not change the numbers.
        progress: whether to show a progress bar.

    Raises:
        ValueError: there is no layer, a layer does not fit the model, or no token counts.
    """
    if not layers:
        raise ValueError("There is no layer to replace an MLP with: give at least one.")
    blocks = sorted(layers)
    counts = sorted(set(counts or range(1, len(blocks) + 1)))
    if not 1 <= counts[0] <= counts[-1] <= len(blocks):
        raise ValueError(f"counts must be from 1 to the {len(blocks)} layers there are, got {list(counts)}.")
    targets = {block: Target.of(model, layers[block]) for block in blocks}
    sequences = token_sequences_of(model, layers[blocks[0]], text)
    batches = list(token_batches(sequences, batch_size, progress=False))
    forwards = [Forward(model, batch) for batch in batches]
    variants: list[With] = ["layers", *baselines]
    plan = [(order, n, how) for order in orders for how in variants for n in counts]
    tallies = {which: Tally() for which in plan}
    base = Tally()
    with tqdm(
        total=(len(plan) + 1 + ("mean" in variants)) * len(forwards), desc="Replacing", disable=not progress
    ) as bar:
        means = _mean_outputs(forwards, targets, bar) if "mean" in variants else {}
        for forward in forwards:
            predicting = torch.stack([forward.predicting(target) for target in targets.values()]).all(0)
            next_tokens = forward.tokens[:, 1:][predicting]

            def log_probabilities(
                replaced: list[Replaced], forward: Forward = forward, predicting: Tensor = predicting
            ) -> Tensor:
                logits = forward.logits(replaced)
                return logits[:, :-1][predicting.to(logits.device)].float().log_softmax(-1)

            unmodified = log_probabilities([])
            next_tokens = next_tokens.to(unmodified.device)
            base.add(unmodified, unmodified, next_tokens)
            bar.update()
            for (order, n, how), tally in tallies.items():
                chosen = blocks[:n] if order == "first" else blocks[-n:]
                replaced = [
                    forward.at(targets[block], _replacement(how, layers[block], means.get(block)))
                    for block in chosen
                ]
                tally.add(log_probabilities(replaced), unmodified, next_tokens)
                bar.update()
    if not base.n:
        raise ValueError("No token counts: all are special tokens, which are excluded.")
    points = [
        ReplacementPoint(order, n, how, t.loss / t.n, t.divergence / t.n, t.agreement / t.n)
        for (order, n, how), t in tallies.items()
    ]
    return ReplacementReport(
        points,
        base.loss / base.n,
        blocks,
        base.n,
        sum(len(batch.tokens) for batch in batches),
        model.cfg.model_name,
        sorted({sae.cfg.architecture() for sae in layers.values()}),
    )


def _replacement(how: With, sae: SAE[Any], mean: Tensor | None) -> Replacement:
    if how == "zero":
        return zero
    if how == "mean" and mean is not None:
        return lambda _x, y: mean.to(y).expand_as(y)
    return lambda x, _y: sae(x.to(sae.W_dec))


def _mean_outputs(
    forwards: Sequence[Forward], targets: Mapping[int, Target], bar: tqdm
) -> dict[int, Float[Tensor, " d_out"]]:
    """Each MLP's mean output over the counted tokens."""
    sums: dict[int, Tensor | float] = dict.fromkeys(targets, 0.0)
    counted: dict[int, int] = dict.fromkeys(targets, 0)

    def adding(forward: Forward, block: int) -> Replacement:
        here = forward.counted(targets[block])

        def add(_x: Tensor, y: Tensor) -> Tensor:
            kept = y[here.to(y.device)].double()
            sums[block] = sums[block] + kept.sum(0).cpu()
            counted[block] += len(kept)
            return y

        return add

    for forward in forwards:
        forward.logits(forward.at(target, adding(forward, block)) for block, target in targets.items())
        bar.update()
    return {block: torch.as_tensor(total) / max(counted[block], 1) for block, total in sums.items()}
