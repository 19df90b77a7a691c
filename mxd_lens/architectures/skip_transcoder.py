"""The transcoder with a skip connection and plain relu: y = C^T relu(G^T x + b_G) + W_skip x + b.

A `TopKSkipTranscoder` without k, under the name and configuration of SAELens' `SkipTranscoder`, whose
own class loses the skip connection when it is attached.
"""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from mxd_lens.architectures.base import register_architecture
from mxd_lens.architectures.topk_skip_transcoder import TopKSkipTranscoder, TopKSkipTranscoderConfig
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig

__all__ = [
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "TrainingSkipTranscoder",
    "TrainingSkipTranscoderConfig",
]


@dataclass(kw_only=True)
class SkipTranscoderConfig(TopKSkipTranscoderConfig):
    """Configuration of a `SkipTranscoder`."""

    k: int | None = None
    """As in `TopKSkipTranscoderConfig`. None, plain relu, is what SAELens' files mean."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "skip_transcoder"


class SkipTranscoder(TopKSkipTranscoder):
    """SAELens' `SkipTranscoder`, attached as it runs: y = C^T relu(G^T x + b_G) + W_skip x + b."""

    cfg: SkipTranscoderConfig
    title: ClassVar[str] = "A skip transcoder"


@dataclass(kw_only=True)
class TrainingSkipTranscoderConfig(SkipTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingSkipTranscoder`."""


class TrainingSkipTranscoder(TrainingPairedTranscoder, SkipTranscoder):
    """A `SkipTranscoder` in training."""

    cfg: TrainingSkipTranscoderConfig


register_architecture(
    SkipTranscoder, SkipTranscoderConfig, TrainingSkipTranscoder, TrainingSkipTranscoderConfig
)
