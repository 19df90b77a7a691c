"""Training one layer on one language model: config in, folder out."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from torch import Tensor

from mxd_lens.architectures.training import TrainingPairedTranscoder
from mxd_lens.models import load_model, weight_processing
from mxd_lens.training.activations import PairedActivationsStore
from mxd_lens.training.checkpoints import PARTIAL, complete_checkpoints
from mxd_lens.training.config import IN_METADATA, WHERE_NOT_WHAT, TranscoderRunnerConfig
from mxd_lens.training.standardizer import FirstBatchScaler, Standardizer
from mxd_lens.training.trainer import TranscoderTrainer

HISTORY_FILENAME = "history.json"


class LayerRun:
    """One layer in training: its configuration, its weights, its trainer."""

    def __init__(
        self,
        cfg: TranscoderRunnerConfig,
        data_provider: Iterator[Tensor],
        override_sae: TrainingSAE[Any] | None = None,
        save_checkpoint_fn: Callable[..., None] | None = None,
    ) -> None:
        self.cfg = cfg
        self.sae = override_sae if override_sae is not None else self._new_sae()
        self.sae.to(cfg.device)
        self.trainer = TranscoderTrainer(
            # The trainer would give up where the final checkpoint cannot be written.
            cfg=replace(cfg.to_sae_trainer_config(), save_final_checkpoint=False),
            sae=self.sae,
            data_provider=data_provider,
            save_checkpoint_fn=save_checkpoint_fn,
        )
        self.trainer.n_checkpoints_kept = cfg.n_checkpoints_kept
        if cfg.standardize_activations:
            is_transcoder = isinstance(self.sae, TrainingPairedTranscoder)
            self.trainer.activation_scaler = Standardizer(self.sae) if is_transcoder else FirstBatchScaler()
        metadata = self.sae.cfg.metadata
        for name in IN_METADATA:
            metadata[name] = getattr(cfg, name)

    def _new_sae(self) -> TrainingSAE[Any]:
        if self.cfg.from_pretrained_path is not None:
            return TrainingSAE.load_from_disk(self.cfg.from_pretrained_path, self.cfg.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.cfg.seed)
            return TrainingSAE.from_dict(self.cfg.get_training_sae_cfg_dict())

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Goes on with the weights and the trainer's state in `checkpoint`.

        Raises:
            ValueError: a file in it is damaged.
        """
        with reading(checkpoint / TRAINER_STATE_FILENAME):
            self.trainer.load_trainer_state(checkpoint)
        with reading(checkpoint / SAE_WEIGHTS_FILENAME):
            self.sae.load_weights_from_checkpoint(checkpoint)

    def finish(self) -> None:
        """Leaves the layer as it will be saved, once its training is done."""
        if isinstance(self.sae, TrainingPairedTranscoder):
            self.sae.normalize_decoder()  # as before every step
        self.sae.eval()

    def save(self, output_path: str | Path) -> None:
        """Writes the layer as SAELens does, with the run's config and history beside it.

        Every file is written under another name first, so that a full disk leaves no half of one.

        Raises:
            OSError: it could not be written.
        """
        folder = Path(output_path)
        partial = folder / f"{PARTIAL}final"
        try:
            self.sae.save_inference_model(partial)
            save_file({"sparsity": self.trainer.log_feature_sparsity}, partial / SPARSITY_FILENAME)
            self.save_description(partial)
            # cfg.json last: a folder that has one is complete.
            for file in sorted(partial.iterdir(), key=lambda file: file.name == SAE_CFG_FILENAME):
                file.replace(folder / file.name)
        except (OSError, SafetensorError) as e:
            raise OSError(f"Could not write the trained layer to {folder}: {e}.") from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def save_description(self, folder: Path) -> None:
        """Writes the run's config and its training curve."""
        (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict(), indent=1))
        (folder / HISTORY_FILENAME).write_text(json.dumps(self.trainer.history))


