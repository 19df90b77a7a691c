"""Whether a training run got worse: its last error against its best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from typing_extensions import Self


class TrainingDiverged(FloatingPointError):
    """The error of a run rose far above its best, and the run was asked to stop then."""


@dataclass(frozen=True)
class Divergence:
    """A training curve's last error beside its best one, both running medians of a few points.

    Made from any sequence of errors relative to the target (1 is the error of an output of zero), so that a
    run that resumes, or a sweep that reads histories, comes to the same verdict.
    """

    last: float
    """The median of the last points."""
    best: float
    """The smallest median of as many points."""
    best_at: int
    """Index of the last of the points that `best` is of."""
    worst: float
    """The largest of the last points."""
    rise: float
    """The last error over the best one, by the measure that rose least."""

    FACTOR = 1.5
    """How many times its best error a diverged run has."""
    WINDOW = 5
    """Points in a median: one bad batch is no divergence."""

    @classmethod
    def of(cls, errors: Sequence[float], *others: Sequence[float]) -> Self | None:
        """Return the verdict on a curve; None while it is too short for one.

        Args:
            errors: one for each point.
            others: the points by other measures. A few tokens with very large targets move a ratio of sums,
                and a few with very small ones a mean of ratios, while nothing is wrong: a run that diverges
                rises by every measure.
        """
        if len(errors) < cls.WINDOW:
            return None
        ends = [cls._ends(curve) for curve in (errors, *others)]
        rise = min(_ratio(last, best) for last, best, _ in ends)
        return cls(*ends[0], max(errors[-cls.WINDOW :]), rise)

    @classmethod
    def _ends(cls, errors: Sequence[float]) -> tuple[float, float, int]:
        """The last median, the least one, and the index of the last point that this is of."""
        medians = [median(errors[i - cls.WINDOW : i]) for i in range(cls.WINDOW, len(errors) + 1)]
        best_at = min(range(len(medians)), key=medians.__getitem__)
        return medians[-1], medians[best_at], best_at + cls.WINDOW - 1

    @property
    def has_diverged(self) -> bool:
        """Whether the last error is more than `FACTOR` times the best one, or not a number."""
        return self.rise > self.FACTOR

    @property
    def is_worse_than_zero(self) -> bool:
        """Whether an output of zero would have a smaller error, at one of the last points at least."""
        return not max(self.last, self.worst) < 1

    def __str__(self) -> str:
        return f"the error is {self.last:.3g}, and was {self.best:.3g} at its best"

    def to_dict(self) -> dict[str, Any]:
        """Return what a layer's metadata says of it."""
        return {
            "last_error": self.last,
            "best_error": self.best,
            "worst_error": self.worst,
            "diverged": self.has_diverged,
        }


def _ratio(last: float, best: float) -> float:
    """last / best; infinite where that is not a number."""
    if last == best:
        return 1.0
    return math.inf if best == 0 or math.isnan(last / best) else last / best
