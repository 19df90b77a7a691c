"""SAEDashboard's pages of our layers, against activations and directions worked out without it."""

import importlib.util
import json
import sys
import time

import pytest
import torch
from sae_lens import logger
from test_attach import MODELS
from test_reading import make_layer

from mxd_lens import MxD, TopKTranscoder, expert_statistics
from mxd_lens.dashboards.sae_dashboard import INSTALL, SeenLayer, run_sae_dashboard
from mxd_lens.training.text import load_text, token_sequences

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
    pages = run_sae_dashboard(sae, tiny_model, tokens, experts, context=context, progress=False)
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
def test_the_norms_weight_is_in_the_logits(tiny_model, tokens):
    sae = make_layer("topk_transcoder, k", "float32")
    n = busiest(activations(sae, tiny_model, tokens), 1)
    with torch.no_grad():
        tiny_model.ln_final.w.mul_(3)
    tripled = run_sae_dashboard(sae, tiny_model, tokens, n, progress=False)
    with torch.no_grad():
        tiny_model.ln_final.w.div_(3)
    plain = run_sae_dashboard(sae, tiny_model, tokens, n, progress=False)
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
    pages = run_sae_dashboard(sae, model, tokens, experts, progress=False)
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
        check_top(run_sae_dashboard(sae, tiny_model, tokens, experts, progress=False), n, a, 5)


@needs_sae_dashboard
def test_neuronpedias_json(tiny_model, tokens, tmp_path):
    sae = make_layer("mxd, k", "float32")
    a = activations(sae, tiny_model, tokens)
    experts = busiest(a, 3)
    pages = run_sae_dashboard(sae, tiny_model, tokens, experts, context=None, progress=False)
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
    pages = run_sae_dashboard(sae, tiny_model, tokens, 3, progress=False)
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
    pages = run_sae_dashboard(sae, tiny_model, tokens, [3, 4], context=None, progress=False)
    assert all(value == 0 for *_, value in shown(pages, 3))
    pages.write_html(tmp_path / "page.html")
    pages.write_neuronpedia(tmp_path / "batch-0.json", "set")


@needs_sae_dashboard
def test_what_cannot_be_shown_is_said(tiny_model, tokens):
    sae = make_layer("mxd, k", "float32")
    run = lambda *args, **more: run_sae_dashboard(sae, tiny_model, *args, progress=False, **more)  # noqa: E731
    sae.b_enc[[3, 5]] = -1e6
    with pytest.raises(
        ValueError, match=r"2 of these experts fire on none of the 690 tokens .* direction: 3, 5"
    ):
        run(tokens, [3, 4, 5])
    other = expert_statistics(make_layer("mxd, relu", "float32"), tiny_model, tokens, progress=False)
    other.fingerprint = "of another"
    with pytest.raises(ValueError, match="statistics of another layer"):
        run(tokens, [4], statistics=other)
    with pytest.raises(IndexError, match="expert 40 does not exist"):
        run(tokens, [40])
    with pytest.raises(ValueError, match="context must be a positive number"):
        run(tokens, [4], context=0)
    with pytest.raises(ValueError, match=r"tokens must be ids \[sequences, positions\], got \(24,\)"):
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
    run_sae_dashboard(make_layer("mxd, k", "float32"), tiny_model, tokens, [35], progress=True)
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
        run_sae_dashboard(make_layer("mxd, k", "float32"), tiny_model, tokens, [3])
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
    pages = run_sae_dashboard(sae, smollm2, tokens, experts, progress=False)
    page = pages.write_html(tmp_path / "page.html")
    seconds = time.perf_counter() - start
    logger.info(
        f"{len(experts)} experts, {tokens.numel()} tokens: {seconds:.1f} s, {page.stat().st_size} bytes."
    )
    for n in experts:
        check_top(pages, n, a, 5, places=3)
