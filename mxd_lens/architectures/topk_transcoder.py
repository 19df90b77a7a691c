"""The TopK transcoder: y = C^T a + b, the baseline an MxD is measured against.

a = TopK_k(relu(G^T x + b_G))        feature coefficients           [d_sae]
y = C^T a + b                        every feature is one direction [d_out]
"""

from dataclasses import dataclass

from typing_extensions import override

from mxd_lens.architectures.base import (
    PairedTranscoder,
    PairedTranscoderConfig,
    TrainingPairedTranscoder,
    TrainingPairedTranscoderConfig,
)


@dataclass(kw_only=True)
class TopKTranscoderConfig(PairedTranscoderConfig):
    """Configuration of a `TopKTranscoder`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "topk_transcoder"


class TopKTranscoder(PairedTranscoder):
    """Transcoder with the k largest features of a token: y = C^T a + b.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]. W_dec starts at
    zero, and its rows are free, as in the paper's baselines and in EleutherAI's sparsify.
    """

    cfg: TopKTranscoderConfig


@dataclass(kw_only=True)
class TrainingTopKTranscoderConfig(TopKTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingTopKTranscoder`."""


class TrainingTopKTranscoder(TrainingPairedTranscoder, TopKTranscoder):
    """A `TopKTranscoder` in training."""

    cfg: TrainingTopKTranscoderConfig
