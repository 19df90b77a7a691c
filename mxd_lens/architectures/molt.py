"""MOLT, a sparse mixture of linear transforms: every expert is a map of low rank from the MLP's input.

a = TopK_k(relu(G^T x + b_G))                                   expert coefficients       [d_sae]
y = sum_n a_n U_n^T (V_n^T x + v_n) + b                         V_n [d_in, r], U_n [r, d_out]

Source: Anthropic's interpretability team, "Sparse mixtures of linear transforms" (Circuits Updates, 2025).
Theirs mixes transforms of several ranks under a JumpReLU gate; here all have one rank, under the gate that
every architecture here has. v_n is what the mean of x contributes once a layer trained on centred inputs is
made one for x.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from mxd_lens.architectures.base import PairedTranscoder, PairedTranscoderConfig, register_architecture
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig
from mxd_lens.sparse.coefficients import Coefficients

__all__ = ["MOLT", "MOLTConfig", "TrainingMOLT", "TrainingMOLTConfig"]


@dataclass(kw_only=True)
class MOLTConfig(PairedTranscoderConfig):
    """Configuration of a `MOLT`."""

    rank: int
    """r, the rank of every transform."""

    @classmethod
    @override
    def positive_integers(cls) -> tuple[str, ...]:
        return (*super().positive_integers(), "rank")

    @classmethod
    @override
    def architecture(cls) -> str:
        return "molt"


class MOLT(PairedTranscoder):
    """Sparse mixture of linear transforms: y = sum_n a_n U_n^T (V_n^T x + v_n) + b.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_read [d_in, d_sae * rank] (V), b_read
    [d_sae * rank] (v), W_dec [d_sae * rank, d_out] (U), b_dec [d_out]. Transform n has columns and rows
    rank * n to rank * (n + 1) - 1. W_dec starts at zero, so that y is b_dec.

    All transforms are applied to every token and multiplied with their coefficients, most of them 0: few
    large transforms, as MOLT has, cost no more than that, and gathering them would.
    """

    cfg: MOLTConfig
    W_read: nn.Parameter
    b_read: nn.Parameter
    title: ClassVar[str] = "A sparse mixture of linear transforms"
    about: ClassVar[str] = "Expert n is a linear map of low rank from the MLP's input to its output."
    unit: ClassVar[str] = "transform"

    @override
    def initialize_weights(self) -> None:
        """As the base; W_read as a linear layer's default."""
        super().initialize_weights()
        cfg = self.cfg
        self.W_read = self.new_linear(cfg.d_in, cfg.d_sae * cfg.rank)
        self.b_read = self.new_parameter(cfg.d_sae * cfg.rank)
        self.W_dec = self.new_parameter(cfg.d_sae * cfg.rank, cfg.d_out)

    @override
    def expert_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return x

    @override
    def mixture(self, a: Coefficients) -> Float[Tensor, "*batch d_sae"]:
        """The coefficients themselves: what they multiply depends on the token."""
        return a.dense()

    @override
    def experts_out(
        self, mixture: Float[Tensor, "*batch d_sae"], expert_input: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """sum_n m_n U_n^T (V_n^T x + v_n)."""
        read = (expert_input @ self.W_read + self.b_read).unflatten(-1, (self.cfg.d_sae, self.cfg.rank))
        return (mixture.unsqueeze(-1) * read).flatten(-2) @ self.W_dec

    @override
    @torch.no_grad()
    def fold_standardization(
        self,
        mean: Float[Tensor, " d_in"],
        scale: Float[Tensor, ""],
        target_scale: Float[Tensor, ""],
    ) -> None:
        super().fold_standardization(mean, scale, target_scale)
        self.fold_input_scale(self.W_read, self.b_read, mean, scale)

    @override
    def formula(self) -> list[str]:
        repeated = f"a.repeat_interleave({self.cfg.rank}, -1)"
        return [self.gate_formula(), f"y = ({repeated} * (x @ W_read + b_read)) @ W_dec + b_dec"]

    @override
    def expert_weight(self, n: int) -> Float[Tensor, "d_in_and_one d_out"]:
        """Transform n as a linear map of [x, 1]: V_n U_n, and v_n U_n below it.

        Raises:
            IndexError: there is no expert n.
        """
        rank = self.cfg.rank
        rows = slice(self.check_expert(n) * rank, (n + 1) * rank)
        return torch.cat([self.W_read[:, rows], self.b_read[None, rows]]) @ self.W_dec[rows]


@dataclass(kw_only=True)
class TrainingMOLTConfig(MOLTConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingMOLT`."""


class TrainingMOLT(TrainingPairedTranscoder, MOLT):
    """A `MOLT` in training."""

    cfg: TrainingMOLTConfig


register_architecture(MOLT, MOLTConfig, TrainingMOLT, TrainingMOLTConfig)
