"""What the experts of a layer contribute: what is lost without them, and what each of them depends on.

    y_hat = experts(m) + rest           m = C^T a, the mixture; rest the skip connection and the bias

Mean ablation of the experts replaces m by its mean over the tokens, resample ablation by another token's
(`evaluate` measures both); the best constant

    argmin_g sum_t w_t ||y_t - rest_t - experts(g)_t||^2        w_t = 1 / ||y_t||^2

is the one that no other constant beats in normalised MSE: what is left of the error is what experts that
differ between tokens are needed for. Beside them stand the ablation curves: sufficiency, where a token keeps
only the experts that write most there, and necessity, where it loses them.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import Parts, decompose
from mxd_lens.analysis.sequences import Text, token_batches, token_sequences_of
from mxd_lens.artifacts.files import write_json
from mxd_lens.artifacts.tables import Cell, Tabular, percent
from mxd_lens.evals.faithfulness import FaithfulnessReport, evaluate_all, share
from mxd_lens.evals.harness import Forward, Measurement, Target, layer_output
from mxd_lens.evals.stability import Stability
from mxd_lens.evals.token_dependence import (
    Dependence,
    ExampleExpert,
    TokenInformation,
    read_firings,
    token_information,
)
from mxd_lens.hooks.replace import Replaced, Replacement
from mxd_lens.models import model_first

# Mixtures and ablations


class BestConstant:
    """The constant that, in the place of the mixture, leaves the least normalised MSE on some tokens.

    Where every output dimension depends on its own entries of the mixture alone (m * s for an MxD and a
    transcoder, m * s + e for affine experts), it is a least-squares problem for each dimension.
    """

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae = sae
        self._products: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._is_elementwise = True

    def add(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> None:
        """Count in some tokens: the layer's inputs, and the MLP's outputs."""
        parts = decompose(self.sae, x)
        factors = self._factors(parts)
        if factors is None:
            self._is_elementwise = False
            return
        target = y.to(parts.bias.device).double()
        weight = 1 / target.pow(2).sum(-1, keepdim=True).clamp_min(1e-12)
        missing = target - parts.rest.double()
        weight = weight.expand_as(missing)
        self._products = self._products + torch.einsum("td,td,qtd->dq", weight, missing, factors)
        self._squares = self._squares + torch.einsum("td,ptd,qtd->dpq", weight, factors, factors)

    def _factors(self, parts: Parts) -> Float[Tensor, "q tokens d_out"] | None:
        """What each of the q entries of the mixture for one output dimension is multiplied by; None where
        the experts' output is not elementwise in the mixture."""
        d_out, width = len(parts.bias), parts.mixture.shape[1]
        if width % d_out:
            return None
        ones = torch.eye(width // d_out).repeat_interleave(d_out, dim=1).to(parts.mixture)
        factors = torch.stack([parts.experts_out(one).expand(-1, d_out) for one in ones]).double()
        blocks = parts.mixture.view(len(parts), len(ones), d_out).double()
        experts = parts.experts_out(parts.mixture).double()
        differs = (torch.einsum("tqd,qtd->td", blocks, factors) - experts).norm() > 0.02 * experts.norm()
        return None if differs else factors

    @property
    def mixture(self) -> Float[Tensor, " m"] | None:
        """The constant; 0 in a dimension that nothing is multiplied with. None where the experts' output is
        not elementwise in the mixture."""
        if not self._is_elementwise:
            return None
        squares, products = torch.as_tensor(self._squares), torch.as_tensor(self._products)
        return (torch.linalg.pinv(squares, hermitian=True) @ products.unsqueeze(-1))[..., 0].T.flatten()

    def replacement(self) -> Replacement | None:
        """The layer with the best constant; None where there is no `mixture`."""
        mixture = self.mixture
        if mixture is None:
            return None
        constant = mixture.to(self.sae.W_dec)
        return layer_output(self.sae, lambda parts: parts.with_mixture(constant))


def only_strongest(sae: SAE[Any], n: int) -> Replacement:
    """The layer with the n experts of each token that write most, by the norm of what they write."""
    return _ablated(sae, lambda rank: rank < n)


def without_strongest(sae: SAE[Any], n: int) -> Replacement:
    """The layer without the n experts of each token that write most."""
    return _ablated(sae, lambda rank: rank >= n)


def _ablated(sae: SAE[Any], keeps: Callable[[Tensor], Tensor]) -> Replacement:
    def output(parts: Parts) -> Tensor:
        order = parts.norms().argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        return parts.with_coefficients(parts.coefficients * keeps(rank)).y

    return layer_output(sae, output)


# The report


@dataclass(frozen=True)
class Ablation:
    """A layer with only its strongest experts (sufficiency), or without them (necessity), at every token."""

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


@dataclass(frozen=True, repr=False)
class AblationReport(Tabular):
    """What `ablation_study` measured of one layer."""

    architecture: str
    """As SAELens registers it."""
    k: int | None
    """Active experts per token, where that is fixed."""
    faithfulness: FaithfulnessReport
    """The layer in the MLP's place, with mean and resample ablation of its experts beside it."""
    normalized_mse_best_constant_gate: float
    """normalized_mse with the constant that is best on these very tokens in the place of the mixture; NaN
    for an architecture that has none."""
    ce_loss_best_constant_gate: float
    """Cross-entropy with it."""
    ablations: list[Ablation]
    """For 0, 1, 2, 4, ... experts, as many as are active on a token."""
    information: TokenInformation
    """How far tokens determine which experts are active."""
    stability: list[Stability] = field(default_factory=list)
    """How alike the experts of other seeds are; empty where there was no other layer to compare with."""

    @property
    def explained_by_experts(self) -> float:
        """(best constant - normalized_mse) / best constant: the share of what no constant mixture explains
        that the experts do. It is at most the feature share, which mean ablation gives."""
        constant = self.normalized_mse_best_constant_gate
        return share(constant - self.faithfulness.normalized_mse, constant)

    @property
    def half_explained_by(self) -> int | None:
        """The fewest experts of those tried that alone halve the distance in normalised MSE between none and
        all. None where all do no better than none."""
        errors = {a.n: a.normalized_mse_kept for a in self.ablations}
        none, whole = errors[0], self.faithfulness.normalized_mse
        if whole >= none:
            return None
        return min(n for n, error in errors.items() if error <= (none + whole) / 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "AblationReport":
        """The report that `to_dict` gave."""
        information = dict(known["information"])
        information["dependences"] = [Dependence(**d) for d in information["dependences"]]
        for kind in ("lookups", "contextual"):
            information[kind] = [
                ExampleExpert(**e | {"tokens": [(t, s) for t, s in e["tokens"]]}) for e in information[kind]
            ]
        parts: dict[str, Any] = {
            "faithfulness": FaithfulnessReport.from_dict(known["faithfulness"]),
            "ablations": [Ablation(**a) for a in known["ablations"]],
            "information": TokenInformation(**information),
            "stability": [Stability(**s) for s in known["stability"]],
        }
        return cls(**{**known, **parts})

    @property
    def title(self) -> str:
        r = self.faithfulness
        return f"Ablation of the experts of {r.model_name}'s {r.hook_name_out}, {r.n_tokens:,} tokens"

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
                "experts at their best constant",
                self.normalized_mse_best_constant_gate,
                f"{self.ce_loss_best_constant_gate:.3f}",
            ],
            ["mean ablation (mean gate)", r.normalized_mse_mean_gate, f"{r.ce_loss_mean_gate:.3f}"],
            [
                "resample ablation (shuffled gate)",
                r.normalized_mse_shuffled_gate,
                f"{r.ce_loss_shuffled_gate:.3f}",
            ],
            ["zero ablated", 1.0, f"{r.ce_loss_zero_ablated:.3f}"],
        ]
        for a in self.ablations:
            rows.append([f"only the {a.n} strongest", a.normalized_mse_kept, f"{a.ce_loss_kept:.3f}"])
            rows.append([f"without them ({a.n})", a.normalized_mse_removed, f"{a.ce_loss_removed:.3f}"])
        rows.append(["explained by the experts", percent(self.explained_by_experts), ""])
        rows += [
            [f"firing determined by: {d.variable}", percent(d.firing), ""] for d in information.dependences
        ]
        rows.append(["experts that are token lookups", percent(information.of("token").lookups), ""])
        for s in self.stability:
            rows.append([f"found again from other seeds, by {s.by}", percent(s.found_again), ""])
        return rows


