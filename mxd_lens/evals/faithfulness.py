"""How faithfully a layer replaces an MLP, and how much of that its experts do."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, Transcoder
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mxd_lens.architectures.base import PairedTranscoder
from mxd_lens.artifacts.tables import Table, Tabular, decimals
from mxd_lens.hooks.replace import Hook, Replacement, paired_hooks
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.models import special_token_ids

N_LARGEST = 5

MEANINGS = {
    "feature_share": "share of the error the experts explain",
    "ce_loss_recovered": "1: no loss added; 0: as zero ablation",
    "kl_divergence": "KL(unmodified || replaced), nats",
    "normalized_mse_median": "median of the error over the tokens",
    "fraction_of_variance_unexplained": "squared error over output variance",
    "l0": "active experts per token",
    "dead_fraction": "experts that never fired on this text",
}
"""What the numbers of the second table mean."""


@dataclass(frozen=True)
class FaithfulnessReport(Tabular):
    """What `evaluate` measured. y is the MLP's output, y_hat the layer's, on the kept tokens.

    Cross-entropies are in nats per token, of the language model with the layer in the MLP's place.
    """

    normalized_mse: float
    """mean over tokens of ||y_hat - y||^2 / ||y||^2."""
    fraction_of_variance_unexplained: float
    """sum over tokens of ||y_hat - y||^2, over that of ||y - mean y||^2. A few tokens with massive
    activations can decide it; see `largest_tokens`."""
    ce_loss: float
    """Cross-entropy of the unmodified model."""
    ce_loss_replaced: float
    """With the layer in place of the MLP."""
    ce_loss_zero_ablated: float
    """With zero in place of the MLP's output."""
    ce_loss_recovered: float
    """(zero ablated - replaced) / (zero ablated - unmodified): 1 is a perfect replacement."""
    kl_divergence: float
    """KL(unmodified || replaced) of the next-token distributions, in nats per token."""
    l0: float
    """Active experts per token."""
    dead_fraction: float
    """Share of experts that fired on none of the tokens."""
    normalized_mse_mean_gate: float
    """normalized_mse with the experts' part C^T a replaced by its mean over the tokens."""
    normalized_mse_shuffled_gate: float
    """normalized_mse with C^T a of another token of the same text, half the text away."""
    feature_share: float
    """(mean gate - normalized_mse) / mean gate: what the experts explain of the error that is left
    without them. Near 0, the dense branch does the work and the experts mean little."""
    ce_loss_mean_gate: float
    """Cross-entropy with the mean gate."""
    ce_loss_shuffled_gate: float
    """Cross-entropy with the shuffled gate."""
    normalized_mse_median: float
    """The median over tokens of ||y_hat - y||^2 / ||y||^2, which massive activations do not move."""
    largest_tokens: list[dict[str, Any]]
    """The tokens with the largest ||y||: token, norm, normalized_mse, and share_of_squared_norm, its
    part of the sum of ||y||^2 over all tokens."""
    n_tokens: int
    """Tokens judged: special tokens excluded where the layer's training excluded them."""
    n_experts: int
    """Experts there are (d_sae)."""
    n_parameters: int
    """Parameters of the layer."""
    model_name: str
    """The language model."""
    hook_name: str
    """Where the layer reads."""
    hook_name_out: str
    """Where it writes."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "FaithfulnessReport":
        """Reads a report that `save` wrote.

        Raises:
            ValueError: the file is not a report.
        """
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {f.name: f.type for f in fields(cls)}
        if not isinstance(known, dict) or known.keys() != names.keys():
            raise ValueError(f"{path} is not a report that FaithfulnessReport.save wrote: its fields differ.")
        for name, kind in names.items():
            value = known[name]
            expected = (int, float) if kind is float else get_origin(kind) or kind
            is_known = isinstance(value, expected)  # type: ignore[arg-type]
            if not is_known:
                raise ValueError(f"{path} is not a report: {name} is {str(value)[:40]!r}, not a {kind}.")
        return cls(**known)

    @property
    def tables(self) -> list[Table]:
        """The errors under each ablation, and every other number with its meaning."""
        where = f"{self.model_name}, {self.hook_name} -> {self.hook_name_out}, {self.n_tokens:,} tokens"
        errors = [
            [name, f"{error:.3f}", f"{loss:.3f}", f"{loss - self.ce_loss:+.3f}"]
            for name, error, loss in (
                ("unmodified model", 0.0, self.ce_loss),
                ("layer", self.normalized_mse, self.ce_loss_replaced),
                ("experts mean-ablated", self.normalized_mse_mean_gate, self.ce_loss_mean_gate),
                ("experts resampled", self.normalized_mse_shuffled_gate, self.ce_loss_shuffled_gate),
                ("MLP zero-ablated", 1.0, self.ce_loss_zero_ablated),
            )
        ]
        others = [[name, decimals(getattr(self, name)), meaning] for name, meaning in MEANINGS.items()]
        return [
            Table(["", "normalised MSE", "cross-entropy", "added nats"], errors, where),
            Table(["name", "value", "meaning"], others),
        ]


def evaluate(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    batch_size: int = 8,
    progress: bool = True,
) -> FaithfulnessReport:
    """Judges a layer in the place of its MLP, on held-out tokens.

    Right for every layer of this package, for SAELens' transcoders (skip connections included) and for
    ordinary SAEs. Tokens that the layer's training excluded (metadata.exclude_special_tokens) are
    neither replaced nor counted; a cross-entropy counts the predictions made at the kept tokens.

    The mean and the shuffled gate are run with the same layer, its experts' part C^T a exchanged; for a
    transcoder that is the features' contribution, for a skip transcoder the part beside the skip.

    Args:
        sae: the layer; its metadata says where it belongs.
        model: any hooked model.
        tokens: token ids, one sequence a row, with BOS where the training had it.
        batch_size: sequences in a forward pass. It does not change the numbers.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the layer was trained on another model or on hooks this one lacks, or there are no
            tokens to judge.
    """
    (report,) = evaluate_all({"": sae}, model, tokens, batch_size, progress).values()
    return report


@torch.no_grad()
def evaluate_all(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, FaithfulnessReport]:
    """Judges several layers, each for itself, as `evaluate` does.

    The unmodified model runs once for all of them, the zero-ablated one once for each MLP.

    Args:
        saes: the layers by name.
        model, tokens, batch_size, progress: as for `evaluate`.

    Returns:
        The reports by the layers' names.
    """
    for sae in saes.values():
        check_fits(model, sae)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
        raise ValueError(f"tokens must be ids [sequences, positions > 1], got {tuple(tokens.shape)}.")
    layers = {name: Layer(sae, Place.of(sae, model, tokens)) for name, sae in saes.items()}
    # An SAE and a transcoder of one MLP write at one hook, and share what does not depend on them.
    places = {layer.place.output: layer.place for layer in layers.values()}
    unmodified, zero = ({output: Judged() for output in places} for _ in range(2))
    batches = [slice(i, i + batch_size) for i in range(0, len(tokens), batch_size)]
    passes = 1 + len(places) + 3 * len(layers)
    with tqdm(total=passes * len(batches), desc="Evaluating", disable=not progress) as bar:
        for batch in batches:
            run = Run(model, tokens[batch])
            logits = run.logits(
                hook
                for output, place in places.items()
                for hook in unmodified[output].hooks(run.at(place), lambda _x, y: y)
            )
            bar.update()
            for output, place in places.items():
                at = run.at(place)
                unmodified[output].score(at, logits)
                zero[output].add(at, lambda _x, y: torch.zeros_like(y))
                bar.update()
            for layer in layers.values():
                layer.replaced.add(run.at(layer.place), layer.experts.counting(run.at(layer.place)), logits)
                bar.update()
        # The mean gate needs the mean of C^T a over all tokens: a second round over the text.
        for batch in batches:
            run = Run(model, tokens[batch])
            for layer in layers.values():
                at, sae, mean = run.at(layer.place), layer.sae, layer.experts.mean
                layer.mean_gate.add(at, exchange_gate(sae, mean.expand_as))
                bar.update()
                layer.shuffled_gate.add(at, exchange_gate(sae, at.shuffle))
                bar.update()
    return {
        name: layer.report(model, tokens, unmodified[layer.place.output], zero[layer.place.output])
        for name, layer in layers.items()
    }


def share(part: float, whole: float) -> float:
    """part / whole, NaN where there is no whole to have a share in."""
    return part / whole if whole else math.nan


@dataclass(frozen=True)
class Place:
    """Where layers belong: their hook points, and the token ids left as they are."""

    hook_name: str
    hook_name_out: str
    excluded: tuple[int, ...]

    @classmethod
    def of(cls, sae: SAE[Any], model: Any, tokens: Int[Tensor, "sequences positions"]) -> "Place":
        """Raises ValueError where no token is left to judge."""
        excluded = special_token_ids(model, sae.cfg.metadata.exclude_special_tokens)
        place = cls(*hook_names(sae), tuple(excluded))
        if not place.kept(tokens)[:, :-1].any():
            raise ValueError("There are no tokens to judge: all are special tokens, which are excluded.")
        return place

    @property
    def output(self) -> tuple[str, tuple[int, ...]]:
        """What decides the model's own output there, and with zero in its place."""
        return self.hook_name_out, self.excluded

    def kept(self, tokens: Int[Tensor, "sequences positions"]) -> Bool[Tensor, "sequences positions"]:
        """Which tokens are replaced and counted."""
        return ~torch.isin(tokens, torch.tensor(self.excluded).to(tokens))


