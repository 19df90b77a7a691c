"""The TopK transcoder: y = C^T a + b, the baseline an MxD is measured against.

a = TopK_k(relu(G^T x + b_G))        feature coefficients           [d_sae]
y = C^T a + b                        every feature is one direction [d_out]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from mxd_lens.architectures.base import PairedTranscoder, PairedTranscoderConfig, register_architecture
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig
from mxd_lens.sparse.coefficients import Active, Coefficients

__all__ = [
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "TrainingTopKTranscoder",
    "TrainingTopKTranscoderConfig",
]


@dataclass(kw_only=True)
class TopKTranscoderConfig(PairedTranscoderConfig):
    """Configuration of a `TopKTranscoder`."""

    relu: bool = True
    """Whether a negative one of the k largest pre-activations is set to 0. Some released layers were trained
    without (False), and differ wherever fewer than k are positive."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.relu, bool) or not (self.relu or self.k):
            raise ValueError(f"relu must be True, or False with a k, got {self.relu!r} with k = {self.k}.")

    @classmethod
    @override
    def architecture(cls) -> str:
        return "topk_transcoder"


class TopKTranscoder(PairedTranscoder):
    """Transcoder with the k largest features of a token: y = C^T a + b.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out].
    """

    cfg: TopKTranscoderConfig
    title: ClassVar[str] = "A TopK transcoder"
    about: ClassVar[str] = "Every feature n writes a_n times row n of W_dec, one direction."

    @override
    def coefficients(self, x: Float[Tensor, "*batch d_in"]) -> Coefficients:
        if self.cfg.relu or self.cfg.k is None:
            return super().coefficients(x)
        values, features = self.pre_activations(x).topk(self.cfg.k, dim=-1, sorted=False)
        return Active(values, features, self.cfg.d_sae)

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return super().get_activation_fn() if self.cfg.relu or self.cfg.k is None else RawTopK(self.cfg.k)

    @override
    def gate_formula(self) -> str:
        return super().gate_formula() if self.cfg.relu else f"a = topk(x @ W_enc + b_enc, {self.cfg.k})"


class RawTopK(nn.Module):
    """The k largest pre-activations as they are, negative ones too; 0 elsewhere."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        values, features = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, features, values)


@dataclass(kw_only=True)
class TrainingTopKTranscoderConfig(TopKTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingTopKTranscoder`."""

    unit_rows: bool = False
    """How W_dec is trained. False: its rows start at zero and are free, as EleutherAI's sparsify has them.
    True: they start at random and stay at unit norm, as is the default of the MxD paper's code."""


class TrainingTopKTranscoder(TrainingPairedTranscoder, TopKTranscoder):
    """A `TopKTranscoder` in training."""

    cfg: TrainingTopKTranscoderConfig

    @property
    def unit_rows(self) -> bool:  # type: ignore[override]
        return self.cfg.unit_rows

    @override
    def scale_experts(self, factor: Float[Tensor, ""]) -> None:
        """As the base; rows that stay at unit norm leave their scale to the coefficients."""
        for weight in (self.W_enc, self.b_enc) if self.unit_rows else (self.W_dec,):
            weight.mul_(factor)


register_architecture(
    TopKTranscoder, TopKTranscoderConfig, TrainingTopKTranscoder, TrainingTopKTranscoderConfig
)
