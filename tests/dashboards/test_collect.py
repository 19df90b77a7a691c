"""What a dashboard shows: saved and read, and every number against one computed apart from it."""

import json
import math
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from attached import MODELS
from layers import D_SAE, LAYERS, make_layer, skip_of, true_input, written_by
from sae_lens import TopKSAE, TopKSAEConfig
from tiny import D_MODEL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.dashboard import cost
from mxd_lens import MxD, TopKTranscoder, load_model
from mxd_lens.analysis.token_text import token_texts, vocabulary_text
from mxd_lens.dashboards.collect import collection, effects, excerpts, firings, kept
from mxd_lens.dashboards.collect.collection import collect_dashboard
from mxd_lens.dashboards.collect.data import (
    Band,
    CollectionConfig,
    DashboardData,
    Excerpt,
    ExpertData,
    Neighbour,
    TokenEffect,
)
from mxd_lens.dashboards.collect.excerpts import choose
from mxd_lens.dashboards.collect.firings import FirstPass, histogram, priorities
from mxd_lens.dashboards.collect.kept import Kept

HOSTILE = ["<script>alert(1)</script>", "\x00\x1b[31m", "\u202eabc", "😀", "", "w" * 50_000, "\u2028", "\r\n"]


def made_up(expert: int) -> ExpertData:
    n = len(HOSTILE)
    excerpt = Excerpt(HOSTILE, list(range(n)), [0.5] * n, [1.25] * n, [math.nan] * n, 3, 7, 0)
    return ExpertData(
        expert=expert,
        density=0.25,
        n_firings=3,
        mean=0.1,
        maximum=1 / 3,
        edges=[0.0, 0.5, 1.0],
        counts=[3, 0],
        bands=[Band("top", 0.1, 0.2, [excerpt, excerpt]), Band("50-100 %", math.nan, math.nan, [])],
        promoted=[TokenEffect(text, 1.5, 0.5) for text in HOSTILE],
        suppressed=[],
        singular_values=[2.0, 1.0],
        stable_rank=1.25,
        coactive=[Neighbour(4, 0.5)],
        similar=[],
        share_of_output=0.01,
        loss_effect=math.nan,
        coherence=0.5,
        mean_gate_share=0.1,
        consistency=0.9,
        contribution_rms=3.0,
        mean_direction=[0.5, -0.5],
    )


@pytest.fixture
def small() -> DashboardData:
    return DashboardData(
        {"model_name": "m</script>", "n": 3}, {"density": [0.1, 0.2]}, [made_up(5), made_up(2)]
    )


def same(one: DashboardData, other: DashboardData) -> bool:
    return repr(one) == repr(other)  # nan is not equal to itself, and repr tells every bit of a float


def test_saved_data_are_read_as_they_were(small, tmp_path):
    small.save(tmp_path)
    assert same(DashboardData.load(tmp_path), small)
    assert isinstance(DashboardData.load(tmp_path).experts[0].promoted[0], TokenEffect)
    assert list(pandas.read_parquet(tmp_path / "experts.parquet").expert) == [5, 2]
    assert not list(tmp_path.glob(".*"))


def test_a_folder_written_twice_is_not_mixed(small, tmp_path):
    small.save(tmp_path / "twice")
    second = DashboardData({"model_name": "other"}, {"density": [0.5]}, [made_up(1)])
    second.save(tmp_path / "twice")
    assert same(DashboardData.load(tmp_path / "twice"), second)
    small.save(tmp_path / "once")
    (tmp_path / "once" / "excerpts.parquet").replace(tmp_path / "twice" / "excerpts.parquet")
    with pytest.raises(ValueError, match=r"excerpts\.parquet was not written together with dashboard\.json"):
        DashboardData.load(tmp_path / "twice")


@pytest.mark.parametrize(
    "name", ["dashboard.json", "overview.parquet", "experts.parquet", "excerpts.parquet"]
)
def test_a_missing_file_is_said(small, tmp_path, name):
    small.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        DashboardData.load(tmp_path)


