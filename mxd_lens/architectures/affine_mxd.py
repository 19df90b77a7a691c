"""Mixtures of Decoders whose experts are affine maps: y = (C^T a) * (D^T z) + E^T a + b (+ W_skip x).

z = phi(W_hidden^T x + b_hidden)                                hidden units, dense       [d_hidden]
a = TopK_k(relu(G^T x + b_G))                                   expert coefficients       [d_sae]
y = sum_n a_n (W_n^T z + e_n) + b            W_n = D diag(c_n)                            [d_out]
  = (C^T a) * (D^T z) + E^T a + b            '*' elementwise: W is never built

Not in the paper. An expert writes a direction e_n of its own, as a transcoder's feature does, and on top what
depends on the token. With D = 0 the layer is a transcoder, with E = 0 an MxD.

Names: those of `mxd`, and b_expert = E [d_sae, d_out], the experts' biases.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from mxd_lens.architectures.base import register_architecture
from mxd_lens.architectures.mxd import MxD, MxDConfig
from mxd_lens.architectures.skip import WithSkip
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig
from mxd_lens.sparse.coefficients import Coefficients

__all__ = [
    "AffineMxD",
    "AffineMxDConfig",
    "AffineSkipMxD",
    "AffineSkipMxDConfig",
    "TrainingAffineMxD",
    "TrainingAffineMxDConfig",
    "TrainingAffineSkipMxD",
    "TrainingAffineSkipMxDConfig",
]


@dataclass(kw_only=True)
class AffineMxDConfig(MxDConfig):
    """Configuration of an `AffineMxD`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "affine_mxd"


class AffineMxD(MxD):
    """Mixture of Decoders with affine experts: y = (C^T a) * (D^T z) + E^T a + b, see the module's formulas.

    Parameters: those of `MxD`, and b_expert [d_sae, d_out], whose row e_n expert n writes at every token. The
    rows of W_dec start at unit norm and are free; W_out and b_expert start at zero, so that y is b_dec.
    hook_expert_out is (C^T a) * (D^T z) + E^T a.
    """

    cfg: AffineMxDConfig
    b_expert: nn.Parameter
    unit_rows: ClassVar[bool] = False
    title: ClassVar[str] = "A Mixture of Decoders with affine experts"
    about: ClassVar[str] = (
        "Expert n writes an affine map of the hidden units, y_n = a_n (z (W_out * W_dec[n]) + b_expert[n]): "
        "a direction of its own, as a transcoder's feature, and what depends on the token. The decoder "
        "branch z is dense: every token uses all of it."
    )

    @override
    def initialize_weights(self) -> None:
        """As an MxD, the rows of W_dec free from there on; b_expert zero."""
        super().initialize_weights()
        nn.init.uniform_(self.W_dec, -1, 1)
        with torch.no_grad():
            self.W_dec.copy_(F.normalize(self.W_dec, dim=-1))
        self.b_expert = self.new_parameter(self.cfg.d_sae, self.cfg.d_out)

    @override
    def mixture(self, a: Coefficients) -> Float[Tensor, "*batch twice_d_out"]:
        """[C^T a | E^T a], from one pass over the active experts."""
        return a.mix(torch.cat([self.W_dec, self.b_expert], dim=-1))

    @override
    def experts_out(
        self, mixture: Float[Tensor, "*batch twice_d_out"], expert_input: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        """(C^T a) * (D^T z) + E^T a."""
        scale, added = mixture.chunk(2, dim=-1)
        return scale * expert_input + added

    @override
    @torch.no_grad()
    def fold_standardization(
        self,
        mean: Float[Tensor, " d_in"],
        scale: Float[Tensor, ""],
        target_scale: Float[Tensor, ""],
    ) -> None:
        super().fold_standardization(mean, scale, target_scale)
        self.b_expert.mul_(target_scale)

    @override
    def formula(self) -> list[str]:
        *lines, _ = MxD.formula(self)
        return [*lines, "y = (a @ W_dec) * (z @ W_out) + a @ b_expert + b_dec"]

    @override
    def expert_sizes(self) -> Float[Tensor, " d_sae"]:
        return torch.hypot(super().expert_sizes(), self.b_expert.norm(dim=-1))

    @override
    def expert_weight(self, n: int) -> Float[Tensor, "d_hidden_and_one d_out"]:
        """Expert n as a linear map of [z, 1]: D diag(c_n), and e_n below it.

        Raises:
            IndexError: there is no expert n.
        """
        return torch.cat([super().expert_weight(n), self.b_expert[n : n + 1]])

    @override
    def singular_values(self, batches: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "n rank"]]:
        # With D = Q R those of [D diag(c_n); e_n] are those of [R diag(c_n); e_n].
        R = torch.linalg.qr(self.W_out.double(), mode="r").R
        for experts in batches:
            linear = R * self.W_dec[experts].double().unsqueeze(1)
            yield torch.linalg.svdvals(torch.cat([linear, self.b_expert[experts].double().unsqueeze(1)], 1))


@dataclass(kw_only=True)
class TrainingAffineMxDConfig(AffineMxDConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingAffineMxD`."""


class TrainingAffineMxD(TrainingPairedTranscoder, AffineMxD):
    """An `AffineMxD` in training."""

    cfg: TrainingAffineMxDConfig


@dataclass(kw_only=True)
class AffineSkipMxDConfig(AffineMxDConfig):
    """Configuration of an `AffineSkipMxD`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "affine_skip_mxd"


class AffineSkipMxD(WithSkip, AffineMxD):
    """Affine experts and a linear skip: y = (C^T a) * (D^T z) + E^T a + W_skip x + b.

    Parameters: those of `AffineMxD`, and W_skip [d_out, d_in], zero at the start. With D = 0 it is a skip
    transcoder, with E = 0 a `SkipMxD`.
    """

    cfg: AffineSkipMxDConfig
    title: ClassVar[str] = "A Mixture of Decoders with affine experts and a skip connection"


@dataclass(kw_only=True)
class TrainingAffineSkipMxDConfig(AffineSkipMxDConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingAffineSkipMxD`."""


class TrainingAffineSkipMxD(TrainingPairedTranscoder, AffineSkipMxD):
    """An `AffineSkipMxD` in training."""

    cfg: TrainingAffineSkipMxDConfig


register_architecture(AffineMxD, AffineMxDConfig, TrainingAffineMxD, TrainingAffineMxDConfig)
register_architecture(AffineSkipMxD, AffineSkipMxDConfig, TrainingAffineSkipMxD, TrainingAffineSkipMxDConfig)
