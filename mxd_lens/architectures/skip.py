"""A linear skip connection, for whichever layer wants one: adds W_skip x to its output."""

import torch
from jaxtyping import Float
from sae_lens.saes.transcoder import SkipTranscoder
from torch import Tensor
from typing_extensions import override

from mxd_lens.architectures.base import PairedTranscoder


class WithSkip(PairedTranscoder, SkipTranscoder):
    """Adds W_skip x to the output of the layer it is mixed into.

    W_skip [d_out, d_in] is SAELens', zero at the start. Unlike SAELens' own `SkipTranscoder`, the layer
    keeps its skip connection when it is attached to a model. hook_expert_out is without the skip.
    """

    @override
    def skip_out(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return x @ self.W_skip.T

    @property
    @override
    def dense_parts(self) -> tuple[str, ...]:
        return (*super().dense_parts, "the skip connection")

    @override
    def formula(self) -> list[str]:
        *lines, y = super().formula()
        return [*lines, f"{y} + x @ W_skip.T"]

    @override
    def fold_standardization(
        self,
        mean: Float[Tensor, " d_in"],
        scale: Float[Tensor, ""],
        target_scale: Float[Tensor, ""],
    ) -> None:
        super().fold_standardization(mean, scale, target_scale)
        with torch.no_grad():
            self.W_skip.mul_(target_scale).div_(scale)
            self.b_dec.copy_(self.b_dec.double() - self.W_skip.double() @ mean.double())
