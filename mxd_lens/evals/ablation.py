"""What the experts of a layer carry: what is lost without them, and what each of them depends on.

    y_hat = (C^T a) * v + rest           v = D^T z for an MxD, 1 for a transcoder

Three ways to drain the gate g = C^T a: its mean over the tokens, another token's (`evaluate` measures
both), and the best constant

    g_j = sum_t w_t v_tj (y_tj - rest_tj) / sum_t w_t v_tj^2        w_t = 1 / ||y_t||^2

which no other constant beats in normalised MSE: what is left of the error is what experts that differ
between tokens are needed for. Beside them stand the ablation curves, in which a token keeps only the
experts that write most there, or loses them.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import take_apart
from mxd_lens.artifacts.files import write_json
from mxd_lens.artifacts.tables import Cell, Tabular, percent
from mxd_lens.evals.faithfulness import FaithfulnessReport, Judged, Place, Run, RunAt, evaluate_all, share
from mxd_lens.evals.stability import Stability
from mxd_lens.evals.token_dependence import (
    Dependence,
    ExampleExpert,
    TokenInformation,
    read_firings,
    token_information,
)
from mxd_lens.hooks.replace import Replacement
from mxd_lens.hooks.site import check_fits

# Gates and ablations


class BestConstantGate:
    """The constant that, in the place of C^T a, leaves the least normalised MSE on some tokens."""

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae = sae
        self._product: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def add(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> None:
        """Counts some tokens in: the layer's inputs, and the MLP's outputs."""
        parts = take_apart(self.sae, x)
        v, target = parts.decoder_out.double(), y.to(parts.bias.device).double()
        weight = 1 / target.pow(2).sum(-1, keepdim=True).clamp_min(1e-12)
        self._product = self._product + (weight * v * (target - parts.rest.double())).sum(0)
        self._square = self._square + (weight * v**2).sum(0)

    @property
    def gate(self) -> Float[Tensor, " d_out"]:
        """g; 0 in a dimension where v is 0 at every token."""
        product, square = torch.as_tensor(self._product), torch.as_tensor(self._square)
        return (product / square).where(square > 0, 0.0)

    def replacement(self) -> Replacement:
        """The layer with the best constant gate."""
        gate = self.gate.to(self.sae.W_dec)

        def replace(x: Tensor, _y: Tensor) -> Tensor:
            parts = take_apart(self.sae, x.reshape(-1, x.shape[-1]))
            return parts.dense(gate).view(*x.shape[:-1], -1)

        return replace


def only_strongest(sae: SAE[Any], n: int) -> Replacement:
    """The layer with the n experts of each token that write most, by the norm of what they write."""
    return _ablated(sae, lambda rank: rank < n)


def without_strongest(sae: SAE[Any], n: int) -> Replacement:
    """The layer without the n experts of each token that write most."""
    return _ablated(sae, lambda rank: rank >= n)


def _ablated(sae: SAE[Any], keeps: Callable[[Tensor], Tensor]) -> Replacement:
    def replace(x: Tensor, _y: Tensor) -> Tensor:
        parts = take_apart(sae, x.reshape(-1, x.shape[-1]))
        order = parts.norms().argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        kept = parts._replace(coefficients=parts.coefficients * keeps(rank))
        return (kept.output + kept.bias).view(*x.shape[:-1], -1)

    return replace


# The report


@dataclass(frozen=True)
class Ablation:
    """A layer with its strongest experts kept or removed, at every token."""

    n: int
    """How many of a token's active experts, those that write most there. The last entry is of all of them:
    k, or where that is not fixed their mean number, rounded up."""
    normalized_mse_kept: float
    """With only these."""
    ce_loss_kept: float
    """With only these, in nats a token."""
    normalized_mse_removed: float
    """Without these."""
    ce_loss_removed: float
    """Without these, in nats a token."""


@dataclass(frozen=True)
class CarryReport(Tabular):
    """What `what_experts_carry` measured of one layer."""

    architecture: str
    """As SAELens registers it."""
    k: int | None
    """Active experts a token, where that is fixed."""
    faithfulness: FaithfulnessReport
    """The layer in the MLP's place, with the mean and the shuffled gate beside it."""
    normalized_mse_best_constant_gate: float
    """normalized_mse with the constant that is best on these very tokens in the place of C^T a."""
    ce_loss_best_constant_gate: float
    """Cross-entropy with it."""
    ablations: list[Ablation]
    """For 0, 1, 2, 4, ... experts, as many as are active on a token."""
    information: TokenInformation
    """How far tokens determine which experts are active."""
    stability: list[Stability] = field(default_factory=list)
    """How alike the experts of other seeds are; empty where there was no other layer to compare with."""

    @property
    def carried(self) -> float:
        """(best constant - normalized_mse) / best constant: the share of what no constant gate explains
        that the experts do. It is at most the feature share, which the mean gate gives."""
        constant = self.normalized_mse_best_constant_gate
        return share(constant - self.faithfulness.normalized_mse, constant)

    @property
    def half_carried_by(self) -> int | None:
        """The fewest experts of those tried which, kept alone, do half of what all of them do: halve the
        distance in normalised MSE between none and all. None where all do no better than none."""
        errors = {a.n: a.normalized_mse_kept for a in self.ablations}
        none, whole = errors[0], self.faithfulness.normalized_mse
        if whole >= none:
            return None
        return min(n for n, error in errors.items() if error <= (none + whole) / 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "CarryReport":
        """The report of which `to_dict` made this."""
        information = dict(known["information"])
        information["dependences"] = [Dependence(**d) for d in information["dependences"]]
        for kind in ("lookups", "contextual"):
            information[kind] = [
                ExampleExpert(**e | {"tokens": [(t, s) for t, s in e["tokens"]]}) for e in information[kind]
            ]
        parts: dict[str, Any] = {
            "faithfulness": FaithfulnessReport(**known["faithfulness"]),
            "ablations": [Ablation(**a) for a in known["ablations"]],
            "information": TokenInformation(**information),
            "stability": [Stability(**s) for s in known["stability"]],
        }
        return cls(**{**known, **parts})

    @property
    def title(self) -> str:
        r = self.faithfulness
        return f"What the experts of {r.model_name}'s {r.hook_name_out} carry, {r.n_tokens:,} tokens"

    @property
    def columns(self) -> list[str]:
        return ["", "normalised MSE", "cross-entropy"]

    @property
    def rows(self) -> list[list[Cell]]:
        r, information = self.faithfulness, self.information
        rows: list[list[Cell]] = [
            ["unmodified", 0.0, f"{r.ce_loss:.3f}"],
            ["the layer", r.normalized_mse, f"{r.ce_loss_replaced:.3f}"],
            [
                "best constant gate",
                self.normalized_mse_best_constant_gate,
                f"{self.ce_loss_best_constant_gate:.3f}",
            ],
            ["mean gate", r.normalized_mse_mean_gate, f"{r.ce_loss_mean_gate:.3f}"],
            ["shuffled gate", r.normalized_mse_shuffled_gate, f"{r.ce_loss_shuffled_gate:.3f}"],
            ["zero ablated", 1.0, f"{r.ce_loss_zero_ablated:.3f}"],
        ]
        for a in self.ablations:
            rows.append([f"only the {a.n} strongest", a.normalized_mse_kept, f"{a.ce_loss_kept:.3f}"])
            rows.append([f"without them ({a.n})", a.normalized_mse_removed, f"{a.ce_loss_removed:.3f}"])
        rows.append(["carried by the experts", percent(self.carried), ""])
        rows += [
            [f"firing determined by: {d.variable}", percent(d.firing), ""] for d in information.dependences
        ]
        rows.append(["experts that are token lookups", percent(information.of("token").lookups), ""])
        for s in self.stability:
            rows.append([f"found again from other seeds, by {s.by}", percent(s.found_again), ""])
        return rows


def save_carry(path: str | Path, reports: Mapping[str, CarryReport]) -> None:
    """Writes reports as JSON, by the layers' names."""
    write_json(Path(path), {name: report.to_dict() for name, report in reports.items()})


def load_carry(path: str | Path) -> dict[str, CarryReport]:
    """Reads reports that `save_carry` wrote."""
    known = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name: CarryReport.from_dict(report) for name, report in known.items()}