class Run:
    """One batch of sequences."""

    def __init__(self, model: Any, tokens: Int[Tensor, "sequences positions"]) -> None:
        self.model = model
        self.tokens = tokens

    def at(self, place: Place) -> "RunAt":
        return RunAt(self, place)

    def logits(self, hooks: Iterable[Hook]) -> Float[Tensor, "sequences positions vocabulary"]:
        return self.model.run_with_hooks(self.tokens, fwd_hooks=list(hooks))


class RunAt:
    """One batch of sequences, and what is needed to run it with something in one MLP's place."""

    def __init__(self, run: Run, place: Place) -> None:
        self.run = run
        self.place = place
        self.kept = place.kept(run.tokens)

    def hooks(self, replacement: Replacement) -> list[Hook]:
        """The hooks that put `replacement` in the MLP's place at the kept tokens."""

        def replace(x: Tensor, y: Tensor) -> Tensor:
            return torch.where(self.kept.unsqueeze(-1).to(y.device), replacement(x, y).to(y.dtype), y)

        return paired_hooks(self.place.hook_name, self.place.hook_name_out, replace)

    def shuffle(self, mixture: Float[Tensor, "sequences positions d_out"]) -> Tensor:
        """Every kept token gets the row of another kept token of its sequence."""
        shuffled = mixture.clone()
        for rows, kept, source in zip(shuffled, self.kept, mixture, strict=True):
            (kept_positions,) = kept.nonzero(as_tuple=True)
            rows[kept_positions] = source[kept_positions.roll(len(kept_positions) // 2)]
        return shuffled


class Judged:
    """The errors and losses of one kind of replacement, over batches."""

    def __init__(self) -> None:
        self._squared_error: list[Tensor] = []
        self._squared_norm: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._divergences: list[Tensor] = []
        self._sum: Tensor | float = 0.0
        self._tokens = 0

    def add(self, at: RunAt, replacement: Replacement, unmodified_logits: Tensor | None = None) -> None:
        """Runs a batch with `replacement` and judges it."""
        self.score(at, at.run.logits(self.hooks(at, replacement)), unmodified_logits)

    def hooks(self, at: RunAt, replacement: Replacement) -> list[Hook]:
        """The hooks that put `replacement` in the MLP's place and measure its error there."""

        def measured(x: Tensor, y: Tensor) -> Tensor:
            y_hat = replacement(x, y)
            target = y[at.kept].double()
            self._squared_error.append((y_hat[at.kept].double() - target).pow(2).sum(-1).cpu())
            self._squared_norm.append(target.pow(2).sum(-1).cpu())
            self._sum = self._sum + target.sum(0).cpu()
            self._tokens += len(target)
            return y_hat

        return at.hooks(measured)

    def score(
        self,
        at: RunAt,
        logits: Float[Tensor, "sequences positions vocabulary"],
        unmodified_logits: Float[Tensor, "sequences positions vocabulary"] | None = None,
    ) -> None:
        """Judges the predictions made at the kept tokens."""
        predicting = at.kept[:, :-1]
        log_probabilities = F.log_softmax(logits[:, :-1][predicting].float(), dim=-1)
        targets = at.run.tokens[:, 1:][predicting].to(log_probabilities.device)
        self._losses.append(F.nll_loss(log_probabilities, targets, reduction="none").cpu())
        if unmodified_logits is not None:
            unmodified = F.log_softmax(unmodified_logits[:, :-1][predicting].float(), dim=-1)
            divergence = F.kl_div(log_probabilities, unmodified, reduction="none", log_target=True)
            self._divergences.append(divergence.sum(-1).cpu())

    @property
    def squared_error(self) -> Float[Tensor, " tokens"]:
        return torch.cat(self._squared_error)

    @property
    def norm(self) -> Float[Tensor, " tokens"]:
        return torch.cat(self._squared_norm).sqrt()

    @property
    def ratio(self) -> Float[Tensor, " tokens"]:
        """||y_hat - y||^2 / ||y||^2."""
        return self.squared_error / torch.cat(self._squared_norm).clamp_min(1e-12)

    @property
    def variance(self) -> float:
        """sum over tokens of ||y - mean y||^2."""
        squared_mean = torch.as_tensor(self._sum).pow(2).sum() / self._tokens**2
        return (torch.cat(self._squared_norm).sum() - self._tokens * squared_mean).item()

    @property
    def normalized_mse(self) -> float:
        return self.ratio.mean().item()

    @property
    def ce_loss(self) -> float:
        return torch.cat(self._losses).double().mean().item()

    @property
    def kl_divergence(self) -> float:
        return torch.cat(self._divergences).double().mean().item()


class Experts:
    """What the experts of a layer do over batches: how many fire, which never, C^T a on average."""

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae = sae
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
        self._active = 0
        self._tokens = 0
        self._sum: Tensor | float = 0.0

    def counting(self, at: RunAt) -> Replacement:
        """The layer itself, with the experts counted at the kept tokens."""

        def replace(x: Tensor, _y: Tensor) -> Tensor:
            mixture, fired, output = decompose(self.sae, x)
            kept = at.kept.to(mixture.device)
            self._sum = self._sum + mixture[kept].double().sum(0)
            self._tokens += int(kept.sum())
            token_of, expert = fired
            fired_at_kept = kept.flatten()[token_of]
            self._active += int(fired_at_kept.sum())
            self.fired[expert[fired_at_kept]] = True
            return output(mixture)

        return replace

    @property
    def mean(self) -> Float[Tensor, " d_out"]:
        """The mean of C^T a over the tokens."""
        return (torch.as_tensor(self._sum) / self._tokens).to(self.sae.dtype)

    @property
    def l0(self) -> float:
        return self._active / self._tokens


class Layer:
    """A layer being judged."""

    def __init__(self, sae: SAE[Any], place: Place) -> None:
        self.sae = sae
        self.place = place
        self.experts = Experts(sae)
        self.replaced, self.mean_gate, self.shuffled_gate = Judged(), Judged(), Judged()

    def report(
        self,
        model: Any,
        tokens: Int[Tensor, "sequences positions"],
        unmodified: Judged,
        zero: Judged,
    ) -> FaithfulnessReport:
        """The numbers, once all batches have been added."""
        norm, ratio = unmodified.norm, self.replaced.ratio
        kept = self.place.kept(tokens).cpu()
        token_ids = tokens.cpu()[kept]
        normalized_mse, mean_gate = self.replaced.normalized_mse, self.mean_gate.normalized_mse
        ce_loss, ce_replaced, ce_zero = unmodified.ce_loss, self.replaced.ce_loss, zero.ce_loss
        return FaithfulnessReport(
            normalized_mse=normalized_mse,
            fraction_of_variance_unexplained=self.replaced.squared_error.sum().item() / unmodified.variance,
            ce_loss=ce_loss,
            ce_loss_replaced=ce_replaced,
            ce_loss_zero_ablated=ce_zero,
            ce_loss_recovered=share(ce_zero - ce_replaced, ce_zero - ce_loss),
            kl_divergence=self.replaced.kl_divergence,
            l0=self.experts.l0,
            dead_fraction=1 - self.experts.fired.float().mean().item(),
            normalized_mse_mean_gate=mean_gate,
            normalized_mse_shuffled_gate=self.shuffled_gate.normalized_mse,
            feature_share=share(mean_gate - normalized_mse, mean_gate),
            ce_loss_mean_gate=self.mean_gate.ce_loss,
            ce_loss_shuffled_gate=self.shuffled_gate.ce_loss,
            normalized_mse_median=ratio.median().item(),
            largest_tokens=[
                {
                    "token": model.tokenizer.decode([int(token_ids[i])]),
                    "norm": norm[i].item(),
                    "normalized_mse": ratio[i].item(),
                    "share_of_squared_norm": (norm[i].pow(2) / norm.pow(2).sum()).item(),
                }
                for i in norm.topk(min(N_LARGEST, len(norm))).indices.tolist()
            ],
            n_tokens=int(kept.sum()),
            n_experts=self.sae.cfg.d_sae,
            n_parameters=sum(p.numel() for p in self.sae.parameters()),
            model_name=model.cfg.model_name,
            hook_name=self.place.hook_name,
            hook_name_out=self.place.hook_name_out,
        )


Fired = tuple[Int[Tensor, " fired"], ...]


def decompose(
    sae: SAE[Any], x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch d_out"], Fired, Callable[[Tensor], Tensor]]:
    """A layer's output as a function of its sparse part.

    Returns:
        C^T a; which experts fired, as (index of the token in x, flattened, expert id), an entry per
        active expert; and the function that makes the output from C^T a.
    """
    if isinstance(sae, PairedTranscoder):
        x = x.to(sae.dtype)
        coefficients = sae.coefficients(x)
        values, indices = coefficients.active()
        token_of, slot = values.flatten(0, -2).nonzero(as_tuple=True)
        fired = (token_of, indices.flatten(0, -2)[token_of, slot])
        return sae.mixture(coefficients), fired, lambda mixture: sae.output(mixture, x)
    # SAELens' own layers are additive, and an SAE's decoder undoes what its encoder normalised.
    a = sae.encode(x)
    mixture = a @ sae.W_dec if isinstance(sae, Transcoder) else sae.decode(a) - sae.b_dec
    rest = sae(x) - mixture
    return mixture, a.flatten(0, -2).nonzero(as_tuple=True), lambda mixture: rest + mixture


def exchange_gate(sae: SAE[Any], exchange: Callable[[Tensor], Tensor]) -> Replacement:
    """The layer with exchange(C^T a) in the place of C^T a."""

    def replace(x: Tensor, _y: Tensor) -> Tensor:
        mixture, _, output = decompose(sae, x)
        return output(exchange(mixture))

    return replace
