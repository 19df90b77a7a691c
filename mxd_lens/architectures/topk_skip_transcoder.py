"""The TopK transcoder with a skip connection: y = C^T a + W_skip x + b.

a = TopK_k(relu(G^T x + b_G))        feature coefficients           [d_sae]
y = C^T a + W_skip x + b             W_skip [d_out, d_in], as SAELens
"""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from mxd_lens.architectures.base import register_architecture, transcoder_parameters
from mxd_lens.architectures.skip import WithSkip
from mxd_lens.architectures.topk_transcoder import TopKTranscoder, TopKTranscoderConfig
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig

__all__ = [
    "TopKSkipTranscoder",
    "TopKSkipTranscoderConfig",
    "TrainingTopKSkipTranscoder",
    "TrainingTopKSkipTranscoderConfig",
    "matched_n_features",
]


@dataclass(kw_only=True)
class TopKSkipTranscoderConfig(TopKTranscoderConfig):
    """Configuration of a `TopKSkipTranscoder`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "topk_skip_transcoder"


class TopKSkipTranscoder(WithSkip, TopKTranscoder):
    """Transcoder with the k largest features of a token and a linear skip: y = C^T a + W_skip x + b.

    Parameters: those of `TopKTranscoder`, and W_skip [d_out, d_in]. W_dec and W_skip start at zero.
    """

    cfg: TopKSkipTranscoderConfig
    title: ClassVar[str] = "A TopK skip transcoder"


@dataclass(kw_only=True)
class TrainingTopKSkipTranscoderConfig(TopKSkipTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingTopKSkipTranscoder`."""


class TrainingTopKSkipTranscoder(TrainingPairedTranscoder, TopKSkipTranscoder):
    """A `TopKSkipTranscoder` in training."""

    cfg: TrainingTopKSkipTranscoderConfig


def matched_n_features(d_in: int, d_out: int, transcoder_width: int) -> int:
    """The number of features that gives a skip transcoder at most as many parameters as a transcoder.

    `TopKSkipTranscoderConfig.matched_size` for a budget of `transcoder_parameters(d_in, d_out,
    transcoder_width)`.

    Args:
        d_in, d_out: the widths.
        transcoder_width: the number of features of the plain transcoder.

    Raises:
        ValueError: the skip connection alone is larger than the transcoder.
    """
    budget = transcoder_parameters(d_in, d_out, transcoder_width)
    return TopKSkipTranscoderConfig.matched_size(budget, d_in=d_in, d_out=d_out)


register_architecture(
    TopKSkipTranscoder, TopKSkipTranscoderConfig, TrainingTopKSkipTranscoder, TrainingTopKSkipTranscoderConfig
)
