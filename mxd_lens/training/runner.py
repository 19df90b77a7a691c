"""Training one layer on one language model: config in, folder out."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import wandb
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, logger
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
from typing_extensions import override

from mxd_lens.architectures.base import TrainingPairedTranscoder, TrainingPairedTranscoderConfig
from mxd_lens.models import load_model
from mxd_lens.training.activations import PairedActivationsStore
from mxd_lens.training.trainer import PARTIAL, TranscoderTrainer, complete_checkpoints

HISTORY_FILENAME = "history.json"
LATEST = "latest"

NOT_SUPPORTED = (
    "hook_head_index",
    "prefetch_llm_batches",
    "compile_llm",
    "compile_sae",
    "model_from_pretrained_kwargs",
    "model_class_name",
    "dataset_trust_remote_code",
)
WHERE_NOT_WHAT = (
    "device",
    "llm_device",
    "act_store_device",
    "output_path",
    "checkpoint_path",
    "cached_activations_path",
    "resume_from_checkpoint",
    "n_checkpoints",
    "n_checkpoints_kept",
    "logger",
    "verbose",
    "sae_lens_version",
    "sae_lens_training_version",
    "tokens_per_buffer",
)
"""Fields in which a resumed run may differ from the run it goes on with."""


@dataclass
class TranscoderRunnerConfig(LanguageModelSAERunnerConfig[TrainingPairedTranscoderConfig]):
    """A training run. SAELens' `LanguageModelSAERunnerConfig` with an output hook and other defaults.

    The defaults are the recipe of the paper's code on GPT-2: AdamW without weight decay (SAELens' Adam
    is the same), learning rate 4e-4 after 5,000 steps of linear warm-up, batches of 4,096 tokens in
    contexts of 128 with BOS, 480 M tokens of OpenWebText. Special tokens are left out, since models
    write massive activations on them; the paper's code keeps them (exclude_special_tokens=False).

    Not supported, and refused when set: hook_head_index, prefetch_llm_batches, compile_llm, compile_sae,
    model_from_pretrained_kwargs, model_class_name, dataset_trust_remote_code. is_dataset_tokenized has no
    effect, as in SAELens: a data set with a column "tokens" or "input_ids" is.
    """

    sae: TrainingPairedTranscoderConfig
    model_name: str = "gpt2"
    """A name for `load_model`."""
    hook_name: str = "blocks.8.mlp.hook_in"
    """The input: activations of width sae.d_in."""
    hook_name_out: str = "blocks.8.hook_mlp_out"
    """The target: activations of width sae.d_out."""
    dataset_path: str = "Skylion007/openwebtext"
    """A source for `load_text`: "embedded", "nltk:NAME", a text file or folder, a hub data set."""
    training_tokens: int = 480_000_000
    train_batch_size_tokens: int = 4096
    n_batches_in_buffer: int = 256
    """Contexts in the mixing buffer (SAELens' name); 256 of 128 tokens are 32,768 tokens."""
    lr: float = 4e-4
    lr_warm_up_steps: int = 5000
    exclude_special_tokens: bool | list[int] = True
    dead_feature_window: int | None = None
    """Steps without firing after which an expert counts as dead. None: a tenth of the run, at most 1,000."""
    use_cached_activations: bool = False
    """Keep the activations on disk, so that further epochs and runs need no language model."""
    cached_activations_path: str | None = None
    """Their folder. Default: activations/MODEL/HOOK_NAME."""
    cached_activations_dtype: str = "bfloat16"
    """Their dtype on disk."""
    n_checkpoints: int = 10
    n_checkpoints_kept: int = 2
    """How many of the last checkpoints stay on disk."""
    checkpoint_path: str | None = None
    """Where checkpoints go. Default: output_path/checkpoints."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or "latest" for the newest one in checkpoint_path (from the start if none)."""
    logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))
    verbose: bool = False

    @override
    def __post_init__(self) -> None:
        checkpoint_path = self.checkpoint_path
        if checkpoint_path is None and self.output_path is not None:
            checkpoint_path = str(Path(self.output_path) / "checkpoints")
        defaults = {f.name: f.default for f in fields(TranscoderRunnerConfig)}
        for name in NOT_SUPPORTED:
            value = getattr(self, name)
            if value not in (defaults[name], {}):
                raise ValueError(f"{name} is not supported here, got {value!r}.")
        if not isinstance(self.sae, TrainingPairedTranscoderConfig):
            raise ValueError(
                f"sae must be the config of a training transcoder, got {type(self.sae).__name__}."
            )
        if self.sae.dtype == "float16":
            raise ValueError(
                "sae.dtype is float16: Adam's epsilon is zero there, and the weights would be NaN after a "
                "step. Train in float32 or bfloat16, and convert the trained layer."
            )
        if self.hook_name == self.hook_name_out:
            raise ValueError(
                f"hook_name and hook_name_out are both {self.hook_name}: a layer that reconstructs its own "
                "input is an SAE, which SAELens' runner trains."
            )
        for name in (
            "n_checkpoints_kept",
            "training_tokens",
            "train_batch_size_tokens",
            "context_size",
            "store_batch_size_prompts",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.training_tokens < self.train_batch_size_tokens:
            raise ValueError(
                f"training_tokens = {self.training_tokens} is less than one batch of "
                f"{self.train_batch_size_tokens} tokens."
            )
        if self.use_cached_activations and self.cached_activations_path is None:
            model = self.model_name.replace("/", "_")
            self.cached_activations_path = str(Path("activations") / model / self.hook_name)
        if self.dead_feature_window is None:
            self.dead_feature_window = max(1, min(1000, self.total_training_steps // 10))
        super().__post_init__()
        # SAELens puts a random folder in between, and a later run could not find its checkpoints.
        self.checkpoint_path = checkpoint_path
        self.model_from_pretrained_kwargs: dict[str, Any] | None = {}

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means."""
        if self.resume_from_checkpoint != LATEST:
            return Path(self.resume_from_checkpoint) if self.resume_from_checkpoint else None
        found = complete_checkpoints(self.checkpoint_path)
        return found[-1] if found else None


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
        self._check_folders()
        self.model = override_model or load_model(cfg.model_name, cfg.llm_device or "cpu")
        self.activations_store = PairedActivationsStore.from_config(self.model, cfg, override_dataset)
        self.sae = override_sae if override_sae is not None else self._new_sae()
        self.sae.to(cfg.device)
        self.trainer = TranscoderTrainer(
            # The trainer would give up where the final checkpoint cannot be written.
            cfg=replace(cfg.to_sae_trainer_config(), save_final_checkpoint=False),
            sae=self.sae,
            data_provider=self.activations_store,
            save_checkpoint_fn=self._save_run_state,
        )
        self.trainer.n_checkpoints_kept = cfg.n_checkpoints_kept
        if self.checkpoint is not None:
            self._load_checkpoint(self.checkpoint)
        self._set_metadata()
        self._make_folders()

    def _new_sae(self) -> TrainingSAE[Any]:
        if self.cfg.from_pretrained_path is not None:
            return TrainingSAE.load_from_disk(self.cfg.from_pretrained_path, self.cfg.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.cfg.seed)
            return TrainingSAE.from_dict(self.cfg.get_training_sae_cfg_dict())

    def run(self) -> TrainingPairedTranscoder:
        """Trains, saves and returns the layer.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM; the message says where the run was saved.
            FloatingPointError: activations or loss not finite; the last checkpoint is kept.
            OSError: the result could not be written; it stays in `self.sae`.
        """
        log = self.cfg.logger
        if log.log_to_wandb:
            wandb.init(
                project=log.wandb_project,
                entity=log.wandb_entity,
                config=self.cfg.to_dict(),
                name=log.run_name,
                id=log.wandb_id,
            )
        with self.trainer.stopping_on_signals():
            self.trainer.fit()
        self.sae.normalize_decoder()  # as before every step
        self.sae.eval()
        if self.cfg.save_final_checkpoint:
            self.trainer.checkpoint_or_warn(f"final_{self.trainer.n_training_samples}")
        if self.cfg.output_path is not None:
            self.save_final_sae(self.cfg.output_path)
        if log.log_to_wandb:
            wandb.finish()
        return self.sae

    def save_final_sae(self, output_path: str | Path) -> None:
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
            self._save_run_state(partial, with_activations=False)
            # cfg.json last: a folder that has one is complete.
            for file in sorted(partial.iterdir(), key=lambda file: file.name == SAE_CFG_FILENAME):
                file.replace(folder / file.name)
        except (OSError, SafetensorError) as e:
            raise OSError(
                f"Could not write the trained layer to {folder}: {e}. The last checkpoint is "
                f"{self.trainer.last_checkpoint}; the layer is in runner.sae, and "
                "runner.save_final_sae(folder) writes it."
            ) from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _save_run_state(self, checkpoint_path: Path | None, with_activations: bool = True) -> None:
        if checkpoint_path is None:
            return
        if with_activations:
            self.activations_store.save_to_checkpoint(checkpoint_path)
        (checkpoint_path / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict(), indent=1))
        (checkpoint_path / HISTORY_FILENAME).write_text(json.dumps(self.trainer.history))

    def _load_checkpoint(self, checkpoint: Path) -> None:
        logger.info("Resuming from %s", checkpoint)
        with reading(checkpoint / TRAINER_STATE_FILENAME):
            self.trainer.load_trainer_state(checkpoint)
        with reading(checkpoint / SAE_WEIGHTS_FILENAME):
            self.sae.load_weights_from_checkpoint(checkpoint)
        with reading(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME):
            self.activations_store.load_from_checkpoint(checkpoint)
        with reading(checkpoint / HISTORY_FILENAME) as file:
            self.trainer.history = json.loads(file.read_text(encoding="utf-8"))

    def _check_folders(self) -> None:
        """Refuses to write over another run, or to go on with one."""
        if self.checkpoint is not None:
            if not (self.checkpoint / RUNNER_CFG_FILENAME).is_file():
                raise FileNotFoundError(f"{self.checkpoint} is not a checkpoint of a training run.")
            with reading(self.checkpoint / RUNNER_CFG_FILENAME) as file:
                saved = json.loads(file.read_text(encoding="utf-8"))
            ours = json.loads(json.dumps(self.cfg.to_dict()))
            changed = [
                f"{name}: {saved.get(name)!r} then, {ours.get(name)!r} now"
                for name in sorted((ours.keys() | saved.keys()) - set(WHERE_NOT_WHAT) - {"sae"})
                if saved.get(name) != ours.get(name)
            ]
            saved_sae, our_sae = saved.get("sae", {}), ours["sae"]
            changed += [
                f"sae.{name}: {saved_sae.get(name)!r} then, {our_sae.get(name)!r} now"
                for name in sorted(our_sae.keys() - {"metadata", "device"})
                if saved_sae.get(name) != our_sae.get(name)
            ]
            if changed:
                raise ValueError(
                    f"{self.checkpoint} is of another run, and cannot be resumed as this one. "
                    + "; ".join(changed)
                )
            return
        for folder in (self.cfg.output_path, self.cfg.checkpoint_path):
            if folder is None:
                continue
            path = Path(folder)
            if (path / SAE_CFG_FILENAME).exists() or complete_checkpoints(path):
                raise FileExistsError(
                    f"{path} holds another run. Go on with it (resume_from_checkpoint='latest'), name "
                    "another folder, or delete it."
                )

    def _make_folders(self) -> None:
        """Makes the folders now rather than when the training is done, without what a kill left there."""
        for folder in (self.cfg.output_path, self.cfg.checkpoint_path):
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                for partial in Path(folder).glob(f"{PARTIAL}*"):
                    shutil.rmtree(partial, ignore_errors=True)

    def _set_metadata(self) -> None:
        metadata, cfg = self.sae.cfg.metadata, self.cfg
        for name in (
            "model_name",
            "hook_name",
            "hook_name_out",
            "dataset_path",
            "context_size",
            "seqpos_slice",
            "prepend_bos",
            "exclude_special_tokens",
            "sequence_separator_token",
            "disable_concat_sequences",
            "training_tokens",
        ):
            metadata[name] = getattr(cfg, name)


@contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Says which file of a checkpoint could not be read."""
    try:
        yield file
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as e:
        raise ValueError(f"The checkpoint's {file} is damaged ({type(e).__name__}: {e}).") from e
