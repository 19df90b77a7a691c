"""SAELens' trainer with atomic checkpoints, runs that stop in order and resume, and a word on divergence."""

import copy
import math
import signal
import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import logger
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from mxd_lens.architectures.training import SHORTEST, TrainingPairedTranscoder
from mxd_lens.training.activations import PairedActivationsStore
from mxd_lens.training.checkpoints import atomic_checkpoint, complete_checkpoints
from mxd_lens.training.divergence import Divergence, TrainingDiverged
from mxd_lens.training.progress import TrainingBar
from mxd_lens.training.standardizer import Standardizer

POINTS_IN_HISTORY = 500
LARGEST_ACTIVATION = 1e16
"""Sums of squares of larger activations exceed float32."""
SCALED_WEIGHTS_FILENAME = "scaled_weights.safetensors"
"""In a checkpoint: the weights for scaled activations. Its sae_weights are for the activations themselves."""


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop, and stopped after a step; `checkpoint` is where it can be resumed."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        super().__init__(
            f"Interrupted. Saved in {checkpoint}: resume_from_checkpoint, or --resume, continues from there."
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


class TrainingLoop:
    """What training one layer and several share: the loop over steps, checkpoints, an orderly stop."""

    cfg: SAETrainerConfig
    n_training_samples: int
    checkpoint_thresholds: list[int]
    n_checkpoints_kept: int = 2
    reserve: int = 0
    """Bytes that a checkpoint leaves free on the disk, for the trained layers."""
    store: PairedActivationsStore | None = None
    """Where the batches come from: the bar shows how it fills its buffer."""
    stop: StopRequest

    @abstractmethod
    def train_step(self) -> str:
        """Make one step on the next batch, log it, and return a line about it, empty where there is none."""

    @abstractmethod
    def write_checkpoint(self, folder: Path) -> None:
        """Write weights, trainer state and whatever else a run needs to resume into a folder."""

    def train(self) -> None:
        """Make steps until all tokens are trained on.

        Raises:
            TrainingInterrupted: a stop was asked for; the message says where the run was saved.
        """
        total = self.cfg.total_training_samples
        with TrainingBar(total, self.n_training_samples) as bar:
            if self.store is not None:
                self.store.on_buffering = bar.buffering
            while self.n_training_samples < total:
                text = self.train_step()
                bar.reach(self.n_training_samples, text)
                if self.checkpoint_thresholds and self.n_training_samples > self.checkpoint_thresholds[0]:
                    self.checkpoint_thresholds.pop(0)
                    self.checkpoint_or_warn(str(self.n_training_samples))
                if self.stop.requested:
                    bar.close()
                    self.checkpoint_or_warn(str(self.n_training_samples))
                    raise TrainingInterrupted(self.last_checkpoint)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of this run."""
        found = complete_checkpoints(self.cfg.checkpoint_path)
        return found[-1] if found else None

    def checkpoint_or_warn(self, name: str) -> None:
        """Save a checkpoint; where it cannot be written the run continues."""
        if self.cfg.checkpoint_path is None:
            return
        final = Path(self.cfg.checkpoint_path) / name
        try:
            with atomic_checkpoint(final, self.n_checkpoints_kept, self.reserve) as partial:
                self.write_checkpoint(partial)
        except OSError as e:
            logger.error("%s Training continues.", e)


class TranscoderTrainer(TrainingLoop, SAETrainer[Any, Any]):
    """SAELens' `SAETrainer` on pairs [x | y], or for an SAE on x alone.

    Adds: a progress bar with loss, normalised MSE, l0 and dead experts; `history`, the training
    curve; a check of every batch before it can touch the weights; a warning where the run diverges; atomic
    checkpoints, of which the last `n_checkpoints_kept` stay; an orderly stop.
    """

    stop_on_divergence: bool = False
    activation_scaler: ActivationScaler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history: list[dict[str, float]] = []
        """One entry per logged step: see `record`; and step, tokens, loss, l0, dead and lr."""
        self.stop = StopRequest()
        self.reserve = sum(p.numel() * p.element_size() for p in self.sae.parameters()) + 2**20
        self.optimizer.register_step_pre_hook(self._check_gradient)

    @override
    def fit(self) -> Any:
        """Trains to the end, and leaves the layer as one for the activations themselves.

        Raises:
            TrainingInterrupted: a stop was asked for; the message says where the run was saved.
            TrainingDiverged: the run diverged, and stop_on_divergence is set.
            FloatingPointError: activations, loss or gradient are not finite.
        """
        self.sae.to(self.cfg.device)
        self._estimate_normalization()
        self.train()
        if hasattr(SAETrainer, "full_sparsity_window_log"):  # SAELens 6.54
            self._log_to_wandb(self.full_sparsity_window_log())
        self.fold_scaling(self.sae)
        self.activation_scaler = ActivationScaler()
        self.set_final_sae_metadata()
        return self.sae

    @override
    def train_step(self) -> str:
        self._log_to_wandb(self.maybe_reset_sparsity())
        output = self.step(next(self.data_provider))
        if self.cfg.logger.log_to_wandb:
            self._log_train_step(output)
            self._run_and_log_evals()
        entry = self.count(output)
        if entry is None:
            return ""
        return (
            f"loss {entry['loss']:.4f}, nmse {entry['normalized_mse']:.3f}, "
            f"l0 {entry['l0']:.1f}, dead {entry['dead']}"
        )

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        """Makes one training step.

        Raises:
            FloatingPointError: the batch or the loss is not finite. The weights are those of the step
                before.
        """
        self._lr = self.optimizer.param_groups[0]["lr"]
        try:
            check_activations(batch)
            self._last_batch = batch
            return super().step(batch)
        except FloatingPointError as e:
            raise FloatingPointError(
                f"Training stopped at step {self.n_training_steps}: {e} {self._where()}"
            ) from e

    def count(self, output: TrainStepOutput) -> dict[str, float] | None:
        """Ends a step: counts it, and adds it to `history` if it is one of those that are kept.

        Returns:
            Its entry in the history, if it has one.

        Raises:
            TrainingDiverged: the run diverged, and stop_on_divergence is set.
        """
        self.n_training_steps += 1
        entry = self.record(output)
        if entry is not None:
            self._check_divergence()
        return entry

    def _estimate_normalization(self) -> None:
        """SAELens' normalisations of an SAE's activations; statistics of a checkpoint stay."""
        scaler, how = self.activation_scaler, self.sae.cfg.normalize_activations
        known = scaler.scaling_factor if how == "expected_average_only_in" else scaler.whitening
        if how not in ("expected_average_only_in", "covariance_whitening") or known is not None:
            return
        estimate = (
            scaler.estimate_scaling_factor if how == "expected_average_only_in" else scaler.estimate_whitening
        )
        estimate(
            d_in=self.sae.cfg.d_in,
            data_provider=self.data_provider,
            n_batches_for_norm_estimate=self.cfg.n_batches_for_norm_estimate,
        )

    def fold_scaling(self, sae: Any) -> None:
        """Makes `sae`, trained on scaled activations, one for the activations themselves."""
        scaler = self.activation_scaler
        if isinstance(scaler, Standardizer):
            scaler.fold(sae)
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            whitening = scaler.whitening
            sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)

    @property
    def divergence(self) -> Divergence | None:
        """The last error beside the best one; None in the first steps."""
        return Divergence.of(
            *([e[name] for e in self.history] for name in ("relative_error", "normalized_mse"))
        )

    def _check_divergence(self) -> None:
        verdict = self.divergence
        has_diverged = verdict is not None and verdict.has_diverged
        if has_diverged and not self._has_diverged:
            message = f"Training diverges at step {self.n_training_steps}: {verdict}."
            if self.stop_on_divergence:
                raise TrainingDiverged(f"{message} {self._where()}")
            logger.warning("%s A lower learning rate or a longer warm-up may help.", message)
        self._has_diverged = has_diverged

    _has_diverged = False
    _last_batch: Tensor | None = None

    @torch.no_grad()
    def final_error(self) -> float | None:
        """The finished layer's relative error on the last batch: the last step is in no training curve."""
        if self._last_batch is None:
            return None
        batch = self._last_batch.to(self.sae.device, self.sae.dtype)
        x, y = batch[:, : self.sae.cfg.d_in], batch[:, -getattr(self.sae.cfg, "d_out", self.sae.cfg.d_in) :]
        squared_error = (self.sae(x) - y).double().pow(2).sum()
        return float(squared_error / y.double().pow(2).sum().clamp_min(1e-30))

    @override
    def set_final_sae_metadata(self) -> None:
        """Adds how the run ended: last_error, best_error, worst_error and diverged."""
        super().set_final_sae_metadata()
        verdict = self.divergence
        if verdict is None:
            return
        final = self.final_error()
        if final is not None and not final <= 2 * Divergence.FACTOR * verdict.best:
            verdict = replace(verdict, last=final, rise=math.inf)  # it broke in the last step
        for name, value in verdict.to_dict().items():
            self.sae.cfg.metadata[name] = value
        if verdict.has_diverged:
            logger.warning("The run has diverged: %s.", verdict)
        elif verdict.is_worse_than_zero:
            logger.warning(
                "The layer is no better than an output of zero, whose error is 1: at the end of the run its "
                "error is %.3g, and up to %.3g.",
                verdict.last,
                verdict.worst,
            )

    def _where(self) -> str:
        last = self.last_checkpoint
        return f"The last checkpoint is {last}." if last else "There is no checkpoint."

    def _log_to_wandb(self, log: dict[str, Any]) -> None:
        if log and self.cfg.logger.log_to_wandb:
            wandb.log(log, step=self.n_training_steps)

    def _check_gradient(self, *_: Any) -> None:
        """A finite loss can have a gradient that is not; Adam must not see it."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.optimizer.zero_grad()
            raise FloatingPointError("the gradient is not finite.")

    @torch.no_grad()
    def record(self, step_output: TrainStepOutput) -> dict[str, float] | None:
        """Adds the step just made to `history` if it is one of those that are kept; returns its entry.

        normalized_mse is the mean over tokens of ||error||^2 / ||y||^2, relative_error the ratio of the sums;
        left_out counts targets of (nearly) zero, which neither the loss nor normalized_mse contains.
        """
        every = max(1, self.cfg.total_training_steps // POINTS_IN_HISTORY)
        if self.n_training_steps % every and self.n_training_samples < self.cfg.total_training_samples:
            return None
        target, a = step_output.sae_in, step_output.feature_acts
        precise = torch.promote_types(target.dtype, torch.float32)
        squared_error = (step_output.sae_out - target).to(precise).pow(2).sum(-1)
        norm = target.to(precise).norm(dim=-1)
        counts = (norm > SHORTEST * norm.mean()) & (norm > 0)
        relative = (squared_error / norm.pow(2))[counts]
        fired = (a._values() if a.is_sparse else a) > 0
        self.history.append(
            {
                "step": self.n_training_steps,
                "tokens": self.n_training_samples,
                "loss": float(step_output.loss),
                "normalized_mse": float(relative.mean()) if len(relative) else 0.0,
                "relative_error": float(squared_error.sum() / norm.pow(2).sum().clamp_min(1e-30)),
                "l0": float(fired.sum() / len(target)),
                "dead": int(self.dead_neurons.sum()),
                "left_out": int((~counts).sum()),
                "lr": self._lr,
            }
        )
        return self.history[-1]

    @override
    def _checkpoint_if_needed(self) -> None:
        """Nothing: `train` writes checkpoints once a step is counted; SAELens would before."""

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Writes a checkpoint in one step: a folder that resumes, and that loads as the layer so far.

        Raises:
            OSError: it could not be written. Earlier ones are kept.
        """
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, None, wandb_aliases)
            return
        with atomic_checkpoint(
            Path(base) / checkpoint_name, self.n_checkpoints_kept, self.reserve
        ) as partial:
            self.write_checkpoint(partial, wandb_aliases)

    @override
    def write_checkpoint(self, folder: Path, wandb_aliases: list[str] | None = None) -> None:
        super().save_checkpoint(folder.name, folder.parent, wandb_aliases)
        scaler = self.activation_scaler
        if getattr(scaler, "statistics", None) or scaler.scaling_factor is not None or scaler.whitening:
            (folder / SAE_WEIGHTS_FILENAME).rename(folder / SCALED_WEIGHTS_FILENAME)
            layer = copy.deepcopy(self.sae)
            self.fold_scaling(layer)
            finish(layer)
            layer.save_model(folder)

    def load_weights(self, checkpoint: Path) -> None:
        """Takes the weights in a checkpoint, for scaled activations where it was trained on such."""
        scaled = checkpoint / SCALED_WEIGHTS_FILENAME
        weights = load_file(scaled if scaled.is_file() else checkpoint / SAE_WEIGHTS_FILENAME)
        self.sae.process_state_dict_for_loading(weights)
        self.sae.load_state_dict(weights)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        super().load_trainer_state(checkpoint_path)
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t > self.n_training_samples]


def finish(sae: Any) -> None:
    """Leaves a layer as it is saved once its training is done."""
    if isinstance(sae, TrainingPairedTranscoder):
        sae.normalize_decoder()  # as before every step
    sae.eval()


def check_activations(batch: Tensor) -> None:
    """Raises FloatingPointError where a batch holds what no layer can be trained on."""
    largest = torch.linalg.vector_norm(batch, ord=float("inf"))
    if torch.isfinite(largest) and largest <= LARGEST_ACTIVATION:
        return
    finite = torch.isfinite(batch).all(-1)
    if not finite.all():
        bad = int((~finite).sum())
        raise FloatingPointError(f"{bad} of {len(batch)} activation pairs are NaN or infinite.")
    raise FloatingPointError(
        f"activations are as large as {largest.item():.3g}, and sums of squares above "
        f"{LARGEST_ACTIVATION:.0e} exceed float32: no layer can be trained on them."
    )
