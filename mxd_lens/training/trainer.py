"""SAELens' trainer, with checkpoints that are whole or not there, and runs that stop and go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from mxd_lens.training.checkpoints import atomic_checkpoint, complete_checkpoints
from mxd_lens.training.standardizer import Standardizer

POINTS_IN_HISTORY = 500


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop, and stopped after a step; `checkpoint` is where to go on."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        super().__init__(
            f"Interrupted. Saved in {checkpoint}: resume_from_checkpoint, or --resume, goes on from there."
            if checkpoint
            else "Interrupted. Nothing was saved: the run has no checkpoint_path."
        )


class StopRequest:
    """Whether the run was asked to stop. A second signal stops it at once."""

    requested = False

    def __call__(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("Stopping after this step; once more stops at once, without saving.")

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for it, until the end of the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signal_number, handler in previous.items():
                signal.signal(signal_number, handler)


class TranscoderTrainer(SAETrainer[Any, Any]):
    """SAELens' `SAETrainer` on pairs [x | y], or for an SAE on x alone.

    Adds: a progress bar with loss, normalised MSE, l0 and dead experts; `history`, the training
    curve; a check of every batch before it can touch the weights; checkpoints that appear whole, of
    which the last `n_checkpoints_kept` stay; an orderly stop.
    """

    n_checkpoints_kept: int = 2
    activation_scaler: ActivationScaler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history: list[dict[str, float]] = []
        """One entry per logged step: step, tokens, loss, normalized_mse, l0, dead, lr."""
        self.stop = StopRequest()
        self.checkpoint_thresholds: list[int]
        self.optimizer.register_step_pre_hook(self._check_gradient)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of this run."""
        found = complete_checkpoints(self.cfg.checkpoint_path)
        return found[-1] if found else None

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        """One training step.

        Raises:
            FloatingPointError: the batch or the loss is not finite. The weights are those of the step
                before.
        """
        self._lr = self.optimizer.param_groups[0]["lr"]
        try:
            if not torch.isfinite(batch).all():
                bad = (~torch.isfinite(batch)).any(-1).sum().item()
                raise FloatingPointError(f"{bad} of {len(batch)} activation pairs are NaN or infinite.")
            return super().step(batch)
        except FloatingPointError as e:
            raise FloatingPointError(
                f"Training stopped at step {self.n_training_steps}: {e} "
                f"The last checkpoint is {self.last_checkpoint or 'not there: none was written yet'}."
            ) from e

    @override
    def fit(self) -> Any:
        super().fit()
        self.fold_scaling()
        return self.sae

    def fold_scaling(self) -> None:
        """At the end: the weights take over the scale of the activations they were trained on."""
        scaler, self.activation_scaler = self.activation_scaler, ActivationScaler()
        if isinstance(scaler, Standardizer):
            scaler.fold()
        elif scaler.scaling_factor is not None:
            self.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)

    def _check_gradient(self, *_: Any) -> None:
        """A finite loss can have a gradient that is not; Adam must not see it."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.optimizer.zero_grad()
            raise FloatingPointError("the gradient is not finite.")

    @override
    def _checkpoint_if_needed(self) -> None:
        """Nothing: SAELens calls this before it counts the step, so a checkpoint would lag by one."""

    @override
    @torch.no_grad()
    def _update_pbar(
        self,
        step_output: TrainStepOutput,
        pbar: tqdm,
        update_interval: int = 1,
    ) -> None:
        """The end of a step: log it, save if it is time to, stop if asked to."""
        pbar.update(self.n_training_samples - pbar.n)
        if entry := self.record(step_output):
            pbar.set_description("Training")
            pbar.set_postfix_str(
                f"loss {entry['loss']:.4f}, nmse {entry['normalized_mse']:.3f}, "
                f"l0 {entry['l0']:.1f}, dead {entry['dead']}"
            )
        if self.checkpoint_thresholds and self.n_training_samples > self.checkpoint_thresholds[0]:
            self.checkpoint_thresholds.pop(0)
            self.checkpoint_or_warn(str(self.n_training_samples))
        if self.stop.requested:
            pbar.close()
            self.checkpoint_or_warn(str(self.n_training_samples))
            raise TrainingInterrupted(self.last_checkpoint)

    @torch.no_grad()
    def record(self, step_output: TrainStepOutput) -> dict[str, float] | None:
        """Adds the step just made to `history` if it is one of those that are kept; returns its entry."""
        every = max(1, self.cfg.total_training_steps // POINTS_IN_HISTORY)
        if self.n_training_steps % every and self.n_training_samples < self.cfg.total_training_samples:
            return None
        target, a = step_output.sae_in, step_output.feature_acts
        squared_error = (step_output.sae_out - target).float().pow(2).sum(-1)
        squared_norm = target.float().pow(2).sum(-1).clamp_min(1e-12)
        fired = (a._values() if a.is_sparse else a) > 0
        self.history.append(
            {
                "step": self.n_training_steps,
                "tokens": self.n_training_samples,
                "loss": float(step_output.loss),
                "normalized_mse": float((squared_error / squared_norm).mean()),
                "l0": float(fired.sum() / len(target)),
                "dead": int(self.dead_neurons.sum()),
                "lr": self._lr,
            }
        )
        return self.history[-1]

    def checkpoint_or_warn(self, name: str) -> None:
        """Saves a checkpoint; one that cannot be written is no reason to lose the run."""
        if self.cfg.checkpoint_path is None:
            return
        try:
            self.save_checkpoint(name)
        except OSError as e:
            logger.error("%s Training goes on.", e)

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Writes a checkpoint that appears when it is complete.

        Raises:
            OSError: it could not be written. Earlier ones are kept.
        """
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, None, wandb_aliases)
            return
        with atomic_checkpoint(Path(base) / checkpoint_name, self.n_checkpoints_kept) as partial:
            super().save_checkpoint(partial.name, base, wandb_aliases)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        super().load_trainer_state(checkpoint_path)
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t > self.n_training_samples]
