"""Training on standardised activations, whose scale the weights take over at the end."""

import torch
from jaxtyping import Float
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from typing_extensions import override

from mxd_lens.architectures.training import TrainingPairedTranscoder


class Standardizer(ActivationScaler):
    """[x | y] -> [(x - mean) / scale | y / target_scale], in the place of SAELens' scaling factor.

    mean is that of x; scale and target_scale bring the mean norms of x - mean and of y to sqrt(d_in)
    and sqrt(d_out). They are taken from the first batch, and b_dec starts at the mean of its targets.
    `fold` makes the layer one for x and y themselves, exactly.

    Adam's steps have one size whatever the activations'. Without this they are too short or too long
    for the weights that read x, and most experts are dead after a few hundred of them.
    """

    def __init__(self, sae: TrainingPairedTranscoder, trained: bool = False) -> None:
        """
        Args:
            sae: the layer, whose `standardization` holds the statistics once there are any.
            trained: whether its weights are those of a trained layer, for the activations as they are.
        """
        super().__init__()
        self.sae, self.trained = sae, trained

    @torch.no_grad()
    def estimate(self, pairs: Float[Tensor, "batch d_in_plus_d_out"]) -> None:
        """Takes the statistics of a batch. An untrained layer's b_dec starts at its mean target; a trained
        layer becomes the same layer for standardised activations."""
        x, y = pairs.float().split([self.sae.cfg.d_in, self.sae.cfg.d_out], dim=-1)
        mean, target_scale = x.mean(0), scale_of(y)
        self.sae.standardization = {"mean": mean, "scale": scale_of(x - mean), "target_scale": target_scale}
        # Where the output does not depend on the input yet, there is nothing to keep.
        if self.trained and (self.sae(x) - self.sae.b_dec).any():
            self.sae.unfold_standardization(**self.sae.standardization)
        else:
            self.sae.b_dec.copy_(y.mean(0) / target_scale)

    @override
    def scale(self, acts: Float[Tensor, "batch d_in_plus_d_out"]) -> Tensor:
        if self.sae.standardization is None:
            self.estimate(acts)
        mean, scale, target_scale = self._on(acts)
        x, y = acts.split([self.sae.cfg.d_in, self.sae.cfg.d_out], dim=-1)
        return torch.cat([(x - mean) / scale, y / target_scale], dim=-1)

    @override
    def unscale(self, acts: Float[Tensor, "batch d_in_plus_d_out"]) -> Tensor:
        mean, scale, target_scale = self._on(acts)
        x, y = acts.split([self.sae.cfg.d_in, self.sae.cfg.d_out], dim=-1)
        return torch.cat([x * scale + mean, y * target_scale], dim=-1)

    def fold(self) -> None:
        """Makes the layer one for the activations as they are."""
        if self.sae.standardization is not None:
            self.sae.fold_standardization(**self.sae.standardization)
            self.sae.standardization = None

    def _on(self, acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        statistics = self.sae.standardization
        assert statistics is not None  # there was a first batch
        mean, scale, target_scale = (statistics[name].to(acts) for name in ("mean", "scale", "target_scale"))
        return mean, scale, target_scale


class FirstBatchScaler(ActivationScaler):
    """SAELens' scaling to a mean norm of sqrt(d_in), for an SAE, from the first batch it is trained on."""

    scaling_factor: float | None = None

    @override
    def scale(self, acts: Float[Tensor, "batch d_in"]) -> Tensor:
        if self.scaling_factor is None:
            self.scaling_factor = 1 / scale_of(acts.float()).item()
        return super().scale(acts)


def scale_of(rows: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """The mean norm of the rows over sqrt(d); 1 where all are zero."""
    norm = rows.norm(dim=-1).mean() / rows.shape[-1] ** 0.5
    return torch.where(norm > 0, norm, torch.ones_like(norm))
