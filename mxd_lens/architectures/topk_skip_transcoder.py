"""The TopK transcoder with a skip connection: y = C^T a + W_skip x + b.

a = TopK_k(relu(G^T x + b_G))        feature coefficients           [d_sae]
y = C^T a + W_skip x + b             W_skip [d_out, d_in], as SAELens
"""

from dataclasses import dataclass

from typing_extensions import override

from mxd_lens.architectures.base import (
    PairedTranscoderConfig,
    TrainingPairedTranscoder,
    TrainingPairedTranscoderConfig,
)
from mxd_lens.architectures.skip import WithSkip
from mxd_lens.architectures.topk_transcoder import TopKTranscoder


@dataclass(kw_only=True)
class TopKSkipTranscoderConfig(PairedTranscoderConfig):
    """Configuration of a `TopKSkipTranscoder`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "topk_skip_transcoder"


class TopKSkipTranscoder(WithSkip, TopKTranscoder):
    """Transcoder with the k largest features of a token and a linear skip: y = C^T a + W_skip x + b.

    Parameters: those of `TopKTranscoder`, and W_skip [d_out, d_in]. W_dec and W_skip start at zero, as in
    the paper's baselines.
    """

    cfg: TopKSkipTranscoderConfig


@dataclass(kw_only=True)
class TrainingTopKSkipTranscoderConfig(TopKSkipTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingTopKSkipTranscoder`."""


class TrainingTopKSkipTranscoder(TrainingPairedTranscoder, TopKSkipTranscoder):
    """A `TopKSkipTranscoder` in training."""

    cfg: TrainingTopKSkipTranscoderConfig
