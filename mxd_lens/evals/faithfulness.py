"""How faithfully a layer replaces an MLP, and how much of that its experts contribute."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from sae_lens import SAE, logger
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import Parts
from mxd_lens.analysis.sequences import Text, token_batches, token_sequences_of
from mxd_lens.artifacts.files import write_text
from mxd_lens.artifacts.identity import hash_tensors
from mxd_lens.artifacts.tables import Table, Tabular, decimals
from mxd_lens.evals.harness import Forward, Measurement, Target, layer_output, unchanged, zero
from mxd_lens.hooks.replace import Replacement
from mxd_lens.models import model_first
from mxd_lens.text import seen_in_training

USELESS = 0.9
"""A normalised MSE of 1 is that of writing nothing at all."""

N_LARGEST = 5
UNKNOWN, HELD_OUT, SEEN = "unknown", "held-out", "seen in training"
"""What is known of a text with respect to a layer's training."""
MEANINGS = {
    "feature_share": "share of the error the experts explain",
    "ce_loss_recovered": "1: no loss added; 0: as zero ablation",
    "kl_divergence": "KL(unmodified || replaced), nats",
    "normalized_mse_median": "median of the error over the tokens",
    "fraction_of_variance_unexplained": "squared error over output variance",
    "l0": "active experts per token",
    "silent_fraction": "experts that never fired on this text",
}
"""What the numbers of the second table mean."""
OPTIONAL = {
    "kl_divergence_zero_ablated",
    "text_name",
    "text_hash",
    "provenance",
    "normalized_mse_by_sequence",
    "ce_added_by_sequence",
}
"""Fields that reports of earlier versions lack."""


