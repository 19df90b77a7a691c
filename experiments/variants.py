"""Layers that were tried and have no place in the package (yet), registered by name when this is imported."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from mxd_lens.architectures.base import register_architecture
from mxd_lens.architectures.mxd import MxD, MxDConfig
from mxd_lens.architectures.skip import WithSkip
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig
from mxd_lens.sparse.coefficients import Coefficients


@dataclass(kw_only=True)
class FactoredMxDConfig(MxDConfig):
    d_mix: int
    """m, the width in which the experts scale."""

    @classmethod
    @override
    def positive_integers(cls) -> tuple[str, ...]:
        return (*super().positive_integers(), "d_mix")

    @classmethod
    @override
    def architecture(cls) -> str:
        return "factored_mxd"


class FactoredMxD(WithSkip, MxD):
    """Affine experts that scale in a space of their own: y = R^T ((C^T a) * (D^T z)) + E^T a + W_skip x + b.

    C = W_scale [d_sae, m], D = W_out [d_hidden, m], R = W_mix [m, d_out], E = W_dec [d_sae, d_out]. An affine
    MxD is m = d_out, R = 1. An expert costs m instead of d_out for its scale.
    """

    cfg: FactoredMxDConfig
    unit_rows = False

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        self.W_dec = self.new_parameter(cfg.d_sae, cfg.d_out)
        self.W_out = self.new_parameter(cfg.d_hidden, cfg.d_mix)
        self.W_mix = self.new_linear(cfg.d_mix, cfg.d_out)
        self.W_scale = self.new_parameter(cfg.d_sae, cfg.d_mix)
        nn.init.uniform_(self.W_scale, -1, 1)
        with torch.no_grad():
            self.W_scale.copy_(F.normalize(self.W_scale, dim=-1))

    @override
    def mixture(self, a: Coefficients) -> Float[Tensor, "*batch d_out_and_m"]:
        return a.mix(torch.cat([self.W_dec, self.W_scale], dim=-1))

    @override
    def experts_out(self, mixture: Tensor, expert_input: Tensor) -> Tensor:
        added, scale = mixture.split([self.cfg.d_out, self.cfg.d_mix], dim=-1)
        return (scale * expert_input) @ self.W_mix + added

    @property
    @override
    def scaled_output(self) -> nn.Parameter:
        return self.W_dec

    @override
    @torch.no_grad()
    def fold_standardization(self, mean: Tensor, scale: Tensor, target_scale: Tensor) -> None:
        super().fold_standardization(mean, scale, target_scale)
        self.W_mix.mul_(target_scale)


@dataclass(kw_only=True)
class TrainingFactoredMxDConfig(FactoredMxDConfig, TrainingPairedTranscoderConfig):
    pass


class TrainingFactoredMxD(TrainingPairedTranscoder, FactoredMxD):
    cfg: TrainingFactoredMxDConfig


register_architecture(FactoredMxD, FactoredMxDConfig, TrainingFactoredMxD, TrainingFactoredMxDConfig)
