"""SAEDashboard's pages of our layers, against activations and directions worked out without it."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import MODELS
from layers import make_layer
from sae_lens import logger
from test_text import nltk_data  # noqa: F401

from mxd_lens import MxD, TopKTranscoder, expert_statistics
from mxd_lens.adapters.sae_dashboard import INSTALL, SaeDashboard, SeenLayer, run_sae_dashboard
from mxd_lens.analysis.token_text import vocabulary_text
from mxd_lens.dashboards.collect.collection import collect_dashboard
from mxd_lens.dashboards.collect.data import CollectionConfig, DashboardData, ExpertData
from mxd_lens.text import load_text, token_sequences

needs_sae_dashboard = pytest.mark.skipif(
    importlib.util.find_spec("sae_dashboard") is None, reason=f"sae-dashboard is not installed: {INSTALL}"
)
LAYERS = ("mxd, k", "gated mxd, relu", "skip_mxd, k", "topk_transcoder, k", "saelens topk rescaled")
TOP = 20  # of the largest activations SAEDashboard shows this many


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(3, 20, (30, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    return tokens


def activations(sae, model, tokens) -> torch.Tensor:
    """a, [sequences, positions, d_sae], of a cached input; 0 at special tokens."""
    name = sae.cfg.metadata.hook_name
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n == name)
    a = sae.encode(cache[name])
    return a * (tokens > 2)[..., None] if tokens.max() < 20 else a * (tokens > 16)[..., None]


def busiest(a: torch.Tensor, n: int) -> list[int]:
    return (a > 0).sum((0, 1)).argsort(descending=True)[:n].tolist()


def shown(pages, expert: int) -> list[tuple[int, int, float]]:
    """Sequence, position and activation of what SAEDashboard shows as the top of an expert."""
    group = pages.data.feature_data_dict[expert].sequence_data.seq_group_data[0]
    buffer = pages.data.cfg.feature_centric_layout.seq_cfg.buffer
    found = []
    for one in group.seq_data:
        at = one.qualifying_token_index - 1 if buffer is None else buffer[0]
        found.append((one.original_index, one.qualifying_token_index, one.feat_acts[at]))
    return found


def check_top(pages, expert: int, a: torch.Tensor, context: int | None, places: int = 4) -> None:
    margin = slice(None) if context is None else slice(context + 1, -context)
    expected = a[:, margin, expert].flatten().sort(descending=True).values[:TOP]
    top = shown(pages, expert)
    assert [value for *_, value in top] == pytest.approx(expected.tolist(), rel=1e-4, abs=10**-places)
    for sequence, position, value in top:
        assert a[sequence, position, expert].item() == pytest.approx(value, rel=1e-4, abs=10**-places)


def written(sae, model, tokens, n: int) -> torch.Tensor:
    """sum_t a_n (what a coefficient of 1 writes at t) / sum_t a_n, in float64, from the definition."""
    name = sae.cfg.metadata.hook_name
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n == name)
    if not isinstance(sae, MxD):
        row = sae.W_dec[n].double()
        return row / row.norm() if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else row
    a = activations(sae, model, tokens)[..., n, None].double()
    rows = (sae.hidden(cache[name]) @ sae.expert_weight(n)).double()
    return (a * rows).sum((0, 1)) / a.sum()


@needs_sae_dashboard
@pytest.mark.parametrize("context", [3, None])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_shown_is_what_encode_gives(kind, context, tiny_model, tokens, tmp_path):
    sae = make_layer(kind, "float32")
    before = {name: p.clone() for name, p in sae.named_parameters()}
    a = activations(sae, tiny_model, tokens)
    experts = busiest(a, 4)
    pages = run_sae_dashboard(tiny_model, sae, tokens, experts, context=context, progress=False)
    assert list(pages.data.feature_data_dict) == experts
    for n in experts:
        check_top(pages, n, a, context)
        density = (a[..., n] > 0).double().mean().item()
        assert f"DENSITY = {density:.3%}" in pages.data.feature_data_dict[n].acts_histogram_data.title
        effects = written(sae, tiny_model, tokens, n) * tiny_model.ln_final.w.double()
        logits = effects @ tiny_model.W_U.double()
        table = pages.data.feature_data_dict[n].logits_table_data
        torch.testing.assert_close(
            torch.tensor(table.top_logits).double(),
            logits.sort(descending=True).values[:10],
            rtol=1e-4,
            atol=1e-4,
        )
        assert logits[table.bottom_token_ids].tolist() == pytest.approx(table.bottom_logits, abs=1e-4)
    assert all(torch.equal(before[name], p) for name, p in sae.named_parameters())
    page = pages.write_html(tmp_path / "new" / "page.html").read_text()
    assert all(f'"{n}": {{' in page for n in experts)


@needs_sae_dashboard
def test_positions_that_the_layer_was_not_trained_on_are_not_shown(tiny_model, tokens):
    sae = make_layer(LAYERS[0], "float32")
    sae.cfg.metadata.seqpos_slice = (4, None)
    a = activations(sae, tiny_model, tokens)
    a[:, :4] = 0
    (n,) = experts = busiest(a, 1)
    pages = run_sae_dashboard(tiny_model, sae, tokens, experts, context=None, progress=False)
    check_top(pages, n, a, None)


@needs_sae_dashboard
def test_the_norms_weight_is_in_the_logits(tiny_model, tokens):
    sae = make_layer("topk_transcoder, k", "float32")
    n = busiest(activations(sae, tiny_model, tokens), 1)
    with torch.no_grad():
        tiny_model.ln_final.w.mul_(3)
    tripled = run_sae_dashboard(tiny_model, sae, tokens, n, progress=False)
    with torch.no_grad():
        tiny_model.ln_final.w.div_(3)
    plain = run_sae_dashboard(tiny_model, sae, tokens, n, progress=False)
    one, other = (
        pages.data.feature_data_dict[n[0]].logits_table_data.top_logits for pages in (tripled, plain)
    )
    assert one == pytest.approx([3 * logit for logit in other], rel=1e-4)


@needs_sae_dashboard
@pytest.mark.parametrize("kind", MODELS)
def test_any_hooked_model(kind, tiny_folder, tokens):
    model, sae = MODELS[kind](tiny_folder), make_layer("mxd, k", "float32")
    a = activations(sae, model, tokens)
    experts = busiest(a, 2)
    pages = run_sae_dashboard(model, sae, tokens, experts, progress=False)
    for n in experts:
        check_top(pages, n, a, 5)
    assert pages.data.model is model
    assert pages.data.encoder is sae


@needs_sae_dashboard
@pytest.mark.parametrize("kind", ["mxd, k", "saelens topk"])
def test_a_layer_that_is_attached(kind, tiny_model, tokens):
    sae = make_layer(kind, "float32")
    a = activations(sae, tiny_model, tokens)
    (n,) = experts = busiest(a, 1)
    with tiny_model.saes(saes=[sae]):
        check_top(run_sae_dashboard(tiny_model, sae, tokens, experts, progress=False), n, a, 5)


@needs_sae_dashboard
def test_neuronpedias_json(tiny_model, tokens, tmp_path):
    sae = make_layer("mxd, k", "float32")
    a = activations(sae, tiny_model, tokens)
    experts = busiest(a, 3)
    pages = run_sae_dashboard(tiny_model, sae, tokens, experts, context=None, progress=False)
    file = pages.write_neuronpedia(tmp_path / "np" / "batch-0.json", "mxd", "a & b")
    batch = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == (tiny_model.cfg.model_name, 1, "mxd")
    assert [feature["feature_index"] for feature in batch["features"]] == experts
    for n, feature in zip(experts, batch["features"], strict=True):
        assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == tokens.shape
        assert feature["dataset"] == "a & b"
        assert feature["frac_nonzero"] == pytest.approx((a[..., n] > 0).double().mean().item(), abs=1e-5)
        top = [one for one in feature["activations"] if one["bin_min"] == -1]
        expected = a[..., n].flatten().sort(descending=True).values[:TOP].tolist()
        peaks = [one["values"][one["qualifying_token_index"]] for one in top]
        assert peaks == pytest.approx(expected, abs=2e-3)
        sequence = shown(pages, n)[0][0]
        assert top[0]["tokens"] == [tiny_model.tokenizer.decode([t]) for t in tokens[sequence, 1:].tolist()]


@needs_sae_dashboard
def test_neuronpedia_wants_whole_sequences_and_html_its_ending(tiny_model, tokens, tmp_path):
    sae = make_layer("topk_transcoder, k", "float32")
    pages = run_sae_dashboard(tiny_model, sae, tokens, 3, progress=False)
    with pytest.raises(ValueError, match="context=None"):
        pages.write_neuronpedia(tmp_path / "batch-0.json", "set")
    with pytest.raises(ValueError, match=r"\.html, got 'page'"):
        pages.write_html(tmp_path / "page")
    assert not list(tmp_path.iterdir())


@needs_sae_dashboard
@pytest.mark.parametrize("kind", ["topk_transcoder, k", "topk_transcoder, relu"])
def test_a_feature_that_never_fires_still_has_its_direction(kind, tiny_model, tokens, tmp_path):
    sae = make_layer(kind, "float32")
    sae.b_enc[3] = -1e6
    pages = run_sae_dashboard(tiny_model, sae, tokens, [3, 4], context=None, progress=False)
    assert all(value == 0 for *_, value in shown(pages, 3))
    pages.write_html(tmp_path / "page.html")
    pages.write_neuronpedia(tmp_path / "batch-0.json", "set")


@needs_sae_dashboard
def test_what_cannot_be_shown_is_said(tiny_model, tokens):
    sae = make_layer("mxd, k", "float32")
    run = lambda *args, **more: run_sae_dashboard(tiny_model, sae, *args, progress=False, **more)  # noqa: E731
    sae.b_enc[[3, 5]] = -1e6
    with pytest.raises(
        ValueError, match=r"2 of these experts fire on none of the 690 tokens .* direction: 3, 5"
    ):
        run(tokens, [3, 4, 5])
    other = expert_statistics(tiny_model, make_layer("mxd, relu", "float32"), tokens, progress=False)
    other.fingerprint = "of another"
    with pytest.raises(ValueError, match="statistics of another layer"):
        run(tokens, [4], statistics=other)
    with pytest.raises(IndexError, match="expert 40 does not exist"):
        run(tokens, [40])
    with pytest.raises(ValueError, match="context must be a positive number"):
        run(tokens, [4], context=0)
    with pytest.raises(ValueError, match=r"tokens must be token ids \[sequences, positions\], got \(24,\)"):
        run(tokens[0], [4])
    with pytest.raises(ValueError, match=r"\(1, 24\) have 13 with their context"):
        run(tokens[:1], [4])
    with pytest.raises(ValueError, match=r"\(30, 11\) have 0 with their context"):
        run(tokens[:, :11], [4])
    sae.cfg.metadata.hook_name = "blocks.1.mlp.hook_pre"
    with pytest.raises(ValueError, match=r"for activations at blocks\.1\.mlp\.hook_pre"):
        run(tokens, [4])
    sae.cfg.metadata.model_name = "gpt2"
    with pytest.raises(ValueError, match="trained on gpt2"):
        run(tokens, [4])


@needs_sae_dashboard
def test_nothing_is_printed(tiny_model, tokens, capsys):
    run_sae_dashboard(tiny_model, make_layer("mxd, k", "float32"), tokens, [35], progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Forward passes" in printed.err


@pytest.mark.parametrize("missing", ["sae_dashboard", "dataclasses_json"])
def test_what_is_missing_is_named_with_the_command_that_installs_it(missing, tiny_model, tokens, monkeypatch):
    if missing != "sae_dashboard" and importlib.util.find_spec("sae_dashboard") is None:
        pytest.skip("sae-dashboard is not installed")
    for name in [name for name in sys.modules if name.split(".")[0] in ("sae_dashboard", missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        run_sae_dashboard(tiny_model, make_layer("mxd, k", "float32"), tokens, [3])
    assert INSTALL in str(raised.value)
    assert missing in str(raised.value)


def test_the_layer_as_it_is_seen_keeps_no_input():
    sae, x = make_layer("mxd, k", "float32"), torch.randn(2, 3, 16)
    seen = SeenLayer(sae, sae.W_dec)
    seen.fold_W_dec_norm()
    a = seen.encode(x)
    with pytest.raises(ValueError, match="no encode is waiting"):
        sae.decode(a)
    assert torch.equal(a, sae.encode(x))


# Against our own dashboard's data

Place = tuple[int, int]
"""A sequence, and a position in it."""


@pytest.fixture
def distinct_tokens() -> torch.Tensor:
    """No two sequences begin alike, so that no two activations are equal and an order is one order."""
    tokens = torch.randint(3, 20, (17, 24), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    tokens[:, 1] = torch.arange(3, 20)
    tokens[5, 9] = 1
    return tokens


def collect_all(sae, model, tokens, experts: list[int]) -> DashboardData:
    """Our data, its top excerpts being all sequences from end to end: every firing is in them."""
    n_sequences, n_positions = tokens.shape
    whole = {"before": n_positions, "after": n_positions}
    cfg = CollectionConfig(n_top=n_sequences, n_per_band=0, loss_effects=False, **whole)
    return collect_dashboard(sae, model, tokens, experts, cfg=cfg, progress=False)


def read_page(pages: SaeDashboard, folder: Path) -> dict[str, Any]:
    """What SAEDashboard's page draws, expert by expert, from the HTML."""
    page = pages.write_html(folder / "page.html").read_text()
    return json.JSONDecoder().raw_decode(page, page.index('{"AGGDATA"'))[0]["DASHBOARD_DATA"]


