"""Training one layer on one language model: config in, folder out."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import wandb
from sae_lens import LoggingConfig, logger
from sae_lens.config import HfDataset
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from safetensors import SafetensorError
from safetensors.torch import save_file

from mxd_lens.architectures.training import TrainingPairedTranscoder
from mxd_lens.artifacts.files import (
    LOCK,
    WriteError,
    atomic_files,
    full_path,
    locked,
    remove_stale_partials,
)
from mxd_lens.artifacts.identity import RunIdentity, differences
from mxd_lens.models import load_model, weight_processing
from mxd_lens.training.activations import PairedActivationsStore
from mxd_lens.training.checkpoints import complete_checkpoints, remove_old
from mxd_lens.training.config import IN_METADATA, TranscoderRunnerConfig
from mxd_lens.training.progress import summary
from mxd_lens.training.standardizer import FirstBatchScaler, Standardizer
from mxd_lens.training.trainer import TranscoderTrainer, finish

HISTORY_FILENAME = "history.json"
IDENTITY_FILENAME = "identity.json"


class TrainingMember:
    """One layer in training: its configuration, its weights, its trainer."""

    def __init__(
        self,
        cfg: TranscoderRunnerConfig,
        store: PairedActivationsStore,
        override_sae: TrainingSAE[Any] | None = None,
        save_checkpoint_fn: Callable[..., None] | None = None,
    ) -> None:
        self.cfg = cfg
        self.identity = RunIdentity(store.identity.fields | {"settings": cfg.settings})
        self.sae = override_sae if override_sae is not None else self._new_sae()
        self.sae.to(cfg.device)
        self.trainer = TranscoderTrainer(
            # The trainer would give up where the final checkpoint cannot be written.
            cfg=replace(cfg.to_sae_trainer_config(), save_final_checkpoint=False),
            sae=self.sae,
            data_provider=store,
            save_checkpoint_fn=save_checkpoint_fn,
        )
        self.trainer.store = store
        self.trainer.n_checkpoints_kept = cfg.n_checkpoints_kept
        self.trainer.stop_on_divergence = cfg.stop_on_divergence
        if cfg.standardize_activations:
            is_transcoder = isinstance(self.sae, TrainingPairedTranscoder)
            scaler = Standardizer if is_transcoder else FirstBatchScaler
            self.trainer.activation_scaler = scaler(self.sae, self._is_trained())
        metadata = self.sae.cfg.metadata
        for name in IN_METADATA:
            metadata[name] = getattr(cfg, name)
        metadata["training_text"] = store.training_text
        metadata["weight_processing"] = weight_processing(store.model)
        # As SAELens writes them: its evaluations load the model from these two.
        metadata["model_class_name"] = cfg.model_class_name
        metadata["model_from_pretrained_kwargs"] = cfg.model_from_pretrained_kwargs

    def _new_sae(self) -> TrainingSAE[Any]:
        if self.cfg.from_pretrained_path is not None:
            return TrainingSAE.load_from_disk(self.cfg.from_pretrained_path, self.cfg.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.cfg.seed)
            return TrainingSAE.from_dict(self.cfg.get_training_sae_cfg_dict())

    def _is_trained(self) -> bool:
        """Whether the weights are those of a layer that has been trained: a new one's biases are zero."""
        biases = (p for name, p in self.sae.named_parameters() if name.startswith("b_"))
        return any(bool(bias.any()) for bias in biases)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Continues with the weights, the trainer's state and the training curve in `checkpoint`.

        Raises:
            ValueError: a file in it is damaged.
        """
        with reading(checkpoint / TRAINER_STATE_FILENAME):
            self.trainer.load_trainer_state(checkpoint)
        with reading(checkpoint / SAE_WEIGHTS_FILENAME):
            self.trainer.load_weights(checkpoint)
        self.trainer.history = read_json(checkpoint / HISTORY_FILENAME)

    def save(self, output_path: str | Path) -> None:
        """Writes the layer as SAELens does, with the run's config and history beside it, in one step.

        Where the disk is full, all checkpoints but the newest are removed to make room.

        Raises:
            FloatingPointError: the weights are not finite.
            OSError: it could not be written.
        """
        for name, weight in self.sae.named_parameters():
            if not weight.isfinite().all():
                raise FloatingPointError(
                    f"The trained layer is not saved: its {name} holds values that are not finite numbers."
                )
        try:
            self._write(output_path)
        except WriteError as e:
            if self.cfg.checkpoint_path is None or len(complete_checkpoints(self.cfg.checkpoint_path)) < 2:
                raise
            logger.warning("%s Removing older checkpoints to make room.", e)
            remove_old(Path(self.cfg.checkpoint_path), 1)
            self._write(output_path)

    def _write(self, folder: str | Path) -> None:
        # A folder that has a cfg.json is complete.
        with atomic_files(folder, last=SAE_CFG_FILENAME) as partial:
            self.sae.save_inference_model(partial)
            save_file({"sparsity": self.trainer.log_feature_sparsity}, partial / SPARSITY_FILENAME)
            self.save_description(partial)

    def save_description(self, folder: Path) -> None:
        """Writes the run's config, its identity and its training curve."""
        (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict(), indent=1))
        (folder / HISTORY_FILENAME).write_text(json.dumps(self.trainer.history))
        (folder / IDENTITY_FILENAME).write_text(json.dumps(self.identity.to_dict(), indent=1))