class TranscoderTrainingRunner:
    """Trains an MxD or transcoder, as SAELens' `LanguageModelSAETrainingRunner` trains an SAE.

    `run()` writes into cfg.output_path a folder that `MxD.from_pretrained` and `SAE.load_from_disk`
    read: cfg.json, sae_weights.safetensors, and beside them sparsity.safetensors, runner_cfg.json and
    history.json (the training curve).
    """

    def __init__(
        self,
        cfg: TranscoderRunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        """Loads the model and opens the text; everything that can be refused is refused here.

        Args:
            cfg: the run.
            override_dataset: used instead of cfg.dataset_path.
            override_model: used instead of loading cfg.model_name.
            override_sae: trained instead of a new layer made from cfg.sae.

        Raises:
            ValueError: hooks or widths that the model does not have, no text, a checkpoint of another
                run.
            FileExistsError: the output folder holds another run.
        """
        self.cfg = cfg
        self.checkpoint = cfg.latest_checkpoint()
        if self.checkpoint is None:
            refuse_another_run(cfg.output_path, cfg.checkpoint_path)
        else:
            refuse_other_settings(self.checkpoint, read_json(self.checkpoint / RUNNER_CFG_FILENAME), cfg)
        self.model = override_model or load_model(cfg.model_name, cfg.llm_device or "cpu")
        self.activations_store = PairedActivationsStore.from_config(self.model, cfg, override_dataset)
        self.layer = LayerRun(cfg, self.activations_store, override_sae, self._save_run_state)
        self.sae, self.trainer = self.layer.sae, self.layer.trainer
        self.sae.cfg.metadata.weight_processing = weight_processing(self.model)
        if self.checkpoint is not None:
            logger.info("Resuming from %s", self.checkpoint)
            self.layer.load_checkpoint(self.checkpoint)
            with reading(self.checkpoint / ACTIVATIONS_STORE_STATE_FILENAME):
                self.activations_store.load_from_checkpoint(self.checkpoint)
            self.trainer.history = read_json(self.checkpoint / HISTORY_FILENAME)
        make_folders(cfg.output_path, cfg.checkpoint_path)

    def run(self) -> TrainingSAE[Any]:
        """Trains, saves and returns the layer.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM; the message says where the run was saved.
            FloatingPointError: activations or loss not finite; the last checkpoint is kept.
            OSError: the result could not be written; it stays in `self.sae`.
        """
        start_wandb(self.cfg.logger, self.cfg.to_dict())
        with self.trainer.stop.by_signals():
            self.trainer.fit()
        self.layer.finish()
        if self.cfg.save_final_checkpoint:
            self.trainer.checkpoint_or_warn(f"final_{self.trainer.n_training_samples}")
        if self.cfg.output_path is not None:
            self.save_final_sae(self.cfg.output_path)
        if self.cfg.logger.log_to_wandb:
            wandb.finish()
        return self.sae

    def save_final_sae(self, output_path: str | Path) -> None:
        """Writes the layer as SAELens does, with the run's config and history beside it.

        Raises:
            OSError: it could not be written.
        """
        try:
            self.layer.save(output_path)
        except OSError as e:
            raise OSError(
                f"{e} The last checkpoint is {self.trainer.last_checkpoint}; the layer is in runner.sae, and "
                "runner.save_final_sae(folder) writes it."
            ) from e

    def _save_run_state(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            self.activations_store.save_to_checkpoint(checkpoint_path)
            self.layer.save_description(checkpoint_path)


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
                f"{folder} holds another run. Go on with it (resume_from_checkpoint='latest'), name "
                "another folder, or delete it."
            )


def refuse_other_settings(checkpoint: Path, saved: dict[str, Any], cfg: TranscoderRunnerConfig) -> None:
    """Raises ValueError where the run in `checkpoint`, with the config `saved`, is not the one of `cfg`."""
    ours = json.loads(json.dumps(cfg.to_dict()))
    names = sorted((ours.keys() | saved.keys()) - set(WHERE_NOT_WHAT) - {"sae"})
    changed = then_and_now(saved, ours, names)
    names = sorted(ours["sae"].keys() - {"metadata", "device"})
    changed += then_and_now(saved.get("sae", {}), ours["sae"], names, "sae.")
    if changed:
        raise ValueError(
            f"{checkpoint} is of another run, and cannot be resumed as this one. " + "; ".join(changed)
        )


def then_and_now(
    then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str], prefix: str = ""
) -> list[str]:
    """The settings that differ, a line each."""
    return [
        f"{prefix}{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in names
        if then.get(name) != now.get(name)
    ]


def make_folders(*folders: str | Path | None) -> None:
    """Makes the folders now rather than when the training is done, without what a kill left there."""
    for folder in [Path(folder) for folder in folders if folder is not None]:
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)


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


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file, in the place of an older one in one step."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
