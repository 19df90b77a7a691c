"""Training a layer with SAELens' trainer: what a configuration adds, the loss, one step."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor
from typing_extensions import override

from mxd_lens.architectures.base import PairedTranscoder, PairedTranscoderConfig
from mxd_lens.sparse.coefficients import Coefficients

SHORTEST_TARGET = 0.01
"""Length of a target, relative to the batch's median, up to which it is left out of the loss."""


def is_too_short(norms: Float[Tensor, " tokens"]) -> Bool[Tensor, " tokens"]:
    """Return which targets, by their norms, are left out of the loss: those of (nearly) zero."""
    return norms <= SHORTEST_TARGET * norms.median()


@dataclass(kw_only=True)
class TrainingPairedTranscoderConfig(PairedTranscoderConfig, TrainingSAEConfig):
    """What training adds to a configuration."""

    decoder_init_norm: float | None = None
    """Must be None: each architecture starts W_dec as its source does."""
    l1_coefficient: float = 0.0
    """Weight of the penalty mean_tokens sum_n |a_n|. Needed where k is None."""
    l1_warm_up_steps: int = 0
    """Steps over which the penalty grows to its full weight."""
    needs_l1: ClassVar[bool] = True
    """Whether nothing but the L1 penalty makes the experts sparse where k is None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_init_norm is not None:
            raise ValueError(
                "decoder_init_norm must be None: each architecture starts W_dec as its source does, "
                f"got {self.decoder_init_norm}."
            )
        if self.l1_coefficient < 0 or (self.needs_l1 and self.k is None and self.l1_coefficient == 0):
            raise ValueError(
                "l1_coefficient must be positive where k is None (it is what makes the experts "
                f"sparse) and never negative, got {self.l1_coefficient} with k = {self.k}."
            )


class TrainingPairedTranscoder(PairedTranscoder, TrainingSAE[Any]):
    """Trains a `PairedTranscoder` with SAELens' trainer on pairs [x | y].

    Loss, as in the paper's code: mean over tokens and output dimensions of (y_hat - y)^2 / ||y||_2,
    plus l1_coefficient * mean_tokens sum_n a_n. Targets shorter than a hundredth of the batch's median are
    left out: the paper's code divides by their norm too, and one target of zero outweighs all the others.
    With `unit_rows`, the rows of C are set to unit norm
    before every step, and the component of C's gradient parallel to each row is removed.
    """

    cfg: TrainingPairedTranscoderConfig

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        if self.cfg.l1_coefficient == 0:
            return {}
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_pre = self.pre_activations(self.process_sae_in(x))
        return self.activate(hidden_pre), hidden_pre

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        if "l1" not in step_input.coefficients:
            return {}
        return {"l1_loss": step_input.coefficients["l1"] * feature_acts.sum(-1).mean()}

    def training_coefficients(self, x: Float[Tensor, "tokens d_in"]) -> Coefficients:
        """a of a training batch, where its gate is another one than at inference."""
        return self.coefficients(x)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's forward pass.

        Args:
            step_input: `sae_in` is the pair [x | y], [tokens, d_in + d_out].

        Returns:
            SAELens' TrainStepOutput with the target y as `sae_in`, so that SAELens' logs compare the
            output with the target; `feature_acts` is sparse.

        Raises:
            ValueError: the pairs have another width.
            FloatingPointError: the loss is not finite; raised before any gradient is taken.
        """
        d_in, d_out = self.cfg.d_in, self.cfg.d_out
        if step_input.sae_in.shape[-1] != d_in + d_out:
            raise ValueError(
                f"training wants pairs [x | y] of width d_in + d_out = {d_in} + {d_out}, "
                f"got {tuple(step_input.sae_in.shape)}."
            )
        self.normalize_decoder()
        x, y = step_input.sae_in.to(self.dtype).split([d_in, d_out], dim=-1)

        a = replace(self.training_coefficients(x), trains=True)
        y_hat = self.output(self.mixture(a), x)

        precise = torch.promote_types(self.dtype, torch.float32)
        squared_error = (y_hat - y).to(precise).pow(2).sum(-1)
        y_norm = y.to(precise).norm(dim=-1)
        too_short = is_too_short(y_norm)
        y_norm = y_norm.masked_fill(too_short, 1)
        squared_error = squared_error.masked_fill(too_short, 0)
        losses = {"mse_loss": (squared_error / y_norm).mean() / d_out}
        losses |= self.calculate_aux_loss(step_input, a.values, a.values, y_hat)
        loss = torch.stack(list(losses.values())).sum()
        # A step that is being captured as a CUDA graph cannot ask the host; whoever replays it does.
        capturing = loss.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at this step.")
        return TrainStepOutput(
            sae_in=y,
            sae_out=y_hat,
            feature_acts=a.sparse(),
            hidden_pre=a.values.detach(),
            loss=loss,
            losses=losses,
            metrics={
                "normalized_mse": (squared_error.detach() / y_norm.pow(2)).mean(),
                "targets_left_out": too_short.sum(),
            },
        )
