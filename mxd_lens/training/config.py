"""The configuration of a training run."""

from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, logger
from sae_lens.saes.sae import TrainingSAEConfig
from typing_extensions import override

from mxd_lens.architectures.training import TrainingPairedTranscoderConfig
from mxd_lens.artifacts.files import full_path
from mxd_lens.artifacts.identity import as_json
from mxd_lens.text import EMBEDDED
from mxd_lens.training.checkpoints import complete_checkpoints

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
"""SAELens' fields that are refused when set."""
MAY_DIFFER_ON_RESUME = (
    "device",
    "llm_device",
    "act_store_device",
    "output_path",
    "checkpoint_path",
    "cached_activations_path",
    "resume_from_checkpoint",
    "n_checkpoints",
    "n_checkpoints_kept",
    "stop_on_divergence",
    "logger",
    "verbose",
    "sae_lens_version",
    "sae_lens_training_version",
    "tokens_per_buffer",
)
"""Fields in which a resumed run may differ from the run that it continues: where it runs and writes."""

IN_METADATA = (
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
)
"""Fields that a saved layer says about itself."""


@dataclass
class TranscoderRunnerConfig(LanguageModelSAERunnerConfig[TrainingSAEConfig]):
    """A training run. SAELens' `LanguageModelSAERunnerConfig` with an output hook and other defaults.

    The defaults are the recipe of the paper's code on GPT-2: AdamW without weight decay (SAELens' Adam
    is the same), learning rate 4e-4 after 5,000 steps of linear warm-up, batches of 4,096 tokens in
    contexts of 128 with BOS, 480 M tokens of OpenWebText. Special tokens are left out, since models
    write massive activations on them; the paper's code keeps them (exclude_special_tokens=False).

    Not supported, and refused when set: hook_head_index, prefetch_llm_batches, compile_llm, compile_sae,
    model_from_pretrained_kwargs, model_class_name, dataset_trust_remote_code. is_dataset_tokenized has no
    effect, as in SAELens: a data set with a column "tokens" or "input_ids" is.
    """

    sae: TrainingSAEConfig
    """A layer of this package; or an SAE of SAELens, with the same hook as input and target."""
    model_name: str = "gpt2"
    """A name for `load_model`."""
    hook_name: str = "blocks.8.mlp.hook_in"
    """The input: activations of width sae.d_in."""
    hook_name_out: str = "blocks.8.hook_mlp_out"
    """The target: activations of width sae.d_out."""
    dataset_path: str = "Skylion007/openwebtext"
    """A source for `load_text`: "embedded", "nltk:NAME", a file or folder of text or data, a hub data set."""
    training_tokens: int = 480_000_000
    train_batch_size_tokens: int = 4096
    n_batches_in_buffer: int = 256
    """Contexts in the mixing buffer (SAELens' name); 256 of 128 tokens are 32,768 tokens."""
    lr: float = 4e-4
    lr_warm_up_steps: int = 5000
    exclude_special_tokens: bool | list[int] = True
    standardize_activations: bool = False
    """Train on centred inputs and on targets of unit scale, see `Standardizer` (an SAE: on activations of
    unit scale); the layer saved is for the activations themselves. The paper's code does not."""
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
    stop_on_divergence: bool = False
    """Stop, with TrainingDiverged, once the error is 1.5 times its best. Otherwise the run warns and goes to
    its end, and the layer's metadata says so."""
    logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))
    verbose: bool = False

    @override
    def __post_init__(self) -> None:
        self._expand_paths()
        checkpoint_path = self.checkpoint_path
        if checkpoint_path is None and self.output_path is not None:
            checkpoint_path = str(Path(self.output_path) / "checkpoints")
        defaults = {f.name: f.default for f in fields(TranscoderRunnerConfig)}
        for name in NOT_SUPPORTED:
            value = getattr(self, name)
            if value not in (defaults[name], {}):
                raise ValueError(f"{name} is not supported here, got {value!r}.")
        if not isinstance(self.sae, TrainingSAEConfig):
            raise ValueError(
                f"sae must be the config of a training transcoder, got {type(self.sae).__name__}."
            )
        is_transcoder = isinstance(self.sae, TrainingPairedTranscoderConfig)
        if self.standardize_activations and self.sae.normalize_activations != "none":
            raise ValueError(
                "standardize_activations and sae.normalize_activations = "
                f"{self.sae.normalize_activations!r} both scale the activations: use one."
            )
        if self.sae.dtype == "float16":
            raise ValueError(
                "sae.dtype is float16: Adam's epsilon is zero there, and the weights would be NaN after a "
                "step. Train in float32 or bfloat16, and convert the trained layer."
            )
        if is_transcoder and self.hook_name == self.hook_name_out:
            raise ValueError(
                f"hook_name and hook_name_out are both {self.hook_name}: a layer that reconstructs its own "
                "input is an SAE; sae must be the config of one."
            )
        if not is_transcoder and self.hook_name != self.hook_name_out:
            raise ValueError(
                f"sae is a {type(self.sae).__name__}, an SAE: hook_name and hook_name_out must be the same, "
                f"got {self.hook_name} and {self.hook_name_out}."
            )
        self._check_numbers()
        if self.use_cached_activations and self.cached_activations_path is None:
            model = self.model_name.replace("/", "_")
            self.cached_activations_path = str(Path("activations") / model / self.hook_name)
        if self.dead_feature_window is None:
            self.dead_feature_window = max(1, min(1000, self.total_training_steps // 10))
        super().__post_init__()
        # SAELens puts a random folder in between, and a later run could not find its checkpoints.
        self.checkpoint_path = checkpoint_path
        self.model_from_pretrained_kwargs: dict[str, Any] | None = {}

    def _expand_paths(self) -> None:
        """Paths are absolute and without ~ from here on: on writing as on reading, and for a later reader."""
        for name in (
            "output_path",
            "checkpoint_path",
            "cached_activations_path",
            "from_pretrained_path",
            "resume_from_checkpoint",
        ):
            value = getattr(self, name)
            if value is not None and value != LATEST:
                setattr(self, name, str(full_path(value)))
        for name in ("model_name", "dataset_path"):
            path = full_path(getattr(self, name))
            is_there = (path / "config.json").is_file() if name == "model_name" else path.exists()
            if is_there and getattr(self, name) not in ("", EMBEDDED):
                setattr(self, name, str(path))

    def _check_numbers(self) -> None:
        """Raises ValueError for numbers with which no run is possible, before a model loads."""
        for name in (
            "n_checkpoints_kept",
            "training_tokens",
            "train_batch_size_tokens",
            "context_size",
            "store_batch_size_prompts",
            "n_batches_in_buffer",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("n_checkpoints", "lr_warm_up_steps", "lr_decay_steps", "lr"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}.")
        if self.context_size == 1 and self.prepend_bos:
            raise ValueError(
                "context_size is 1 and prepend_bos is set: the sequences would hold BOS alone. Raise "
                "context_size."
            )
        if self.training_tokens < self.train_batch_size_tokens:
            raise ValueError(
                f"training_tokens = {self.training_tokens} is less than one batch of "
                f"{self.train_batch_size_tokens} tokens."
            )
        buffer_size = self.n_batches_in_buffer * len(range(self.context_size)[slice(*self.seqpos_slice)])
        if buffer_size < self.train_batch_size_tokens:
            raise ValueError(
                f"the buffer holds {buffer_size} tokens, fewer than a batch of "
                f"{self.train_batch_size_tokens}: raise n_batches_in_buffer or lower train_batch_size_tokens."
            )
        if not 0 <= self.activations_mixing_fraction <= 1:
            raise ValueError(
                f"activations_mixing_fraction must be from 0 to 1, got {self.activations_mixing_fraction}."
            )
        if self.lr_warm_up_steps > self.total_training_steps:
            logger.warning(
                "lr_warm_up_steps is %d and the run has %d steps: the learning rate never reaches %g.",
                self.lr_warm_up_steps,
                self.total_training_steps,
                self.lr,
            )
        for name in ("device", "llm_device", "act_store_device"):
            device = getattr(self, name)
            if device not in (None, "with_model"):
                check_device(device, name)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the run, as JSON takes it: its RunIdentity compares it."""
        settings = self.to_dict()
        layer = {name: v for name, v in settings["sae"].items() if name not in ("metadata", "device")}
        kept = {name: v for name, v in settings.items() if name not in (*MAY_DIFFER_ON_RESUME, "sae")}
        return as_json(kept | {"sae": layer})

    @property
    def hook_widths(self) -> dict[str, int]:
        """The hook points a batch holds, in order, and their widths: x and y, or an SAE's one."""
        if not isinstance(self.sae, TrainingPairedTranscoderConfig):
            return {self.hook_name: self.sae.d_in}
        return {self.hook_name: self.sae.d_in, self.hook_name_out: self.sae.d_out}

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means."""
        if self.resume_from_checkpoint != LATEST:
            return Path(self.resume_from_checkpoint) if self.resume_from_checkpoint else None
        found = complete_checkpoints(self.checkpoint_path)
        return found[-1] if found else None


def check_device(device: str | torch.device, name: str = "device") -> None:
    """Raise ValueError where `device` is not the name of a device that this machine has."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).partition("\n")[0]
        raise ValueError(f"{name} is {str(device)!r}, which cannot be used here: {reason}") from e
