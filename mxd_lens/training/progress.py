"""What a training run shows: a line before it starts, and a bar of tokens."""

from collections.abc import Iterable
from typing import Any

from sae_lens.saes.sae import TrainingSAE
from tqdm.auto import tqdm

from mxd_lens.training.config import TranscoderRunnerConfig


class TrainingBar(tqdm):
    """Tokens trained on, of all of the run; while the buffer of activations fills it says how far that is."""

    def __init__(self, total: int, initial: int = 0) -> None:
        self._is_buffering = False
        super().__init__(
            total=total, initial=initial, desc="Training", unit=" tokens", unit_scale=True, miniters=0
        )

    def buffering(self, n_rows: int, size: int) -> None:
        """Say that the buffer holds `n_rows` of `size` tokens."""
        self._is_buffering = True
        self.set_description(f"Running the language model: {n_rows:,} of {size:,} tokens", refresh=False)
        self.update(0)

    def reach(self, n_tokens: int, text: str = "") -> None:
        """Move to `n_tokens`, with `text` behind the bar."""
        if self._is_buffering:
            self._is_buffering = False
            self.set_description("Training", refresh=False)
        if text:
            self.set_postfix_str(text, refresh=False)
        self.update(min(n_tokens, self.total) - self.n)  # the last batch may reach beyond the end


def summary(cfgs: Iterable[TranscoderRunnerConfig], saes: Iterable[TrainingSAE[Any]]) -> str:
    """Return one line about a run: layers, hook points, sizes, parameters, tokens, memory.

    The memory is that of weights, gradients and Adam's two moments, and of the buffer of activations; the
    language model's comes on top.
    """
    cfgs, saes = list(cfgs), list(saes)
    cfg, sae = cfgs[0], saes[0]
    n_parameters = sum(p.numel() for each in saes for p in each.parameters())
    widths: dict[str, int] = {}
    for each in cfgs:
        widths |= each.hook_widths
    weights = sum(4 * p.numel() * p.element_size() for each in saes for p in each.parameters())
    buffer = 2 * cfg.n_batches_in_buffer * cfg.context_size * sum(widths.values()) * 4
    what = (
        f"{sae.cfg.architecture()} with d_sae = {sae.cfg.d_sae:,}"
        if len(saes) == 1
        else f"{len(saes)} layers"
    )
    hooks = " -> ".join(f"{name} [{width:,}]" for name, width in widths.items())
    where = hooks if len(cfgs) == 1 else f"{len(widths)} hook points"
    return (
        f"Training {what} on {cfg.model_name}, {where}: {n_parameters:,} parameters, "
        f"{cfg.training_tokens:,} tokens in {cfg.total_training_steps:,} steps, about "
        f"{(weights + buffer) / 2**30:.2f} GiB beside the language model."
    )