def test_writing_that_is_interrupted_leaves_no_data_or_the_old(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    written = []

    def dies(*args, **kwargs):
        written.append(args)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", dies)
    with pytest.raises(KeyboardInterrupt):
        DashboardData({}, {}, []).save(tmp_path)
    assert same(DashboardData.load(tmp_path), small)


def test_a_newer_format_is_said(small, tmp_path):
    small.save(tmp_path)
    about = json.loads((tmp_path / "dashboard.json").read_text())
    (tmp_path / "dashboard.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, and this version of mxd_lens reads up to 1"):
        DashboardData.load(tmp_path)


# Every number, computed apart

BOS = 1
SHOWN = [3, 17, 31, 0]
EVERYTHING = CollectionConfig(
    n_top=100, n_per_band=100, n_bands=3, before=3, after=2, n_tokens=4, batch_size=3
)


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(3, 20, (7, 12), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = BOS
    tokens[2, 6] = BOS
    return tokens


def collect(sae, model, tokens, **changes) -> DashboardData:
    settings = {"experts": SHOWN, "cfg": EVERYTHING, "progress": False} | changes
    return collect_dashboard(model, sae, tokens, **settings)


class ByHand:
    """The layer's inputs, activations and contributions, and the model's losses, token by token."""

    def __init__(self, sae, model, tokens):
        self.sae, self.model, self.tokens = sae, model, tokens
        self.x = true_input(model, sae, tokens).double()
        self.kept = tokens != BOS
        self.acts = sae.encode(self.x) * self.kept[..., None]
        self.sequences = [(s, t) for s in range(len(tokens)) for t in range(tokens.shape[1])]
        self.places = [(s, t) for s, t in self.sequences if self.kept[s, t]]

    def firings(self, n: int) -> list[tuple[int, int]]:
        return [p for p in self.places if self.acts[p][n] != 0]

    def a(self, n: int) -> np.ndarray:
        return np.array([self.acts[p][n].item() for p in self.firings(n)])

    def written(self, n: int) -> np.ndarray:
        return np.array([written_by(self.sae, self.x[p], n).tolist() for p in self.firings(n)])

    def share_of_output(self, n: int) -> float:
        shares = []
        for p in self.places:
            output = self.sae(self.x[p]) - self.sae.b_dec
            shares.append((written_by(self.sae, self.x[p], n) @ output / (output @ output)).item())
        return float(np.mean(shares))

    def jaccard(self, n: int, m: int) -> float:
        one, other = set(self.firings(n)), set(self.firings(m))
        return len(one & other) / len(one | other) if one | other else 0.0

    def losses(self, without: int | None) -> np.ndarray:
        metadata = self.sae.cfg.metadata
        name_out = metadata.hook_name_out or metadata.hook_name
        names = {name_out, name_out.replace("hook_mlp_out", "mlp.hook_out")}
        y_hat = self.sae(self.x)
        if without is not None:
            y_hat = y_hat - written_by(self.sae, self.x, without)

        def replace(y, hook):
            return torch.where(self.kept[..., None], y_hat.to(y.dtype), y)

        logits = self.model.run_with_hooks(self.tokens, fwd_hooks=[(names.__contains__, replace)])
        p = np.exp(logits.detach().double().numpy())
        p = p / p.sum(-1, keepdims=True)
        return np.array(
            [
                [-np.log(p[s, t, i]) for t, i in enumerate(row[1:])]
                for s, row in enumerate(self.tokens.tolist())
            ]
        )


def close(actual, expected, tolerance: float = 1e-4):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def check_expert(shown: ExpertData, hand: ByHand) -> None:
    n, a, written = shown.expert, hand.a(shown.expert), hand.written(shown.expert)
    units = written / a[:, None]
    direction = (a[:, None] * units).sum(0) / a.sum()
    assert shown.n_firings == len(a)
    close(shown.density, len(a) / len(hand.places))
    close(shown.mean, a.mean())
    close(shown.maximum, a.max())
    assert len(shown.edges) == len(shown.counts) + 1
    assert shown.counts == np.histogram(a, shown.edges)[0].tolist()
    assert sum(shown.counts) == len(a)
    assert shown.edges[0] == 0
    close(shown.share_of_output, hand.share_of_output(n))
    close(shown.contribution_rms, np.sqrt((written**2).sum(-1).mean()))
    close(shown.consistency, direction @ direction / ((a * (units**2).sum(-1)).sum() / a.sum()))
    close(shown.mean_direction, direction)
    check_weights(shown, hand)
    check_tokens(shown, hand, a, units, direction)
    top = hand.x[tuple(torch.tensor([[e.sequence, e.start + e.peak] for e in shown.bands[0].excerpts]).T)]
    centred = (top - torch.stack([hand.x[p] for p in hand.places]).mean(0)).numpy()
    centred /= np.linalg.norm(centred, axis=-1, keepdims=True)
    cosines = [u @ v for i, u in enumerate(centred) for v in centred[i + 1 :]]
    if cosines:
        close(shown.coherence, max(np.mean(cosines), 0))
    else:
        assert math.isnan(shown.coherence)


def check_weights(shown: ExpertData, hand: ByHand) -> None:
    n, sae = shown.expert, hand.sae
    rows = sae.W_dec.numpy().copy()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    W = sae.expert_weight(n).numpy() if hasattr(sae, "expert_weight") else rows[n : n + 1]
    singular_values = np.linalg.svd(W, compute_uv=False)
    close(shown.singular_values, singular_values)
    close(shown.stable_rank, (np.linalg.norm(W) / np.linalg.norm(W, 2)) ** 2)
    gate = sum(hand.acts[p].numpy() @ rows for p in hand.places)
    close(shown.mean_gate_share, (rows[n] @ gate) ** 2 / (rows[n] @ rows[n]) / (gate @ gate))
    cosine = rows @ rows[n] / np.linalg.norm(rows, axis=-1) / np.linalg.norm(rows[n])
    cosine[n] = -2
    order = np.argsort(-cosine)[: len(shown.similar)]
    assert [other.expert for other in shown.similar] == order.tolist()
    close([other.similarity for other in shown.similar], cosine[order])
    jaccard = np.array([hand.jaccard(n, m) if m != n else -1 for m in range(D_SAE)])
    close([other.similarity for other in shown.coactive], np.sort(jaccard)[::-1][: len(shown.coactive)])
    close([jaccard[other.expert] for other in shown.coactive], [o.similarity for o in shown.coactive])
    assert len(shown.coactive) == min(10, (jaccard > 0).sum())


def check_tokens(shown: ExpertData, hand: ByHand, a, units, direction) -> None:
    """The final norm of the tiny model is w * r / rms(r)."""
    model = hand.model
    w, W_U = model.ln_final.w.detach().double().numpy(), model.W_U.detach().double().numpy()

    def logits(u):
        effect = (w * u) @ W_U
        return effect - effect.mean(-1, keepdims=True)

    mean, each = logits(direction), logits(units)
    spread = np.sqrt((a[:, None] * (each - mean) ** 2).sum(0) / a.sum())
    vocabulary = hand.model.tokenizer.convert_ids_to_tokens(range(W_U.shape[1]))
    for side, order in ((shown.promoted, np.argsort(-mean)), (shown.suppressed, np.argsort(mean))):
        assert [effect.token for effect in side] == [vocabulary[i] for i in order[:4]]
        close([effect.logit for effect in side], mean[order[:4]])
        close([effect.spread for effect in side], spread[order[:4]])


def check_excerpts(shown: ExpertData, hand: ByHand) -> None:
    n, firings = shown.expert, hand.firings(shown.expert)
    effects = hand.losses(None) - hand.losses(n)
    effects = np.pad(-effects, ((0, 0), (0, 1)), constant_values=np.nan)
    words = [hand.model.tokenizer.convert_ids_to_tokens(row) for row in hand.tokens.tolist()]
    for band in shown.bands:
        peaks = [e.values[e.peak] for e in band.excerpts]
        close(peaks, sorted(peaks, reverse=True))
        close([band.low, band.high], [peaks[-1], peaks[0]])
        for e in band.excerpts:
            at = e.start + e.peak
            assert (e.sequence, at) in firings
            assert e.start == max(at - 3, 0)
            here = slice(e.start, min(at + 3, hand.tokens.shape[1]))
            assert e.token_ids == hand.tokens[e.sequence, here].tolist()
            assert [t.strip() for t in e.tokens] == words[e.sequence][here]
            close(e.values, hand.acts[e.sequence, here, n])
            written = written_by(hand.sae, hand.x[e.sequence, here], n) * hand.kept[e.sequence, here, None]
            close(e.norms, written.norm(dim=-1))
            close(e.loss_effects, effects[e.sequence, here])
    top, *bands = shown.bands
    best = {s: max(hand.acts[p][n].item() for p in firings if p[0] == s) for s in {p[0] for p in firings}}
    assert top.name == "top"
    assert {e.sequence for e in top.excerpts} == best.keys()
    close([e.values[e.peak] for e in top.excerpts], [best[e.sequence] for e in top.excerpts])
    # Of a sample that holds all firings, and bands that hold all of the sample: each firing once.
    found = [(e.sequence, e.start + e.peak) for band in bands for e in band.excerpts]
    assert sorted(found) == sorted(firings)
    assert all(lower.high <= upper.low for upper, lower in pairwise(bands))
    if len(firings) >= 3:
        assert [band.name for band in bands] == ["66.7-100 %", "33.3-66.7 %", "0-33.3 %"]
        assert max(len(b.excerpts) for b in bands) - min(len(b.excerpts) for b in bands) <= 1
    means = [np.nanmean(v) for b in bands if not np.isnan(v := [effects[p] for p in peaks_of(b)]).all()]
    if means:
        close(shown.loss_effect, np.mean(means))
    else:
        assert math.isnan(shown.loss_effect)


def peaks_of(band: Band) -> list[tuple[int, int]]:
    return [(e.sequence, e.start + e.peak) for e in band.excerpts]


@pytest.mark.parametrize("kind", LAYERS)
def test_every_number(tiny_model, tokens, kind):
    sae = make_layer(kind)
    hand, data = ByHand(sae, tiny_model, tokens), collect(sae, tiny_model, tokens)
    assert [shown.expert for shown in data.experts] == SHOWN
    for shown in data.experts:
        if shown.n_firings:
            check_expert(shown, hand)
            check_excerpts(shown, hand)
        else:
            assert not hand.firings(shown.expert)
    assert any(shown.n_firings > 5 for shown in data.experts)
    assert data.settings["n_tokens"] == len(hand.places)
    overview = data.overview
    for n in range(D_SAE):
        a = hand.a(n)
        close(overview["density"][n], len(a) / len(hand.places))
        close(overview["share_of_output"][n], hand.share_of_output(n))
        close(overview["maximum"][n], a.max(initial=0))
    total = sum(hand.acts[p].sum().item() for p in hand.places)
    close(overview["load_share"], [hand.a(n).sum() / total for n in range(D_SAE)])
    skip = [
        (skip_of(sae, hand.x[p]) @ (y := sae(hand.x[p]) - sae.b_dec) / (y @ y)).item() for p in hand.places
    ]
    assert sum(overview["share_of_output"]) + np.mean(skip) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["skip_mxd, k", "saelens topk"])
def test_on_every_model(tiny_folder, tokens, kind, model):
    model, sae = MODELS[model](tiny_folder), make_layer(kind)
    hand = ByHand(sae, model, tokens)
    alive = hand.acts.sum((0, 1)).topk(3).indices
    for shown in collect(sae, model, tokens, experts=alive).experts:
        check_excerpts(shown, hand)
        close(shown.mean, hand.a(shown.expert).mean())


def test_an_expert_that_never_fires(tiny_model, tokens):
    sae = make_layer("mxd, k")
    sae.b_enc[17] = -1000
    data = collect(sae, tiny_model, tokens)
    shown = data.experts[1]
    assert (shown.expert, shown.n_firings, shown.density, shown.maximum) == (17, 0, 0, 0)
    assert all(map(math.isnan, (shown.mean, shown.loss_effect, shown.coherence, shown.consistency)))
    empty = (shown.bands, shown.promoted, shown.suppressed, shown.edges, shown.counts, shown.mean_direction)
    assert not any(empty)
    assert not shown.coactive
    assert len(shown.singular_values) == D_MODEL
    assert all(other.expert != 17 for expert in data.experts for other in expert.coactive)


def test_alone_experts_that_never_fire(tiny_model, tokens):
    sae = make_layer("mxd, k")
    sae.b_enc[17] = -1000
    (shown,) = collect(sae, tiny_model, tokens, experts=17).experts
    assert shown.bands == []


def test_without_loss_effects(tiny_model, tokens):
    sae = make_layer("mxd, k")
    whole = collect(sae, tiny_model, tokens)
    cfg = CollectionConfig(**(vars(EVERYTHING) | {"loss_effects": False}))
    for one, other in zip(collect(sae, tiny_model, tokens, cfg=cfg).experts, whole.experts, strict=True):
        assert math.isnan(one.loss_effect)
        close(one.coherence, other.coherence, 1e-9)
        for mine, theirs in zip(one.bands, other.bands, strict=True):
            for e, f in zip(mine.excerpts, theirs.excerpts, strict=True):
                assert e.token_ids == f.token_ids
                close(e.values, f.values, 1e-6)
                close(e.norms, f.norms, 1e-6)
                assert np.isnan(e.loss_effects).all()


def test_few_are_drawn_where_not_all_fit(tiny_model, tokens):
    cfg = CollectionConfig(n_top=2, n_bands=2, n_per_band=1, before=0, after=0, n_sampled=6, n_directions=2)
    sae = make_layer("mxd, k")
    sae.b_enc[3] = 100
    (shown,) = collect(sae, tiny_model, tokens, experts=[3], cfg=cfg).experts
    assert [len(band.excerpts) for band in shown.bands] == [2, 1, 1]
    assert all(len(e.tokens) == 1 for band in shown.bands for e in band.excerpts)
    (other,) = collect(
        sae, tiny_model, tokens, experts=[3], cfg=CollectionConfig(**(vars(cfg) | {"seed": 1}))
    ).experts
    assert peaks_of(other.bands[0]) == peaks_of(shown.bands[0])
    assert [peaks_of(b) for b in other.bands[1:]] != [peaks_of(b) for b in shown.bands[1:]]


def test_numbers_do_not_depend_on_the_batch(tiny_model, tokens):
    sae = make_layer("mxd, relu")
    one, other = (
        collect(sae, tiny_model, tokens, cfg=CollectionConfig(n_per_band=1, n_directions=5, batch_size=size))
        for size in (2, 7)
    )
    for mine, theirs in zip(one.experts, other.experts, strict=True):
        assert [peaks_of(b) for b in mine.bands] == [peaks_of(b) for b in theirs.bands]
        assert mine.counts == theirs.counts
        for name in ("share_of_output", "loss_effect", "coherence", "mean", "consistency"):
            close(getattr(mine, name), getattr(theirs, name), 1e-5)
        close([e.spread for e in mine.promoted], [e.spread for e in theirs.promoted], 1e-5)


# Interrupted, resumed, refused


class Dies(BaseException):
    pass


def without_date(data: DashboardData) -> str:
    data.settings.pop("date")
    return repr(data)


POINTS = [
    (firings, "read_batch", 1),
    (firings, "read_batch", 3),
    (excerpts, "read_batch", 1),
    (excerpts, "read_batch", 2),
    (effects, "losses_with", 1),
    (effects, "losses_with", 2),
    (effects, "losses_without", 1),
    (effects, "losses_without", 3),
    *((kept, "save_file", call) for call in (1, 2, 3, 6, 9, 12)),
    (collection, "histogram", 1),
    (effects, "spectrum", 1),
    (pq, "write_table", 2),
]
"""Where a run is killed: in the n-th call of a function."""


@pytest.mark.parametrize(("module", "name", "call"), POINTS)
def test_a_killed_run_resumes(tiny_model, tokens, tmp_path, monkeypatch, module, name, call):
    sae = make_layer("skip_mxd, k")
    cfg = CollectionConfig(batch_size=2, checkpoint_every=1, n_per_band=2, before=2, after=1)
    whole = without_date(collect(sae, tiny_model, tokens, cfg=cfg, folder=tmp_path / "whole"))
    calls = []
    original = getattr(module, name)

    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            if name == "save_file":
                args[1].write_bytes(b"half")
            raise Dies
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        with pytest.raises(Dies):
            collect(sae, tiny_model, tokens, cfg=cfg, folder=tmp_path / "killed")
    passes = []
    monkeypatch.setattr(
        firings, "read_batch", lambda *args, _f=firings.read_batch: passes.append(1) or _f(*args)
    )
    resumed = collect(sae, tiny_model, tokens, cfg=cfg, folder=tmp_path / "killed")
    assert without_date(resumed) == whole
    if module is not firings and name != "save_file":
        assert not passes  # the first pass is not repeated
    elif (name, call) == ("read_batch", 3):
        assert len(passes) == 2  # of 4
    names = {"dashboard.json", "overview.parquet", "experts.parquet", "excerpts.parquet"}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_killed_outright(tiny_model, tokens, tmp_path):
    sae = make_layer("mxd, k")
    cfg = CollectionConfig(batch_size=2, checkpoint_every=1)
    whole = without_date(collect(sae, tiny_model, tokens, cfg=cfg))
    child = os.fork()
    if not child:
        effects.losses_without = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        collect(sae, tiny_model, tokens, cfg=cfg, folder=tmp_path / "d")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["collecting"]
    assert without_date(collect(sae, tiny_model, tokens, cfg=cfg, folder=tmp_path / "d")) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_complete_folder_is_read(tiny_model, tokens, tmp_path, monkeypatch):
    sae = make_layer("mxd, k")
    data = collect(sae, tiny_model, tokens, folder=tmp_path, text_name="words", layer="here")
    assert data.settings["text_name"] == "words"
    monkeypatch.setattr(firings, "read_batch", None)
    again = collect(sae, tiny_model, tokens, folder=tmp_path)
    assert same(again, data)
    assert not (tmp_path / "collecting").exists()


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [3]}, r"experts: \[3, 17, 31, 0\] then, \[3\] now"),
        ({"cfg": CollectionConfig(n_top=3)}, "n_top: 100 then, 3 now"),
        ({"tokens": torch.full((7, 12), 5)}, "tokens: '.*' then, '.*' now"),
        ({"kind": "mxd, relu"}, "layer.settings: '.*' then, '.*' now"),
        ({"changed": "layer"}, "layer.weights: '.*' then, '.*' now"),
        ({"changed": "model"}, "model.weights: '.*' then, '.*' now"),
    ],
)
def test_the_folder_of_another_call_is_refused(
    tiny_model, tokens, tmp_path, monkeypatch, changes, message, interrupted
):
    with monkeypatch.context() as patch:
        if interrupted:
            patch.setattr(collection, "histogram", None)
        with pytest.raises(TypeError) if interrupted else monkeypatch.context():
            collect(make_layer("mxd, k"), tiny_model, tokens, folder=tmp_path / "d")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    call = {"kind": "mxd, k", "tokens": tokens} | changes
    sae, changed = make_layer(call.pop("kind")), call.pop("changed", "")
    with torch.no_grad():
        if changed == "layer":
            sae.W_hidden[3, 5] += 1e-3
        if changed == "model":
            tiny_model.blocks[0].attn.W_Q[0, 3, 2] += 1e-3
    with pytest.raises(ValueError, match=f"holds the results of another run.*({message})"):
        collect(sae, tiny_model, folder=tmp_path / "d", **call)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_experts_that_are_drawn_fire(tiny_model, tokens, monkeypatch):
    monkeypatch.setattr(collection, "N_BY_DEFAULT", 5)
    sae = make_layer("mxd, k")
    drawn = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    sae.b_enc[drawn[:3]] = -1000
    data = collect(sae, tiny_model, tokens, experts=None)
    ids = [e.expert for e in data.experts]
    live = [n for n in drawn.tolist() if data.overview["density"][n] > 0]
    assert ids == sorted(live[:5])
    assert data.settings["deep"] == ids


