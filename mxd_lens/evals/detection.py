"""The detection score of a description: given it, which of some passages does the expert fire on?

Half of the passages are ones on which the expert fires, so that guessing gives a balanced accuracy of 0.5.
Whoever describes an expert (a word list, a rule, a language model) says where the description applies; the
passages and the score are made here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.firings import firings
from mxd_lens.analysis.sequences import Text
from mxd_lens.architectures.base import expert_ids
from mxd_lens.models import model_first

Applies = Callable[[Sequence["Passage"]], Sequence[bool]]
"""Whether a description applies to each of some passages."""


@dataclass(frozen=True)
class Passage:
    """Some tokens in a row, special ones left out, and an expert's coefficients on them."""

    ids: list[int]
    """The tokens' ids."""
    tokens: list[str]
    """Their texts."""
    coefficients: list[float]
    """a_n, 0 where the expert does not fire."""

    @property
    def peak(self) -> float:
        """The largest coefficient; 0 where the expert does not fire."""
        return max(self.coefficients, default=0.0)

    @property
    def text(self) -> str:
        return "".join(self.tokens)


@dataclass(frozen=True)
class ExpertPassages:
    """An expert's passages: some to describe it from, others to test the description on."""

    expert: int
    describe: list[Passage]
    """On which it fires most strongly, but for those to test on."""
    test: list[Passage]
    """On which it fires, spread evenly over how strongly."""
    silent: list[Passage]
    """On which it does not fire, drawn at random."""
    n_firing: int
    """Passages of the text on which it fires."""


@dataclass(frozen=True)
class DetectionScore:
    """How well a description tells where an expert fires."""

    expert: int
    n_firing: int
    """Test passages on which it fires."""
    n_silent: int
    """Test passages on which it does not."""
    recall: float
    """Share of the passages on which it fires that the description applies to; NaN without any."""
    specificity: float
    """Share of the passages on which it does not fire that the description does not apply to."""

    @property
    def accuracy(self) -> float:
        """The balanced accuracy, (recall + specificity) / 2; 0.5 is chance, NaN where one of them is."""
        return (self.recall + self.specificity) / 2

    @property
    def standard_error(self) -> float:
        """Of the balanced accuracy, from the binomials of recall and specificity."""
        if not self.n_firing or not self.n_silent:
            return math.nan
        variance = (
            self.recall * (1 - self.recall) / self.n_firing
            + self.specificity * (1 - self.specificity) / self.n_silent
        )
        return math.sqrt(variance) / 2


def detection_score(passages: ExpertPassages, applies: Applies) -> DetectionScore:
    """Score a description on an expert's test passages.

    Args:
        passages: from `expert_passages`.
        applies: whether the description applies to each of some passages. It sees the texts and ids of
            passages, and coefficients of 0.

    Raises:
        ValueError: `applies` does not give one answer per passage.
    """
    asked = [*passages.test, *passages.silent]
    blind = [Passage(p.ids, p.tokens, [0.0] * len(p.ids)) for p in asked]
    answers = [bool(answer) for answer in applies(blind)]
    if len(answers) != len(asked):
        raise ValueError(f"The description gave {len(answers)} answers to {len(asked)} passages.")
    n = len(passages.test)
    hits, alarms = answers[:n], answers[n:]
    return DetectionScore(
        expert=passages.expert,
        n_firing=n,
        n_silent=len(passages.silent),
        recall=sum(hits) / len(hits) if hits else math.nan,
        specificity=1 - sum(alarms) / len(alarms) if alarms else math.nan,
    )


@model_first
def expert_passages(
    model: Any,
    sae: SAE[Any],
    text: Text,
    experts: int | Iterable[int] | Int[Tensor, " n"],
    length: int = 32,
    n_describe: int = 20,
    n_test: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> list[ExpertPassages]:
    """The passages of a text for some experts.

    Args:
        model, sae, text, batch_size, progress: as for `evaluate`.
        experts: which.
        length: tokens in a passage; sequences are cut into passages, the last of which may be shorter.
        n_describe: passages to describe an expert from, at most.
        n_test: passages to test on at most, as many on which it fires and on which it does not. Where an
            expert fires on few passages, half of them are for the test.
        seed: of the draw of silent passages.

    Raises:
        IndexError, TypeError: there is no such expert.
        ValueError: a number is not positive; or as `evaluate`.
    """
    for name, value in {"length": length, "n_describe": n_describe, "n_test": n_test}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    ids = expert_ids(sae, experts).cpu()
    found = firings(model, sae, text, batch_size, progress).of_experts(ids)
    window = found.position // length
    _, sizes = (found.sequence * (int(window.max()) + 1) + window).unique_consecutive(return_counts=True)
    of_token = torch.arange(len(sizes)).repeat_interleave(sizes)
    starts = sizes.cumsum(0) - sizes
    texts = {int(t): model.tokenizer.decode([int(t)]) for t in found.token.unique()}

    def passage(slot: int, i: int) -> Passage:
        start, size = int(starts[i]), int(sizes[i])
        of_passage = found.token[start : start + size].tolist()
        coefficients = torch.zeros(size)
        inside = (found.expert == slot) & (of_token[found.token_of] == i)
        coefficients[found.token_of[inside] - start] = found.coefficient[inside].float()
        return Passage(of_passage, [texts[t] for t in of_passage], coefficients.tolist())

    chosen = []
    for slot, expert in enumerate(ids.tolist()):
        of_expert = found.expert == slot
        peaks = torch.zeros(len(sizes))
        peaks.scatter_reduce_(
            0, of_token[found.token_of[of_expert]], found.coefficient[of_expert].float(), "amax"
        )
        chosen.append(_choose(expert, peaks, partial(passage, slot), n_describe, n_test, seed))
    return chosen


def _choose(
    expert: int,
    peaks: Float[Tensor, " passages"],
    passage: Callable[[int], Passage],
    n_describe: int,
    n_test: int,
    seed: int,
) -> ExpertPassages:
    order = peaks.argsort(descending=True, stable=True)
    firing = order[peaks[order] > 0]
    n = min(n_test, len(firing) // 2)
    # Not the very strongest: the middles of n equal parts of the ranking.
    tested = ((torch.arange(n) + 0.5) * len(firing) / max(n, 1)).long()
    rest = torch.ones(len(firing), dtype=torch.bool)
    rest[tested] = False
    silent = (peaks == 0).nonzero()[:, 0]
    drawn = torch.randperm(len(silent), generator=torch.Generator().manual_seed(seed))[:n]
    return ExpertPassages(
        expert=expert,
        describe=[passage(int(i)) for i in firing[rest][:n_describe]],
        test=[passage(int(i)) for i in firing[tested]],
        silent=[passage(int(i)) for i in silent[drawn]],
        n_firing=len(firing),
    )
