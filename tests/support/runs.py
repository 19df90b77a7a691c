"""Training runs of a few steps on the tiny model."""

from typing import Any

from tiny import D_MODEL, HOOK_IN, HOOK_OUT

from mxd_lens import TrainingMxDConfig, TranscoderRunnerConfig

CONTEXT = 8


def run_config(
    widths: tuple[int, int] = (D_MODEL, D_MODEL), sae: dict[str, Any] | None = None, **changes: Any
) -> TranscoderRunnerConfig:
    """A run of ten steps on the tiny model; `sae` changes the layer's settings, `changes` the run's."""
    settings = {
        "hook_name": HOOK_IN,
        "hook_name_out": HOOK_OUT,
        "context_size": CONTEXT,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 8,
        "train_batch_size_tokens": 16,
        "training_tokens": 160,
        "output_path": None,
    } | changes
    layer = {"d_in": widths[0], "d_out": widths[1], "d_sae": 24, "d_hidden": 8, "k": 3} | (sae or {})
    return TranscoderRunnerConfig(sae=TrainingMxDConfig(**layer), **settings)
