"""Training many layers on one stream of activations: one language-model forward pass feeds them all."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import logger
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from mxd_lens.models import load_model, weight_processing
from mxd_lens.training.activations import PairedActivationsStore
from mxd_lens.training.checkpoints import atomic_checkpoint, complete_checkpoints
from mxd_lens.training.config import WHERE_NOT_WHAT, TranscoderRunnerConfig
from mxd_lens.training.runner import (
    LayerRun,
    make_folders,
    read_json,
    reading,
    refuse_another_run,
    refuse_other_settings,
    start_wandb,
)
from mxd_lens.training.trainer import (
    StopRequest,
    TrainingInterrupted,
    TranscoderTrainer,
)

OF_ONE_LAYER = {
    "sae",
    "hook_name",
    "hook_name_out",
    "lr",
    "lr_end",
    "lr_scheduler_name",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "n_restart_cycles",
    "adam_beta1",
    "adam_beta2",
    "dead_feature_window",
    "standardize_activations",
    "seed",
    "from_pretrained_path",
    *WHERE_NOT_WHAT,
} - {"device", "llm_device", "act_store_device"}
"""Fields in which layers that are trained together may differ."""


class SharedRows:
    """A store's batches, as SAELens' multi-SAE trainer takes them: by the hook points wanted."""

    def __init__(self, store: PairedActivationsStore, runs: Mapping[str, LayerRun]) -> None:
        self.store = store
        self.cfg_of = {hook_key(run.cfg): run.cfg for run in runs.values()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        rows = next(self.store)
        return {key: self.store.select(rows, cfg) for key, cfg in self.cfg_of.items()}


def hook_key(cfg: TranscoderRunnerConfig) -> str:
    """One name for the hook points that a layer is trained on."""
    return " -> ".join(cfg.hook_widths)


class MultiTranscoderTrainer(MultiSAETrainer):
    """SAELens' `MultiSAETrainer`, each layer with its own optimiser, schedule and `TranscoderTrainer`.

    A layer that fails is left behind with its reason in `failures`; the others go on. Checkpoints
    appear whole; the last `n_checkpoints_kept` stay.
    """

    trainers: dict[str, TranscoderTrainer]
    n_training_samples: int
    n_training_steps: int

    def __init__(
        self, runs: Mapping[str, LayerRun], n_checkpoints_kept: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(
            *args,
            saes={name: run.sae for name, run in runs.items()},
            hook_names={name: hook_key(run.cfg) for name, run in runs.items()},
            **kwargs,
        )
        self.trainers = {name: run.trainer for name, run in runs.items()}
        self.n_checkpoints_kept = n_checkpoints_kept
        self.failures: dict[str, str] = {}
        """Why a layer was left behind."""
        self.stop = StopRequest()

    @override
    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Trains to the end.

        Raises:
            TrainingInterrupted: a stop was asked for; the message says where the layers were saved.
            RuntimeError: every layer failed.
        """
        total = self.cfg.total_training_samples
        with tqdm(total=total, initial=self.n_training_samples, desc="Training") as bar:
            while self.n_training_samples < total:
                self._maybe_log_sparsity()
                batch = next(self.data_provider)
                outputs = {
                    name: output
                    for name in list(self.trainers)
                    if (output := self._step(name, batch)) is not None
                }
                if not self.trainers:
                    raise RuntimeError(f"Every layer failed. {self.failure_report()}")
                self.n_training_samples = next(iter(self.trainers.values())).n_training_samples
                if self.cfg.logger.log_to_wandb:
                    self._log_train_step(outputs)
                self.n_training_steps += 1
                self._record(outputs, bar)
                self._checkpoint_if_needed()
                if self.stop.requested:
                    self.checkpoint_or_warn()
                    raise TrainingInterrupted(self.last_checkpoint)
        if hasattr(SAETrainer, "full_sparsity_window_log"):  # SAELens 6.54
            self._maybe_log_sparsity(final=True)
        for trainer in self.trainers.values():
            trainer.fold_scaling()
            trainer.set_final_sae_metadata()
        return self.saes

    def _step(self, name: str, batch: Mapping[str, Tensor]) -> TrainStepOutput | None:
        try:
            return self.trainers[name].step(batch[self.hook_names[name]])
        except Exception as e:
            self.leave_behind(name, e)
            return None

    def leave_behind(self, name: str, error: Exception | str) -> None:
        """Goes on without a layer."""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        logger.error("%s failed, the others go on. %s", name, reason)
        self.failures[name] = reason
        del self.trainers[name], self.saes[name]

    def failure_report(self) -> str:
        """The layers that failed, and why."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())

    @torch.no_grad()
    def _record(self, outputs: Mapping[str, TrainStepOutput], bar: tqdm) -> None:
        errors = []
        for name, trainer in self.trainers.items():
            trainer.n_training_steps += 1
            if entry := trainer.record(outputs[name]):
                errors.append(entry["normalized_mse"])
        bar.update(self.n_training_samples - bar.n)
        if errors:
            bar.set_postfix_str(f"{len(errors)} layers, nmse {min(errors):.3f} to {max(errors):.3f}")

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = complete_checkpoints(self.cfg.checkpoint_path)
        return found[-1] if found else None

    @override
    def _checkpoint_if_needed(self) -> None:
        if self.checkpoint_thresholds and self.n_training_samples > self.checkpoint_thresholds[0]:
            self.checkpoint_thresholds.pop(0)
            self.checkpoint_or_warn()

    def checkpoint_or_warn(self) -> None:
        """Saves a checkpoint; one that cannot be written is no reason to lose the run."""
        if self.cfg.checkpoint_path is None:
            return
        try:
            self.save_checkpoint(str(self.n_training_samples))
        except OSError as e:
            logger.error("%s Training goes on.", e)

    @override
    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """Writes a checkpoint that appears when it is complete, with a folder for each layer.

        Raises:
            OSError: it could not be written. Earlier ones are kept.
        """
        assert self.cfg.checkpoint_path is not None  # asked by checkpoint_or_warn
        final = Path(self.cfg.checkpoint_path) / checkpoint_name
        with atomic_checkpoint(final, self.n_checkpoints_kept) as partial:
            super().save_checkpoint(partial.name, wandb_aliases)


class MultiTranscoderTrainingRunner:
    """Trains many layers together, each as `TranscoderTrainingRunner` would train it alone.

    The language model runs once for all: its forward pass captures every hook point that any of the
    layers needs, and each is trained on the same tokens in the same order, with an optimiser and a
    schedule of its own. Trained alone, in the same order of tokens, a layer ends with the same weights.

        runner = MultiTranscoderTrainingRunner({"k8": cfg_8, "k32": cfg_32})
        layers = runner.run()      # those that did not fail; runner.failures says why the others did

    Every layer is written to its cfg.output_path. Checkpoints, of all layers together, go to
    `checkpoint_path`, as many as the first config says.
    """

    def __init__(
        self,
        cfgs: Mapping[str, TranscoderRunnerConfig],
        checkpoint_path: str | Path | None = None,
        resume: bool = False,
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        beside: Iterable[TranscoderRunnerConfig] = (),
        order_seed: int | None = None,
    ) -> None:
        """Loads the model and opens the text; everything that can be refused is refused here.

        Args:
            cfgs: the layers' runs by name. They differ in the layer, its hooks, its seed, its learning
                rate and schedule, and in where they are written; in nothing else.
            checkpoint_path: where checkpoints go; without it a run that is stopped is lost.
            resume: go on from the newest checkpoint there, if there is one.
            override_dataset: used instead of dataset_path.
            override_model: used instead of loading model_name.
            beside: runs whose activations are captured as well, for a cache that serves them later.
            order_seed: of the order of tokens. Default: the first config's seed.

        Raises:
            ValueError: there are no layers, they differ in what they must share, a hook or a width
                does not fit the model, or the checkpoint is of other runs.
            FileExistsError: an output folder holds another run.
        """
        self.cfgs = dict(cfgs)
        first = self._shared()
        found = complete_checkpoints(checkpoint_path)
        self.checkpoint = found[-1] if resume and found else None
        refuse_another_run(*(cfg.output_path for cfg in self.cfgs.values()))
        saved = self._saved_state(checkpoint_path)
        self.model = override_model or load_model(first.model_name, first.llm_device or "cpu")
        self.activations_store = PairedActivationsStore.from_config(
            self.model, first, override_dataset, (*self.cfgs.values(), *beside), order_seed
        )
        failed = saved.get("failures", {})
        self.runs = {name: LayerRun(cfg, iter(())) for name, cfg in self.cfgs.items() if name not in failed}
        for run in self.runs.values():
            run.sae.cfg.metadata.weight_processing = weight_processing(self.model)
        self.trainer = MultiTranscoderTrainer(
            self.runs,
            first.n_checkpoints_kept,
            cfg=replace(
                first.to_sae_trainer_config(),
                save_final_checkpoint=False,
                checkpoint_path=None if checkpoint_path is None else str(checkpoint_path),
            ),
            data_provider=SharedRows(self.activations_store, self.runs),
            save_checkpoint_fn=self._save_run_state,
        )
        self.trainer.failures.update(failed)
        if self.checkpoint is not None:
            self._load(self.checkpoint, saved)
        make_folders(checkpoint_path, *(cfg.output_path for cfg in self.cfgs.values()))

    @property
    def failures(self) -> dict[str, str]:
        """The layers that failed, and why."""
        return self.trainer.failures

    def run(self) -> dict[str, TrainingSAE[Any]]:
        """Trains, saves and returns the layers that did not fail.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM; the message says where the run was saved.
            RuntimeError: every layer failed.
        """
        log = self.trainer.cfg.logger
        start_wandb(log, {name: cfg.to_dict() for name, cfg in self.cfgs.items()})
        with self.trainer.stop.by_signals():
            self.trainer.fit()
        for name in list(self.trainer.trainers):
            run = self.runs[name]
            run.finish()
            try:
                if run.cfg.output_path is not None:
                    run.save(run.cfg.output_path)
            except OSError as e:
                self.trainer.leave_behind(name, e)
        if log.log_to_wandb:
            wandb.finish()
        if not self.trainer.saes:
            raise RuntimeError(f"Every layer failed. {self.trainer.failure_report()}")
        return self.trainer.saes

    def _shared(self) -> TranscoderRunnerConfig:
        """The first config, once it is certain that the others agree with it."""
        if not self.cfgs:
            raise ValueError("There is no layer to train.")
        for name, cfg in self.cfgs.items():
            if cfg.sae.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
                raise ValueError(
                    f"{name} has normalize_activations = {cfg.sae.normalize_activations!r}, which SAELens "
                    "estimates on batches that the other layers would then miss: use "
                    "standardize_activations."
                )
        (first_name, first), *others = self.cfgs.items()
        for name, cfg in others:
            differing = [
                f"{field.name} ({getattr(first, field.name)!r} and {getattr(cfg, field.name)!r})"
                for field in fields(TranscoderRunnerConfig)
                if field.name not in OF_ONE_LAYER and getattr(first, field.name) != getattr(cfg, field.name)
            ]
            if differing:
                raise ValueError(
                    f"{first_name} and {name} cannot be trained together: they differ in "
                    + ", ".join(differing)
                )
        folders = [cfg.output_path for cfg in self.cfgs.values() if cfg.output_path is not None]
        if len(set(folders)) < len(folders):
            raise ValueError("Two layers have the same output_path.")
        return first

    def _saved_state(self, checkpoint_path: str | Path | None) -> dict[str, Any]:
        """The checkpoint's description of its runs, once it is certain that they are these."""
        if self.checkpoint is None:
            refuse_another_run(checkpoint_path)
            return {}
        saved = read_json(self.checkpoint / RUNNER_CFG_FILENAME)
        if saved["cfgs"].keys() != self.cfgs.keys():
            raise ValueError(
                f"{self.checkpoint} is of other layers, {', '.join(saved['cfgs'])}, and cannot be gone on "
                f"with for {', '.join(self.cfgs)}."
            )
        for name, cfg in self.cfgs.items():
            refuse_other_settings(self.checkpoint, saved["cfgs"][name], cfg)
        return saved

    def _save_run_state(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is None:
            return
        self.activations_store.save_to_checkpoint(checkpoint_path)
        state = {
            "cfgs": {name: cfg.to_dict() for name, cfg in self.cfgs.items()},
            "failures": self.failures,
            "histories": {name: trainer.history for name, trainer in self.trainer.trainers.items()},
        }
        (checkpoint_path / RUNNER_CFG_FILENAME).write_text(json.dumps(state))

    def _load(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        logger.info("Resuming from %s", checkpoint)
        for name, run in self.runs.items():
            run.load_checkpoint(checkpoint / name)
            run.trainer.history = saved["histories"][name]
        with reading(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME):
            self.activations_store.load_from_checkpoint(checkpoint)
        trainer = next(iter(self.runs.values())).trainer
        self.trainer.n_training_steps = trainer.n_training_steps
        self.trainer.n_training_samples = done = trainer.n_training_samples
        self.trainer.checkpoint_thresholds = [t for t in self.trainer.checkpoint_thresholds if t > done]