def tokens_in_excerpts(ours: ExpertData) -> dict[Place, tuple[int, float]]:
    """Token id and coefficient of every token that our data show of an expert."""
    return {
        (e.sequence, e.start + i): (token, value)
        for band in ours.bands
        for e in band.excerpts
        for i, (token, value) in enumerate(zip(e.token_ids, e.values, strict=True))
    }


def check_sums(drawn: dict[str, Any], ours: ExpertData, data: DashboardData) -> None:
    """The density, the number of firings and the largest."""
    histogram = drawn["actsHistogramData"]["0"]
    n_tokens = data.settings["n_sequences"] * data.settings["context_size"]
    assert histogram["title"].endswith(f"DENSITY = {ours.n_firings / n_tokens:.3%}")
    assert ours.n_firings == pytest.approx(ours.density * data.settings["n_tokens"])
    assert sum(histogram["y"]) == sum(ours.counts) == ours.n_firings
    maximum = float(drawn["tokenData"]["seq-group-2-0"]["title"].split("MAX = ")[1])
    assert maximum == pytest.approx(ours.maximum, abs=5.1e-4)


def check_direction(pages: SaeDashboard, drawn: dict[str, Any], ours: ExpertData, model) -> None:
    """The mean direction's largest entries, and the tokens it promotes and suppresses."""
    direction = torch.tensor(ours.mean_direction).double()
    aligned = drawn["featureTablesData"]["0"]["neuronAlignment"]
    largest = direction.topk(len(aligned))
    assert [row["index"] for row in aligned] == largest.indices.tolist()
    assert [float(row["value"]) for row in aligned] == pytest.approx(largest.values.tolist(), abs=6e-4)
    logits = (direction * model.ln_final.w.double()) @ model.W_U.double()
    table, on_page = (
        pages.data.feature_data_dict[ours.expert].logits_table_data,
        drawn["logitsTableData"]["0"],
    )
    for effects, ids, values, cells in (
        (ours.promoted, table.top_token_ids, table.top_logits, on_page["posLogits"]),
        (ours.suppressed, table.bottom_token_ids, table.bottom_logits, on_page["negLogits"]),
    ):
        assert len(effects) == len(ids) == 10
        assert [effect.token for effect in effects] == [vocabulary_text(model.tokenizer, t) for t in ids]
        expected = [effect.logit + logits.mean().item() for effect in effects]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert [cell["value"] for cell in cells] == pytest.approx(expected, abs=5.1e-3)


