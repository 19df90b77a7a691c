"""The detection score: planted experts that a word explains, and ones that it does not."""

import math

import pytest
import torch
from planted import (
    CONTEXT,
    FIRST,
    N_WORDS,
    WORD,
    PlantedModel,
    planted_mxd,
    planted_tokens,
    planted_transcoder,
)

from mxd_lens.evals.detection import ExpertPassages, Passage, detection_score, expert_passages

SETTINGS = {"length": 7, "n_describe": 5, "n_test": 6, "progress": False}


def passages_of(experts, sae=None, tokens=None, **settings) -> list[ExpertPassages]:
    sae = sae or planted_transcoder()
    tokens = planted_tokens(12, 50) if tokens is None else tokens
    return expert_passages(PlantedModel(sae), sae, tokens, experts, **SETTINGS | settings)


def test_passages_hold_what_the_expert_does():
    word, context = passages_of([3, N_WORDS + 1])
    for p in (*word.describe, *word.test):
        assert p.coefficients == [WORD * (i == FIRST + 3) for i in p.ids]
        assert p.tokens == [f" w{i}" for i in p.ids]
        assert p.peak == WORD
    assert all(p.peak == 0 for p in word.silent)
    # 50 tokens, BOS left out of the first of eight windows of 7.
    n_windows = 12 * 8
    firing = sum(
        (row[i : i + 7] == FIRST + 3).any().item() for row in planted_tokens(12, 50) for i in range(0, 50, 7)
    )
    assert word.n_firing == firing < n_windows
    assert len(word.test) == len(word.silent) == 6
    assert {p.peak for p in context.test} == {CONTEXT}
    tested = [tuple(p.ids) for p in (*word.test, *word.describe)]
    assert len(set(tested)) == len(tested)


def test_the_batch_size_and_padding_do_not_matter():
    tokens = planted_tokens(12, 50)
    one = passages_of([2, 5], sae=planted_mxd(), tokens=tokens, batch_size=1)
    other = passages_of([2, 5], sae=planted_mxd(), tokens=list(tokens), batch_size=5)
    assert one == other


def test_a_word_explains_its_expert_and_no_context():
    word, context = passages_of([3, N_WORDS + 1])
    names_it = lambda passages: [f" w{FIRST + 3}" in p.tokens for p in passages]  # noqa: E731
    score = detection_score(word, names_it)
    assert (score.recall, score.specificity, score.accuracy) == (1, 1, 1)
    assert score.standard_error == 0
    assert 0 < detection_score(context, names_it).accuracy < 1
    always = detection_score(word, lambda passages: [True] * len(passages))
    assert (always.recall, always.specificity, always.accuracy) == (1, 0, 0.5)


def test_a_description_does_not_see_the_coefficients():
    (word,) = passages_of([3])
    seen = []
    detection_score(word, lambda passages: [seen.extend(p.coefficients) or False for p in passages])
    assert set(seen) == {0.0}


def test_the_score_by_hand():
    passage = lambda: Passage([1], ["a"], [0.0])  # noqa: E731
    passages = ExpertPassages(3, [], [passage() for _ in range(4)], [passage() for _ in range(5)], 9)
    answers = [True, True, True, False, False, False, False, False, True]
    score = detection_score(passages, lambda _: answers)
    assert (score.recall, score.specificity) == (0.75, 0.8)
    assert score.accuracy == pytest.approx(0.775)
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4 + 0.8 * 0.2 / 5) / 2)
    with pytest.raises(ValueError, match="2 answers to 9 passages"):
        detection_score(passages, lambda _: [True, False])


def test_an_expert_that_never_fires_has_no_score():
    (never,) = passages_of([17])
    assert (never.n_firing, never.test, never.silent) == (0, [], [])
    score = detection_score(never, lambda passages: [True] * len(passages))
    assert math.isnan(score.accuracy)
    assert math.isnan(score.standard_error)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"length": 0}, ValueError, "length must be at least 1"),
        ({"n_test": 0}, ValueError, "n_test must be at least 1"),
        ({"experts": [18]}, IndexError, "expert 18 does not exist"),
        ({"experts": [True]}, TypeError, "named by an integer"),
        ({"tokens": torch.zeros(0, 5, dtype=torch.long)}, ValueError, "tokens must be token ids"),
    ],
)
def test_bad_input(settings, error, message):
    with pytest.raises(error, match=message):
        passages_of(**{"experts": [1]} | settings)