def save_ablations(path: str | Path, reports: Mapping[str, AblationReport]) -> None:
    """Write reports as JSON, by the layers' names."""
    write_json(Path(path), {name: report.to_dict() for name, report in reports.items()})


def load_ablations(path: str | Path) -> dict[str, AblationReport]:
    """Read reports that `save_ablations` wrote."""
    known = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name: AblationReport.from_dict(report) for name, report in known.items()}


@torch.no_grad()
@model_first
def ablation_study(
    model: Any,
    saes: Mapping[str, SAE[Any]],
    tokens: Text,
    ablated_sequences: int = 32,
    batch_size: int = 8,
    min_fired: int = 10,
    progress: bool = True,
    text_name: str = "",
) -> dict[str, AblationReport]:
    """Measure what the experts of some layers contribute, each layer on its own.

        reports = ablation_study(model, {"MxD": mxd, "transcoder": transcoder}, tokens)

    For every layer of this package, for SAELens' transcoders and for SAEs.

    Args:
        model: any hooked model with a tokenizer.
        saes: the layers by name.
        tokens: token ids with one sequence per row, a string, or strings. Use text that the layers were
            not trained on.
        ablated_sequences: how many of the sequences, from the first, the ablations run on: some twenty runs
            of the language model per layer. Which experts fire is read from all.
        batch_size: sequences in a forward pass. It does not change the numbers.
        min_fired: see `token_information`.
        progress: whether to show progress bars.
        text_name: what the text is called, for the reports.

    Raises:
        ValueError: as `evaluate` and `token_information`, or ablated_sequences is not positive, or a layer is
            one of SAELens' that rescales or reshapes its input while it runs.
    """
    if ablated_sequences < 1:
        raise ValueError(f"ablated_sequences must be at least 1, got {ablated_sequences}.")
    sequences = token_sequences_of(model, next(iter(saes.values())), tokens)
    ablated = sequences[:ablated_sequences]
    targets = {name: Target.of(model, sae) for name, sae in saes.items()}
    reports = evaluate_all(model, saes, ablated, batch_size, progress, text_name)
    forwards = [Forward(model, batch) for batch in token_batches(ablated, batch_size, progress=False)]
    constants = _best_constants(saes, targets, forwards, progress)
    replacements: dict[str, dict[Any, Replacement]] = {}
    for name, sae in saes.items():
        constant = constants[name].replacement()
        replacements[name] = (
            ({} if constant is None else {"constant": constant})
            | {("kept", n): only_strongest(sae, n) for n in sizes(reports[name])}
            | {("removed", n): without_strongest(sae, n) for n in sizes(reports[name]) if n}
        )
    scores = _measure(targets, forwards, replacements, progress)
    firings = read_firings(model, saes, sequences, batch_size, progress)

    def decode(token: int) -> str:
        return model.tokenizer.decode([token])

    return {
        name: AblationReport(
            architecture=sae.cfg.architecture(),
            k=getattr(sae.cfg, "k", None),
            faithfulness=reports[name],
            normalized_mse_best_constant_gate=(
                scores[name]["constant"].normalized_mse if "constant" in scores[name] else math.nan
            ),
            ce_loss_best_constant_gate=(
                scores[name]["constant"].ce_loss if "constant" in scores[name] else math.nan
            ),
            ablations=_ablations(sae, reports[name], scores[name]),
            information=token_information(firings[name], decode, min_fired),
        )
        for name, sae in saes.items()
    }


