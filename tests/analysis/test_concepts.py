"""Concept search: scores against numpy and scikit-learn, its confidence under chance, and known experts."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from concepts import CONCEPTS
from layers import D_SAE, close, make_layer, true_input
from sklearn.metrics import roc_auc_score

from mxd_lens import MxD, find_experts
from mxd_lens.analysis.concepts import (
    area_under_curve,
    auc_interval,
    other_splits,
    read_texts,
    separation,
)

POSITIVE = ["the big cat", "a dog ran under the small hill then", "the cat sat", "it was a big red cat"]
NEGATIVE = ["then it ran", "the mat was on a hill", "small and blue", "a dog and then the red mat was it"]


def strongest_by_hand(model, sae, texts) -> np.ndarray:
    """Every expert's largest coefficient on each text, without its BOS."""
    rows = []
    for text in texts:
        tokens = model.to_tokens(text)
        acts = sae.encode(true_input(model, sae, tokens))[0]
        rows.append(acts[1:].amax(0))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize(
    "kind", ["mxd, k", "skip_mxd, relu", "molt, k", "saelens transcoder", "saelens topk"]
)
def test_every_score_is_the_one_computed_by_hand(tiny_model, kind):
    sae = make_layer(kind)
    found = find_experts(tiny_model, sae, POSITIVE, NEGATIVE, n=6, progress=False, batch_size=3)
    m = strongest_by_hand(tiny_model, sae, [*POSITIVE, *NEGATIVE])
    positive, negative = m[:4], m[4:]
    on = found.per_expert["always_on"].numpy()
    s = np.sqrt((3 * positive.var(0, ddof=1) + 3 * negative.var(0, ddof=1)) / 6)
    spread = m.std(0)
    s_0 = np.sort(spread[(spread > 0) & ~on])[
        ((spread > 0) & ~on).sum() // 2 - (1 - ((spread > 0) & ~on).sum() % 2)
    ]
    expected = (positive.mean(0) - negative.mean(0)) / (s + s_0)
    np.testing.assert_allclose(found.per_expert["score"].numpy()[~on], expected[~on], rtol=1e-3, atol=1e-4)
    labels = [1] * 4 + [0] * 4
    for n in range(D_SAE):
        assert found.per_expert["auc"][n].item() == pytest.approx(
            roc_auc_score(labels, m[:, n].round(3)), abs=1e-6
        )
    order = np.argsort(-np.where(on, -np.inf, expected), kind="stable")
    assert found.experts.tolist() == order[:6].tolist()
    np.testing.assert_allclose(found.coefficient_max.numpy(), m.max(0)[order[:6]], rtol=1e-4)
    # Confidence: against every other division of the eight texts, one at a time.
    best = []
    for chosen in combinations(range(8), 4):
        one, rest = m[list(chosen)], np.delete(m, list(chosen), axis=0)
        within = np.sqrt((3 * one.var(0, ddof=1) + 3 * rest.var(0, ddof=1)) / 6)
        best.append(np.where(on, -np.inf, (one.mean(0) - rest.mean(0)) / (within + s_0)).max())
    for i, n in enumerate(found.experts.tolist()):
        p = np.mean(np.array(best) >= expected[n] - 1e-4)
        assert found.confidence[i].item() == pytest.approx(1 - p, abs=0.021)


def test_an_example_is_where_the_expert_fires_most(tiny_model):
    sae = make_layer("mxd, k")
    found = find_experts(tiny_model, sae, POSITIVE, NEGATIVE, n=3, progress=False)
    for i, n in enumerate(found.experts.tolist()):
        peaks = []
        for text in POSITIVE:
            tokens = tiny_model.to_tokens(text)
            acts = sae.encode(true_input(tiny_model, sae, tokens))[0, 1:, n]
            if acts.any():
                peaks.append(
                    (acts.max().item(), tiny_model.tokenizer.decode([int(tokens[0, 1 + acts.argmax()])]))
                )
        peaks.sort(reverse=True)
        assert [e.token for e in found.examples[i]] == [token for _, token in peaks[:3]]
        assert [e.coefficient for e in found.examples[i]] == pytest.approx(
            [a for a, _ in peaks[:3]], rel=1e-4
        )


def test_random_texts_have_low_confidence():
    """Under chance the best expert's confidence is over 1 - p in no more than p of the searches."""
    generator = torch.Generator().manual_seed(0)
    # Like experts: most are silent on most texts, and sizes differ.
    m = torch.rand(400, 300, generator=generator) * (torch.rand(400, 300, generator=generator) < 0.08)
    m *= torch.rand(300, generator=generator) * 5
    for k, tolerance in ((2, 0.0), (4, 0.06), (12, 0.06)):
        confidences = []
        for _ in range(60):
            rows = m[torch.randperm(400, generator=generator)[: 2 * k]]
            labels = torch.tensor([True] * k + [False] * k)
            s_0 = rows.std(0, correction=0)[rows.std(0) > 0].median()
            scores = separation(rows, labels[None], s_0)[0]
            splits = other_splits(labels, seed=1)
            best = separation(rows, splits, s_0).amax(1)
            confidences.append(1 - ((best >= scores.max()).sum().item() + 1) / (len(best) + 1))
        for p in (0.05, 0.1, 0.2):
            assert np.mean(np.array(confidences) >= 1 - p) <= p + tolerance + 2 * math.sqrt(p / 60)
        assert 0.2 < np.mean(confidences) < 0.7


