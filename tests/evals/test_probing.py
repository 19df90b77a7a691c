"""Sparse probing: planted experts are found, and every number is scikit-learn's on features made by hand."""

import random
import sys
from collections import Counter

import datasets
import nltk
import numpy as np
import pytest
import torch
from attached import random_mxd
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from test_text import DOWNLOADED
from tiny import D_MODEL, HOOK_OUT, WORDS

from mxd_lens import MxD, MxDConfig, TopKTranscoder, TopKTranscoderConfig, load_model, sparse_probing
from mxd_lens.evals.probing import tasks as probing_tasks
from mxd_lens.evals.probing.logistic import single_feature_probes
from mxd_lens.evals.probing.probing import (
    ALL,
    ALWAYS,
    CONSTANT,
    MAJORITY,
    ONE,
    SparseProbing,
    of_k,
    pool,
    scored,
    split,
)
from mxd_lens.evals.probing.tasks import (
    OFFLINE_TASKS,
    PASSAGE,
    TASKS,
    LabelledTexts,
    Passage,
    ProbingTask,
    load_task,
    pieces,
)
from mxd_lens.reports.probing import write_probing_page

EMBEDDING = "blocks.0.hook_resid_pre"
SMALL = {"ks": (1, 2, 5), "n_candidates": 8, "progress": False}


def planted_texts(share: float = 1.0, n: int = 120) -> LabelledTexts:
    """Texts of three classes: of two, a share has a word that no other text has."""
    draw = random.Random(0)
    others = [word for word in WORDS if word not in ("cat", "dog")]
    passages = []
    for i in range(n):
        label, words = ("cat", "dog", "neither")[i % 3], [draw.choice(others) for _ in range(8)]
        if label != "neither" and i / n < share:
            words[draw.randrange(8)] = label
        passages.append((label, " ".join(words)))
    return LabelledTexts.of("pets", passages)


def planted_transcoder(model, kind: type = TopKTranscoder):
    """Two experts that fire on one word each, before six that fire on anything."""
    W_E = model.W_E.detach()
    shared = {
        "d_in": D_MODEL,
        "d_out": D_MODEL,
        "d_sae": 8,
        "k": 3,
        "metadata": SAEMetadata(hook_name=EMBEDDING, hook_name_out=HOOK_OUT),
    }
    config = MxDConfig(**shared, d_hidden=4) if kind is MxD else TopKTranscoderConfig(**shared)
    layer = kind(config).requires_grad_(False)
    for n, word in enumerate(("cat", "dog")):
        token = model.tokenizer.convert_tokens_to_ids(word)
        direction = W_E[token] / W_E[token].square().sum()
        next_largest = (W_E @ direction)[torch.arange(len(W_E)) != token].max()
        layer.W_enc[:, n] = 100 * direction
        layer.b_enc[n] = -50 * (1 + next_largest)
    return layer


@pytest.mark.parametrize("kind", [TopKTranscoder, MxD])
def test_planted_experts_are_found(kind, tiny_model):
    result = sparse_probing(
        tiny_model, planted_transcoder(tiny_model, kind), planted_texts(), seeds=(0, 1), **SMALL
    )
    for seed in (0, 1):
        for n, label in enumerate(("cat", "dog")):
            (probe,) = [p for p in result.select("pets", kind_name(kind), label) if p.seed == seed]
            assert probe.experts[0].expert == n
            assert probe.experts[0].difference > 0
            assert probe.scores[ONE] == (1, 1)
            assert probe.scores[of_k(1)] == (1, 1)
    (probe,) = [p for p in result.select("pets", kind_name(kind), "neither") if p.seed == 0]
    assert probe.scores[of_k(2)] == (1, 1), "neither word: two experts together say so"
    assert probe.scores[ONE].f1 < 1


def kind_name(kind: type) -> str:
    return {TopKTranscoder: "topk_transcoder", MxD: "mxd"}[kind]


def test_an_expert_that_fires_on_some_of_its_class_has_the_scores_of_those(tiny_model):
    task = planted_texts(share=0.6)
    layer = planted_transcoder(tiny_model)
    layer.W_enc[:, 2:] = 0  # nothing else fires
    result = sparse_probing(tiny_model, layer, task, **SMALL)
    test = split(task, 0)
    truth = np.array(task.labels)[test] == "cat"
    answer = np.array(["cat" in text.split() for text in task.texts])[test]
    assert 0 < answer.sum() < truth.sum()
    (probe,) = result.select("pets", "topk_transcoder", "cat")
    hits = (truth & answer).sum()
    assert probe.scores[ONE].f1 == pytest.approx(2 * hits / (hits + truth.sum()))
    assert probe.scores[ONE].balanced_accuracy == pytest.approx((hits / truth.sum() + 1) / 2)