@dataclass(frozen=True, repr=False)
class FaithfulnessReport(Tabular):
    """What `evaluate` measured. y is the MLP's output, y_hat the layer's, on the counted tokens.

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
    silent_fraction: float
    """Share of experts that fired on none of these tokens. On a short text many do not; the experts that
    are dead did not fire in training either."""
    normalized_mse_mean_gate: float
    """normalized_mse with mean ablation of the experts: their part C^T a replaced by its mean over the
    tokens ("mean gate")."""
    normalized_mse_shuffled_gate: float
    """normalized_mse with resample ablation of the experts: C^T a of another token of the same sequence,
    half the sequence away ("shuffled gate")."""
    feature_share: float
    """(mean gate - normalized_mse) / mean gate: what the experts explain of the error that is left
    without them. Near 0, the dense branch does the work and the experts mean little."""
    ce_loss_mean_gate: float
    """Cross-entropy with mean ablation of the experts."""
    ce_loss_shuffled_gate: float
    """Cross-entropy with resample ablation of the experts."""
    normalized_mse_median: float
    """The median over tokens of ||y_hat - y||^2 / ||y||^2, which massive activations do not move."""
    largest_tokens: list[dict[str, Any]]
    """The tokens with the largest ||y||: token, norm, normalized_mse, and share_of_squared_norm, its
    part of the sum of ||y||^2 over all tokens."""
    n_tokens: int
    """Tokens counted: without special tokens where the layer's training excluded them."""
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
    kl_divergence_zero_ablated: float = math.nan
    """KL(unmodified || zero ablated), in nats per token; NaN in a report of an earlier version."""
    text_name: str = ""
    """What the text is called; empty where the caller did not say."""
    text_hash: str = ""
    """Of the token ids: equal hashes are equal texts, tokenised alike."""
    provenance: str = UNKNOWN
    """"held-out" only where the layer's record of its training proves that no row of the text was in it;
    "seen in training" where one was; "unknown" otherwise."""
    normalized_mse_by_sequence: list[float] = field(default_factory=list)
    """The mean over each sequence's counted tokens, for `mxd_lens.evals.intervals`."""
    ce_added_by_sequence: list[float] = field(default_factory=list)
    """ce_loss_replaced - ce_loss of each sequence."""

    @property
    def dead_fraction(self) -> float:
        """The former name of `silent_fraction`."""
        warnings.warn(
            "FaithfulnessReport.dead_fraction is silent_fraction now: an expert that is silent on a text "
            "need not be dead. The old name ends with the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.silent_fraction

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "FaithfulnessReport":
        """The report that `to_dict` gave, of this or an earlier version.

        Raises:
            ValueError: fields are missing or unknown.
        """
        if not isinstance(known, Mapping):
            raise ValueError(f"a report is a JSON object, got {type(known).__name__}.")
        values = dict(known)
        if "dead_fraction" in values:
            values["silent_fraction"] = values.pop("dead_fraction")
        kinds = {f.name: f.type for f in fields(cls)}
        unknown, missing = values.keys() - kinds.keys(), kinds.keys() - values.keys() - OPTIONAL
        if unknown or missing:
            raise ValueError(
                f"this is not a report: missing {few_names(missing)}; unknown {few_names(unknown)}."
            )
        for name, value in values.items():
            kind: Any = kinds[name]
            expected = (int, float) if kind is float else get_origin(kind) or kind
            if not isinstance(value, expected):
                raise ValueError(f"this is not a report: {name} is {str(value)[:40]!r}, not a {kind}.")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "FaithfulnessReport":
        """Read a report that `save` wrote. Raises ValueError where the file is no such report."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: {e}") from e

    def __repr__(self) -> str:
        return (
            f"FaithfulnessReport({self.model_name}: {self.hook_name_out}, {self.n_tokens:,} tokens: "
            f"normalized_mse={self.normalized_mse:.3f}, feature_share={self.feature_share:.3f}, "
            f"ce_loss_recovered={self.ce_loss_recovered:.3f})"
        )

    @property
    def tables(self) -> list[Table]:
        """The errors under each ablation, and every other number with its meaning."""
        tokens = f"{self.n_tokens:,} tokens" + (f" of {self.text_name}" if self.text_name else "")
        known = "" if self.provenance == UNKNOWN else f", {self.provenance}"
        where = f"{self.model_name}, {self.hook_name} -> {self.hook_name_out}, {tokens}{known}"
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


@model_first
def evaluate(
    model: Any,
    sae: SAE[Any],
    tokens: Text,
    batch_size: int = 8,
    progress: bool = True,
    text_name: str = "",
    rows: Dataset | None = None,
) -> FaithfulnessReport:
    """Measure how well a layer replaces its MLP, and how much of that its experts contribute.

        report = evaluate(model, mxd, tokens)
        report = evaluate(model, mxd, ["A first text.", "A second one."])

    For every layer of this package, for SAELens' transcoders (skip connections included) and for ordinary
    SAEs. Tokens that the layer's training excluded (metadata.exclude_special_tokens) are neither replaced
    nor counted; a cross-entropy counts the predictions made at the counted tokens.

    The mean ablation ("mean gate") and the resample ablation ("shuffled gate") of the experts run the same
    layer with the experts' part, C^T a, exchanged; for a transcoder that is the features' contribution, for
    a skip transcoder the part beside the skip.

    Args:
        model: any hooked model.
        sae: the layer; its metadata says where it belongs.
        tokens: token ids with one sequence per row and BOS where the training had it, a string, or
            strings. Use text that the layer was not trained on.
        batch_size: sequences in a forward pass. It does not change the numbers.
        progress: whether to show a progress bar.
        text_name: what the text is called, for the report.
        rows: the rows of text that the tokens are of. The report says "held-out" only where the layer's
            record of its training proves that none of them was in it; without them it says "unknown".

    Raises:
        ValueError: the layer was trained on another model or on hooks this one lacks, there are no tokens to
            evaluate on, or activations are NaN or infinite.
        TypeError: the text is neither text nor token ids.
    """
    (report,) = evaluate_all(model, {"": sae}, tokens, batch_size, progress, text_name, rows).values()
    return report


@torch.no_grad()
@model_first
def evaluate_all(
    model: Any,
    saes: Mapping[str, SAE[Any]],
    tokens: Text,
    batch_size: int = 8,
    progress: bool = True,
    text_name: str = "",
    rows: Dataset | None = None,
) -> dict[str, FaithfulnessReport]:
    """Evaluate several layers, each on its own, as `evaluate` does.

    The unmodified model runs once for all of them, the zero-ablated one once for each MLP.

    Args:
        model, tokens, batch_size, progress, text_name, rows: as for `evaluate`.
        saes: the layers by name.

    Returns:
        The reports by the layers' names.

    Raises:
        ValueError, TypeError: as `evaluate`.
    """
    sequences = token_sequences_of(model, next(iter(saes.values())), tokens)
    layers = {name: LayerScores(sae, Target.of(model, sae)) for name, sae in saes.items()}
    # An SAE and a transcoder of one MLP write at one hook, and share what does not depend on them.
    targets = {layer.target.output: layer.target for layer in layers.values()}
    unmodified, ablated = ({output: Measurement() for output in targets} for _ in range(2))
    batches = list(token_batches(sequences, batch_size, progress=False))
    forwards = [Forward(model, batch) for batch in batches]
    for layer in layers.values():
        if not any(forward.predicting(layer.target).any() for forward in forwards):
            raise ValueError(
                "There are no tokens to evaluate on: every one is a special token that the layer's training "
                "excluded, or the last of its sequence."
            )
    with tqdm(
        total=(1 + len(targets) + 3 * len(layers)) * len(forwards), desc="Evaluating", disable=not progress
    ) as bar:
        for forward in forwards:
            logits = forward.logits(
                unmodified[output].at(forward, target, unchanged) for output, target in targets.items()
            )
            bar.update()
            for output, target in targets.items():
                unmodified[output].score(forward, target, logits, logits)
                ablated[output].add(forward, target, zero, logits)
                bar.update()
            for layer in layers.values():
                layer.replaced.add(forward, layer.target, layer.counting(forward), logits)
                bar.update()
        # Mean ablation needs the mean over all tokens: a second round over the text.
        for forward in forwards:
            for layer in layers.values():
                layer.mean_gate.add(forward, layer.target, layer.mean_ablated())
                bar.update()
                layer.shuffled_gate.add(forward, layer.target, layer.resampled(forward))
                bar.update()
    whole = {str(i): sequence for i, sequence in enumerate(sequences)}
    about = {"text_name": text_name, "text_hash": hash_tensors(whole)}
    reports = {
        name: layer.report(
            model,
            forwards,
            about | {"provenance": provenance(layer.sae, rows)},
            unmodified[layer.target.output],
            ablated[layer.target.output],
        )
        for name, layer in layers.items()
    }
    for name, report in reports.items():
        if report.normalized_mse > USELESS:
            logger.warning(
                "%s has a normalised MSE of %.2f, and writing nothing has 1: check_layer(model, sae) says "
                "whether it reads the wrong tensor, or lacks a part.",
                name or "The layer",
                report.normalized_mse,
            )
    return reports


def provenance(sae: SAE[Any], rows: Dataset | None) -> str:
    """What a layer's record of its training says about some rows of text."""
    record = getattr(sae.cfg.metadata, "training_text", None)
    return UNKNOWN if rows is None else seen_in_training(record, rows)


def few_names(names: Set[str]) -> str:
    """Some names, for an error."""
    return ", ".join(str(name)[:40] for name in sorted(names, key=str)[:5]) or "nothing"


def share(part: float, whole: float) -> float:
    """part / whole, NaN where there is no whole to have a share in."""
    return part / whole if whole else math.nan


def means_of(
    values: Float[Tensor, " tokens"], where: Sequence[Bool[Tensor, "sequences positions"]]
) -> list[float]:
    """The mean of each sequence's values, which lie one after another; sequences without any are left out."""
    counts = [n for mask in where for n in mask.sum(1).tolist()]
    return [part.mean().item() for part in values.double().split(counts) if len(part)]


class LayerScores:
    """One layer under evaluation: its measurements, and what its experts do on the text."""

    def __init__(self, sae: SAE[Any], target: Target) -> None:
        self.sae = sae
        self.target = target
        self.replaced, self.mean_gate, self.shuffled_gate = Measurement(), Measurement(), Measurement()
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.W_dec.device)
        self._active = 0
        self._tokens = 0
        self._mixture_sum: Tensor | float = 0.0

    def counting(self, forward: Forward) -> Replacement:
        """The layer itself, with the experts counted at the counted tokens."""
        counted = forward.counted(self.target).flatten()

        def output(parts: Parts) -> Tensor:
            here = counted.to(parts.mixture.device)
            self._mixture_sum = self._mixture_sum + parts.mixture[here].double().sum(0)
            self._tokens += int(here.sum())
            token_of, expert, _ = parts.fired
            fired_here = here[token_of]
            self._active += int(fired_here.sum())
            self.fired[expert[fired_here]] = True
            return parts.y

        return layer_output(self.sae, output)

    def mean_ablated(self) -> Replacement:
        """The layer with the mean mixture at every token."""
        mean = (torch.as_tensor(self._mixture_sum) / self._tokens).to(self.sae.W_dec)
        return layer_output(self.sae, lambda parts: parts.with_mixture(mean))

    def resampled(self, forward: Forward) -> Replacement:
        """The layer with every counted token's mixture taken from another one, half its sequence away."""
        counted = forward.counted(self.target)
        source = torch.arange(counted.numel()).view(counted.shape)
        for row, here in zip(source, counted, strict=True):
            (positions,) = here.nonzero(as_tuple=True)
            row[positions] = row[positions.roll(len(positions) // 2)]
        order = source.flatten()
        return layer_output(
            self.sae, lambda parts: parts.with_mixture(parts.mixture[order.to(parts.mixture.device)])
        )

    def report(
        self,
        model: Any,
        forwards: Sequence[Forward],
        about: Mapping[str, str],
        unmodified: Measurement,
        ablated: Measurement,
    ) -> FaithfulnessReport:
        """The numbers, once all batches have been added."""
        norm, ratio = unmodified.norm, self.replaced.ratio
        token_ids = torch.cat([f.tokens[f.counted(self.target)].cpu() for f in forwards])
        normalized_mse, mean_gate = self.replaced.normalized_mse, self.mean_gate.normalized_mse
        ce_loss, ce_replaced, ce_zero = unmodified.ce_loss, self.replaced.ce_loss, ablated.ce_loss
        return FaithfulnessReport(
            normalized_mse=normalized_mse,
            fraction_of_variance_unexplained=self.replaced.squared_error.sum().item() / unmodified.variance,
            ce_loss=ce_loss,
            ce_loss_replaced=ce_replaced,
            ce_loss_zero_ablated=ce_zero,
            ce_loss_recovered=share(ce_zero - ce_replaced, ce_zero - ce_loss),
            kl_divergence=self.replaced.kl_divergence,
            kl_divergence_zero_ablated=ablated.kl_divergence,
            l0=self._active / self._tokens,
            silent_fraction=1 - self.fired.float().mean().item(),
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
            n_tokens=len(token_ids),
            n_experts=self.sae.cfg.d_sae,
            n_parameters=sum(p.numel() for p in self.sae.parameters()),
            model_name=model.cfg.model_name,
            hook_name=self.target.hook_name,
            hook_name_out=self.target.hook_name_out,
            normalized_mse_by_sequence=means_of(ratio, [f.counted(self.target) for f in forwards]),
            ce_added_by_sequence=means_of(
                self.replaced.losses - unmodified.losses, [f.predicting(self.target) for f in forwards]
            ),
            **about,
        )
