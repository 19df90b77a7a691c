"""The Mixture of Decoders with a skip connection of its own: y = (C^T a) * (D^T z) + W_skip x + b.

Not in the paper; names and formulas otherwise as in `mxd`. What is linear in the MLP's input goes through
W_skip, and neither the decoder branch nor the experts spend anything on it. The layer starts as a TopK
skip transcoder: D^T z is 1 for every token, and expert n writes a_n c_n. Training then makes what an
expert writes depend on the token. Started as an `MxD`, with D zero and C of unit norm, it learns to write
most of the output densely: of the error at 1 epoch on SmolLM2's layer 12, the experts then explained a
third, started so half, at nearly the same error.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from mxd_lens.architectures.base import register_architecture
from mxd_lens.architectures.mxd import HIDDEN_ACTIVATIONS, MxD, MxDConfig
from mxd_lens.architectures.skip import WithSkip
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig

__all__ = [
    "SkipMxD",
    "SkipMxDConfig",
    "TrainingSkipMxD",
    "TrainingSkipMxDConfig",
]


@dataclass(kw_only=True)
class SkipMxDConfig(MxDConfig):
    """Configuration of a `SkipMxD`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "skip_mxd"


class SkipMxD(WithSkip, MxD):
    """Mixture of Decoders with a linear skip: y = (C^T a) * (D^T z) + W_skip x + b.

    Parameters: those of `MxD`, and W_skip [d_out, d_in] as SAELens', zero at the start. The rows of
    W_dec are free, and zero at the start. hook_expert_out is (C^T a) * (D^T z), without the skip.
    """

    cfg: SkipMxDConfig
    unit_rows: ClassVar[bool] = False
    title: ClassVar[str] = "A Mixture of Decoders with a skip connection"

    @override
    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the base; hidden unit 0 is a constant that W_out turns into D^T z = 1."""
        super().initialize_weights()
        branches = [(self.W_hidden, self.b_hidden)]
        if self.cfg.gated:
            branches.append((self.W_hidden_gate, self.b_hidden_gate))
        for weight, bias in branches:
            weight[:, 0] = 0
            bias[0] = 1
        one = torch.ones((), dtype=torch.float64)
        self.W_out[0] = 1 / HIDDEN_ACTIVATIONS[self.cfg.hidden_activation](one)


@dataclass(kw_only=True)
class TrainingSkipMxDConfig(SkipMxDConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingSkipMxD`."""


class TrainingSkipMxD(TrainingPairedTranscoder, SkipMxD):
    """A `SkipMxD` in training."""

    cfg: TrainingSkipMxDConfig


register_architecture(SkipMxD, SkipMxDConfig, TrainingSkipMxD, TrainingSkipMxDConfig)