def test_where_the_classes_are_drawn_at_random_nothing_is_found(tiny_model):
    texts = planted_texts(n=300)
    labels = random.Random(1).choices(["heads", "tails"], k=300)
    task = LabelledTexts.of("coin", zip(labels, texts.texts, strict=True))
    result = sparse_probing(tiny_model, planted_transcoder(tiny_model), task, seeds=range(5), **SMALL)
    accuracies = [s.balanced_accuracy for s in result.by_seed("coin", "topk_transcoder", ONE)]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.07)


def test_every_number_is_scikit_learns_on_features_made_by_hand(tiny_model):
    """A text at a time, dense, and scikit-learn for every single probe."""
    task, mxd, seed = planted_texts(), random_mxd(D_MODEL), 3
    result = sparse_probing(tiny_model, {"mxd": mxd}, task, seeds=(seed,), ks=(1, 2, 5, 20), progress=False,
                            n_candidates=30)  # fmt: skip
    hook_in = mxd.cfg.metadata.hook_name
    features, dense = [], []
    for text in task.texts:
        tokens = torch.tensor([[1, *tiny_model.tokenizer.encode(text, add_special_tokens=False)]])
        x = tiny_model.run_with_cache(tokens)[1][hook_in][0, 1:]
        features.append(mxd.encode(x).double().mean(0).numpy())
        dense.append(x.double().mean(0).numpy())
    labels = np.array(task.labels)
    folds = StratifiedGroupKFold(n_splits=4, shuffle=True, random_state=seed)
    train, test = next(folds.split(labels, labels, task.sources))
    assert len(test) == 30

    for name, X in (("mxd", np.array(features)), (hook_in, np.array(dense))):
        for label in ("cat", "dog", "neither"):
            y = labels == label
            gap = X[train][y[train]].mean(0) - X[train][~y[train]].mean(0)
            ranked = sorted(range(X.shape[1]), key=lambda n: -abs(gap[n]))

            def fit(columns, X=X, y=y):
                scaler = StandardScaler().fit(X[train][:, columns])
                probe = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=10_000)
                probe.fit(scaler.transform(X[train][:, columns]), y[train])
                return [
                    (f1_score(y[i], a), balanced_accuracy_score(y[i], a))
                    for i in (train, test)
                    for a in [probe.predict(scaler.transform(X[i][:, columns]))]
                ]

            (probe,) = result.select("pets", name, label)
            singles = {n: fit([n]) for n in ranked[:30]}
            for expert in probe.experts:
                assert expert.difference == pytest.approx(gap[expert.expert], rel=1e-5)
                (train_f1, _), on_test = singles[expert.expert]
                assert expert.train_f1 == pytest.approx(train_f1)
                assert (expert.f1, expert.balanced_accuracy) == pytest.approx(on_test)
            assert probe.experts[0].train_f1 == pytest.approx(max(on[0][0] for on in singles.values()))
            assert probe.scores["one, chosen on test"].f1 == pytest.approx(
                max(on[1][0] for on in singles.values())
            )
            for k in (1, 2, 5):
                assert probe.scores[of_k(k)] == pytest.approx(fit(ranked[:k])[1])
            if name == "mxd":
                assert probe.scores[of_k(20)] == pytest.approx(fit(ranked[:20])[1])
                assert ALL not in probe.scores
            else:
                assert of_k(20) not in probe.scores, "more than there are coordinates"
                assert probe.scores[ALL] == pytest.approx(fit(ranked)[1])
            (constant,) = result.select("pets", ALWAYS, label)
            assert constant.scores[CONSTANT] == pytest.approx((f1_score(y[test], np.ones(30)), 0.5))
            (constant,) = result.select("pets", MAJORITY, label)
            assert constant.scores[CONSTANT] == (0, 0.5)


