"""The TopK transcoder with a skip connection: y = C^T a + W_skip x + b.

a = TopK_k(relu(G^T x + b_G))        feature coefficients           [d_sae]
y = C^T a + W_skip x + b             W_skip [d_out, d_in], as SAELens
"""

from dataclasses import dataclass

from jaxtyping import Float
from sae_lens.saes.transcoder import SkipTranscoder
from torch import Tensor
from typing_extensions import override

from mxd_lens.architectures.base import (
    PairedTranscoder,
    PairedTranscoderConfig,
    TrainingPairedTranscoder,
    TrainingPairedTranscoderConfig,
)


@dataclass(kw_only=True)
class TopKSkipTranscoderConfig(PairedTranscoderConfig):
    """Configuration of a `TopKSkipTranscoder`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "topk_skip_transcoder"


class TopKSkipTranscoder(PairedTranscoder, SkipTranscoder):
    """Transcoder with the k largest features of a token and a linear skip: y = C^T a + W_skip x + b.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out],
    W_skip [d_out, d_in]. W_dec and W_skip start at zero, as in the paper's baselines. Unlike SAELens' own
    `SkipTranscoder`, it keeps its skip connection when it is attached to a model.
    """

    cfg: TopKSkipTranscoderConfig

    @override
    def mix(
        self, mixture: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """C^T a + W_skip x + b."""
        return self.hook_expert_out(mixture) + x @ self.W_skip.T + self.b_dec


@dataclass(kw_only=True)
class TrainingTopKSkipTranscoderConfig(TopKSkipTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingTopKSkipTranscoder`."""


class TrainingTopKSkipTranscoder(TrainingPairedTranscoder, TopKSkipTranscoder):
    """A `TopKSkipTranscoder` in training."""

    cfg: TrainingTopKSkipTranscoderConfig
