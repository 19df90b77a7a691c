"""The JumpReLU transcoder with a skip connection: y = C^T a + W_skip x + b, a as in `jumprelu_transcoder`.

Names, weights and configuration are those of SAELens' `JumpReLUSkipTranscoder`, and Gemma Scope 2's affine
transcoders are of this architecture. SAELens' own class loses the skip connection when it is attached.
"""

from dataclasses import dataclass
from typing import ClassVar

from sae_lens.saes import transcoder as saelens
from typing_extensions import override

from mxd_lens.architectures.base import register_architecture
from mxd_lens.architectures.jumprelu_transcoder import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    TrainingJumpReLUTranscoder,
    TrainingJumpReLUTranscoderConfig,
)
from mxd_lens.architectures.skip import WithSkip

__all__ = [
    "JumpReLUSkipTranscoder",
    "JumpReLUSkipTranscoderConfig",
    "TrainingJumpReLUSkipTranscoder",
    "TrainingJumpReLUSkipTranscoderConfig",
]


@dataclass(kw_only=True)
class JumpReLUSkipTranscoderConfig(JumpReLUTranscoderConfig):
    """Configuration of a `JumpReLUSkipTranscoder`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "jumprelu_skip_transcoder"


class JumpReLUSkipTranscoder(WithSkip, JumpReLUTranscoder, saelens.JumpReLUSkipTranscoder):
    """Transcoder with a threshold for each feature and a linear skip: y = C^T a + W_skip x + b.

    Parameters: those of `JumpReLUTranscoder`, and W_skip [d_out, d_in], zero at the start.
    """

    cfg: JumpReLUSkipTranscoderConfig
    title: ClassVar[str] = "A JumpReLU skip transcoder"


@dataclass(kw_only=True)
class TrainingJumpReLUSkipTranscoderConfig(JumpReLUSkipTranscoderConfig, TrainingJumpReLUTranscoderConfig):
    """Configuration of a `TrainingJumpReLUSkipTranscoder`."""


class TrainingJumpReLUSkipTranscoder(TrainingJumpReLUTranscoder, JumpReLUSkipTranscoder):
    """A `JumpReLUSkipTranscoder` in training."""

    cfg: TrainingJumpReLUSkipTranscoderConfig


register_architecture(
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    TrainingJumpReLUSkipTranscoder,
    TrainingJumpReLUSkipTranscoderConfig,
)