def test_all_that_fire(tiny_model, tokens, tmp_path):
    sae = make_layer("mxd, k")
    sae.b_enc[[7, 30]] = -1000
    cfg = CollectionConfig.light(n_neighbours=4)
    whole = {"experts": "live", "cfg": cfg, "folder": tmp_path / "d"}
    data = collect(sae, tiny_model, tokens, **whole)
    live = [n for n, density in enumerate(data.overview["density"]) if density > 0]
    assert [e.expert for e in data.experts] == live
    assert 7 not in live
    assert all(not e.singular_values and math.isnan(e.loss_effect) for e in data.experts)
    assert all(e.promoted and e.coactive and e.bands for e in data.experts)
    named = collect(sae, tiny_model, tokens, experts=live[:3], cfg=cfg).experts
    deeper = collect(sae, tiny_model, tokens, **whole, deep=live[1:3])
    assert deeper.settings["deep"] == live[1:3]
    for mine, theirs in zip(deeper.experts[1:3], named[1:3], strict=True):
        close(mine.singular_values, theirs.singular_values)
        close(mine.loss_effect, theirs.loss_effect)
    others = [e for e in deeper.experts if e.expert not in live[1:3]]
    assert [repr(e) for e in others] == [repr(e) for e in data.experts if e.expert not in live[1:3]]
    again = collect(sae, tiny_model, tokens, **whole, deep=live[:2])
    assert again.settings["deep"] == [*live[1:3], live[0]]
    assert repr(again.experts[1:]) == repr(deeper.experts[1:])


