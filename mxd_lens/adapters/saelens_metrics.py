"""SAELens' evaluation metrics, by its names, for layers that read at one hook and write at another.

`sae_lens.evals.run_evals` compares a layer's output with its input, and puts it in the input's place: its
numbers for transcoders and MxDs mean nothing. Here "in" is the target, the MLP's output, "out" what the
layer makes of the MLP's input, and the layer stands in the MLP's place. For an ordinary SAE the target is
the input, and every number is the one that `run_evals` gives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator, get_featurewise_weight_based_metrics
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import encode_to_read
from mxd_lens.evals.faithfulness import Place, Run, share
from mxd_lens.hooks.replace import paired_hooks
from mxd_lens.hooks.site import check_fits


class SaeLensMetrics(NamedTuple):
    """What `saelens_metrics` measured, in the shape of what `run_evals` returns: it unpacks like that."""

    metrics: dict[str, dict[str, float]]
    """By SAELens' groups and names: model_behavior_preservation (kl_div_...), model_performance_preservation
    (ce_loss_...), reconstruction_quality (explained_variance, mse, ...), shrinkage (l2_...), sparsity (l0,
    l1), token_stats."""
    feature_metrics: dict[str, list[float]]
    """A number an expert: feature_density, consistent_activation_heuristic (tokens on which it fires, for
    each sequence in which it does; NaN where it never does), and what SAELens reads off the weights."""


@torch.no_grad()
def saelens_metrics(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    batch_size: int = 8,
    progress: bool = True,
) -> SaeLensMetrics:
    """SAELens' metrics of a layer, correct for layers with two hooks.

        metrics, feature_metrics = saelens_metrics(mxd, model, tokens)

    Tokens that the layer's training excluded are neither replaced nor counted, as with `run_evals`'
    exclude_special_tokens; like it, and unlike `evaluate`, the zero-ablated model loses all tokens. Two
    metrics of SAELens depend on what else is in a batch, explained_variance_legacy and
    relative_reconstruction_bias: here the whole text is one batch. encoder_decoder_cosine_sim is given
    only where encoder and decoder share a space, in an ordinary SAE.

    Args:
        sae, model, tokens, batch_size, progress: as for `evaluate`.

    Raises:
        ValueError: as `evaluate`.
    """
    check_fits(model, sae)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
        raise ValueError(f"tokens must be ids [sequences, positions > 1], got {tuple(tokens.shape)}.")
    place = Place.of(sae, model, tokens)
    reconstruction, density, losses = Reconstruction(), Density(sae), Losses()
    for batch in tqdm(tokens.split(batch_size), desc="Evaluating", disable=not progress):
        run, kept = Run(model, batch), place.kept(batch)

        def replace(x: Tensor, y: Tensor, kept: Bool[Tensor, "s p"] = kept) -> Tensor:
            kept = kept.to(y.device)
            y_hat = sae(x).to(y)
            reconstruction.add(y[kept], y_hat[kept])
            density.add(encode_to_read(sae, x), kept)
            return torch.where(kept.unsqueeze(-1), y_hat, y)

        def logits(replacement: Callable[[Tensor, Tensor], Tensor] | None = None, run: Run = run) -> Tensor:
            if replacement is None:
                return run.logits([])
            return run.logits(paired_hooks(place.hook_name, place.hook_name_out, replacement))

        losses.add(batch, kept, logits(), logits(replace), logits(lambda _x, y: torch.zeros_like(y)))
    feature_metrics = density.metrics | weight_metrics(sae)
    groups: dict[str, dict[str, float]] = {
        **losses.metrics,
        **reconstruction.metrics,
        "sparsity": density.sparsity,
        "token_stats": {
            "total_tokens_eval_reconstruction": tokens.numel(),
            "total_tokens_eval_sparsity_variance": tokens.numel(),
        },
    }
    return SaeLensMetrics(groups, feature_metrics)


class Losses:
    """Divergences and cross-entropies of the predictions made at the kept tokens, with SAELens' names."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(
        self,
        tokens: Int[Tensor, "sequences positions"],
        kept: Bool[Tensor, "sequences positions"],
        unmodified: Float[Tensor, "sequences positions vocabulary"],
        replaced: Float[Tensor, "sequences positions vocabulary"],
        ablated: Float[Tensor, "sequences positions vocabulary"],
    ) -> None:
        """Judges a batch."""
        base = F.log_softmax(unmodified.float(), dim=-1)
        found: dict[str, Tensor] = {}
        for name, logits in (("without_sae", unmodified), ("with_sae", replaced), ("with_ablation", ablated)):
            log_probabilities = F.log_softmax(logits.float(), dim=-1)
            next_tokens = tokens[:, 1:, None].to(log_probabilities.device)
            loss = -log_probabilities[:, :-1].gather(-1, next_tokens)[..., 0]
            found[f"ce_loss_{name}"] = loss[kept[:, :-1].to(loss.device)]
            divergence = (base.exp() * (base - log_probabilities)).sum(-1)
            found[f"kl_div_{name}"] = divergence[kept.to(divergence.device)]
        for name, values in found.items():
            self._values.setdefault(name, []).append(values.double().cpu())

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        of = {name: torch.cat(values).mean().item() for name, values in self._values.items()}
        kl, kl_ablated = of["kl_div_with_sae"], of["kl_div_with_ablation"]
        ce, ce_ablated = of["ce_loss_with_sae"], of["ce_loss_with_ablation"]
        return {
            "model_behavior_preservation": {
                "kl_div_score": share(kl_ablated - kl, kl_ablated),
                "kl_div_with_ablation": kl_ablated,
                "kl_div_with_sae": kl,
            },
            "model_performance_preservation": {
                "ce_loss_score": share(ce_ablated - ce, ce_ablated - of["ce_loss_without_sae"]),
                "ce_loss_with_ablation": ce_ablated,
                "ce_loss_with_sae": ce,
                "ce_loss_without_sae": of["ce_loss_without_sae"],
            },
        }