@torch.no_grad()
def what_experts_carry(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    judged_sequences: int = 32,
    batch_size: int = 8,
    min_fired: int = 10,
    progress: bool = True,
) -> dict[str, CarryReport]:
    """What the experts of some layers carry, each layer for itself.

        reports = what_experts_carry({"MxD": mxd, "transcoder": transcoder}, model, tokens)

    Right for every layer of this package, for SAELens' transcoders and for SAEs.

    Args:
        saes: the layers by name.
        model: any hooked model with a tokenizer.
        tokens: held-out token ids, one sequence a row, with BOS where the training had it.
        judged_sequences: how many of the sequences, from the first, the gates and the ablation curves are
            judged on: some twenty runs of the language model a layer. Which experts fire is read from all.
        batch_size: sequences in a forward pass. It does not change the numbers.
        min_fired: see `token_information`.
        progress: whether to show progress bars.

    Raises:
        ValueError: as `evaluate` and `token_information`, or judged_sequences is not positive, or a layer is
            one of SAELens' that rescales or reshapes its input while it runs.
    """
    if judged_sequences < 1:
        raise ValueError(f"judged_sequences must be at least 1, got {judged_sequences}.")
    for sae in saes.values():
        check_fits(model, sae)
    judged = tokens[:judged_sequences]
    reports = evaluate_all(saes, model, judged, batch_size, progress)
    constant = _best_constants(saes, model, judged, batch_size, progress)
    replacements = {
        name: {"constant": constant[name].replacement()}
        | {("kept", n): only_strongest(sae, n) for n in sizes(reports[name])}
        | {("removed", n): without_strongest(sae, n) for n in sizes(reports[name]) if n}
        for name, sae in saes.items()
    }
    scores = _judge(saes, model, judged, replacements, batch_size, progress)
    firings = read_firings(saes, model, tokens, batch_size, progress)

    def decode(token: int) -> str:
        return model.tokenizer.decode([token])

    return {
        name: CarryReport(
            architecture=sae.cfg.architecture(),
            k=getattr(sae.cfg, "k", None),
            faithfulness=reports[name],
            normalized_mse_best_constant_gate=scores[name]["constant"].normalized_mse,
            ce_loss_best_constant_gate=scores[name]["constant"].ce_loss,
            ablations=_ablations(sae, reports[name], scores[name]),
            information=token_information(firings[name], decode, min_fired),
        )
        for name, sae in saes.items()
    }