def check_tokens_shown(
    pages: SaeDashboard, drawn: dict[str, Any], expert: int, ours: dict[Place, tuple[int, float]]
) -> int:
    """Every token on the page that our data have too, of all its groups; how many there were."""
    n_compared = 0
    buffer = pages.data.cfg.feature_centric_layout.seq_cfg.buffer
    groups = pages.data.feature_data_dict[expert].sequence_data.seq_group_data
    for i, group in enumerate(groups):
        rows = drawn["tokenData"][f"seq-group-2-{i}"]["data"] if group.seq_data else []
        for one, row in zip(group.seq_data, rows, strict=True):
            start = one.qualifying_token_index - buffer[0] if buffer else 1
            for position, cell in enumerate(row, start):
                place = one.original_index, position
                if place in ours:
                    n_compared += 1
                    token, value = ours[place]
                    assert cell["tokID"] == token
                    assert cell.get("featAct", 0) == pytest.approx(value, rel=1e-4, abs=1e-4)
            bold = start + [cell["isBold"] for cell in row].index(True)
            if buffer:
                assert bold == one.qualifying_token_index
            else:
                assert one.feat_acts[bold - start] == max(one.feat_acts)
    return n_compared


def check_one_a_sequence(top: list[tuple[int, int, float]], ours: ExpertData) -> int:
    """Our top excerpts are SAEDashboard's, less the repeated sequences; how many those leave to compare."""
    best: dict[int, tuple[int, int, float]] = {}
    for sequence, position, value in top:
        if value:
            best.setdefault(sequence, (sequence, position, value))
    mine = [(e.sequence, e.start + e.peak, e.values[e.peak]) for e in ours.bands[0].excerpts][: len(best)]
    theirs = list(best.values())[: len(mine)]
    assert [place for *place, _ in mine] == [place for *place, _ in theirs]
    assert [value for *_, value in mine] == pytest.approx([v for *_, v in theirs], rel=1e-4, abs=1e-4)
    return len(mine)