@pytest.mark.parametrize("heavy", [False, True])
def test_single_probes_are_scikit_learns(heavy):
    draw = np.random.default_rng(0)
    y = draw.random(300) < 0.2
    Z = np.maximum(draw.normal(size=(300, 12)) - 1.5 * heavy, 0) * draw.exponential(1 + 9 * heavy, (300, 12))
    Z += y[:, None] * np.linspace(0, 4, 12)
    Z[:, 0], Z[:, 1] = 0, y  # one says nothing, one everything
    Z = StandardScaler().fit_transform(Z)
    weight, intercept = single_feature_probes(Z, y)
    for n in range(12):
        probe = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000).fit(Z[:, [n]], y)
        assert weight[n] == pytest.approx(probe.coef_[0, 0], abs=1e-4)
        assert intercept[n] == pytest.approx(probe.intercept_[0], abs=1e-4)


def test_scores_are_scikit_learns():
    draw = np.random.default_rng(0)
    truth, answers = draw.random(50) < 0.3, draw.random((50, 6)) < [0, 0.2, 0.5, 0.8, 1, 0.01]
    f1, accuracy = scored(truth, answers)
    for i in range(6):
        assert f1[i] == pytest.approx(f1_score(truth, answers[:, i]))
        assert accuracy[i] == pytest.approx(balanced_accuracy_score(truth, answers[:, i]))


# What the numbers do not depend on


def layers_of_two_hooks() -> dict:
    torch.manual_seed(0)
    cfg = TopKSAEConfig(d_in=D_MODEL, d_sae=24, k=4, metadata=SAEMetadata(hook_name=HOOK_OUT))
    return {"mxd": random_mxd(D_MODEL), "sae": TopKSAE(cfg).requires_grad_(False)}


def test_one_pass_feeds_all_layers_each_from_its_hook(tiny_model, monkeypatch):
    task, layers = planted_texts(), layers_of_two_hooks()
    passes, run = [], tiny_model.run_with_hooks
    monkeypatch.setattr(tiny_model, "run_with_hooks", lambda *a, **k: passes.append(k) or run(*a, **k))
    both = pool(tiny_model, layers, task.texts, batch_size=40, progress=False)
    assert len(passes) == 3
    assert {call["stop_at_layer"] for call in passes} == {2}
    assert set(both.activations) == {"blocks.1.mlp.hook_in", HOOK_OUT}
    for name, layer in layers.items():
        alone = pool(tiny_model, {name: layer}, task.texts, batch_size=40, progress=False)
        assert (both.features[name] != alone.features[name]).nnz == 0
        assert both.features[name].nnz < 0.9 * both.features[name].shape[0] * layer.cfg.d_sae


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_neither_batch_nor_order_changes_the_numbers(batch_size, tiny_model):
    draw = random.Random(2)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in range(60)]
    layers = layers_of_two_hooks()
    expected = pool(tiny_model, layers, texts, progress=False)
    order = random.Random(3).sample(range(60), 60)
    actual = pool(tiny_model, layers, [texts[i] for i in order], batch_size=batch_size, progress=False)
    assert actual.n_tokens.tolist() == [len(texts[i].split()) for i in order]
    for name in layers:
        np.testing.assert_allclose(
            actual.features[name].toarray(), expected.features[name][order].toarray(), rtol=1e-4, atol=1e-5
        )
    for hook, activations in expected.activations.items():
        np.testing.assert_allclose(actual.activations[hook], activations[order], rtol=1e-4, atol=1e-5)


def test_the_order_of_the_texts_given_does_not_matter(tiny_model):
    task = planted_texts()
    pairs = list(zip(task.labels, task.texts, strict=True))
    shuffled = LabelledTexts.of("pets", random.Random(4).sample(pairs, len(pairs)))
    assert shuffled == task
    assert LabelledTexts.of("pets", pairs[::-1], n_texts=30) == LabelledTexts.of("pets", pairs, n_texts=30)


def test_the_units_of_the_coefficients_do_not_matter(tiny_model):
    layer = planted_transcoder(tiny_model)
    expected = sparse_probing(tiny_model, layer, planted_texts(share=0.6), **SMALL).probes
    layer.W_enc *= 1e-4
    layer.b_enc *= 1e-4
    actual = sparse_probing(tiny_model, layer, planted_texts(share=0.6), **SMALL).probes
    assert [probe.scores for probe in actual] == [probe.scores for probe in expected]


def test_float16_features_are_close(tiny_model):
    texts = planted_texts().texts
    precise = pool(tiny_model, {"mxd": random_mxd(D_MODEL)}, texts, progress=False).features["mxd"]
    half = random_mxd(D_MODEL).to(dtype=torch.float16)
    rough = pool(tiny_model, {"mxd": half}, texts, progress=False).features["mxd"]
    error = np.abs((precise - rough).toarray()).max(1)
    assert (error > 0).any()
    assert np.median(error) < 2e-3 * precise.max()
    assert np.abs(precise - rough).sum() < 0.01 * precise.sum()