class Reconstruction:
    """How far the layer's output is from the target, y_hat from y, with SAELens' names."""

    def __init__(self) -> None:
        self._explained = ExplainedVarianceCalculator()
        self._values: dict[str, list[Tensor]] = {}
        self._targets: list[Tensor] = []

    def add(self, y: Float[Tensor, "tokens d_out"], y_hat: Float[Tensor, "tokens d_out"]) -> None:
        """Judges some tokens."""
        y, y_hat = y.float(), y_hat.float()
        self._explained.add_batch(sae_output=y_hat, hidden_acts=y)
        norm_in, norm_out = y.norm(dim=-1), y_hat.norm(dim=-1)
        found = {
            "mse": (y - y_hat).pow(2).sum(-1),
            "cossim": F.cosine_similarity(y, y_hat, dim=-1),
            "l2_norm_in": norm_in,
            "l2_norm_out": norm_out,
            "l2_ratio": norm_out / norm_in.where(norm_in >= 1e-4, 1.0),
            "product": (y * y_hat).sum(-1),
        }
        for name, values in found.items():
            self._values.setdefault(name, []).append(values.double().cpu())
        self._targets.append(y.cpu())

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        of = {name: torch.cat(values) for name, values in self._values.items()}
        targets = torch.cat(self._targets)
        from_mean = (targets - targets.mean(0)).pow(2).sum(-1).double()
        bias = of["l2_norm_out"].pow(2).mean() / of["product"].mean()
        return {
            "reconstruction_quality": {
                "explained_variance": self._explained.compute(),
                "explained_variance_legacy": (1 - of["mse"] / from_mean).mean().item(),
                "mse": of["mse"].mean().item(),
                "cossim": of["cossim"].mean().item(),
            },
            "shrinkage": {
                "l2_norm_in": of["l2_norm_in"].mean().item(),
                "l2_norm_out": of["l2_norm_out"].mean().item(),
                "l2_ratio": of["l2_ratio"].mean().item(),
                "relative_reconstruction_bias": bias.item(),
            },
        }


class Density:
    """How often experts fire, with SAELens' names."""

    def __init__(self, sae: SAE[Any]) -> None:
        self._tokens = torch.zeros(sae.cfg.d_sae, dtype=torch.long)
        self._sequences = torch.zeros(sae.cfg.d_sae, dtype=torch.long)
        self._magnitude = 0.0
        self._n_tokens = 0

    def add(
        self, acts: Float[Tensor, "sequences positions d_sae"], kept: Bool[Tensor, "sequences positions"]
    ) -> None:
        """Counts a batch of whole sequences."""
        active = (acts != 0) & kept.to(acts.device).unsqueeze(-1)
        self._tokens += active.sum((0, 1)).cpu()
        self._sequences += active.any(1).sum(0).cpu()
        self._magnitude += acts[active].abs().double().sum().item()
        self._n_tokens += int(kept.sum())

    @property
    def sparsity(self) -> dict[str, float]:
        return {
            "l0": self._tokens.sum().item() / self._n_tokens,
            "l1": self._magnitude / self._n_tokens,
        }

    @property
    def metrics(self) -> dict[str, list[float]]:
        return {
            "feature_density": (self._tokens.double() / self._n_tokens).tolist(),
            "consistent_activation_heuristic": (self._tokens.double() / self._sequences).tolist(),
        }


def weight_metrics(sae: SAE[Any]) -> dict[str, list[float]]:
    """SAELens' metrics of the weights; without the cosine where encoder and decoder share no space."""
    metadata = sae.cfg.metadata
    if metadata.hook_name_out in (None, metadata.hook_name):
        return get_featurewise_weight_based_metrics(sae)
    return {
        "encoder_bias": sae.b_enc.tolist(),
        "encoder_norm": sae.W_enc.norm(dim=0).tolist(),
    }
