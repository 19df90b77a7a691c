"""The JumpReLU transcoder: a threshold for each feature decides whether it is active.

p = G^T x + b_G                      pre-activations                [d_sae]
a_n = relu(p_n) where p_n > theta_n  else 0                         [d_sae]
y = C^T a + b                                                       [d_out]

Names, weights and configuration are those of SAELens' `JumpReLUTranscoder`, and Gemma Scope's transcoders are
of this architecture. Training takes SAELens' straight-through estimator for theta, in a window around it, and
a penalty on the number of active features (Rajamanoharan et al. 2024, arXiv 2407.14435).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens.saes import transcoder as saelens
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor, nn
from typing_extensions import override

from mxd_lens.architectures.base import PairedTranscoder, PairedTranscoderConfig, register_architecture
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig
from mxd_lens.sparse.coefficients import Dense

__all__ = [
    "JumpReLUTranscoder",
    "JumpReLUTranscoderConfig",
    "TrainingJumpReLUTranscoder",
    "TrainingJumpReLUTranscoderConfig",
]


@dataclass(kw_only=True)
class JumpReLUTranscoderConfig(PairedTranscoderConfig):
    """Configuration of a `JumpReLUTranscoder`."""

    k: int | None = None
    """Must be None: the thresholds decide how many features are active."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None:
            raise ValueError(f"k must be None where thresholds decide what is active, got {self.k}.")

    @classmethod
    @override
    def architecture(cls) -> str:
        return "jumprelu_transcoder"


class JumpReLUTranscoder(PairedTranscoder, saelens.JumpReLUTranscoder):
    """Transcoder with a threshold for each feature: y = C^T a + b, a = relu(p) where p > threshold.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], threshold [d_sae].
    """

    cfg: JumpReLUTranscoderConfig
    title: ClassVar[str] = "A JumpReLU transcoder"
    about: ClassVar[str] = "Every feature n writes a_n times row n of W_dec, one direction."

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.threshold = self.new_parameter(self.cfg.d_sae)

    @override
    def coefficients(self, x: Float[Tensor, "*batch d_in"]) -> Dense:
        return Dense(self.activate(self.pre_activations(x)))

    @override
    def get_activation_fn(self) -> nn.Module:
        return nn.ReLU()

    @override
    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """relu of the pre-activations above their threshold; 0 elsewhere."""
        return torch.relu(pre) * (pre > self.threshold)

    @override
    def gate_formula(self) -> str:
        return "a = relu(x @ W_enc + b_enc) * (x @ W_enc + b_enc > threshold)"


@dataclass(kw_only=True)
class TrainingJumpReLUTranscoderConfig(JumpReLUTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingJumpReLUTranscoder`."""

    l0_coefficient: float = 0.0
    """Weight of the penalty mean_tokens |{n: a_n > 0}|. Must be positive: it makes the features sparse."""
    l0_warm_up_steps: int = 0
    """Steps over which the penalty grows to its full weight."""
    jumprelu_init_threshold: float = 0.01
    """The thresholds at the start."""
    jumprelu_bandwidth: float = 0.05
    """Width of the window around a threshold in which it gets a gradient."""
    needs_l1: ClassVar[bool] = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l0_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")


class TrainingJumpReLUTranscoder(TrainingPairedTranscoder, JumpReLUTranscoder):
    """A `JumpReLUTranscoder` in training: the penalty l0_coefficient * L0 is added to the loss.

    Gradients of the thresholds are SAELens' straight-through estimates. Before every step, thresholds
    below 0 are set to 0.
    """

    cfg: TrainingJumpReLUTranscoderConfig

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        nn.init.constant_(self.threshold, self.cfg.jumprelu_init_threshold)

    @override
    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        # SAELens' function knows no relu; above a threshold of 0 or more it needs none.
        return JumpReLU.apply(pre, self.threshold.clamp(min=0), self.cfg.jumprelu_bandwidth, False)

    @override
    @torch.no_grad()
    def normalize_decoder(self) -> None:
        super().normalize_decoder()
        if hasattr(self, "threshold"):
            self.threshold.clamp_(min=0)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        l0 = TrainCoefficientConfig(self.cfg.l0_coefficient, self.cfg.l0_warm_up_steps)
        return super().get_coefficients() | {"l0": l0}

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        x = step_input.sae_in[..., : self.cfg.d_in].to(self.dtype)
        # The window reaches below the thresholds, where feature_acts is 0 already.
        pre = self.pre_activations(x)
        active: Any = Step.apply(pre, self.threshold, self.cfg.jumprelu_bandwidth, False)
        return losses | {"l0_loss": step_input.coefficients["l0"] * active.sum(-1).mean()}


register_architecture(
    JumpReLUTranscoder, JumpReLUTranscoderConfig, TrainingJumpReLUTranscoder, TrainingJumpReLUTranscoderConfig
)