def test_other_files_are_left_alone(tiny_model, tokens, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt"):
        collect(make_layer("mxd, k"), tiny_model, tokens, folder=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_an_expert_is_shown_once(tiny_model, tokens):
    data = collect(make_layer("mxd, k"), tiny_model, tokens, experts=[7, 2, 7])
    assert [e.expert for e in data.experts] == [7, 2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"experts": [40]}, IndexError, "expert 40 does not exist: there are 40"),
        ({"experts": []}, ValueError, "no expert is named"),
        ({"experts": "alive"}, ValueError, 'experts are ids, "live" or None'),
        ({"tokens": torch.zeros(3, 4)}, ValueError, "tokens must be ids"),
        ({"tokens": torch.zeros(3, 1, dtype=torch.long)}, ValueError, "tokens must be ids"),
    ],
)
def test_what_cannot_be_collected_is_said(tiny_model, tokens, changes, error, message):
    with pytest.raises(error, match=message):
        collect(make_layer("mxd, k"), tiny_model, **({"tokens": tokens} | changes))


def test_a_layer_that_is_attached_is_said(tiny_model, tokens):
    sae = make_layer("mxd, k", "float32")
    with tiny_model.saes(saes=[sae]), pytest.raises(ValueError, match="reset_saes"):
        collect(sae, tiny_model, tokens)


