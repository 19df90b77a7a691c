"""The Mixture of Decoders, arXiv 2505.21364: every expert is a full linear decoder of the same z.

z = phi(E^T x + b_E)                 hidden units, dense            [d_hidden]
a = TopK_k(relu(G^T x + b_G))        expert coefficients            [d_sae]
y = sum_n a_n W_n^T z + b            W_n = D diag(c_n)              [d_out]
  = (C^T a) * (D^T z) + b            '*' elementwise: W is never built

Names: G = W_enc, C = W_dec, E = W_hidden, D = W_out, b = b_dec. Gated, as TransformerLens' gated
MLPs: z = phi(x W_hidden_gate + b_hidden_gate) * (x W_hidden + b_hidden).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from mxd_lens.architectures.base import (
    PairedTranscoder,
    PairedTranscoderConfig,
    register_architecture,
    transcoder_parameters,
)
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig

__all__ = [
    "MxD",
    "MxDConfig",
    "TrainingMxD",
    "TrainingMxDConfig",
    "matched_n_experts",
]

HIDDEN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


@dataclass(kw_only=True)
class MxDConfig(PairedTranscoderConfig):
    """Configuration of an `MxD`."""

    d_hidden: int
    """Width of the decoder branch z; the paper's is that of the base MLP, 4 * d_in."""
    hidden_activation: str = "gelu"
    """phi: relu, gelu, gelu_pytorch_tanh, sigmoid or silu; or identity, a branch that is linear in x."""
    gated: bool = False
    """Whether z is a gated linear unit."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_activation not in list(HIDDEN_ACTIVATIONS):
            raise ValueError(
                f"hidden_activation must be one of {sorted(HIDDEN_ACTIVATIONS)}, "
                f"got {self.hidden_activation!r}."
            )
        if not isinstance(self.gated, bool):
            raise ValueError(f"gated must be true or false, got {self.gated!r}.")

    @classmethod
    @override
    def positive_integers(cls) -> tuple[str, ...]:
        return (*super().positive_integers(), "d_hidden")

    @classmethod
    @override
    def architecture(cls) -> str:
        return "mxd"


class MxD(PairedTranscoder):
    """Mixture of Decoders: y = (C^T a) * (D^T z) + b, see the module's formulas.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out],
    W_hidden [d_in, d_hidden], b_hidden [d_hidden], W_out [d_hidden, d_out]; gated also
    W_hidden_gate [d_in, d_hidden], b_hidden_gate [d_hidden].

    Hook points besides SAELens': hook_hidden_pre (before phi), hook_hidden_linear (gated: the branch
    without phi), hook_hidden_post (z), hook_decoder_out (D^T z), hook_expert_out ((C^T a) * (D^T z)).

    Row c_n of W_dec is no direction in the output: expert n writes a_n c_n * (D^T z), which depends on
    the token through z.
    """

    cfg: MxDConfig
    W_hidden: nn.Parameter
    b_hidden: nn.Parameter
    W_hidden_gate: nn.Parameter
    b_hidden_gate: nn.Parameter
    W_out: nn.Parameter
    unit_rows: ClassVar[bool] = True
    title: ClassVar[str] = "A Mixture of Decoders"
    about: ClassVar[str] = (
        "Every expert n is a full linear decoder, y_n = a_n z (W_out * W_dec[n]); row n of W_dec alone is no "
        "direction in the output. The decoder branch z is dense: every token uses all of it."
    )
    unit: ClassVar[str] = "expert"

    def __init__(self, cfg: MxDConfig) -> None:
        super().__init__(cfg)
        self.hook_hidden_pre = HookPoint()
        if cfg.gated:
            self.hook_hidden_linear = HookPoint()
        self.hook_hidden_post = HookPoint()
        self.hook_decoder_out = HookPoint()
        self.setup()

    @override
    def initialize_weights(self) -> None:
        """As the base; W_hidden as a linear layer's default, W_out zero: y = b_dec at the start."""
        super().initialize_weights()
        cfg = self.cfg
        self.W_hidden = self.new_linear(cfg.d_in, cfg.d_hidden)
        self.b_hidden = self.new_parameter(cfg.d_hidden)
        if cfg.gated:
            self.W_hidden_gate = self.new_linear(cfg.d_in, cfg.d_hidden)
            self.b_hidden_gate = self.new_parameter(cfg.d_hidden)
        self.W_out = self.new_parameter(cfg.d_hidden, cfg.d_out)

    @override
    def fold_standardization(
        self,
        mean: Float[Tensor, " d_in"],
        scale: Float[Tensor, ""],
        target_scale: Float[Tensor, ""],
    ) -> None:
        super().fold_standardization(mean, scale, target_scale)
        with torch.no_grad():
            self.fold_input_scale(self.W_hidden, self.b_hidden, mean, scale)
            if self.cfg.gated:
                self.fold_input_scale(self.W_hidden_gate, self.b_hidden_gate, mean, scale)

    @override
    def scale_experts(self, factor: Float[Tensor, ""]) -> None:
        self.W_out.mul_(factor)

    def hidden(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_hidden"]:
        """z, the hidden units of the decoder branch."""
        phi = HIDDEN_ACTIVATIONS[self.cfg.hidden_activation]
        linear = x @ self.W_hidden + self.b_hidden
        if not self.cfg.gated:
            return self.hook_hidden_post(phi(self.hook_hidden_pre(linear)))
        gate = phi(self.hook_hidden_pre(x @ self.W_hidden_gate + self.b_hidden_gate))
        return self.hook_hidden_post(gate * self.hook_hidden_linear(linear))

    def decoder_out(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """D^T z."""
        return self.hook_decoder_out(self.hidden(x) @ self.W_out)

    @override
    def expert_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.decoder_out(x)

    @override
    def linear_expert_input(
        self, x: Float[Tensor, "*batch d_in"], at: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        phi = HIDDEN_ACTIVATIONS[self.cfg.hidden_activation]
        linear = x @ self.W_hidden + self.b_hidden
        if self.cfg.gated:
            slope = phi(at @ self.W_hidden_gate + self.b_hidden_gate)
        else:
            pre = at @ self.W_hidden + self.b_hidden
            slope = torch.where(pre == 0, 0, phi(pre) / pre)
        return (slope.detach() * linear) @ self.W_out

    @property
    @override
    def dense_parts(self) -> tuple[str, ...]:
        return ("the decoder branch",)

    @override
    def formula(self) -> list[str]:
        phi, branch = self.cfg.hidden_activation, "x @ W_hidden + b_hidden"
        z = f"{phi}(x @ W_hidden_gate + b_hidden_gate) * ({branch})" if self.cfg.gated else f"{phi}({branch})"
        return [f"z = {z}", self.gate_formula(), "y = (a @ W_dec) * (z @ W_out) + b_dec"]

    @override
    def expert_weight(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        """W_n = D diag(c_n): expert n's linear map from z to the output.

        Raises:
            IndexError: there is no expert n.
        """
        return self.W_out * self.W_dec[self.check_expert(n)]

    @override
    def singular_values(self, batches: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "n rank"]]:
        # With D = Q R those of D diag(c_n) are those of R diag(c_n), which is no larger than [d_out, d_out].
        R = torch.linalg.qr(self.W_out.double(), mode="r").R
        for experts in batches:
            yield torch.linalg.svdvals(R * self.W_dec[experts].double().unsqueeze(1))


@dataclass(kw_only=True)
class TrainingMxDConfig(MxDConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingMxD`."""


class TrainingMxD(TrainingPairedTranscoder, MxD):
    """An `MxD` in training."""

    cfg: TrainingMxDConfig


def matched_n_experts(
    d_in: int,
    d_out: int,
    d_hidden: int,
    transcoder_width: int,
    gated: bool = False,
    skip: bool = False,
) -> int:
    """The number of experts that gives an MxD at most as many parameters as a transcoder.

    `MxDConfig.matched_size` for a budget of `transcoder_parameters(d_in, d_out, transcoder_width)`.

    Args:
        d_in, d_out, d_hidden: the MxD's widths.
        transcoder_width: the number of features of the transcoder.
        gated: whether the MxD is gated.
        skip: whether it has a skip connection, as a `SkipMxD`.

    Raises:
        ValueError: the decoder branch alone is larger than the transcoder.
    """
    # A skip connection's parameters do not depend on the number of experts.
    budget = transcoder_parameters(d_in, d_out, transcoder_width) - skip * d_in * d_out
    return MxDConfig.matched_size(budget, d_in=d_in, d_out=d_out, d_hidden=d_hidden, gated=gated)


register_architecture(MxD, MxDConfig, TrainingMxD, TrainingMxDConfig)