def test_all_other_splits_where_they_are_few():
    labels = torch.tensor([True, True, False, False, False])
    splits = {tuple(row) for row in other_splits(labels, 0).tolist()}
    expected = {tuple(i in c for i in range(5)) for c in combinations(range(5), 2)} - {tuple(labels.tolist())}
    assert splits == expected
    many = torch.tensor([True] * 20 + [False] * 20)
    drawn = other_splits(many, 0)
    assert drawn.shape == (500, 40)
    assert (drawn.sum(1) == 20).all()


@pytest.mark.parametrize(("auc", "p", "q"), [(1.0, 4, 4), (0.75, 4, 4), (0.9, 30, 50), (0.0, 5, 5)])
def test_the_interval_of_an_auc(auc, p, q):
    """Its bounds solve (auc - A)^2 = z^2 V(A), V as Newcombe 2006 writes it."""
    low, high = auc_interval(auc, p, q)
    assert 0 <= low <= auc <= high <= 1
    for bound in (low, high):
        if bound not in (0.0, 1.0) and abs(bound - auc) > 1e-6:
            N = (p + q) / 2
            variance = bound * (1 - bound) / ((p - 1) * (q - 1))
            variance *= 2 * N - 1 - (3 * N - 3) / ((2 - bound) * (1 + bound))
            assert (auc - bound) ** 2 == pytest.approx(1.96**2 * variance, rel=1e-6)
    narrow = auc_interval(auc, 20 * p, 20 * q)
    assert narrow[1] - narrow[0] < high - low
    assert auc_interval(auc, 1, 9) == (0.0, 1.0)


def test_an_area_counts_ties_one_half():
    positive, negative = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert area_under_curve(positive, negative).tolist() == [(0.5 + 1 + 1 + 1) / 4, 0.5]


def test_half_of_many_texts_checks_what_the_other_half_found(tiny_model):
    sae = make_layer("mxd, k")
    positive = [f"the {a} cat {b}" for a in ("big", "red", "small") for b in ("sat", "ran", "it")]
    negative = [f"a {a} mat {b}" for a in ("big", "red", "small") for b in ("sat", "ran", "it")]
    found = find_experts(tiny_model, sae, positive, negative, progress=False)
    assert (found.n_positive, found.n_negative, found.n_held_out) == (5, 5, 8)
    alone = find_experts(tiny_model, sae, positive[::2], negative[::2], progress=False)
    assert alone.n_held_out == 0
    assert alone.held_out_auc.isnan().all()
    m = strongest_by_hand(tiny_model, sae, [*positive[1::2], *negative[1::2]])
    for i, n in enumerate(found.experts.tolist()):
        expected = roc_auc_score([1] * 4 + [0] * 4, m[:, n].round(3))
        assert found.held_out_auc[i].item() == pytest.approx(expected, abs=1e-6)


def test_an_expert_that_is_always_on_is_marked_and_left_out(tiny_model):
    sae = make_layer("mxd, k")
    sae.b_enc[9] = 100
    found = find_experts(tiny_model, sae, POSITIVE, NEGATIVE, n=D_SAE, progress=False)
    frame = found.to_pandas()
    assert frame[frame.always_on].expert.tolist() == [9]
    assert found.experts[-1] == 9
    assert found.scores[-1] == -math.inf
    assert len(frame) == D_SAE
    assert frame.score.is_monotonic_decreasing


def test_a_long_text_is_one_text(tiny_model):
    sae = make_layer("mxd, k")
    sae.cfg.metadata.context_size = 4
    texts = read_texts(tiny_model, sae, ["the big cat sat on the red mat", "a dog"], progress=False)
    assert texts.text_of.bincount().tolist() == [8, 2]
    assert texts.strongest.shape == (2, D_SAE)
    close(texts.density, texts.firings.counts.double() / 10)


def test_what_cannot_be_searched(tiny_model):
    sae = make_layer("mxd, k")
    with pytest.raises(ValueError, match="n must be a positive number"):
        find_experts(tiny_model, sae, "the cat", "a dog", n=0)
    with pytest.raises(ValueError, match="at least one positive and one negative"):
        find_experts(tiny_model, sae, "the cat", [], progress=False)
    with pytest.raises(ValueError, match="A text has no token"):
        find_experts(tiny_model, sae, ["the cat", ""], "a dog", progress=False)


@pytest.mark.real_model
@pytest.mark.slow
def test_known_experts_are_found(smollm2):
    """With four sentences on each side, among 5,888 experts, and more surely than by chance."""
    mxd = MxD.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp")
    for name, (expert, positive, negative) in CONCEPTS.items():
        found = find_experts(smollm2, mxd, positive, negative, n=5, progress=False)
        assert expert in found.experts.tolist(), name
        assert found.confidence[found.experts == expert].item() > 0.9, name
