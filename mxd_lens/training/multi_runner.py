"""Training many layers on one stream of activations: one language-model forward pass feeds them all."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import wandb
from sae_lens import logger
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from typing_extensions import override

from mxd_lens.artifacts.files import full_path
from mxd_lens.models import load_model
from mxd_lens.training.activations import PairedActivationsStore
from mxd_lens.training.checkpoints import complete_checkpoints
from mxd_lens.training.config import MAY_DIFFER_ON_RESUME, TranscoderRunnerConfig
from mxd_lens.training.progress import summary
from mxd_lens.training.runner import (
    TrainingMember,
    locked_folders,
    make_folders,
    read_json,
    reading,
    refuse_another_run,
    refuse_other_settings,
    require_identity,
    start_wandb,
)
from mxd_lens.training.trainer import StopRequest, TrainingLoop, TranscoderTrainer, finish

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
    *MAY_DIFFER_ON_RESUME,
} - {"device", "llm_device", "act_store_device"}
"""Fields in which layers that are trained together may differ."""


class SharedRows:
    """A store's batches, as SAELens' multi-SAE trainer takes them: by the hook points wanted."""

    def __init__(self, store: PairedActivationsStore, members: Mapping[str, TrainingMember]) -> None:
        self.store = store
        self.cfg_of = {hook_key(member.cfg): member.cfg for member in members.values()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        rows = next(self.store)
        return {key: self.store.select(rows, cfg) for key, cfg in self.cfg_of.items()}


def hook_key(cfg: TranscoderRunnerConfig) -> str:
    """One name for the hook points that a layer is trained on."""
    return " -> ".join(cfg.hook_widths)


class MultiTranscoderTrainer(TrainingLoop, MultiSAETrainer):
    """SAELens' `MultiSAETrainer`, each layer with its own optimiser, schedule and `TranscoderTrainer`.

    A layer that fails is left out from then on, with its reason in `failures`; the others continue.
    """

    trainers: dict[str, TranscoderTrainer]
    n_training_samples: int
    n_training_steps: int

    def __init__(
        self, members: Mapping[str, TrainingMember], n_checkpoints_kept: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(
            *args,
            saes={name: member.sae for name, member in members.items()},
            hook_names={name: hook_key(member.cfg) for name, member in members.items()},
            **kwargs,
        )
        self.trainers = {name: member.trainer for name, member in members.items()}
        self.n_checkpoints_kept = n_checkpoints_kept
        self.reserve = sum(trainer.reserve for trainer in self.trainers.values())
        self.failures: dict[str, str] = {}
        """Why a layer was left out."""
        self.stop = StopRequest()

    @override
    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Trains to the end.

        Raises:
            TrainingInterrupted: a stop was asked for; the message says where the layers were saved.
            RuntimeError: every layer failed.
        """
        self.train()
        if hasattr(SAETrainer, "full_sparsity_window_log"):  # SAELens 6.54
            self._maybe_log_sparsity(final=True)
        for trainer in self.trainers.values():
            trainer.fold_scaling(trainer.sae)
            trainer.set_final_sae_metadata()
        return self.saes

    @override
    def train_step(self) -> str:
        self._maybe_log_sparsity()
        batch = next(self.data_provider)
        outputs: dict[str, TrainStepOutput] = {}
        errors: list[float] = []
        for name, trainer in list(self.trainers.items()):
            try:
                outputs[name] = trainer.step(batch[self.hook_names[name]])
                if entry := trainer.count(outputs[name]):
                    errors.append(entry["normalized_mse"])
            except Exception as e:
                self.leave_out(name, e)
        if not self.trainers:
            raise RuntimeError(f"Every layer failed. {self.failure_report()}")
        self.n_training_samples = next(iter(self.trainers.values())).n_training_samples
        if self.cfg.logger.log_to_wandb:
            self._log_train_step(outputs)
        self.n_training_steps += 1
        if not errors:
            return ""
        return f"{len(errors)} layers, nmse {min(errors):.3f} to {max(errors):.3f}"

    def leave_out(self, name: str, error: Exception | str) -> None:
        """Continues without a layer."""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        logger.error("%s failed, the others continue. %s", name, reason)
        self.failures[name] = reason
        del self.trainers[name], self.saes[name]

    def failure_report(self) -> str:
        """The layers that failed, and why."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())

    @override
    def write_checkpoint(self, folder: Path) -> None:
        for name, trainer in self.trainers.items():
            (folder / name).mkdir()
            trainer.write_checkpoint(folder / name)
        if self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=folder)


class MultiTranscoderTrainingRunner:
    """Trains many layers together, each as `TranscoderTrainingRunner` would train it alone.

    The language model runs once for all: its forward pass captures every hook point that any of the
    layers needs, and each is trained on the same tokens in the same order, with an optimiser and a
    schedule of its own. Trained alone, in the same order of tokens, a layer ends with the same weights.

        runner = MultiTranscoderTrainingRunner({"k8": cfg_8, "k32": cfg_32})
        layers = runner.run()      # those that did not fail; runner.failures says why the others did

    Every layer is written to its cfg.output_path. Checkpoints, of all layers together, go to
    `checkpoint_path`, as many as the first config says. While it runs it holds the locks of these folders.
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
            resume: continue from the newest checkpoint there, if there is one. Layers of this run that were
                written before it was stopped are written again.
            override_dataset: used instead of dataset_path.
            override_model: used instead of loading model_name.
            beside: runs whose activations are captured as well, for a cache that serves them later.
            order_seed: of the order of tokens. Default: the first config's seed.

        Raises:
            ValueError: there are no layers, they differ in what they must share, a hook or a width
                does not fit the model, or the checkpoint is of other runs.
            FileExistsError: an output folder holds another run.
            LockedError: another process is writing to one of the folders.
        """
        self.cfgs = dict(cfgs)
        first = self._shared()
        found = complete_checkpoints(checkpoint_path)
        self.resume = resume
        self.checkpoint = found[-1] if resume and found else None
        self.folders = (checkpoint_path, *(cfg.output_path for cfg in self.cfgs.values()))
        with locked_folders(*self.folders, only_existing=True):
            failed = self._check_folders(checkpoint_path)
        self.model = override_model or load_model(first.model_name, first.llm_device or "cpu")
        self.activations_store = PairedActivationsStore.from_config(
            self.model, first, override_dataset, (*self.cfgs.values(), *beside), order_seed
        )
        self.members = {
            name: TrainingMember(cfg, self.activations_store)
            for name, cfg in self.cfgs.items()
            if name not in failed
        }
        self.trainer = MultiTranscoderTrainer(
            self.members,
            first.n_checkpoints_kept,
            cfg=replace(
                first.to_sae_trainer_config(),
                save_final_checkpoint=False,
                checkpoint_path=None if checkpoint_path is None else str(full_path(checkpoint_path)),
            ),
            data_provider=SharedRows(self.activations_store, self.members),
            save_checkpoint_fn=self._save_run_state,
        )
        self.trainer.store = self.activations_store
        self.trainer.failures.update(failed)
        if self.checkpoint is not None:
            self._load(self.checkpoint)
        make_folders(*self.folders)

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
        with locked_folders(*self.folders):
            if self.checkpoint is None:  # another process may have been faster
                self._refuse_another_run()
            logger.info(
                summary(
                    [member.cfg for member in self.members.values()],
                    [member.sae for member in self.members.values()],
                )
            )
            start_wandb(log, {name: cfg.to_dict() for name, cfg in self.cfgs.items()})
            try:
                with self.trainer.stop.by_signals():
                    self.trainer.fit()
            finally:
                self.activations_store.close()
            for name in list(self.trainer.trainers):
                self._save(name)
        if log.log_to_wandb:
            wandb.finish()
        if not self.trainer.saes:
            raise RuntimeError(f"Every layer failed. {self.trainer.failure_report()}")
        return self.trainer.saes

    def _save(self, name: str) -> None:
        member = self.members[name]
        finish(member.sae)
        if member.cfg.output_path is None:
            return
        try:
            member.save(member.cfg.output_path)
        except (OSError, FloatingPointError) as e:
            self.trainer.leave_out(name, e)

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

    def _check_folders(self, checkpoint_path: str | Path | None) -> dict[str, str]:
        """Refuse folders of other runs; return the layers that had failed at the checkpoint, and why."""
        if self.checkpoint is None:
            self._refuse_another_run()
            refuse_another_run(checkpoint_path)
            return {}
        saved = read_json(self.checkpoint / RUNNER_CFG_FILENAME)
        failed: dict[str, str] = saved["failures"]
        if saved["cfgs"].keys() != self.cfgs.keys():
            raise ValueError(
                f"{self.checkpoint} is of other layers, {', '.join(saved['cfgs'])}, and cannot be resumed "
                f"for {', '.join(self.cfgs)}."
            )
        for name, cfg in self.cfgs.items():
            if name not in failed:
                refuse_other_settings(self.checkpoint / name, cfg)
        self._refuse_another_run()
        return failed

    def _refuse_another_run(self) -> None:
        """Raises FileExistsError where an output folder holds a layer that is not one of this run."""
        for cfg in self.cfgs.values():
            if cfg.output_path is not None and not (self.resume and is_written_by(cfg)):
                refuse_another_run(cfg.output_path)

    def _save_run_state(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is None:
            return
        self.activations_store.save_to_checkpoint(checkpoint_path)
        for name in self.trainer.trainers:
            self.members[name].save_description(checkpoint_path / name)
        state = {
            "cfgs": {name: cfg.to_dict() for name, cfg in self.cfgs.items()},
            "failures": self.failures,
        }
        (checkpoint_path / RUNNER_CFG_FILENAME).write_text(json.dumps(state))

    def _load(self, checkpoint: Path) -> None:
        logger.info("Resuming from %s", checkpoint)
        for name, member in self.members.items():
            require_identity(checkpoint / name, member.identity)
            member.load_checkpoint(checkpoint / name)
        with reading(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME):
            self.activations_store.load_from_checkpoint(checkpoint)
        trainer = next(iter(self.members.values())).trainer
        self.trainer.n_training_steps = trainer.n_training_steps
        self.trainer.n_training_samples = done = trainer.n_training_samples
        self.trainer.checkpoint_thresholds = [t for t in self.trainer.checkpoint_thresholds if t > done]


def is_written_by(cfg: TranscoderRunnerConfig) -> bool:
    """Whether the layer in cfg.output_path was written by a run with the same settings."""
    try:
        refuse_other_settings(Path(str(cfg.output_path)), cfg)
    except (OSError, ValueError):
        return False
    return True
