"""How the layers of a frontier are trained, by name; and the paper's runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What all layers of a sweep share beside their size and their tokens."""

    name: str
    about: str
    """Where it comes from."""
    lr: float
    """The learning rate up to `lr_width` features."""
    lr_width: int | None
    """Beyond this width the rate falls as 1 / sqrt(width); None: it is the same at every width."""
    warm_up: float | int
    """Steps of linear warm-up; below 1 a share of the run."""
    decay: float
    """Share of the run over which the rate falls to 0 at the end."""
    standardize: bool
    """Whether the layers are trained on standardised activations."""

    def learning_rate(self, width: int) -> float:
        """The learning rate for layers of the parameters of a transcoder of `width` features."""
        if self.lr_width is None or width <= self.lr_width:
            return self.lr
        return self.lr * (self.lr_width / width) ** 0.5

    def settings(self, steps: int, width: int) -> dict[str, Any]:
        """The recipe as fields of `TranscoderRunnerConfig`."""
        warm_up = int(self.warm_up * steps) if self.warm_up < 1 else int(self.warm_up)
        return {
            "lr": self.learning_rate(width),
            "lr_warm_up_steps": min(warm_up, steps),
            "lr_decay_steps": int(self.decay * steps),
            "standardize_activations": self.standardize,
        }


RECIPES: Mapping[str, Recipe] = {
    "tuned": Recipe(
        "tuned",
        "Tuned on SmolLM2-135M at 4,608 features, runs of 1 to 8 M tokens.",
        lr=4e-3,
        lr_width=4_608,
        warm_up=0.05,
        decay=0.5,
        standardize=True,
    ),
    "paper": Recipe(
        "paper",
        "The paper's code: one rate for every model, 5,000 steps of warm-up, then constant; raw activations.",
        lr=4e-4,
        lr_width=None,
        warm_up=5_000,
        decay=0.0,
        standardize=False,
    ),
}
"""By name. Initialisation and loss are the architectures' own, which are the paper's for what it has."""


@dataclass(frozen=True)
class Preset:
    """A run of the paper: its model, block, size and tokens, as its code has them."""

    model: str
    layer: int
    d_model: int
    d_hidden: int
    """Width of the MxD's decoder branch."""
    tokens: int = 480_000_000
    text: str = "Skylion007/openwebtext"
    batch: int = 4_096
    ks: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    recipe: str = "paper"

    @property
    def transcoder_width(self) -> int:
        """32 features for each dimension."""
        return 32 * self.d_model


PRESETS: Mapping[str, Preset] = {
    "paper-gpt2": Preset("gpt2", 8, 768, 4 * 768),
    "paper-pythia-410m": Preset("pythia-410m", 15, 1_024, 4 * 1_024),
    "paper-pythia-1.4b": Preset("pythia-1.4b", 15, 2_048, 4 * 2_048),
    "paper-llama-3.2-3b": Preset("meta-llama/Llama-3.2-3B", 15, 3_072, 8_202),
}
"""The paper's four figures. Blocks and widths are the defaults of its training scripts."""
