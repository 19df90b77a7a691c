"""Whether a training run got worse: its last error against its best."""

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
    worst: float = 0.0
    """The largest of the last points."""

    FACTOR = 1.5
    """How many times its best error a diverged run has."""
    WINDOW = 5
    """Points in a median: one bad batch is no divergence."""

    @classmethod
    def of(cls, errors: Sequence[float]) -> Self | None:
        """Return the verdict on a curve; None while it is too short for one."""
        if len(errors) < cls.WINDOW:
            return None
        medians = [median(errors[i - cls.WINDOW : i]) for i in range(cls.WINDOW, len(errors) + 1)]
        best_at = min(range(len(medians)), key=medians.__getitem__)
        return cls(medians[-1], medians[best_at], best_at + cls.WINDOW - 1, max(errors[-cls.WINDOW :]))

    @property
    def has_diverged(self) -> bool:
        """Whether the last error is `FACTOR` times the best one, or not a number."""
        return not self.last <= self.FACTOR * self.best

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