def sizes(report: FaithfulnessReport) -> list[int]:
    """0, 1, 2, 4, ... up to below the experts that are active on a token."""
    return [0, *(2**i for i in range(math.ceil(math.log2(max(report.l0, 1)))))]


def _best_constants(
    saes: Mapping[str, SAE[Any]], model: Any, tokens: Tensor, batch_size: int, progress: bool
) -> dict[str, BestConstantGate]:
    gates = {name: BestConstantGate(sae) for name, sae in saes.items()}
    places = {name: Place.of(sae, model, tokens) for name, sae in saes.items()}

    def adding(gate: BestConstantGate, at: RunAt) -> Replacement:
        def add(x: Tensor, y: Tensor) -> Tensor:
            gate.add(x[at.kept.to(x.device)], y[at.kept.to(y.device)])
            return y

        return add

    for batch in tqdm(tokens.split(batch_size), desc="Fitting constants", disable=not progress):
        run = Run(model, batch)
        at = {name: run.at(place) for name, place in places.items()}
        run.logits(hook for name, gate in gates.items() for hook in at[name].hooks(adding(gate, at[name])))
    return gates


def _judge(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Tensor,
    replacements: Mapping[str, Mapping[Any, Replacement]],
    batch_size: int,
    progress: bool,
) -> dict[str, dict[Any, Judged]]:
    scores = {name: {what: Judged() for what in of} for name, of in replacements.items()}
    places = {name: Place.of(sae, model, tokens) for name, sae in saes.items()}
    batches = tokens.split(batch_size)
    passes = len(batches) * sum(map(len, replacements.values()))
    with tqdm(total=passes, desc="Ablating experts", disable=not progress) as bar:
        for batch in batches:
            run = Run(model, batch)
            for name, of in replacements.items():
                for what, replacement in of.items():
                    scores[name][what].add(run.at(places[name]), replacement)
                    bar.update()
    return scores


def _ablations(sae: SAE[Any], report: FaithfulnessReport, scores: Mapping[Any, Judged]) -> list[Ablation]:
    def of(what: str, n: int) -> tuple[float, float]:
        if (what, n) == ("removed", 0):
            return report.normalized_mse, report.ce_loss_replaced
        judged = scores[what, n]
        return judged.normalized_mse, judged.ce_loss

    ablations = [Ablation(n, *of("kept", n), *of("removed", n)) for n in sizes(report)]
    # All of them: the layer itself, and the layer without experts.
    none = ablations[0]
    whole = (report.normalized_mse, report.ce_loss_replaced)
    most = getattr(sae.cfg, "k", None) or max(math.ceil(report.l0), 1)
    return [*ablations, Ablation(most, *whole, none.normalized_mse_kept, none.ce_loss_kept)]
