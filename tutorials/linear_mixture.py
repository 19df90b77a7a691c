"""A mixture of linear transforms of low rank: every expert is a linear map of the layer's input.

v = (x P + p) D                         P [d_in, r], D [r, d_out], r small       [d_out]
a = TopK_k(relu(G^T x + b_G))           expert coefficients                      [d_sae]
y = sum_n a_n T_n (x) + b               T_n (x) = (x P + p) D diag(c_n)          [d_out]
  = (C^T a) * v + b                     '*' elementwise

It is an MxD whose decoder branch is linear and narrow: experts have rank r rather than d_out, and all that is
not linear in the layer is in the choice of its experts. Names: P = W_hidden, p = b_hidden, D = W_out,
r = d_hidden; the rest as in `mxd_lens.architectures.mxd`.
"""

from dataclasses import dataclass

from jaxtyping import Float
from sae_lens import register_sae_class, register_sae_training_class
from torch import Tensor
from typing_extensions import override

from mxd_lens.architectures.mxd import MxD, MxDConfig
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig


@dataclass(kw_only=True)
class LinearMixtureConfig(MxDConfig):
    """Configuration of a `LinearMixture`; d_hidden is the rank r, and hidden_activation has no effect."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gated:
            raise ValueError("gated must be False: a product of two branches is not linear.")

    @classmethod
    @override
    def architecture(cls) -> str:
        return "linear_mixture"


class LinearMixture(MxD):
    """Mixture of linear transforms: y = (C^T a) * ((x P + p) D) + b, see the module's formulas."""

    cfg: LinearMixtureConfig

    @override
    def hidden(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch rank"]:
        """x P + p, without an activation function."""
        return self.hook_hidden_post(self.hook_hidden_pre(x @ self.W_hidden + self.b_hidden))


@dataclass(kw_only=True)
class TrainingLinearMixtureConfig(LinearMixtureConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingLinearMixture`."""


class TrainingLinearMixture(TrainingPairedTranscoder, LinearMixture):
    """A `LinearMixture` in training."""

    cfg: TrainingLinearMixtureConfig


register_sae_class("linear_mixture", LinearMixture, LinearMixtureConfig)
register_sae_training_class("linear_mixture", TrainingLinearMixture, TrainingLinearMixtureConfig)
