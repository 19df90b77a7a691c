"""Training on standardised activations, whose scale the weights take over at the end."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from mxd_lens.architectures.training import TrainingPairedTranscoder

STANDARDIZER_FILENAME = "standardizer.safetensors"


class Standardizer(ActivationScaler):
    """[x | y] -> [(x - mean) / scale | y / target_scale], in the place of SAELens' scaling factor.

    mean is that of x; scale and target_scale bring the mean norms of x - mean and of y to sqrt(d_in)
    and sqrt(d_out). They are taken from the first batch. `fold` makes the layer one for x and y themselves,
    exactly. A new layer's b_dec starts at the mean of the targets; a layer trained before is for x and y
    themselves, and `unfold` makes it one for the standardised activations.

    Adam's steps have one size whatever the activations'. Without this they are too short or too long
    for the weights that read x, and most experts are dead after a few hundred of them.
    """

    def __init__(self, sae: TrainingPairedTranscoder, is_trained: bool = False) -> None:
        """For a layer; `is_trained` says whether it has been trained, on the activations themselves."""
        super().__init__()
        self.sae = sae
        self.is_trained = is_trained
        self.statistics: dict[str, Tensor] | None = None
        """mean, scale and target_scale, once there was a batch to take them from."""

    @torch.no_grad()
    def estimate(self, pairs: Float[Tensor, "batch d_in_plus_d_out"]) -> None:
        """Takes the statistics of a batch, and makes the layer one for activations so standardised."""
        x, y = pairs.float().split([self.sae.cfg.d_in, self.sae.cfg.d_out], dim=-1)
        mean, target_scale = x.mean(0), scale_of(y)
        self.statistics = {"mean": mean, "scale": scale_of(x - mean), "target_scale": target_scale}
        if self.is_trained:
            self.unfold()
        else:
            self.sae.b_dec.copy_(y.mean(0) / target_scale)

    @override
    def scale(self, acts: Float[Tensor, "batch d_in_plus_d_out"]) -> Tensor:
        if self.statistics is None:
            self.estimate(acts)
        mean, scale, target_scale = self._on(acts)
        x, y = acts.split([self.sae.cfg.d_in, self.sae.cfg.d_out], dim=-1)
        return torch.cat([(x - mean) / scale, y / target_scale], dim=-1)

    @override
    def unscale(self, acts: Float[Tensor, "batch d_in_plus_d_out"]) -> Tensor:
        mean, scale, target_scale = self._on(acts)
        x, y = acts.split([self.sae.cfg.d_in, self.sae.cfg.d_out], dim=-1)
        return torch.cat([x * scale + mean, y * target_scale], dim=-1)

    def fold(self, sae: TrainingPairedTranscoder) -> None:
        """Makes a layer for standardised activations one for the activations as they are."""
        if self.statistics is not None:
            sae.fold_standardization(**self.statistics)

    def unfold(self) -> None:
        """Makes the layer for the activations as they are one for the standardised: the inverse of `fold`."""
        assert self.statistics is not None  # asked for by estimate
        mean, scale, target_scale = (self.statistics[n].double() for n in ("mean", "scale", "target_scale"))
        self.sae.fold_standardization(-mean / scale, 1 / scale, 1 / target_scale)

    @override
    def save(self, file_path: str) -> None:
        super().save(file_path)
        if self.statistics is not None:
            save_file(self.statistics, Path(file_path).with_name(STANDARDIZER_FILENAME))

    @override
    def load(self, file_path: str | Path) -> None:
        super().load(file_path)
        file = Path(file_path).with_name(STANDARDIZER_FILENAME)
        self.statistics = load_file(file, str(self.sae.device)) if file.exists() else None

    def _on(self, acts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.statistics is not None  # there was a first batch
        mean, scale, target_scale = (
            self.statistics[name].to(acts) for name in ("mean", "scale", "target_scale")
        )
        return mean, scale, target_scale


class FirstBatchScaler(ActivationScaler):
    """SAELens' scaling to a mean norm of sqrt(d_in), for an SAE, from the first batch it is trained on."""

    scaling_factor: float | None = None

    def __init__(self, sae: TrainingSAE[Any], is_trained: bool = False) -> None:
        super().__init__()
        self.sae = sae
        self.is_trained = is_trained

    @override
    def scale(self, acts: Float[Tensor, "batch d_in"]) -> Tensor:
        if self.scaling_factor is None:
            self.scaling_factor = 1 / scale_of(acts.float()).item()
            if self.is_trained:
                self.sae.fold_activation_norm_scaling_factor(1 / self.scaling_factor)
        return super().scale(acts)


def scale_of(rows: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """The mean norm of the rows over sqrt(d); 1 where all are zero."""
    norm = rows.norm(dim=-1).mean() / rows.shape[-1] ** 0.5
    return torch.where(norm > 0, norm, torch.ones_like(norm))
