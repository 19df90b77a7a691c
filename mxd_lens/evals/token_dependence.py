"""How far the token, and what stands before it, determines which experts are active.

The layer's input at a token follows from the tokens up to it, so that what the token itself does not
determine, its context does. An expert whose firing the token alone determines is a token lookup.

    I(F; X) = H(F) - H(F | X)                            F: whether an expert fires; X: the token's id
    determined by X = (I - I_0) / (H(F) - I_0)           I_0: I where F and X have nothing to do with each
                                                         other, with as many firings and the same tokens

A text of T tokens has many that occur once, and these "determine" whatever happens on them: counted as it
is, I is far from 0 even for an expert that fires at random. I_0 is its exact expectation under all orders
of X, so that the quotient is 0 for such an expert and 1 for one that X determines, whatever T.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.firings import Firings, read
from mxd_lens.analysis.sequences import Text
from mxd_lens.models import model_first

LOOKUP = 0.9
"""Experts that the token determines this far are called token lookups."""
BINS = 20
"""Of the histograms, from 0 to 1."""
EXAMPLES = 8
"""Experts shown as examples, of either kind."""
BITS = 1 / math.log(2)
BLOCK = 2**22
"""Terms of an expectation formed at once."""

Phi = Callable[[Float[Tensor, "*n"]], Float[Tensor, "*n"]]


# What fires where


class StrongestFirings(NamedTuple):
    """Which experts fire on a text, and which of them writes most at each token."""

    firings: Firings
    """Of the layer on the text."""
    strongest: Int[Tensor, " tokens"]
    """The expert that writes most at each token, by the norm of what it writes."""

    @property
    def variables(self) -> dict[str, Int[Tensor, " tokens"]]:
        """What may determine the experts, by name, each as numbers from 0."""
        f = self.firings
        pair = (f.previous + 1) * (int(f.token.max()) + 1) + f.token
        ids = {"token": f.token, "previous token": f.previous, "both": pair, "position": f.position}
        return {name: values.unique(return_inverse=True)[1] for name, values in ids.items()}


@model_first
def read_firings(
    model: Any,
    saes: Mapping[str, SAE[Any]],
    text: Text,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, StrongestFirings]:
    """Which experts of several layers are active on a text, and which write most.

    Args:
        model, text, batch_size, progress: as for `evaluate`. Memory grows with the tokens times the active
            experts of each.
        saes: the layers by name.

    Raises:
        ValueError, TypeError: as `evaluate`.
    """
    found: dict[str, list[Firings]] = {name: [] for name in saes}
    strongest: dict[str, list[Tensor]] = {name: [] for name in saes}
    for readings in read(model, saes, text, batch_size, progress):
        for name, reading in readings.items():
            parts = reading.parts
            found[name].append(reading.firings)
            most = parts.norms().argmax(-1, keepdim=True)
            strongest[name].append(parts.experts.gather(1, most)[:, 0].cpu())
    return {name: StrongestFirings(Firings.join(found[name]), torch.cat(strongest[name])) for name in saes}


# Information


def binary_entropy(p: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The entropy of a yes that comes with probability p, in bits."""
    return BITS * (torch.special.entr(p) + torch.special.entr(1 - p))