@pytest.mark.parametrize("attached", [False, True])
def test_bridges_and_attached_layers_give_the_same(attached, tiny_folder, tiny_model):
    texts, layers = planted_texts().texts[:20], layers_of_two_hooks()
    expected = pool(tiny_model, layers, texts, progress=False)
    bridge = load_model(tiny_folder, model_class=SAETransformerBridge)
    with bridge.saes(saes=[layers["mxd"]] if attached else []):
        actual = pool(bridge, {"mxd": layers["mxd"]}, texts, progress=False)
    np.testing.assert_allclose(
        actual.features["mxd"].toarray(), expected.features["mxd"].toarray(), rtol=1e-3, atol=1e-4
    )


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_candidates": 9}, "n_candidates asks for 9 experts, and topk_transcoder has 8"),
        ({"ks": (1, 100)}, "ks asks for 100 experts, and topk_transcoder has 8"),
        ({"ks": (0,)}, "ks must be positive, got 0"),
        ({"seeds": ()}, "needs a layer and a seed"),
    ],
)
def test_more_than_there_is_is_refused(options, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        sparse_probing(tiny_model, planted_transcoder(tiny_model), planted_texts(), **SMALL | options)


def test_a_task_of_one_class():
    with pytest.raises(ValueError, match="'mood' has texts of glad only"):
        LabelledTexts.of("mood", [("glad", "a cat"), ("glad", "a dog"), ("sad", "  ")])
    with pytest.raises(ValueError, match="no class only"):
        LabelledTexts.of("mood", [])


def test_a_class_that_cannot_be_split(tiny_model):
    rare = LabelledTexts.of("rare", [*(("cat", f"the cat {w}") for w in WORDS), ("dog", "a dog", "one")])
    with pytest.raises(ValueError, match="class 'dog' of 'rare' cannot be split: 1 texts of 1 documents"):
        split(rare, 0)
    few = LabelledTexts.of("few", [("cat", "a cat"), ("dog", "a dog")])
    with pytest.raises(ValueError, match="takes 4 documents"):
        sparse_probing(tiny_model, planted_transcoder(tiny_model), few, **SMALL)


def test_empty_texts_duplicates_and_contradictions_are_left_out():
    task = LabelledTexts.of(
        "mood",
        [
            ("glad", "What a day"),
            ("glad", "what  a\nday "),
            ("sad", ""),
            ("sad", " \n"),
            ("sad", "Rain again"),
            ("glad", "Well"),
            ("sad", "well"),
        ],
    )
    assert task.texts == ["What a day", "Rain again"] or task.texts == ["what  a\nday ", "Rain again"]
    assert task.removed == {"empty": 2, "duplicate": 2, "ambiguous": 1}


def test_a_text_without_a_token(tiny_model):
    layers = {"layer": planted_transcoder(tiny_model)}
    for texts in (["a cat", "</s> <s>"], ["a cat", ""]):
        with pytest.raises(ValueError, match="no token but special ones"):
            pool(tiny_model, layers, texts, progress=False)
    with pytest.raises(ValueError, match="no text"):
        pool(tiny_model, layers, [], progress=False)


def test_a_text_longer_than_the_context_is_cut_and_counted(tiny_model):
    layers = {"mxd": random_mxd(D_MODEL)}
    long = " ".join(WORDS * 40)
    pooled = pool(tiny_model, layers, [long, "the cat"], progress=False)
    assert (pooled.n_cut, pooled.n_tokens.tolist()) == (1, [255, 2])
    layers["mxd"].cfg.metadata.context_size = 9
    beginning = pool(tiny_model, layers, [" ".join(WORDS[:8]), "the cat"], progress=False)
    pooled = pool(tiny_model, layers, [long, "the cat"], progress=False)
    assert (pooled.n_cut, beginning.n_cut) == (1, 0)
    np.testing.assert_allclose(
        pooled.features["mxd"].toarray(), beginning.features["mxd"].toarray(), rtol=1e-5
    )
    assert pool(tiny_model, layers, [long], 5, progress=False).n_tokens.tolist() == [4]


def test_layers_of_different_training(tiny_model):
    layers = layers_of_two_hooks()
    layers["sae"].cfg.metadata.prepend_bos = False
    with pytest.raises(ValueError, match="probe them apart"):
        pool(tiny_model, layers, ["a cat"], progress=False)
    layers["sae"].cfg.metadata.model_name = "gpt2"
    with pytest.raises(ValueError, match="trained on gpt2"):
        pool(tiny_model, layers, ["a cat"], progress=False)


def test_without_scikit_learn(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mxd-lens\[probing\]'"):
        sparse_probing(tiny_model, planted_transcoder(tiny_model), planted_texts(), **SMALL)


def test_two_tasks_of_one_name(tiny_model):
    with pytest.raises(ValueError, match="Two tasks have one name: pets, pets"):
        sparse_probing(
            tiny_model, planted_transcoder(tiny_model), [planted_texts(), planted_texts(0.5)], **SMALL
        )


# What comes out


def test_the_results_are_kept_and_shown(tiny_model, tmp_path):
    layers = {"<mxd>": random_mxd(D_MODEL)}
    result = sparse_probing(tiny_model, layers, planted_texts(), seeds=(0, 7), **SMALL)
    result.save(tmp_path / "probing.json")
    assert SparseProbing.load(tmp_path / "probing.json") == result
    facts = result.tasks["pets"]
    assert facts.balance == {"cat": 40, "dog": 40, "neither": 40}
    assert facts.splits[7] == {
        "train": dict.fromkeys(facts.balance, 30),
        "test": dict.fromkeys(facts.balance, 10),
    }
    assert (facts.n_tokens, facts.n_cut) == (120 * 8, 0)
    table = result.to_pandas()
    assert table["probed"].tolist() == ["<mxd>", "blocks.1.mlp.hook_in", MAJORITY, ALWAYS]
    scores = [probe.scores[ONE].f1 for probe in result.select("pets", "<mxd>")]
    assert table["one, F1"][0] == pytest.approx(np.mean(scores))
    by_seed = [
        np.mean([p.scores[ONE].f1 for p in result.select("pets", "<mxd>") if p.seed == s]) for s in (0, 7)
    ]
    assert table["±"][0] == pytest.approx(np.std(by_seed, ddof=1))
    page = write_probing_page(tmp_path / "page.html", result).read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1
    assert "&lt;mxd&gt;" in page
    assert "cat 40, dog 40, neither 40" in page


# The tasks


def test_pieces_are_passages_of_whole_words():
    text = " ".join(f"word{i}" for i in range(1000))
    found = pieces(text)
    assert 4 <= len(found) <= 8
    assert all(PASSAGE // 4 <= len(piece) <= PASSAGE for piece in found)
    assert all(word in text.split() for piece in found for word in piece.split())
    assert "word0" not in found[0]
    assert pieces("a cat") == ["a cat"]
    assert pieces("") == []
    assert pieces("x" * 2000) == []


def test_documents_stay_whole():
    task = LabelledTexts.of(
        "books", [("ab"[i % 2], f"text {i} {j}", f"book {i}") for i in range(24) for j in range(5)]
    )
    for seed in range(5):
        test = split(task, seed)
        sides: dict[str, set] = {}
        for source, side in zip(task.sources, test.tolist(), strict=True):
            sides.setdefault(source, set()).add(side)
        assert all(len(side) == 1 for side in sides.values())
        assert 0.15 < test.mean() < 0.35
    assert any((split(task, 0) != split(task, seed)).any() for seed in range(1, 5))


@pytest.fixture(autouse=True)
def nltk_data_beside_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    if DOWNLOADED.is_dir():
        monkeypatch.setattr(nltk.data, "path", [*nltk.data.path, str(DOWNLOADED)])


def has_corpora() -> bool:
    try:
        for name in ("genesis", "udhr", "sentence_polarity", "movie_reviews", "brown", "abc"):
            probing_tasks.nltk_reader(name)
    except LookupError:
        return False
    return True


@pytest.mark.parametrize("name", OFFLINE_TASKS)
def test_tasks_that_need_no_network(name):
    if TASKS[name].provider == "nltk" and not has_corpora():
        pytest.skip("the nltk corpora are not on this machine")
    task = load_task(name, n_texts=240)
    assert len(task.balance) >= 2
    assert len(set(task.balance.values())) == 1, "as many of each class"
    assert len({" ".join(text.split()).casefold() for text in task.texts}) == len(task.texts)
    whole = [text for text, source in zip(task.texts, task.sources, strict=True) if "sentence" not in source]
    assert all(0 < len(text) <= PASSAGE for text in whole)
    assert task == load_task(name, n_texts=240)
    split(task, 0)
    expected = {"language": "Finnish", "sentiment": "negative", "topic": "religion", "code": "Python"}[name]
    assert expected in task.balance


def test_an_unknown_task():
    with pytest.raises(ValueError, match="no probing task 'mood': choose from language, sentiment"):
        load_task("mood")


def test_an_nltk_corpus_that_is_missing(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    import nltk.corpus
    from nltk.corpus.util import LazyCorpusLoader

    lazy = LazyCorpusLoader("genesis", nltk.corpus.PlaintextCorpusReader, r".*")
    monkeypatch.setattr(nltk.corpus, "genesis", lazy)
    with pytest.raises(LookupError, match=r"python -m nltk\.downloader genesis"):
        load_task("language")


HUB = {
    "ag_news": {None: [{"text": f"news {i}", "label": i % 4} for i in range(40)]},
    "amazon_reviews": {None: [{"text": f"review {i}", "rating": [1.0, 5.0][i % 2]} for i in range(40)]},
    "europarl": {
        pair: [{"translation": {pair[:2]: f"{pair} {i}", pair[3:]: "other"}} for i in range(8)]
        for pair in ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt")
    },
    "github_code": {
        None: [
            {"content": f"{e} {i}\n" * 300, "path": f"a/b{i}.{e}", "repo_name": "r"}
            for i in range(8)
            for e in ("c", "py", "html", "java", "php", "rb")
        ]
    },
}


@pytest.mark.parametrize("name", HUB)
def test_tasks_from_the_hub(name, monkeypatch):
    """Against a stand-in for `load_dataset`: rows as the data sets have them."""

    def load(path, config=None, *, split, streaming, **options):
        assert split == "train"
        rows = datasets.Dataset.from_list(HUB[name][config])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_task(name)
    counts = {"ag_news": [10] * 4, "amazon_reviews": [20] * 2, "europarl": [8] * 5, "github_code": [8] * 5}
    assert list(task.balance.values()) == counts[name]
    assert task.provider == "Hugging Face hub"
    assert all("other" not in text for text in task.texts)


@pytest.mark.parametrize("name", HUB)
def test_a_hub_that_is_out_of_reach(name, monkeypatch):
    def load(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("no connection")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConnectionError, match="Without a network there are the tasks language, sentiment"):
        load_task(name)


def test_a_hub_in_offline_mode():
    with pytest.raises(ConnectionError, match="cannot be had from the Hugging Face hub"):
        load_task("ag_news")


def test_too_few_files_of_a_language(monkeypatch, caplog):
    def source_file(label, file, folder):
        return [Passage(label, str(file), str(file))] if label in ("C", "Python") else []

    monkeypatch.setattr(probing_tasks, "source_file", source_file)
    with caplog.at_level("WARNING"):
        labels = Counter(passage.label for passage in probing_tasks.code())
    assert set(labels) == {"C", "Python"}
    assert "goes without JavaScript" in caplog.text


@pytest.mark.real_model
def test_a_real_models_experts_know_languages(smollm2):
    if not has_corpora():
        pytest.skip("the nltk corpora are not on this machine")
    mxd = MxD.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp")
    # Fewer texts leave three of a class to test on, and the scores to chance.
    task = load_task("language", n_texts=144)
    result = sparse_probing(smollm2, mxd, task, seeds=range(5), ks=(1, 5), context_size=24, progress=False)
    (always,) = {round(s.f1, 3) for s in result.by_seed("language", ALWAYS, CONSTANT)}
    one = [scores.f1 for scores in result.by_seed("language", "mxd", ONE)]
    dense = [scores.f1 for scores in result.by_seed("language", "blocks.11.mlp.hook_in", ALL)]
    assert np.mean(one) > always + 0.2
    assert np.mean(dense) > np.mean(one)


def test_a_task_of_ones_own_by_name(tiny_model, monkeypatch):
    task = planted_texts()
    passages = [Passage(*row) for row in zip(task.labels, task.texts, task.sources, strict=True)]
    monkeypatch.setitem(TASKS, "pets", ProbingTask("pets", "which pet", "given", lambda: passages))
    result = sparse_probing(tiny_model, planted_transcoder(tiny_model), "pets", n_texts=60, **SMALL)
    assert result.tasks["pets"].balance == {"cat": 20, "dog": 20, "neither": 20}
