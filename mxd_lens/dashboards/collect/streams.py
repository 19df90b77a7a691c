"""What is kept of a stream of firings, with memory in proportion to the experts and not to the stream.

Nothing here depends on how the stream is cut into batches, and nothing on a random generator's state.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

N_BINS = 64
LARGEST_PENDING = 100_000
"""Rows that wait for being sorted in, or as many as there are sorted rows, if these are more."""


class BestRows:
    """Of a stream of rows, those with the largest scores of each group; of equal ones the earlier.

    Rows that can still be among them are collected, and sorted in when there are as many as are sorted
    already: each row is sorted in a few times however long the stream is.
    """

    def __init__(self, n_groups: int, size: int) -> None:
        self.size = size
        self._threshold: Tensor | None = None
        self._n_groups = n_groups
        self._sorted: dict[str, Tensor] = {}
        self._pending: list[dict[str, Tensor]] = []
        self._n_pending = 0

    def add(self, group: Int[Tensor, " rows"], score: Tensor, **columns: Tensor) -> None:
        """Adds rows of the stream.

        Args:
            group: which group each belongs to.
            score: by which they are chosen, [rows].
            columns: what else a row has, [rows, ...]; the same ones at every call.
        """
        chance = self.may_stay(group, score)
        group, score = group[chance], score[chance]
        columns = {name: values[chance] for name, values in columns.items()}
        self._pending.append({"group": group, "score": score, **columns})
        self._n_pending += len(group)
        if self._n_pending > max(LARGEST_PENDING, len(self._sorted.get("group", ()))):
            self._sort_in()

    def may_stay(self, group: Int[Tensor, " rows"], score: Tensor) -> Bool[Tensor, " rows"]:
        """Which rows can be among the best; the others need not be added."""
        if self._threshold is None:
            return torch.ones_like(group, dtype=torch.bool)
        return score > self._threshold[group]

    @property
    def rows(self) -> dict[str, Tensor]:
        """The best rows so far: group, score and the columns; sorted by group, then the best first."""
        self._sort_in()
        return self._sorted

    @rows.setter
    def rows(self, rows: Mapping[str, Tensor]) -> None:
        self._sorted, self._pending, self._n_pending = dict(rows), [], 0
        if rows:
            self._find_threshold()

    def of(self, group: int) -> dict[str, Tensor]:
        """The best rows of one group, the best first."""
        rows = self.rows
        if not rows:
            return {}
        low, high = torch.searchsorted(rows["group"], torch.tensor([group, group + 1])).tolist()
        return {name: values[low:high] for name, values in rows.items()}

    def _sort_in(self) -> None:
        if not self._n_pending and self._sorted:
            return
        parts = ([self._sorted] if self._sorted else []) + self._pending
        self._pending, self._n_pending = [], 0
        if not parts:
            return
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[-1]}
        order = rows["score"].argsort(descending=True, stable=True)
        order = order[rows["group"][order].argsort(stable=True)]
        group = rows["group"][order]
        best = order[rank_within(group) < self.size]
        self._sorted = {name: values[best] for name, values in rows.items()}
        self._find_threshold()

    def _find_threshold(self) -> None:
        """The score that a row must exceed, for groups that have all their rows."""
        group, score = self._sorted["group"], self._sorted["score"]
        lowest = -torch.inf if score.is_floating_point() else torch.iinfo(score.dtype).min
        self._threshold = torch.full((self._n_groups,), lowest, dtype=score.dtype)
        last = rank_within(group) == self.size - 1
        self._threshold[group[last]] = score[last]


def rank_within(group: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """How many rows of the same group precede each row; the groups lie together."""
    _, counts = group.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(group)) - starts.repeat_interleave(counts)


def largest_of_each(
    group: Int[Tensor, " rows"], sequence: Int[Tensor, " rows"], score: Float[Tensor, " rows"]
) -> Int[Tensor, " n"]:
    """Which rows have the largest score of their group in their sequence, the first of equal ones."""
    order = score.argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]
    order = order[group[order].argsort(stable=True)]
    pairs = torch.stack([group[order], sequence[order]])
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(0)
    return order[is_first].sort().values


def priorities(
    seed: int, expert: Int[Tensor, " n"], sequence: Int[Tensor, " n"], position: Int[Tensor, " n"]
) -> Int[Tensor, " n"]:
    """A pseudo-random number for each firing, always the same one: a hash of where it is.

    The firings with the largest are a uniform sample, whatever the order they come in.
    """
    state = np.zeros(len(expert), dtype=np.uint64)
    for part in (torch.full_like(expert, seed), expert, sequence, position):
        # A round of the splitmix64 generator for each, numbers wrapping around at 2^64.
        state += part.numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return torch.from_numpy(state.view(np.int64))


class Histograms:
    """Histograms of positive values by group, in equal bins from 0 to a power of two.

    Where a value exceeds it the power grows and bins are merged in twos, which leaves every count as if the
    bins had been these from the start.
    """

    def __init__(self, n_groups: int) -> None:
        self.counts = torch.zeros(n_groups, N_BINS, dtype=torch.long)
        self.exponents = torch.full((n_groups,), torch.iinfo(torch.int32).min, dtype=torch.int32)

    def add(self, group: Int[Tensor, " rows"], values: Float[Tensor, " rows"]) -> None:
        """Counts values in."""
        values = values.double()
        needed = self.exponents.scatter_reduce(0, group, torch.frexp(values).exponent, "amax")
        merged = (needed.long() - self.exponents.long()).clamp_max(N_BINS.bit_length())
        grown = merged.nonzero()[:, 0]
        bins = torch.arange(N_BINS) >> merged[grown, None]
        self.counts[grown] = torch.zeros_like(self.counts[grown]).scatter_add(1, bins, self.counts[grown])
        self.exponents = needed
        # Scaling by powers of two is exact.
        bins = torch.ldexp(values * N_BINS, -needed[group]).long()
        self.counts.view(-1).index_add_(0, group * N_BINS + bins, torch.ones_like(group))

    def of(self, group: int) -> tuple[list[float], list[int]]:
        """The bounds and counts of a group's bins up to the last that is not empty; nothing if all are."""
        counts = self.counts[group].tolist()
        while counts and not counts[-1]:
            counts.pop()
        width = 2.0 ** int(self.exponents[group]) / N_BINS if counts else 0.0
        return [width * i for i in range(len(counts) + 1)] if counts else [], counts