def test_a_layer_that_normalises_its_input_is_said(tiny_model, tokens):
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4, normalize_activations="layer_norm"))
    sae.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    with pytest.raises(ValueError, match="normalize_activations='layer_norm'"):
        collect(sae, tiny_model, tokens)


@pytest.mark.parametrize(("name", "value"), [("n_bands", 0), ("n_top", -1), ("batch_size", 0)])
def test_a_setting_that_cannot_be_is_said(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        CollectionConfig(**{name: value})


def test_what_it_costs_is_measured(tiny_model, tokens):
    sae = make_layer("mxd, k")
    run = cost(lambda: collect(sae, tiny_model, tokens))
    assert (run["experts"], run["tokens"]) == (4, 76)
    assert run["excerpts"] > 10
    assert 0 < sum(clock for clock, _ in run["stages"].values()) < run["seconds"]
    assert collection.add_spectra.__name__ == "add_spectra"


# Choosing


def found_by(sae, model, tokens, experts, cfg) -> firings.Firings:
    return FirstPass(sae, experts, cfg, Kept(None, None)).read(model, tokens, progress=False)


@pytest.mark.parametrize("n_top", [0, 1, 4, 1000])
def test_the_top_is_that_of_a_sort(tiny_model, tokens, n_top):
    cfg = CollectionConfig(n_top=n_top)
    found = found_by(make_layer("mxd, relu"), tiny_model, tokens, SHOWN, cfg)
    for slot in range(len(SHOWN)):
        place, value, _ = found.of(slot)
        value[:] = value.round(1)  # with ties
        best: dict[int, tuple[float, int]] = {}
        for p, v in zip(place.tolist(), value.tolist(), strict=True):
            if -v < best.get(p // 12, (0,))[0]:
                best[p // 12] = (-v, p)
        expected = [p for _, p in sorted(best.values())][:n_top]
        assert choose(found, slot, cfg).top.tolist() == expected


def test_histograms_are_numpys():
    values = np.array([0.001, 1e-9, 3.0, 4.0, 0.5, 0.5, 7.99, 8.0, 1000.0, 1e-30])
    edges, counts = histogram(values)
    assert counts == np.histogram(values, edges)[0].tolist()
    assert edges[-1] == 1008
    assert histogram(values[:0]) == ([], [])
    assert histogram(np.array([8.0]))[0][-1] == 8.25


def test_priorities_are_spread_evenly_and_depend_on_everything():
    n = np.arange(100_000)
    drawn = priorities(0, 3, n, 100) / 2**63
    assert len(np.unique(drawn)) == len(n)
    counts = np.histogram(drawn, 20, (-1, 1))[0]
    assert (abs(counts - 5000)).max() < 5 * 5000**0.5
    place = np.array([105])
    others = [priorities(*a)[0] for a in [(0, 1, place, 100), (1, 1, place, 100), (0, 2, place, 100)]]
    others += [priorities(0, 1, place + step, 100)[0] for step in (1, 100)]
    assert len(set(others)) == 5


def test_memory_is_that_of_the_firings_shown(tiny_model, tokens):
    sae = make_layer("mxd, k")
    found = found_by(sae, tiny_model, tokens.repeat(20, 1), SHOWN, CollectionConfig())
    n = int(found.statistics.fired[SHOWN].sum())
    assert len(found.place) == len(found.value) == len(found.norm) == n
    assert n < found.statistics.fired.sum() / 4


# Texts of tokens


def byte_tokenizer(merges: list[tuple[str, str]] = []) -> PreTrainedTokenizerFast:  # noqa: B006
    """A byte-level tokenizer: a token a byte, and those that are merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_characters_of_several_tokens_stand_once():
    tokenizer = byte_tokenizer()
    text = "a 😀é\n‮אב<b>"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(ids) == len(text.encode())
    assert texts[:9] == ["a", " ", "😀", "", "", "", "é", "", "\n"]
    assert "".join(texts) == text
    assert [t for t in texts if t] == list(text)


def test_tokens_that_cut_characters_anywhere():
    """The end of one character and the beginning of the next in one token."""
    one, other = "😀".encode(), "日".encode()
    names = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((spelling, _),) = names.pre_tokenize_str("😀日")
    assert len(spelling) == len(one + other)
    tokenizer = byte_tokenizer([(spelling[3], spelling[4])])
    ids = tokenizer("x😀日y")["input_ids"]
    assert len(ids) == 8
    assert token_texts(tokenizer, ids) == ["x", "😀日", "", "", "", "", "", "y"][: len(ids)]


def test_characters_cut_off_and_replacement_characters():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é😀")["input_ids"]
    assert token_texts(tokenizer, ids[:-1])[-3:] == ["\ufffd", "", ""]
    assert token_texts(tokenizer, ids[1:])[0].startswith("\ufffd")
    assert token_texts(tokenizer, tokenizer("\ufffdab")["input_ids"]) == ["\ufffd", "", "", "a", "b"]
    assert token_texts(tokenizer, []) == []
    assert vocabulary_text(tokenizer, ids[0]) == tokenizer.convert_ids_to_tokens(ids[0])
    assert vocabulary_text(tokenizer, tokenizer("a")["input_ids"][0]) == "a"


def test_a_space_stands_with_the_token_it_precedes():
    """As sentencepiece's tokenizers, whose decoder strips the first space and knows bytes by name."""
    vocabulary = ["<unk>", "▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in "😀".encode())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(vocabulary)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_texts(fast, [1, 2, 3, 4, 5, 6, 7, 2]) == ["the", " cat", "s", "😀", "", "", "", " cat"]


# Hostile text

NASTY = "<script>alert('x')</script> \u202eשלום\u202c 😀👩‍👩‍👧 \x00\x07\x1b[31m\x7f\u2028\ufeff & \"quoted\" "


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """A random Llama that reads bytes."""
    folder: Path = tmp_path_factory.mktemp("bytes") / "llama-of-bytes"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=D_MODEL,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return load_model(folder)


def test_hostile_text(byte_model, tmp_path):
    text = NASTY * 3 + "w" * 50_000 + NASTY
    ids = byte_model.tokenizer(text)["input_ids"]
    tokens = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)[-40:]
    tokens = torch.cat([torch.tensor(ids[: 64 * 8]).view(-1, 64), tokens])
    sae = make_layer("mxd, k")
    data = collect(sae, byte_model, tokens, folder=tmp_path, cfg=CollectionConfig(before=8, after=6))
    assert same(DashboardData.load(tmp_path), data)
    shown = [e for expert in data.experts for band in expert.bands for e in band.excerpts]
    assert len(shown) > 50
    for e in shown:
        assert len(e.tokens) == len(e.token_ids) == len(e.values) == len(e.loss_effects)
        assert e.start == 0 or e.tokens[0]
        # A sequence may end, or begin, within a character.
        inside = "".join(e.tokens).strip("\ufffd")
        assert inside in text
    seen = "".join(t for e in shown for t in e.tokens)
    assert "w" * 15 in seen
    assert any(ord(c) > 0xFFFF for c in seen)
    assert "\x00" in seen


# The real model


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("made", "release"), [(MxD, "smollm2-135m-mxd"), (TopKTranscoder, "smollm2-135m-transcoder")]
)
def test_smollm2(smollm2, made, release):
    sae = made.from_pretrained(release, "blocks.11.mlp")
    text = "Emoji 😀👩‍👩‍👧 and العربية mix with <b>markup</b> in 日本語. " * 3
    ids = [smollm2.tokenizer.bos_token_id, *smollm2.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(token_texts(smollm2.tokenizer, ids[1:])) == text
    tokens = torch.tensor([ids[:64]])
    cfg = CollectionConfig(n_top=2, n_per_band=1, before=64, after=64)
    fires = sae.encode(true_input(smollm2, sae, tokens)[0, 1:]).sum(0).topk(2).indices.tolist()
    data = collect(sae, smollm2, tokens, experts=fires, cfg=cfg)
    for expert in data.experts:
        (e,) = expert.bands[0].excerpts
        assert e.token_ids == ids[:64]
        assert "".join(e.tokens[1:]).startswith("Emoji 😀👩‍👩‍👧 and العربية mix")
        x = true_input(smollm2, sae, tokens)[0]
        expected = sae.encode(x).detach()[:, expert.expert]
        expected[0] = 0
        close(e.values, expected, 1e-3)
        assert math.isfinite(expert.loss_effect)
