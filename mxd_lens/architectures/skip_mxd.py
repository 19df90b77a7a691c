"""The Mixture of Decoders with a skip connection of its own: y = (C^T a) * (D^T z) + W_skip x + b.

What is linear in the MLP's input goes through W_skip, and neither the decoder branch nor the experts
have to spend anything on it. Not in the paper; names and formulas otherwise as in `mxd`.
"""

from dataclasses import dataclass

from typing_extensions import override

from mxd_lens.architectures.base import TrainingPairedTranscoder, TrainingPairedTranscoderConfig
from mxd_lens.architectures.mxd import MxD, MxDConfig
from mxd_lens.architectures.skip import WithSkip


@dataclass(kw_only=True)
class SkipMxDConfig(MxDConfig):
    """Configuration of a `SkipMxD`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "skip_mxd"


class SkipMxD(WithSkip, MxD):
    """Mixture of Decoders with a linear skip: y = (C^T a) * (D^T z) + W_skip x + b.

    Parameters: those of `MxD`, and W_skip [d_out, d_in] as SAELens', zero at the start.
    hook_expert_out is (C^T a) * (D^T z), without the skip.
    """

    cfg: SkipMxDConfig


@dataclass(kw_only=True)
class TrainingSkipMxDConfig(SkipMxDConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingSkipMxD`."""


class TrainingSkipMxD(TrainingPairedTranscoder, SkipMxD):
    """A `SkipMxD` in training."""

    cfg: TrainingSkipMxDConfig
