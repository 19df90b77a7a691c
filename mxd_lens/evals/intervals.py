"""Bootstrap confidence intervals over sequences: how far a mean would move on other text of the same kind.

Tokens of one sequence are alike, so that sequences are drawn, not tokens.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 4_000


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resampled(
    values: Float[Tensor, "... sequences"], resamples: int = RESAMPLES, seed: int = 0
) -> Float[Tensor, "resamples ..."]:
    """Means over sequences drawn with replacement; the same draws for all rows, which keeps them paired."""
    n = values.shape[-1]
    chosen = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones(resamples, n, dtype=torch.float64)
    )
    return (counts @ values.double().reshape(-1, n).T / n).reshape(resamples, *values.shape[:-1])


def interval(drawn: Float[Tensor, " resamples"], mean: float) -> Interval:
    """The 2.5 % and 97.5 % quantiles of what was drawn, around the mean."""
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Interval(mean, low, high)


def mean_interval(values: Float[Tensor, " sequences"], seed: int = 0) -> Interval:
    """The mean over sequences of equal length, with its interval.

    Raises:
        ValueError: there are fewer than two sequences.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"An interval needs the values of two sequences or more, got {tuple(values.shape)}.")
    return interval(resampled(values, seed=seed), values.double().mean().item())


def difference(
    values: Float[Tensor, " sequences"], baseline: Float[Tensor, " sequences"], seed: int = 0
) -> Interval:
    """The mean of values - baseline on the same sequences, with its interval."""
    return mean_interval(values.double() - baseline.double(), seed)


def ratio(
    values: Float[Tensor, " sequences"], baseline: Float[Tensor, " sequences"], seed: int = 0
) -> Interval:
    """mean(values) / mean(baseline) on the same sequences, with its interval."""
    both = torch.stack([values, baseline]).double()
    above, below = resampled(both, seed=seed).unbind(1)
    one, other = both.mean(1).tolist()
    return interval(above / below, one / other)
