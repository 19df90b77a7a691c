"""Which experts tell two sets of texts apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.firings import firings
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.models import model_first


@dataclass(frozen=True)
class ExpertContrast(Tabular):
    """What `find_experts` found: experts whose mean coefficient differs between two texts."""

    experts: Int[Tensor, " n"]
    """Largest difference first, by magnitude."""
    means_a: Float[Tensor, " n"]
    """Mean coefficient over the tokens of the first text; 0 counts where the expert is not active."""
    means_b: Float[Tensor, " n"]
    """Over those of the second."""
    n_tokens_a: int
    """Tokens of the first text, special ones left out."""
    n_tokens_b: int
    """Of the second."""

    @property
    def title(self) -> str:
        return f"Mean coefficients: a over {self.n_tokens_a:,} tokens, b over {self.n_tokens_b:,}"

    @property
    def columns(self) -> list[str]:
        return ["expert", "mean in a", "mean in b", "a - b"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for n, a, b in zip(self.experts.tolist(), self.means_a.tolist(), self.means_b.tolist(), strict=True):
            yield [n, a, b, a - b]


@model_first
def find_experts(
    model: Any,
    sae: SAE[Any],
    text_a: str | Sequence[str],
    text_b: str | Sequence[str],
    n: int = 10,
    progress: bool = True,
) -> ExpertContrast:
    """The experts whose mean coefficient differs most between two texts.

        find_experts(model, mxd, "Le chat est sur la table.", "The cat is on the table.")

    Args:
        model: any hooked model; the layer may be attached to it or not.
        sae: the layer.
        text_a, text_b: a text, or several; one longer than the model's context is cut. Means are over all
            tokens that are not special ones, so that a long text counts more than a short one.
        n: how many experts, by the magnitude of the difference; its sign says which text has more.
        progress: whether to show a progress bar.

    Raises:
        ValueError: n is not positive, a text has no token, or the layer does not belong to the model.
    """
    if n < 1:
        raise ValueError(f"n must be a positive number of experts, got {n}.")
    sides = [firings(model, sae, text, progress=progress) for text in (text_a, text_b)]
    mean_a, mean_b = (torch.as_tensor(side.matrix.mean(0)).flatten() for side in sides)
    tokens_a, tokens_b = (side.n_tokens for side in sides)
    order = (mean_a - mean_b).abs().argsort(descending=True, stable=True)[:n]
    return ExpertContrast(order, mean_a[order], mean_b[order], tokens_a, tokens_b)