def surprise(p: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """-p log2 p, one term of an entropy in bits."""
    return BITS * torch.special.entr(p)


class Determined(NamedTuple):
    """Sums of information over one or more experts, in bits a token."""

    entropy: Float[Tensor, " n"]
    """H(F): what there is to know."""
    information: Float[Tensor, " n"]
    """I(F; X), as counted."""
    chance: Float[Tensor, " n"]
    """I_0, what would be counted if X had nothing to do with it."""

    @property
    def share(self) -> Float[Tensor, " n"]:
        """(I - I_0) / (H - I_0); NaN where nothing could be learnt."""
        learnable = self.entropy - self.chance
        share = (self.information - self.chance) / learnable
        return share.where(learnable > 1e-9 * self.entropy.clamp_min(1e-12), math.nan)

    @property
    def total(self) -> "Determined":
        """Of all experts together: informations are summed, not shares averaged."""
        return Determined(*(part.sum() for part in self))


def firing_information(firings: Firings, x: Int[Tensor, " tokens"], experts: Int[Tensor, " n"]) -> Determined:
    """How far x determines whether each of some experts fires."""
    entropy, information, chance = _information(
        firings.token_of, firings.expert, firings.n_experts, x, binary_entropy
    )
    return Determined(entropy[experts], information[experts], chance[experts])


def label_information(labels: Int[Tensor, " tokens"], x: Int[Tensor, " tokens"]) -> Determined:
    """How far x determines a label that every token has; here, which expert is the strongest."""
    every = torch.arange(len(labels))
    terms = _information(every, labels, int(labels.max()) + 1, x, surprise)
    return Determined(*(part.sum() for part in terms))


def _information(
    token_of: Int[Tensor, " entries"],
    label: Int[Tensor, " entries"],
    n_labels: int,
    x: Int[Tensor, " tokens"],
    phi: Phi,
) -> tuple[Float[Tensor, " n_labels"], ...]:
    """Entropy, information and its expectation by chance, the terms of each label."""
    n_tokens = len(x)
    labelled = torch.bincount(label, minlength=n_labels)
    sizes = torch.bincount(x)
    entropy = phi(labelled.double() / n_tokens)
    # phi(0) = 0: only the labels that occur with a value of x have a term there.
    pairs, both = (label * len(sizes) + x[token_of]).unique(return_counts=True)
    size = sizes[pairs % len(sizes)].double()
    conditional = torch.zeros(n_labels, dtype=torch.float64)
    conditional.index_add_(0, pairs // len(sizes), size / n_tokens * phi(both / size))
    kinds, kind_of = labelled.unique(return_inverse=True)
    by_chance = expected_conditional(kinds, sizes, n_tokens, phi)[kind_of]
    return entropy, entropy - conditional, entropy - by_chance


def expected_conditional(
    labelled: Int[Tensor, " n"], sizes: Int[Tensor, " values"], n_tokens: int, phi: Phi
) -> Float[Tensor, " n"]:
    """E[sum_x n_x / T phi(k_x / n_x)] for labels put on `labelled` of T tokens at random.

    k_x, how many of the n_x tokens of one value are labelled, is then hypergeometric.

    Args:
        labelled: how many tokens each label is put on.
        sizes: n_x, how many tokens have each value of x; they sum to T.
        n_tokens: T.
        phi: a function of a share with phi(0) = 0.
    """
    log_factorial = torch.lgamma(torch.arange(1, n_tokens + 2, dtype=torch.float64))

    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    total = torch.zeros(len(labelled), dtype=torch.float64)
    present = sizes[sizes > 0]
    for m, values in zip(*(part.tolist() for part in present.unique(return_counts=True)), strict=True):
        share = phi(torch.arange(m + 1, dtype=torch.float64) / m)
        for block in torch.arange(len(labelled)).split(max(1, BLOCK // (m + 1))):
            n = labelled[block, None]
            # Far from its mean, k has no weight that a double would show.
            mean = n.double() * m / n_tokens
            reach = 12 * mean.sqrt() + 40
            lowest = torch.maximum((n + m - n_tokens).clamp_min(0), (mean - reach).floor().long())
            highest = torch.minimum(n.clamp_max(m), (mean + reach).ceil().long())
            k = lowest + torch.arange(int((highest - lowest).max()) + 1)
            inside = k <= highest
            k = torch.minimum(k, highest)
            weight = (
                log_choose(torch.tensor(m), k) + log_choose(torch.tensor(n_tokens - m), n - k)
            ) - log_choose(torch.tensor(n_tokens), n)
            total[block] += values * m / n_tokens * (weight.exp() * share[k] * inside).sum(-1)
    return total


# The report


@dataclass(frozen=True)
class Dependence:
    """How far one variable determines which experts are active: shares from 0 (chance) to 1 (wholly)."""

    variable: str
    """token; previous token; both; position in the sequence."""
    firing: float
    """Of the information in which experts fire, over the measured experts together."""
    firing_shuffled: float
    """The same with the variable's values dealt out anew over the tokens: 0, but for one draw's noise."""
    firing_median: float
    """The median of the experts' own shares."""
    strongest: float
    """Of the information in which expert writes most."""
    strongest_bits: float
    """That information, I - I_0, in bits a token."""
    lookups: float
    """Share of the measured experts that the variable determines to 90 % or more."""
    histogram: list[int]
    """How many experts have what share, in bins of 5 %; shares below 0 are in the first."""


@dataclass(frozen=True)
class ExampleExpert:
    """An expert and the tokens it fires on."""

    expert: int
    share: float
    """How far the token determines its firing."""
    fired: int
    """Tokens on which it fires."""
    tokens: list[tuple[str, float]]
    """The tokens it fires on most, each with its share of the firings."""


@dataclass(frozen=True)
class TokenInformation:
    """What `token_information` measured."""

    n_tokens: int
    n_judged: int
    """Experts measured: those that fire on at least `min_fired` tokens, and not on all but as many."""
    n_always_on: int
    """Experts that fire on 90 % of the tokens or more."""
    strongest_entropy: float
    """H of which expert writes most, in bits a token."""
    dependences: list[Dependence]
    """By the token, the token before it, both, and the position."""
    lookups: list[ExampleExpert]
    """The experts that the token determines most, of the half that fires most."""
    contextual: list[ExampleExpert]
    """Those of that half that it determines least."""

    def of(self, variable: str) -> Dependence:
        """What was measured of one variable."""
        return next(d for d in self.dependences if d.variable == variable)


def token_information(
    found: StrongestFirings, decode: Callable[[int], str], min_fired: int = 10
) -> TokenInformation:
    """How far the token, and what stands before it, determines which experts are active.

    Args:
        found: from `read_firings`. Some ten thousand tokens are needed; fewer give the same numbers on
            average, with more noise.
        decode: the text of a token id, for the examples.
        min_fired: experts that fire on fewer tokens, or on all but fewer, are not measured.

    Raises:
        ValueError: min_fired is not positive, or there are no tokens.
    """
    if min_fired < 1:
        raise ValueError(f"min_fired must be at least 1, got {min_fired}.")
    firings = found.firings
    if not firings.n_tokens:
        raise ValueError("There are no tokens to learn from.")
    counts, n_tokens = firings.counts, firings.n_tokens
    judged = ((counts >= min_fired) & (counts <= n_tokens - min_fired)).nonzero()[:, 0]
    order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))
    dependences = []
    shares: dict[str, Tensor] = {}
    for name, x in found.variables.items():
        by_expert = firing_information(firings, x, judged)
        shares[name] = share = by_expert.share
        strongest = label_information(found.strongest, x)
        learnt = share[~share.isnan()]
        dependences.append(
            Dependence(
                variable=name,
                firing=by_expert.total.share.item(),
                firing_shuffled=firing_information(firings, x[order], judged).total.share.item(),
                firing_median=learnt.median().item() if len(learnt) else math.nan,
                strongest=strongest.share.item(),
                strongest_bits=(strongest.information - strongest.chance).item(),
                lookups=(learnt >= LOOKUP).double().mean().item(),
                histogram=torch.histc(learnt.clamp(0, 1), BINS, 0, 1).long().tolist(),
            )
        )
    # Of an expert that fires rarely, a share says little: examples are of the half that fires most.
    often = counts[judged].argsort(descending=True, stable=True)[: math.ceil(len(judged) / 2)]
    often = often[~shares["token"][often].isnan()]
    by_token = often[shares["token"][often].argsort(descending=True, stable=True)]
    n = min(EXAMPLES, len(by_token) // 2)

    def examples(chosen: Int[Tensor, " n"]) -> list[ExampleExpert]:
        return [_example(firings, int(judged[i]), shares["token"][i].item(), decode) for i in chosen.tolist()]

    return TokenInformation(
        n_tokens=n_tokens,
        n_judged=len(judged),
        n_always_on=int((counts >= 0.9 * n_tokens).sum()),
        strongest_entropy=label_information(found.strongest, firings.token).entropy.item(),
        dependences=dependences,
        lookups=examples(by_token[:n]),
        contextual=examples(by_token.flip(0)[:n]),
    )


def _example(firings: Firings, expert: int, share: float, decode: Callable[[int], str]) -> ExampleExpert:
    fired_on = firings.token[firings.token_of[firings.expert == expert]]
    ids, counts = fired_on.unique(return_counts=True)
    top = counts.argsort(descending=True, stable=True)[:3]
    tokens = [(decode(int(ids[i])), int(counts[i]) / len(fired_on)) for i in top.tolist()]
    return ExampleExpert(expert, share, len(fired_on), tokens)