def what_experts_carry(
    saes: Any, model: Any, tokens: Any, judged_sequences: int = 32, **settings: Any
) -> dict[str, AblationReport]:
    """The former name of `ablation_study`, with its former order of arguments."""
    warnings.warn(
        "what_experts_carry is ablation_study(model, saes, text, ablated_sequences) now. The old name ends "
        "with the next version.",
        DeprecationWarning,
        stacklevel=2,
    )
    if isinstance(model, Mapping):
        saes, model = model, saes
    return ablation_study(model, saes, tokens, judged_sequences, **settings)


def sizes(report: FaithfulnessReport) -> list[int]:
    """0, 1, 2, 4, ... up to below the experts that are active on a token."""
    return [0, *(2**i for i in range(math.ceil(math.log2(max(report.l0, 1)))))]


def _best_constants(
    saes: Mapping[str, SAE[Any]],
    targets: Mapping[str, Target],
    forwards: list[Forward],
    progress: bool,
) -> dict[str, BestConstant]:
    constants = {name: BestConstant(sae) for name, sae in saes.items()}

    def adding(constant: BestConstant, forward: Forward, target: Target) -> Replaced:
        counted = forward.counted(target)

        def add(x: Tensor, y: Tensor) -> Tensor:
            constant.add(x[counted.to(x.device)], y[counted.to(y.device)])
            return y

        return forward.at(target, add)

    for forward in tqdm(forwards, desc="Fitting constants", disable=not progress):
        forward.logits(adding(constant, forward, targets[name]) for name, constant in constants.items())
    return constants


def _measure(
    targets: Mapping[str, Target],
    forwards: list[Forward],
    replacements: Mapping[str, Mapping[Any, Replacement]],
    progress: bool,
) -> dict[str, dict[Any, Measurement]]:
    scores = {name: {what: Measurement() for what in of} for name, of in replacements.items()}
    passes = len(forwards) * sum(map(len, replacements.values()))
    with tqdm(total=passes, desc="Ablating experts", disable=not progress) as bar:
        for forward in forwards:
            for name, of in replacements.items():
                for what, replacement in of.items():
                    scores[name][what].add(forward, targets[name], replacement)
                    bar.update()
    return scores


def _ablations(
    sae: SAE[Any], report: FaithfulnessReport, scores: Mapping[Any, Measurement]
) -> list[Ablation]:
    def of(what: str, n: int) -> tuple[float, float]:
        if (what, n) == ("removed", 0):
            return report.normalized_mse, report.ce_loss_replaced
        measured = scores[what, n]
        return measured.normalized_mse, measured.ce_loss

    ablations = [Ablation(n, *of("kept", n), *of("removed", n)) for n in sizes(report)]
    # All of them: the layer itself, and the layer without experts.
    none = ablations[0]
    whole = (report.normalized_mse, report.ce_loss_replaced)
    most = getattr(sae.cfg, "k", None) or max(math.ceil(report.l0), 1)
    return [*ablations, Ablation(most, *whole, none.normalized_mse_kept, none.ce_loss_kept)]
