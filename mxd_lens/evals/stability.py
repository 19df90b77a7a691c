"""Whether training again, from another seed, finds the same experts.

Experts of two layers are matched one to one, so that the sum of their similarities is largest, by

    decoder         the cosine of their mean directions, what a coefficient of 1 writes on average
    coactivation    the correlation of their firing on the same tokens

c_n itself is no direction that two MxDs share: an MxD is the same with c_nj multiplied and column j of D
divided by any number, for every output dimension j. The mean direction, sum_t a_n u_n / sum_t a_n, is
what it writes, and for a transcoder it is c_n.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mxd_lens.analysis.firings import Firings, read
from mxd_lens.analysis.sequences import Text
from mxd_lens.analysis.statistics import ExpertStatistics
from mxd_lens.models import model_first

EXACT = 4096
"""Up to this many experts the best matching is found; beyond it a greedy one, from the most similar on."""
CANDIDATES = 64
"""Of a greedy matching: the most similar experts that each may be matched with."""
BLOCK = 256
"""Experts compared at once, each with all of the other layer."""
ALIKE = 0.7
"""Matched experts at least this similar count as found again."""


class Usage(NamedTuple):
    """How a layer's experts are used on a text, for comparison with another layer's."""

    statistics: ExpertStatistics
    """Their directions, and how often they fire."""
    firings: Firings
    """On which tokens."""

    @property
    def alive(self) -> Int[Tensor, " n"]:
        """The experts that fire and write: the others cannot be compared."""
        wrote = self.statistics.direction_sum.norm(dim=-1) > 0
        return ((self.statistics.fired > 0) & wrote).nonzero()[:, 0]

    @property
    def directions(self) -> Float[Tensor, "n d_out"]:
        """The mean direction of every expert alive, of unit length."""
        return F.normalize(self.statistics.mean_direction(self.alive).double(), dim=-1)

    def firing(self, shift: int = 0) -> Tensor:
        """Whether each expert alive fires on each token, [alive, tokens], sparse.

        Args:
            shift: how many tokens later it is said to fire; what goes over the end comes back.
        """
        n_tokens, alive = self.statistics.n_tokens, self.alive
        of_alive = self.firings.of_experts(alive.cpu())
        at = torch.stack([of_alive.expert, (of_alive.token_of + shift) % n_tokens]).to(alive.device)
        ones = torch.ones(at.shape[1], dtype=torch.float32, device=at.device)
        shape = (len(alive), n_tokens)
        return torch.sparse_coo_tensor(at, ones, shape, check_invariants=False).coalesce()


def read_usage(model: Any, sae: SAE[Any], tokens: Text, batch_size: int = 8, progress: bool = True) -> Usage:
    """How a layer's experts are used on a text, and where they fire.

    Args:
        model, sae, tokens, batch_size, progress: as for `expert_statistics`.

    Raises:
        ValueError, TypeError: as `expert_statistics`.
    """
    statistics = ExpertStatistics.of(sae)
    found = []
    for reading in read(model, {"": sae}, tokens, batch_size, progress):
        found.append(reading[""].firings)
        statistics.add_parts(reading[""].parts)
    return Usage(statistics, Firings.join(found))


class Similarities:
    """The similarity of every expert of one layer to every one of another, a block at a time.

    Shuffled, there is nothing in common to find: what is left is chance.
    """

    def __init__(self, one: Usage, other: Usage, shuffled: bool = False) -> None:  # noqa: ARG002
        self.shape = len(one.alive), len(other.alive)

    def block(self, rows: slice) -> Float[Tensor, "rows n"]:
        raise NotImplementedError


class ByDecoder(Similarities):
    """The cosine of mean directions. Shuffled: the other layer's directions turned at random, all alike."""

    def __init__(self, one: Usage, other: Usage, shuffled: bool = False) -> None:
        super().__init__(one, other, shuffled)
        self._one, self._other = one.directions, other.directions
        if shuffled:
            d_out = self._other.shape[1]
            noise = torch.randn(d_out, d_out, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            self._other = self._other @ torch.linalg.qr(noise).Q.to(self._other.device)

    def block(self, rows: slice) -> Float[Tensor, "rows n"]:
        return self._one[rows] @ self._other.T


class ByCoactivation(Similarities):
    """The correlation of firing. Shuffled: the other layer's firing half the text later."""

    def __init__(self, one: Usage, other: Usage, shuffled: bool = False) -> None:
        super().__init__(one, other, shuffled)
        self._n_tokens = one.statistics.n_tokens
        self._one = one.firing()
        self._other = other.firing(self._n_tokens // 2 if shuffled else 0)
        self._fired = [u.statistics.fired[u.alive].double() for u in (one, other)]

    def block(self, rows: slice) -> Float[Tensor, "rows n"]:
        T = self._n_tokens
        of_block = self._one.index_select(0, torch.arange(self.shape[0])[rows].to(self._one.device))
        together = torch.sparse.mm(self._other, of_block.to_dense().T).T.double()
        n, m = self._fired[0][rows, None], self._fired[1][None]
        variances = n * (T - n) * m * (T - m)
        # An expert that always fires tells nothing by firing.
        return ((T * together - n * m) / variances.sqrt()).where(variances > 0, 0.0)


SIMILARITIES: Mapping[str, type[Similarities]] = {"decoder": ByDecoder, "coactivation": ByCoactivation}


class Matching(NamedTuple):
    """Experts of two layers matched one to one; places among those alive, not ids."""

    partner: Int[Tensor, " n"]
    """For every expert alive of the first layer its partner in the second, or -1."""
    similarity: Float[Tensor, " n"]
    """How similar they are; NaN without a partner."""
    nearest: Float[Tensor, " n"]
    """The similarity of the most similar expert, taken or not."""


def match(similarities: Similarities, exact: int = EXACT) -> Matching:
    """Matches the experts of two layers.

    Up to `exact` experts the sum of similarities is the largest there is (scipy's linear_sum_assignment);
    beyond, pairs are taken greedily, the most similar first, among each expert's nearest 64.

    Raises:
        ValueError: one of the layers has no expert that fires.
    """
    n, m = similarities.shape
    if not n or not m:
        raise ValueError(f"There is nothing to match: {n} and {m} experts fire on this text.")
    partner = torch.full((n,), -1)
    similarity = torch.full((n,), math.nan, dtype=torch.float64)
    blocks = [slice(i, i + BLOCK) for i in range(0, n, BLOCK)]
    if max(n, m) <= exact:
        whole = torch.cat([similarities.block(rows).cpu() for rows in blocks])
        nearest = whole.amax(-1)
        rows, columns = (torch.as_tensor(i) for i in linear_sum_assignment(whole.numpy(), maximize=True))
        partner[rows] = columns
        similarity[rows] = whole[rows, columns]
        return Matching(partner, similarity, nearest)
    found = [similarities.block(rows).topk(min(CANDIDATES, m)) for rows in blocks]
    values = torch.cat([f.values.cpu() for f in found])
    columns = torch.cat([f.indices.cpu() for f in found])
    taken = np.zeros(m, dtype=bool)
    for place in values.flatten().argsort(descending=True, stable=True).tolist():
        row, slot = divmod(place, values.shape[1])
        column = int(columns[row, slot])
        if partner[row] < 0 and not taken[column]:
            taken[column] = True
            partner[row], similarity[row] = column, values[row, slot]
    return Matching(partner, similarity, values[:, 0])


@dataclass(frozen=True)
class Stability:
    """How alike the experts of layers that differ in their seed are; means over the pairs of layers."""

    n_layers: int
    """Layers compared."""
    n_tokens: int
    """Tokens on which their experts were compared."""
    by: str
    """decoder or coactivation."""
    matched: float
    """Mean similarity of matched experts; one without a partner, where one layer has more experts that fire,
    counts 0."""
    found_again: float
    """Share of the experts that fire whose partner is as similar as 0.7 or more."""
    nearest: float
    """Mean similarity of each expert of the first layer to its nearest in the second, which others may
    share."""
    matched_shuffled: float
    """`matched` where there is nothing to find: by decoder, with the other layer's directions turned at
    random, all alike; by co-activation, with its firing half the text later."""
    agreement: float
    """Share of the experts that both matchings, by decoder and by co-activation, give the same partner."""


@model_first
def stability(
    model: Any,
    layers: Mapping[str, SAE[Any]],
    tokens: Text,
    batch_size: int = 8,
    exact: int = EXACT,
    progress: bool = True,
) -> list[Stability]:
    """Compare the experts of layers that were trained alike from several seeds, every pair of them.

    Args:
        model, tokens, batch_size, progress: as for `evaluate`. Co-activation wants some ten thousand tokens.
        layers: the layers by name; two or more, of one MLP.
        exact: up to how many experts the best matching is found, in time that grows as their cube.

    Returns:
        The stability by decoder and by co-activation.

    Raises:
        ValueError: there are fewer than two layers, they belong to different places, or one does not belong
            to the model.
    """
    if len(layers) < 2:
        raise ValueError(f"Stability compares two layers or more, got {len(layers)}.")
    places = {
        (s.cfg.metadata.hook_name, s.cfg.metadata.hook_name_out, str(s.cfg.metadata.exclude_special_tokens))
        for s in layers.values()
    }
    if len(places) > 1:
        raise ValueError(f"Only layers of one MLP have experts in common; these are of {sorted(places)}.")
    usages = {name: read_usage(model, sae, tokens, batch_size, progress) for name, sae in layers.items()}
    pairs = list(combinations(usages.values(), 2))
    results: dict[str, list[dict[str, float]]] = {by: [] for by in SIMILARITIES}
    for one, other in tqdm(pairs, desc="Matching experts", disable=not progress):
        matchings = {by: match(kind(one, other), exact) for by, kind in SIMILARITIES.items()}
        partners = [m.partner for m in matchings.values()]
        agreed = ((partners[0] == partners[1]) & (partners[0] >= 0)).sum().item()
        agreement = agreed / max(len(one.alive), len(other.alive))
        for by, kind in SIMILARITIES.items():
            similarities = kind(one, other, shuffled=True)
            shuffled = match(similarities, exact)
            summary = _summary(matchings[by], shuffled, max(similarities.shape))
            results[by].append(summary | {"agreement": agreement})
    n_tokens = pairs[0][0].statistics.n_tokens
    return [
        Stability(len(layers), n_tokens, by, **{key: mean(r[key] for r in found) for key in found[0]})
        for by, found in results.items()
    ]


def _summary(matching: Matching, shuffled: Matching, n_experts: int) -> dict[str, float]:
    return {
        "matched": matching.similarity.nansum().item() / n_experts,
        "found_again": (matching.similarity >= ALIKE).sum().item() / n_experts,
        "nearest": matching.nearest.mean().item(),
        "matched_shuffled": shuffled.similarity.nansum().item() / n_experts,
    }
