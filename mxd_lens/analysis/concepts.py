"""Which experts respond to a concept, given texts with it and texts without it.

Each text is described by every expert's largest coefficient on it, m_tn. An expert is scored by how far
the two groups lie apart, in units of its own spread,

    T_n = (mean_pos m_tn - mean_neg m_tn) / (s_n + s_0)

with s_n the pooled standard deviation within the groups and s_0 the median over the experts of the standard
deviation over all texts, so that an expert that hardly fires is not scored by the accident of a small s_n.

There are thousands of experts and few texts, so that some expert separates any two groups. How sure a find
is, is therefore measured against the best score of any expert after the texts have been dealt to the two
groups anew (the permutation test of Westfall and Young, 1993, for the largest of many statistics).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.firings import Firings, read_batch
from mxd_lens.analysis.sequences import token_batches, token_sequences_of
from mxd_lens.artifacts.tables import Cell, Tabular, percent
from mxd_lens.models import model_first, ordinary_tokens

if TYPE_CHECKING:
    import pandas

ALWAYS_ON = 0.9
"""Experts that fire on this share of all tokens are left out of the search."""
N_SPLITS = 500
"""Ways of dealing the texts to two groups that a find is compared with, at most."""
CHECKED_FROM = 8
"""Texts on each side from which on half of them are kept for the check."""
N_EXAMPLES = 3
"""Texts shown for each expert."""
AROUND = 6
"""Tokens shown before the one on which an expert fires most."""
Z = 1.96
"""Of a 95 % interval."""


class Example(NamedTuple):
    """Where an expert fires most in one text."""

    coefficient: float
    """a_n there."""
    before: str
    """The text before the token."""
    token: str
    """The token."""


@dataclass(frozen=True, repr=False)
class ConceptSearch(Tabular):
    """What `find_experts` found, best first."""

    experts: Int[Tensor, " n"]
    """The experts with the largest scores."""
    scores: Float[Tensor, " n"]
    """T_n, the difference of the groups' means in units of the expert's own spread."""
    auc: Float[Tensor, " n"]
    """Share of the pairs of a positive and a negative text in which the positive has the larger
    coefficient; ties count one half."""
    auc_interval: Float[Tensor, "n 2"]
    """A 95 % interval of the AUC (Newcombe 2006, method 5), for this expert alone."""
    confidence: Float[Tensor, " n"]
    """1 - p, with p the share of other divisions of the same texts into two groups in which the best of all
    experts scores as high. Near 0.5 or below, the find is what chance gives."""
    held_out_auc: Float[Tensor, " n"]
    """The AUC on the texts that were kept for the check; NaN where there were too few to keep any."""
    examples: list[list[Example]]
    """For each expert the positive texts on which it fires most."""
    coefficient_max: Float[Tensor, " n"]
    """The largest coefficient on any of the texts: the unit of steering strengths."""
    n_positive: int
    """Positive texts that were searched."""
    n_negative: int
    n_held_out: int
    """Texts on both sides that were kept for the check."""
    per_expert: dict[str, Tensor]
    """Of every expert: score, auc, confidence, density (share of the tokens of all texts on which it fires),
    and whether it is always on."""

    @property
    def title(self) -> str:
        kept = f", {self.n_held_out} kept for the check" if self.n_held_out else ""
        return f"Experts for {self.n_positive} positive against {self.n_negative} negative texts{kept}"

    @property
    def columns(self) -> list[str]:
        return ["expert", "score", "AUC", "confidence", "held-out AUC", "fires most on"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for i, n in enumerate(self.experts.tolist()):
            low, high = self.auc_interval[i].tolist()
            where = "; ".join(f"{e.before}[{e.token}]" for e in self.examples[i][:1])
            yield [
                n,
                self.scores[i].item(),
                f"{self.auc[i]:.2f} ({low:.2f} to {high:.2f})",
                percent(self.confidence[i].item()),
                self.held_out_auc[i].item(),
                where,
            ]

    def to_pandas(self) -> "pandas.DataFrame":
        """A row for every expert of the layer, best first: score, AUC, confidence, density, always on."""
        import pandas

        frame = pandas.DataFrame({name: values.numpy() for name, values in self.per_expert.items()})
        return frame.rename_axis("expert").sort_values("score", ascending=False, kind="stable").reset_index()


class Texts(NamedTuple):
    """Texts, and what the experts do on them."""

    firings: Firings
    text_of: Int[Tensor, " tokens"]
    """The text that each token is in."""
    strongest: Float[Tensor, "texts experts"]
    """m, the largest coefficient of each expert on each text."""

    @property
    def density(self) -> Float[Tensor, " experts"]:
        """Share of the tokens on which each expert fires."""
        return self.firings.counts.double() / self.firings.n_tokens


@torch.no_grad()
@model_first
def find_experts(
    model: Any,
    sae: SAE[Any],
    positive: str | Sequence[str],
    negative: str | Sequence[str],
    n: int = 10,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> ConceptSearch:
    """Find the experts that fire on texts with a concept and not on texts without it.

        find_experts(model, mxd, ["It rained on May 22.", "The year ended December 31."],
                     ["It rained on the way.", "The year ended too soon."])

    Texts that are alike but for the concept find it best. Two on each side are enough to rank experts and
    too few to be sure; from eight on each side, half are kept to check what the other half found.

    Args:
        model: any hooked model; the layer may be attached to it or not.
        sae: the layer.
        positive, negative: a text, or several. Special tokens are left out.
        n: how many experts to return.
        batch_size: texts in a forward pass.
        progress: whether to show a progress bar.
        seed: of the draw of divisions that the confidence is measured against, where there are too many to
            try all.

    Raises:
        ValueError: n is not positive, a side has no text, or the layer does not belong to the model.
    """
    if n < 1:
        raise ValueError(f"n must be a positive number of experts, got {n}.")
    sides = [[text] if isinstance(text, str) else list(text) for text in (positive, negative)]
    if not all(sides):
        raise ValueError("There must be at least one positive and one negative text.")
    texts = read_texts(model, sae, [*sides[0], *sides[1]], batch_size, progress)
    is_positive = torch.tensor([True] * len(sides[0]) + [False] * len(sides[1]))
    searched = _searched(is_positive)
    m, labels = texts.strongest[searched], is_positive[searched]
    always_on = texts.density >= ALWAYS_ON
    spread = m.std(0, correction=0)
    varies = spread[(spread > 0) & ~always_on]
    s_0 = varies.median() if len(varies) else spread.new_ones(())
    scores = separation(m, labels[None], s_0)[0].masked_fill(always_on, -math.inf)
    confidence = _confidence(m, labels, s_0, scores, always_on, seed)
    auc = area_under_curve(m[labels], m[~labels])
    order = scores.argsort(descending=True, stable=True)[:n]
    held_out = texts.strongest[~searched], is_positive[~searched]
    checked = (
        area_under_curve(held_out[0][held_out[1]], held_out[0][~held_out[1]])
        if len(held_out[1])
        else torch.full_like(auc, math.nan)
    )
    sizes = int(labels.sum()), int((~labels).sum())
    return ConceptSearch(
        experts=order,
        scores=scores[order],
        auc=auc[order],
        auc_interval=torch.tensor([auc_interval(auc[i].item(), *sizes) for i in order.tolist()]),
        confidence=confidence[order],
        held_out_auc=checked[order],
        examples=[_examples(model, texts, i, is_positive) for i in order.tolist()],
        coefficient_max=texts.strongest.amax(0)[order],
        n_positive=sizes[0],
        n_negative=sizes[1],
        n_held_out=int((~searched).sum()),
        per_expert={
            "score": scores,
            "auc": auc,
            "confidence": confidence,
            "held_out_auc": checked,
            "density": texts.density,
            "always_on": always_on,
        },
    )


@torch.no_grad()
def read_texts(
    model: Any, sae: SAE[Any], texts: Sequence[str], batch_size: int = 8, progress: bool = True
) -> Texts:
    """Read what the experts do on each of some texts; a long text is read in several sequences."""
    sequences: list[Tensor] = []
    text_of_sequence: list[int] = []
    for i, text in enumerate(texts):
        of_text = token_sequences_of(model, sae, [text])
        sequences += list(of_text)
        text_of_sequence += [i] * len(of_text)
    found = []
    for batch in token_batches(sequences, batch_size, "Reading texts", progress):
        counted = batch.present & ordinary_tokens(model, batch.tokens, True)
        found.append(read_batch(model, {"": sae}, batch, counted=counted)[""].firings)
    firings = Firings.join(found)
    text_of = torch.tensor(text_of_sequence)[firings.sequence]
    strongest = torch.zeros(len(texts), firings.n_experts)
    entries = text_of[firings.token_of] * firings.n_experts + firings.expert
    strongest.view(-1).scatter_reduce_(0, entries, firings.coefficient.float(), "amax")
    return Texts(firings, text_of, strongest)


def separation(
    m: Float[Tensor, "texts experts"], labels: Bool[Tensor, "splits texts"], s_0: Float[Tensor, ""]
) -> Float[Tensor, "splits experts"]:
    """T for every division of the texts into positive (True) and negative ones; see the module."""
    one = labels.to(m)
    sizes = one.sum(1, keepdim=True), (1 - one).sum(1, keepdim=True)
    sums, squares = one @ m, one @ m.square()
    rest, rest_squares = m.sum(0) - sums, m.square().sum(0) - squares
    within = (squares - sums.square() / sizes[0]) + (rest_squares - rest.square() / sizes[1])
    s = (within.clamp_min(0) / (sizes[0] + sizes[1] - 2).clamp_min(1)).sqrt()
    return (sums / sizes[0] - rest / sizes[1]) / (s + s_0)


def area_under_curve(
    positive: Float[Tensor, "p experts"], negative: Float[Tensor, "q experts"]
) -> Float[Tensor, " experts"]:
    """P(positive > negative) + P(equal) / 2 over all pairs of texts, for each expert.

    Texts that begin alike have equal coefficients there, up to the rounding of the batches they ran in: what
    differs by less than 1e-4 of an expert's largest coefficient counts as equal.
    """
    above = torch.zeros(positive.shape[1], dtype=torch.float64)
    rounding = 1e-4 * torch.maximum(positive.amax(0), negative.amax(0))
    for row in positive:
        above += (row > negative + rounding).double().mean(0)
        above += ((row - negative).abs() <= rounding).double().mean(0) / 2
    return (above / len(positive)).float()


def auc_interval(auc: float, p: int, q: int, z: float = Z) -> tuple[float, float]:
    """The interval of an AUC from p and q texts (Newcombe 2006, method 5), wide where they are few."""
    if min(p, q) < 2:
        return 0.0, 1.0

    def variance(a: float) -> float:
        mean_size = (p + q) / 2 - 1
        return a * (1 - a) * (1 + mean_size * ((1 - a) / (2 - a) + a / (1 + a))) / ((p - 1) * (q - 1))

    def bound(low: float, high: float, grows: bool) -> float:
        for _ in range(50):
            middle = (low + high) / 2
            inside = (auc - middle) ** 2 <= z**2 * variance(middle)
            low, high = (middle, high) if inside == grows else (low, middle)
        return (low + high) / 2

    return bound(0.0, auc, grows=False), bound(auc, 1.0, grows=True)


def _searched(is_positive: Bool[Tensor, " texts"]) -> Bool[Tensor, " texts"]:
    """Which texts are searched: every second one of each side where there are enough to keep the others."""
    searched = torch.ones_like(is_positive)
    sides = [(is_positive == side).nonzero()[:, 0] for side in (True, False)]
    if min(map(len, sides)) >= CHECKED_FROM:
        for side in sides:
            searched[side[1::2]] = False
    return searched


def _confidence(
    m: Float[Tensor, "texts experts"],
    labels: Bool[Tensor, " texts"],
    s_0: Float[Tensor, ""],
    scores: Float[Tensor, " experts"],
    always_on: Bool[Tensor, " experts"],
    seed: int,
) -> Float[Tensor, " experts"]:
    """1 - the share of divisions of the texts, the given one among them, whose best score is as high."""
    splits = other_splits(labels, seed)
    best = torch.cat(
        [separation(m, block, s_0).masked_fill(always_on, -math.inf).amax(1) for block in splits.split(64)]
    )
    # The given division counts for one, whether or not it was drawn.
    as_high = (best[:, None] >= scores - 1e-6).sum(0) if len(best) else torch.zeros_like(scores)
    return 1 - (as_high + 1) / (len(best) + 1)


def other_splits(labels: Bool[Tensor, " texts"], seed: int) -> Bool[Tensor, "splits texts"]:
    """Other divisions into groups of the same sizes: all of them, or 500 drawn at random."""
    n, k = len(labels), int(labels.sum())
    if math.comb(n, k) <= N_SPLITS:
        splits = torch.zeros(math.comb(n, k), n, dtype=torch.bool)
        for row, chosen in zip(splits, combinations(range(n), k), strict=True):
            row[list(chosen)] = True
        return splits[(splits != labels).any(1)]
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([labels[torch.randperm(n, generator=generator)] for _ in range(N_SPLITS)])


def _examples(model: Any, texts: Texts, expert: int, is_positive: Bool[Tensor, " texts"]) -> list[Example]:
    """The positive texts on which an expert fires most."""
    f = texts.firings
    on = (f.expert == expert).nonzero()[:, 0]
    found: dict[int, tuple[float, int]] = {}
    for token, a in zip(f.token_of[on].tolist(), f.coefficient[on].tolist(), strict=True):
        text = int(texts.text_of[token])
        if is_positive[text] and a > found.get(text, (0.0, 0))[0]:
            found[text] = a, token
    best = sorted(found.values(), reverse=True)[:N_EXAMPLES]
    examples = []
    for a, token in best:
        start = token
        while start > 0 and token - start < AROUND and f.sequence[start - 1] == f.sequence[token]:
            start -= 1
        before = model.tokenizer.decode(f.token[start:token].tolist())
        examples.append(Example(a, before, model.tokenizer.decode([int(f.token[token])])))
    return examples