@needs_sae_dashboard
@pytest.mark.parametrize(
    ("context", "excluded"), [(3, True), (None, True), (3, False)], ids=["context", "whole", "BOS counted"]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_its_page_agrees_with_our_data(kind, context, excluded, tiny_model, distinct_tokens, tmp_path):
    """The top firings, the largest, the density, and the tokens promoted and suppressed, of four experts.

    The two differ by definition, and are compared with the difference taken into account:

        top firings     SAEDashboard: the 20 largest, as many of one sequence as there are; only those with
                        their context, that is not in the first context + 1 positions nor in the last
                        `context`. Ours: the largest of each sequence, anywhere in it.
        excerpts        SAEDashboard: the context on either side; for whole sequences all but their first
                        token, the largest of the sequence being bold whichever it was chosen for.
        the largest     of all tokens in both, those without context too
        density         SAEDashboard: a share of all tokens; ours: of those that the layer's training kept.
                        In both no expert fires on the others.
        logits          SAEDashboard: of the mean direction; ours: less their mean over the vocabulary
    """
    sae, tokens = make_layer(kind, "float32"), distinct_tokens
    sae.cfg.metadata.exclude_special_tokens = excluded
    with torch.no_grad():
        tiny_model.ln_final.w.copy_(torch.linspace(0.5, 2, 16))
    experts = busiest(activations(sae, tiny_model, tokens), 4)
    pages = run_sae_dashboard(tiny_model, sae, tokens, experts, context=context, progress=False)
    data, page = collect_all(sae, tiny_model, tokens, experts), read_page(pages, tmp_path)
    assert data.settings["n_tokens"] == tokens.numel() - excluded * (tokens == 1).sum()
    has_context = range(24) if context is None else range(context + 1, 24 - context)
    for ours in data.experts:
        drawn, top = page[str(ours.expert)], shown(pages, ours.expert)
        check_sums(drawn, ours, data)
        check_direction(pages, drawn, ours, tiny_model)
        nowhere = {
            (s, p): (token, 0.0) for s, row in enumerate(tokens.tolist()) for p, token in enumerate(row)
        }
        known = nowhere | tokens_in_excerpts(ours)
        firings = {place: value for place, (_, value) in known.items() if value}
        assert len(firings) == ours.n_firings > TOP
        check_tokens_shown(pages, drawn, ours.expert, known)
        with_context = sorted(firings, key=lambda place: -firings[place])
        with_context = [place for place in with_context if place[1] in has_context][:TOP]
        assert [(s, p) for s, p, _ in top] == with_context
        assert [value for *_, value in top] == pytest.approx([firings[p] for p in with_context], abs=1e-4)
        if context is None:
            assert check_one_a_sequence(top, ours) > 5


@needs_sae_dashboard
@pytest.mark.parametrize("excluded", [True, False])
@pytest.mark.parametrize("kind", ["topk_transcoder, k", "mxd, k"])
def test_its_correlations_and_sums_leave_out_what_training_did(
    kind, excluded, tiny_model, distinct_tokens, tmp_path
):
    """BOS is the same input in every sequence: counted, it makes experts that fire on it alike."""
    sae, tokens = make_layer(kind, "float32"), distinct_tokens
    sae.cfg.metadata.exclude_special_tokens = excluded
    name = sae.cfg.metadata.hook_name
    x = tiny_model.run_with_cache(tokens, names_filter=name)[1][name]
    on_bos = sae.encode(x)[0, 0].nonzero()[:, 0].tolist()
    kept = (tokens != 1)[..., None] | torch.tensor(not excluded)
    acts = (sae.encode(x) * kept)[..., on_bos]
    alive = (acts > 0).any(0).any(0).tolist()
    experts = [n for n, fires in zip(on_bos, alive, strict=True) if fires]
    acts = acts[..., alive].flatten(0, 1).T.double()
    pages = run_sae_dashboard(tiny_model, sae, tokens, experts, progress=False)
    data = collect_all(sae, tiny_model, tokens, experts)
    seen = pages.data.feature_stats
    assert len(experts) >= 3
    assert seen.max == pytest.approx([ours.maximum for ours in data.experts], rel=1e-4)
    fired = [ours.n_firings / tokens.numel() for ours in data.experts]
    assert seen.frac_nonzero == pytest.approx(fired, abs=1e-6)
    inputs = (x * kept).flatten(0, 1).T.double()
    among = torch.corrcoef(acts).fill_diagonal_(0)
    with_inputs = torch.corrcoef(torch.cat([acts, inputs]))[: len(acts), len(acts) :]
    for i, n in enumerate(experts):
        tables = pages.data.feature_data_dict[n].feature_tables_data
        for pearson, indices, expected, ids in (
            (tables.correlated_features_pearson, tables.correlated_features_indices, among[i], experts),
            (tables.correlated_neurons_pearson, tables.correlated_neurons_indices, with_inputs[i], range(16)),
        ):
            largest = expected.topk(3)
            assert indices == [ids[j] for j in largest.indices.tolist()]
            assert pearson == pytest.approx(largest.values.tolist(), abs=1e-4)


@needs_sae_dashboard
@pytest.mark.real_model
@pytest.mark.parametrize("layer_class", [MxD, TopKTranscoder])
def test_its_page_agrees_with_our_data_on_the_bundled_layers(layer_class, smollm2, tmp_path, nltk_data):  # noqa: F811
    """As above, on running text: SAEDashboard's 20 firings, less repeated sequences, are how ours begin."""
    try:
        text = load_text("nltk:brown")
    except LookupError:
        pytest.skip("the nltk corpora are not on this machine")
    release = "smollm2-135m-mxd" if layer_class is MxD else "smollm2-135m-transcoder"
    sae = layer_class.from_pretrained(release, "blocks.11.mlp")
    tokens = token_sequences(smollm2, text, 48, 64)
    start = time.perf_counter()
    statistics = expert_statistics(smollm2, sae, tokens, progress=False)
    busy = (statistics.fired >= 2 * TOP).nonzero()[:, 0]
    experts = busy[torch.linspace(0, len(busy) - 1, 12).long()].tolist()
    settings = {"context": None, "statistics": statistics, "progress": False}
    pages = run_sae_dashboard(smollm2, sae, tokens, experts, **settings)
    theirs = time.perf_counter()
    cfg = CollectionConfig(n_per_band=1, loss_effects=False)
    data = collect_dashboard(sae, smollm2, tokens, experts, cfg=cfg, progress=False)
    end = time.perf_counter()
    page, n_tokens, n_firings = read_page(pages, tmp_path), 0, 0
    for ours in data.experts:
        drawn = page[str(ours.expert)]
        check_sums(drawn, ours, data)
        check_direction(pages, drawn, ours, smollm2)
        n_tokens += check_tokens_shown(pages, drawn, ours.expert, tokens_in_excerpts(ours))
        n_firings += check_one_a_sequence(shown(pages, ours.expert), ours)
    logger.info(
        f"{n_tokens} tokens and {n_firings} top firings of {experts} agree; SAEDashboard "
        f"{theirs - start:.1f} s, ours {end - theirs:.1f} s."
    )


@needs_sae_dashboard
@pytest.mark.real_model
@pytest.mark.parametrize("layer_class", [MxD, TopKTranscoder])
def test_the_bundled_layers(layer_class, smollm2, tmp_path):
    release = "smollm2-135m-mxd" if layer_class is MxD else "smollm2-135m-transcoder"
    sae = layer_class.from_pretrained(release, "blocks.11.mlp")
    tokens = token_sequences(smollm2, load_text("embedded"), 24, 64)
    a = activations(sae, smollm2, tokens)
    experts = [n for n in busiest(a, 200)[20::60] if a[..., n].count_nonzero() > TOP]
    start = time.perf_counter()
    pages = run_sae_dashboard(smollm2, sae, tokens, experts, progress=False)
    page = pages.write_html(tmp_path / "page.html")
    seconds = time.perf_counter() - start
    logger.info(
        f"{len(experts)} experts, {tokens.numel()} tokens: {seconds:.1f} s, {page.stat().st_size} bytes."
    )
    for n in experts:
        check_top(pages, n, a, 5, places=3)
