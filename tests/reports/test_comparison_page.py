"""One prompt through several decompositions: its numbers, and its page in a browser."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attached import MODELS, PROMPT
from command_line import run
from layers import make_layer, skip_of, written_by
from tiny import HOOK_OUT
from torch.nn import functional as F

from mxd_lens import MxD, replacement_hooks
from mxd_lens.evals.comparison import PARTS, compare
from mxd_lens.reports.comparison import write_comparison_page

KINDS = (
    "mxd, k",
    "gated mxd, relu",
    "skip_mxd, k",
    "topk_transcoder, k",
    "topk_skip_transcoder, k",
    "saelens transcoder",
    "saelens topk rescaled",
)


@pytest.fixture
def model(tiny_model):
    return tiny_model.double()


@pytest.fixture
def layers():
    return {kind: make_layer(kind) for kind in KINDS}


def cached(model, tokens, name: str) -> torch.Tensor:
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n == name)
    return cache[name]


def mean_mixture(sae, x: torch.Tensor) -> torch.Tensor:
    rows = sae.W_dec
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return (sae.encode(x) @ rows).mean(0)


def branch(sae, x: torch.Tensor) -> torch.Tensor:
    return sae.hidden(x) @ sae.W_out if isinstance(sae, MxD) else torch.ones(len(x), 1).to(x)


def close(actual, expected, tolerance: float = 1e-8):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("over", ["the prompt", "a text"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_taken_apart(kind, over, model, layers):
    sae, tokens = layers[kind], model.to_tokens(PROMPT)
    text = torch.randint(3, 20, (5, 9), generator=torch.Generator().manual_seed(2))
    text[:, 0] = 1
    given = text if over == "a text" else None
    comparison = compare(model, layers, PROMPT, given, k=3, progress=False)
    found = comparison.layers[KINDS.index(kind)]
    x, y = (cached(model, tokens, name)[0] for name in (sae.cfg.metadata.hook_name, HOOK_OUT))
    mean_of = x[1:] if given is None else cached(model, text, sae.cfg.metadata.hook_name)[:, 1:].flatten(0, 1)
    mean = mean_mixture(sae, mean_of)
    output, skip = sae(x), skip_of(sae, x)
    dense = mean * branch(sae, x) + skip + sae.b_dec
    squared = (y * y).sum(-1)
    pieces = [output - dense, mean * branch(sae, x) + 0 * y, skip, sae.b_dec + 0 * y, y - output]
    close(found.shares, torch.stack([(piece * y).sum(-1) / squared for piece in pieces], dim=-1))
    close(found.shares.sum(-1), torch.ones(len(y)).double())
    close(found.error, (output - y).pow(2).sum(-1) / squared)
    close(found.error_mean_gate, (dense - y).pow(2).sum(-1) / squared)
    close(comparison.output_norms, y.norm(dim=-1))
    a = sae.encode(x)
    assert found.n_active.tolist() == (a > 0).sum(-1).tolist()
    every = torch.stack([(written_by(sae, x, n) * y).sum(-1) / squared for n in range(sae.cfg.d_sae)], dim=-1)
    every = every.masked_fill(a == 0, 0)
    for t, n, coefficient, share, norm in (
        (t, *row)
        for t in range(len(y))
        for row in zip(
            *(v[t] for v in (found.experts, found.coefficients, found.expert_shares, found.norms)),
            strict=True,
        )
    ):
        if coefficient:
            close(coefficient, a[t, n])
            close(share, every[t, n])
            close(norm, written_by(sae, x, int(n))[t].norm())
    close(found.expert_shares.abs(), every.abs().topk(3).values)
    assert found.kept.tolist() == [False] + [True] * (len(y) - 1)


@pytest.mark.parametrize("kind", ["mxd, k", "topk_skip_transcoder, k", "saelens topk rescaled"])
def test_what_the_model_expects(kind, model, layers):
    sae, tokens = layers[kind], model.to_tokens(PROMPT)
    comparison = compare(model, layers, PROMPT, n_predictions=4, progress=False)
    found = comparison.layers[KINDS.index(kind)]
    special = (tokens < 3)[..., None]
    mean = mean_mixture(sae, cached(model, tokens, sae.cfg.metadata.hook_name)[0, 1:])
    x = cached(model, tokens, sae.cfg.metadata.hook_name)
    dense = mean * branch(sae, x[0]) + skip_of(sae, x[0]) + sae.b_dec

    def with_output(new) -> torch.Tensor:
        hook = lambda y, hook: torch.where(special, y, new)  # noqa: E731
        return F.log_softmax(model.run_with_hooks(tokens, fwd_hooks=[(HOOK_OUT, hook)])[0], dim=-1)

    unmodified = F.log_softmax(model(tokens)[0], dim=-1)
    for expected, got in (
        (unmodified, comparison.unmodified),
        (with_output(torch.zeros(())), comparison.zero_ablated),
        (with_output(sae(x)), found.replaced),
        (with_output(dense), found.mean_gate),
    ):
        top = expected.topk(4)
        assert torch.equal(got.tokens, top.indices)
        close(got.probabilities, top.values.exp())
        close(got.loss[:-1], -expected[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]])
        assert math.isnan(got.loss[-1])
        close(got.divergence, (unmodified.exp() * (unmodified - expected)).sum(-1))
    assert [text.strip() for text in comparison.prompt] == ["<s>", *PROMPT.split(" ")]
    for t in found.replaced.tokens.flatten().tolist():
        assert comparison.vocabulary[t] == model.tokenizer.decode([t])


@pytest.mark.parametrize("kind", MODELS)
def test_any_hooked_model(kind, tiny_folder):
    model, sae = MODELS[kind](tiny_folder), make_layer("skip_mxd, k", "float32")
    found = compare(model, {"one": sae}, PROMPT, progress=False)
    sae.cfg.metadata.exclude_special_tokens = False
    tokens = model.to_tokens(PROMPT)
    everywhere = compare(model, {"one": sae}, tokens, progress=False).layers[0]
    expected = F.log_softmax(model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(sae))[0], dim=-1)
    close(everywhere.replaced.probabilities.float(), expected.topk(5).values.exp(), 1e-4)
    assert everywhere.kept.all()
    assert not found.layers[0].kept[0]


def test_the_table_is_the_means(model, layers):
    comparison = compare(model, layers, PROMPT, progress=False)
    table = comparison.to_pandas().set_index("")
    assert list(table.index) == ["unmodified", "zero ablated", *KINDS]
    assert table.columns.is_unique
    found = comparison.layers[2]
    row = table.loc["skip_mxd, k"]
    assert row["error"] == pytest.approx(found.error[1:].mean().item())
    assert row["CE"] == pytest.approx(found.replaced.loss[:-1].mean().item())
    assert row["CE, dense"] == pytest.approx(found.mean_gate.loss[:-1].mean().item())
    assert row["parameters"] == sum(p.numel() for p in layers["skip_mxd, k"].parameters())
    assert table.loc["unmodified", "KL"] == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_compared(model):
    one, elsewhere = make_layer("mxd, k"), make_layer("topk_transcoder, k", layer=2)
    of = lambda layers, prompt=PROMPT, **more: compare(model, layers, prompt, progress=False, **more)  # noqa: E731
    with pytest.raises(ValueError, match="There is no layer to compare"):
        of({})
    with pytest.raises(ValueError, match=r"a at blocks\.1\.hook_mlp_out, b at blocks\.2\.hook_mlp_out"):
        of({"a": one, "b": elsewhere})
    for k, n in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=f"must be positive, got {k} and {n}"):
            of({"a": one}, k=k, n_predictions=n)
    with pytest.raises(ValueError, match="one prompt of at least one token"):
        of({"a": one}, torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="special tokens"):
        of({"a": one}, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="text for the mean has no tokens"):
        of({"a": one}, text=torch.tensor([[1, 2]]))
    with model.saes(saes=[one]), pytest.raises(ValueError, match=r"attached at blocks\.1\.hook_mlp_out"):
        of({"a": one})
    one.cfg.metadata.model_name = "gpt2"
    with pytest.raises(ValueError, match="trained on gpt2"):
        of({"a": one})


def test_memory_of_an_input_is_not_kept(model):
    sae = make_layer("mxd, k")
    compare(model, {"a": sae}, PROMPT, progress=False)
    with pytest.raises(ValueError, match="no encode is waiting"):
        sae.decode(torch.zeros(1, 3, sae.cfg.d_sae).double())


# The page

HOSTILE = {"<script>alert(1)</script>": "mxd, k", "</table><img src=x onerror=alert(1)>": "skip_mxd, k"}
HOSTILE_PROMPT = [
    "<s>",
    "<script>alert(2)</script>",
    "\u202eevil",
    "שלום",
    "👩‍🚀",
    "",
    "\x00\x1b[31m\n",
    "w" * 50_000,
]


@pytest.fixture
def hostile(model):
    comparison = compare(
        model, {name: make_layer(kind) for name, kind in HOSTILE.items()}, PROMPT, progress=False
    )
    vocabulary = dict.fromkeys(comparison.vocabulary, "<img src=x onerror=alert(3)>")
    return replace(comparison, prompt=HOSTILE_PROMPT, vocabulary=vocabulary, model_name="<b>model</b>")


def test_text_stays_text(hostile, tmp_path):
    page = write_comparison_page(tmp_path / "p.html", hostile).read_text()
    for markup in ("<script", "<img", "<b>model", "</table><img"):
        assert markup not in page
    assert "\x00" not in page
    assert "\u202e" not in page
    assert r"\x00\x1b[31m\n" in page
    assert not re.search("https?:", page)
    assert "👩" in page


def test_a_page_has_every_layer_token_and_part(model, layers, tmp_path):
    comparison = compare(model, layers, PROMPT, progress=False)
    page = write_comparison_page(tmp_path / "p.html", comparison).read_text()
    assert page.count('<tr><th class="token">') == 2 * len(comparison.prompt)
    assert page.count("left to the MLP") == len(layers)
    for kind in KINDS:
        assert f"<th>{kind}</th>" in page
    found = comparison.layers[0]
    n, share = int(found.experts[3, 0]), found.expert_shares[3, 0].item()
    row = rf"<span>#{n}</span><span>[\d.]+</span><span>{re.escape(f'{100 * share:.1f} %')}</span>"
    assert re.search(row, page)
    assert all(part in page for part in PARTS)


@pytest.fixture
def browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next((p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).exists()), None)
    with playwright.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except playwright.Error as e:
            pytest.skip(f"no browser: {e.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(hostile, browser, width, scheme, tmp_path):
    file = write_comparison_page(tmp_path / "p.html", hostile)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(240_000)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: faults.append(request.url) if "p.html" not in request.url else None)
    page.goto(file.as_uri())
    cell = page.locator("table.side").first.locator("td[tabindex]").nth(6)
    tip = cell.locator(".tip")
    assert not tip.is_visible()
    cell.hover()
    assert tip.is_visible()
    assert "mean gate" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    page.mouse.move(1, 1)
    assert not tip.is_visible()
    cell.focus()
    assert tip.is_visible()
    page.keyboard.press("Tab")
    assert not tip.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    second = page.locator("table.side th.token").nth(1)
    assert second.inner_text().startswith("<script>alert(2)</script>")
    assert faults == []


# The command


def test_the_command(model, tiny_folder, words, tmp_path):
    for kind, name in (("mxd, k", "mxd"), ("topk_transcoder, k", "k=4")):
        sae = make_layer(kind, "float32")
        sae.cfg.metadata.model_name = str(tiny_folder)
        sae.save_model(tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(words))
    page = tmp_path / "page.html"
    options = ["--prompt", PROMPT, "--output", page]
    arguments = ["compare", f"An MxD={tmp_path / 'mxd'}", tmp_path / "k=4", *options]
    result = run(*arguments, "--text", text, "--sequences", 2)
    assert f"The page: {page}" in result.output
    html = page.read_text()
    assert "<th>An MxD</th>" in html
    assert "<th>k=4</th>" in html
    assert "256 tokens of a text" in html
    run(*arguments, "--text", "prompt")
    assert "the prompt itself" in page.read_text()
    assert "layers have the name k=4" in run(*arguments, tmp_path / "k=4", code=2).output
    assert "RELEASE:SAE_ID" in run("compare", "nowhere", *options, code=2).output


@pytest.mark.real_model
def test_the_bundled_layers_by_the_command(tmp_path):
    page = tmp_path / "page.html"
    release = "smollm2-135m-{}:blocks.11.mlp"
    run(
        "compare", "MxD=" + release.format("mxd"), "transcoder=" + release.format("transcoder"),
        "--output", page, "--prompt", "Tea 👩‍🚀 in Cœur", "--text", "prompt",
    )  # fmt: skip
    html = page.read_text()
    assert re.search(r'<th class="token"><bdi class="text"> ?👩', html)
    assert "\ufffd" not in html
