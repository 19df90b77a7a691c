"""The TopK transcoder: y = C^T a + b, the baseline an MxD is measured against.

a = TopK_k(relu(G^T x + b_G))        feature coefficients           [d_sae]
y = C^T a + b                        every feature is one direction [d_out]
"""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from mxd_lens.architectures.base import PairedTranscoder, PairedTranscoderConfig, register_architecture
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig

__all__ = [
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "TrainingTopKTranscoder",
    "TrainingTopKTranscoderConfig",
]


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
    title: ClassVar[str] = "A TopK transcoder"
    about: ClassVar[str] = "Every feature n writes a_n times row n of W_dec, one direction."


@dataclass(kw_only=True)
class TrainingTopKTranscoderConfig(TopKTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingTopKTranscoder`."""


class TrainingTopKTranscoder(TrainingPairedTranscoder, TopKTranscoder):
    """A `TopKTranscoder` in training."""

    cfg: TrainingTopKTranscoderConfig


register_architecture(
    TopKTranscoder, TopKTranscoderConfig, TrainingTopKTranscoder, TrainingTopKTranscoderConfig
)