class TranscoderTrainingRunner:
    """Trains an MxD or transcoder, as SAELens' `LanguageModelSAETrainingRunner` trains an SAE.

    `run()` writes into cfg.output_path a folder that `MxD.from_pretrained` and `SAE.load_from_disk`
    read: cfg.json, sae_weights.safetensors, and beside them sparsity.safetensors, runner_cfg.json and
    history.json (the training curve). While it runs it holds the lock of that folder.
    """

    def __init__(
        self,
        cfg: TranscoderRunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        override_sae: TrainingSAE[Any] | None = None,
        resume_from_checkpoint: str | Path | None = None,
    ) -> None:
        """Loads the model and opens the text; everything that can be refused is refused here.

        Args:
            cfg: the run.
            override_dataset: used instead of cfg.dataset_path.
            override_model: used instead of loading cfg.model_name.
            override_sae: trained instead of a new layer made from cfg.sae. With standardize_activations, one
                with biases that are not zero counts as trained, and continues as the layer that it is.
            resume_from_checkpoint: used instead of cfg.resume_from_checkpoint.

        Raises:
            ValueError: hooks or widths that the model does not have, no text, a checkpoint of another
                run.
            FileExistsError: the output folder holds another run.
            LockedError: another process is writing to the output folder.
        """
        if resume_from_checkpoint is not None:
            cfg = replace(cfg, resume_from_checkpoint=str(resume_from_checkpoint))
        self.cfg = cfg
        with locked_folders(cfg.output_path, cfg.checkpoint_path, only_existing=True):
            self.checkpoint = cfg.latest_checkpoint()
            if self.checkpoint is None:
                refuse_another_run(cfg.output_path, cfg.checkpoint_path)
            else:
                refuse_other_settings(self.checkpoint, cfg)
        self.model = override_model or load_model(cfg.model_name, cfg.llm_device or "cpu")
        self.activations_store = PairedActivationsStore.from_config(self.model, cfg, override_dataset)
        self.member = TrainingMember(cfg, self.activations_store, override_sae, self._save_run_state)
        self.sae, self.trainer = self.member.sae, self.member.trainer
        if self.checkpoint is not None:
            logger.info("Resuming from %s", self.checkpoint)
            require_identity(self.checkpoint, self.member.identity)
            self.member.load_checkpoint(self.checkpoint)
            with reading(self.checkpoint / ACTIVATIONS_STORE_STATE_FILENAME):
                self.activations_store.load_from_checkpoint(self.checkpoint)
        make_folders(cfg.output_path, cfg.checkpoint_path)

    def run(self) -> TrainingSAE[Any]:
        """Trains, saves and returns the layer.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM; the message says where the run was saved.
            TrainingDiverged: the run diverged, and cfg.stop_on_divergence is set.
            FloatingPointError: activations or loss not finite; the last checkpoint is kept.
            LockedError: another process is writing to the output folder.
            OSError: the result could not be written; it stays in `self.sae`.
        """
        with locked_folders(self.cfg.output_path, self.cfg.checkpoint_path):
            if self.checkpoint is None:  # another process may have been faster
                refuse_another_run(self.cfg.output_path, self.cfg.checkpoint_path)
            logger.info(summary([self.cfg], [self.sae]))
            start_wandb(self.cfg.logger, self.cfg.to_dict())
            try:
                with self.trainer.stop.by_signals():
                    self.trainer.fit()
            finally:
                self.activations_store.close()
            finish(self.sae)
            if self.cfg.save_final_checkpoint:
                self.trainer.checkpoint_or_warn(f"final_{self.trainer.n_training_samples}")
            if self.cfg.output_path is not None:
                self.save_final_sae(self.sae, self.cfg.output_path)
            if self.cfg.logger.log_to_wandb:
                wandb.finish()
        return self.sae

    def save_final_sae(
        self,
        sae: TrainingSAE[Any] | None = None,
        output_path: str | Path | None = None,
        log_feature_sparsity: Any = None,  # noqa: ARG002  SAELens passes it; the trainer knows it
    ) -> None:
        """Writes the layer as SAELens does, with the run's config and history beside it.

        Args:
            sae: SAELens' first argument; the run's own layer, which is the default.
            output_path: the folder. Default: cfg.output_path.
            log_feature_sparsity: SAELens' third argument; the trainer's is written.

        Raises:
            ValueError: there is no folder to write to.
            FloatingPointError: the weights are not finite.
            OSError: it could not be written.
        """
        if isinstance(sae, str | Path):
            warnings.warn(
                "save_final_sae(folder) is now save_final_sae(sae, folder), as in SAELens, or "
                "save_final_sae(output_path=folder). The former order ends with the next version.",
                DeprecationWarning,
                stacklevel=2,
            )
            sae, output_path = None, sae
        output_path = output_path or self.cfg.output_path
        if output_path is None:
            raise ValueError("There is no folder to write to: give output_path.")
        if sae is not None:
            self.member.sae = sae
        try:
            self.member.save(output_path)
        except OSError as e:
            raise OSError(
                f"{e} The last checkpoint is {self.trainer.last_checkpoint}; the layer is in runner.sae, and "
                "runner.save_final_sae(output_path=folder) writes it."
            ) from e

    def _save_run_state(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            self.activations_store.save_to_checkpoint(checkpoint_path)
            self.member.save_description(checkpoint_path)


def start_wandb(log: LoggingConfig, config: dict[str, Any]) -> None:
    """Starts a Weights & Biases run where one is wanted."""
    if log.log_to_wandb:
        wandb.init(
            project=log.wandb_project,
            entity=log.wandb_entity,
            config=config,
            name=log.run_name,
            id=log.wandb_id,
        )


def refuse_another_run(*folders: str | Path | None) -> None:
    """Raises FileExistsError where a folder holds a run already."""
    for folder in folders:
        if folder is not None and (
            (Path(folder) / SAE_CFG_FILENAME).exists() or complete_checkpoints(folder)
        ):
            raise FileExistsError(
                f"{folder} holds another run. Resume it (resume_from_checkpoint='latest'), choose "
                "another folder, or delete it."
            )


def refuse_other_settings(folder: Path, cfg: TranscoderRunnerConfig) -> None:
    """Raises ValueError where the run in `folder`, a checkpoint or a trained layer, has other settings.

    Asked before a model loads; what is then known of the model and the text is compared by
    `require_identity`.
    """
    if changed := differences(read_json(folder / IDENTITY_FILENAME)["settings"], cfg.settings):
        raise ValueError(
            f"{folder} is of another run, and cannot be resumed as this one. " + "; ".join(changed)
        )


def require_identity(checkpoint: Path, identity: RunIdentity) -> None:
    """Raises ValueError where the run in `checkpoint` had another model, other weights or another text."""
    then = RunIdentity.from_dict(read_json(checkpoint / IDENTITY_FILENAME))
    if changed := then.differences(identity):
        raise ValueError(
            f"{checkpoint} is of another run, and cannot be resumed as this one. " + "; ".join(changed)
        )


def make_folders(*folders: str | Path | None) -> None:
    """Makes the folders now rather than when the training is done, without what a killed process left."""
    for folder in [Path(folder) for folder in folders if folder is not None]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise WriteError(folder, "it is a file" if folder.is_file() else str(e.strerror)) from e
        remove_stale_partials(folder)


@contextmanager
def locked_folders(*folders: str | Path | None, only_existing: bool = False) -> Iterator[None]:
    """Hold the locks of folders that a run writes to."""
    with ExitStack() as stack:
        for folder in dict.fromkeys(full_path(folder) for folder in folders if folder is not None):
            if folder.is_dir() or not only_existing:
                stack.enter_context(locked(folder / LOCK, "training run"))
        yield


@contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Says which file of a checkpoint could not be read."""
    try:
        yield file
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as e:
        raise ValueError(f"The checkpoint's {file} is damaged ({type(e).__name__}: {e}).") from e


def read_json(file: Path) -> Any:
    """A checkpoint's JSON file.

    Raises:
        FileNotFoundError: there is none, so it is no checkpoint.
        ValueError: it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} is not a checkpoint of a training run: it has no {file.name}."
        )
    with reading(file):
        return json.loads(file.read_text(encoding="utf-8"))


def then_and_now(
    then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str], prefix: str = ""
) -> list[str]:
    """As `artifacts.identity.differences`, of some of the fields."""
    names = list(names)
    changed = differences({n: then.get(n) for n in names}, {n: now.get(n) for n in names})
    return [f"{prefix}{line}" for line in changed]
