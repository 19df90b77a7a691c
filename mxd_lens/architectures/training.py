"""Training a layer with SAELens' trainer: what a configuration adds, the loss, one step."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
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

SHORTEST = 1e-3
"""Of the mean norm of a batch's targets: a shorter one is left out of the loss."""


@dataclass(kw_only=True)
class TrainingPairedTranscoderConfig(PairedTranscoderConfig, TrainingSAEConfig):
    """What training adds to a configuration."""

    decoder_init_norm: float | None = None
    """Must be None: each architecture starts W_dec as its source does."""
    l1_coefficient: float = 0.0
    """Weight of the penalty mean_tokens sum_n a_n ||w_n||. Needed where k is None."""
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
    plus l1_coefficient * mean_tokens sum_n a_n ||w_n||, w_n what expert n writes with (a row of W_dec). With
    `unit_rows`, ||w_n|| is 1: the rows of C are set to unit norm before every step, and the component of C's
    gradient parallel to each row is removed.

    Unlike the paper's code, a token whose target is shorter than `SHORTEST` times the mean of its batch is
    left out of the loss: divided by next to nothing, one such token would outweigh all others. The metric
    `targets_left_out` counts them.
    """

    cfg: TrainingPairedTranscoderConfig

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        if self.cfg.l1_coefficient == 0:
            return {}
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sae_in = self.process_sae_in(x)
        hidden_pre = self.pre_activations(sae_in)
        feature_acts = self.activate(hidden_pre)
        self.remember_input(feature_acts, sae_in)
        return feature_acts, hidden_pre

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
        # Without the size of w_n the penalty on a_n could be evaded by a smaller a_n and a larger w_n.
        a: Coefficients = feature_acts  # type: ignore[assignment]
        sizes = torch.ones_like(self.b_enc) if self.unit_rows else self.expert_sizes()
        return {"l1_loss": step_input.coefficients["l1"] * a.mix(sizes.unsqueeze(-1)).mean()}

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
        counts = (y_norm > SHORTEST * y_norm.mean()) & (y_norm > 0)
        y_norm = torch.where(counts, y_norm, 1)
        n_counted = counts.sum().clamp_min(1)

        def mean_over_tokens(values: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
            return torch.where(counts, values, 0).sum() / n_counted

        losses = {"mse_loss": mean_over_tokens(squared_error / y_norm) / d_out}
        losses |= self.calculate_aux_loss(step_input, a, a.values, y_hat)  # type: ignore[arg-type]
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
                "normalized_mse": mean_over_tokens(squared_error.detach() / y_norm.pow(2)),
                "targets_left_out": len(counts) - counts.sum(),
            },
        )
