"""The pages of a dashboard: as files, as text, and in a browser; and the card of an expert."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import unescape
from io import StringIO
from pathlib import Path

import pytest
import torch
from layers import LAYERS, make_layer
from made_up_dashboard import HOSTILE, dead, made_up
from rich.console import Console
from typer.testing import CliRunner

from mxd_lens import MxD, TopKTranscoder, build_dashboard, expert_statistics
from mxd_lens.analysis.card import expert_card
from mxd_lens.cli import app
from mxd_lens.dashboards.collect.data import CollectionConfig, DashboardData, Excerpt
from mxd_lens.dashboards.render import (
    ascii_literal,
    expert_page,
    number,
    own_prompt,
    pieces,
    quantity,
    read_labels,
    spans_decades,
    usage,
    visible,
    write_dashboard,
)
from mxd_lens.pretrained.registry import find_release

CHROMIUM = Path("/usr/bin/chromium")


def parts_of(page: str) -> tuple[str, dict]:
    """A page without its scripts and style, and the data embedded in it."""
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S), data


# As files


def test_the_folder(tmp_path):
    data = made_up(5)
    index = write_dashboard(tmp_path / "new" / "dashboard", data, progress=False)
    assert index == tmp_path / "new" / "dashboard" / "index.html"
    ids = [e.expert for e in data.experts]
    assert {p.name for p in (index.parent / "experts").iterdir()} == {f"expert-{n}.html" for n in ids}
    loaded = DashboardData.load(index.parent / "data")
    assert [e.expert for e in loaded.experts] == ids
    assert [p.name for p in index.parent.parent.iterdir()] == ["dashboard"]  # nothing half-written is left


def test_a_second_dashboard_takes_the_place_of_the_first(tmp_path):
    first, second = made_up(6, seed=0), made_up(4, seed=1)
    write_dashboard(tmp_path / "d", first, progress=False)
    write_dashboard(tmp_path / "d", second, progress=False)
    names = {f"expert-{e.expert}.html" for e in second.experts}
    assert {p.name for p in (tmp_path / "d" / "experts").iterdir()} == names
    linked = re.findall(r'href="experts/([^"]+)"', (tmp_path / "d" / "index.html").read_text())
    assert sorted(linked) == sorted(names)
    assert len(DashboardData.load(tmp_path / "d" / "data").experts) == 4


@pytest.mark.parametrize("at", ["a page", "the last step"])
def test_one_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch, at):
    write_dashboard(tmp_path / "d", made_up(3, seed=0), progress=False)
    before = {p: p.read_bytes() for p in (tmp_path / "d").rglob("*") if p.is_file()}
    if at == "a page":
        second = made_up(3, seed=1)
        second.experts[2].promoted[0] = "no effect"
    else:
        second = made_up(3, seed=1)

        def fail(*_):
            raise OSError("the disk is gone")

        monkeypatch.setattr("mxd_lens.artifacts.files._exchange", fail)
    with pytest.raises((AttributeError, OSError)):
        write_dashboard(tmp_path / "d", second, progress=False)
    assert {p: p.read_bytes() for p in (tmp_path / "d").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_what_is_no_dashboard_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt"):
        write_dashboard(tmp_path / "mine", made_up(2), progress=False)
    write_dashboard(tmp_path / "d", made_up(2), progress=False)
    (tmp_path / "d" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        write_dashboard(tmp_path / "d", made_up(2), progress=False)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<p>another's")
    with pytest.raises(FileExistsError, match=r"holds index\.html"):
        write_dashboard(tmp_path / "site", made_up(2), progress=False)
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "corpus.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds data"):
        write_dashboard(tmp_path / "project", made_up(2), progress=False)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="is a file"):
        write_dashboard(tmp_path / "file", made_up(2), progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_no_page_names_anything_outside_it(tmp_path):
    index = write_dashboard(tmp_path / "d", made_up(3), progress=False)
    for page in [index, *(tmp_path / "d" / "experts").iterdir()]:
        text = page.read_text()
        markup, _ = parts_of(text)
        assert not re.search(r"<script[^>]*\ssrc=|<link|@import|url\(", markup)
        for target in re.findall(r'(?:href|src)="([^"]*)"', markup):
            assert (page.parent / target).is_file(), target
        assert "default-src 'none'" in unescape(markup)
        assert (len(text) > 4e6) == (page == index)  # plotly.js is there once


# What they say


def test_a_page_shows_its_expert():
    data = made_up(5)
    e = data.experts[2]
    markup, embedded = parts_of(expert_page(data, e.expert).html)
    for shown in (
        f'<span id="expert">{e.expert}</span>',
        quantity("density", e.density),
        f"{e.n_firings:,}",
        quantity("loss_effect", e.loss_effect),
        number(e.coherence),
        f"{e.promoted[0].logit:+.3g}",
        f"± {number(e.promoted[0].spread)}",
        number(e.singular_values[0]),
        "60 experts",
        "32 active on a token",
        "200,000 tokens of wikitext",
    ):
        assert shown in markup, shown
    excerpts = [x for band in e.bands for x in band.excerpts]
    texts = re.findall(r'<p class="excerpt"[^>]*>(.*?)</p>', markup, re.S)
    assert [unescape(re.sub("<.*?>", "", text)) for text in texts] == ["".join(x.tokens) for x in excerpts]
    assert len(re.findall('class="top"', markup)) == len(excerpts)
    for (values, norms, effects), x in zip(embedded["excerpts"], excerpts, strict=True):
        assert values == pytest.approx(x.values, rel=1e-3)
        assert norms == pytest.approx(x.norms, rel=1e-3)
        assert effects[:-1] == pytest.approx(x.loss_effects[:-1], rel=1e-3)
        assert effects[-1] is None
    for other, value in e.coactive:
        assert f'{other} <span class="soft">({number(value)})' in markup  # by itself there are no links
    assert "href" not in markup


def test_bars_are_as_high_as_bins_are_full():
    data = made_up(1)
    e = data.experts[0]
    markup, _ = parts_of(expert_page(data, e.expert).html)
    bars = re.findall(
        r'<title>([^<]*)</title>.*?<rect x="[\d.]+" y="([\d.]+)" [^>]*height="([\d.]+)"', markup
    )
    assert len(bars) == len(e.counts)
    for (title, y, height), count in zip(bars, e.counts, strict=True):
        assert float(height) == pytest.approx(100 * count / max(e.counts), abs=0.01)
        assert float(y) + float(height) == pytest.approx(100, abs=0.02)
        assert title.endswith(f": {count:,} firing" + "s" * (count != 1))


def test_neighbours_and_order_are_links_in_a_folder(tmp_path):
    data = made_up(12, d_sae=14)  # nearly every neighbour has a page
    write_dashboard(tmp_path / "d", data, progress=False)
    by_density = sorted(data.experts, key=lambda e: -e.density)
    ids = [e.expert for e in by_density]
    for i, e in enumerate(by_density):
        markup, embedded = parts_of((tmp_path / "d" / "experts" / f"expert-{e.expert}.html").read_text())
        near = dict(re.findall(r'<a rel="(\w+)" href="(expert-\d+\.html)">', markup))
        beside = [ids[j] if 0 <= j < 12 else None for j in (i - 1, i + 1)]
        assert near == {
            rel: f"expert-{n}.html" for rel, n in zip(("prev", "next"), beside, strict=True) if n is not None
        }
        assert embedded["beside"]["-density"] == beside
        by_id = sorted(ids)
        j = by_id.index(e.expert)
        assert embedded["beside"]["expert"] == [by_id[j - 1] if j else None, [*by_id, None][j + 1]]
        for other, _ in e.similar:
            assert (f'<a href="expert-{other}.html">{other}</a>' in markup) == (other in ids)


def test_an_expert_that_never_fired(tmp_path):
    data = made_up(3, d_sae=10)
    data.experts.append(dead(next(n for n in range(10) if n not in [e.expert for e in data.experts])))
    index = write_dashboard(tmp_path / "d", data, progress=False)
    markup, embedded = parts_of(expert_page(data, data.experts[-1].expert).html)
    assert "It fired on none of the tokens." in markup
    assert "nan" not in re.sub("<.*?>", "", markup).lower()
    assert "(0.0, 10.0)" in usage(data.settings, data.experts[-1])[0]
    assert parts_of(index.read_text())[1]["values"]["coherence"][-1] is None
    assert embedded["excerpts"] == []


def test_the_index(tmp_path):
    data = made_up(20)
    data.overview["consistency"] = [
        v if math.isnan(v) else 0.01 + 0.9 * v for v in data.overview["consistency"]
    ]
    data.overview["mean"] = [-1.0, *data.overview["mean"][1:]]
    markup, embedded = parts_of(write_dashboard(tmp_path / "d", data, progress=False).read_text())
    by_density = sorted(data.experts, key=lambda e: -e.density)
    assert embedded["ids"] == [e.expert for e in by_density]
    assert re.findall(r"experts/expert-(\d+)\.html", markup) == [str(e.expert) for e in by_density]
    assert embedded["values"]["loss_effect"] == pytest.approx([e.loss_effect for e in by_density], rel=1e-3)
    first = by_density[0].bands[0].excerpts[0]
    assert "".join(first.tokens).lower() in embedded["texts"][0]
    assert by_density[0].promoted[0].token in embedded["texts"][0]
    assert len(embedded["overview"]["density"]) == 60
    known = [None if math.isnan(v) else pytest.approx(v, rel=1e-3) for v in data.overview["consistency"]]
    assert embedded["overview"]["consistency"] == known
    assert embedded["names"]["density"] == {"label": "density", "log": True}
    # A share of less than a percent is far from none: a logarithm. Zero and below have none.
    logs = {name: about["log"] for name, about in embedded["names"].items()}
    assert logs == {"density": True, "mean": False, "share_of_output": True, "consistency": False}
    assert "n top 10; bands 4" in markup


@pytest.mark.parametrize(
    ("values", "log"),
    [([1, 2, 3], False), ([1e-5, 0.1], True), ([-1, 1e3], False), ([0, None, 1e-3, 1], True), ([], False)],
)
def test_axes_are_logarithmic_over_decades(values, log):
    assert spans_decades(values) is log


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((math.nan, "–"), (math.inf, "–"), (3, "3"), (12345, "12,345"), (0.123456, "0.123")),
        *((12345.6, "12,346"), (1e-7, "1e-07"), (0.0, "0")),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_quantities():
    assert quantity("density", 0.00123) == "0.123 %"
    assert quantity("share_of_output", -1.234e-7) == "-1.2e-05 %"
    assert quantity("loss_effect", 0.5) == "+0.5"
    assert quantity("density", math.nan) == quantity("loss_effect", math.nan) == "–"


def test_light_pages_say_what_was_not_measured(tmp_path):
    data = made_up(4, d_sae=10)
    light, deep = data.experts[0], data.experts[1]
    light.singular_values, light.stable_rank, light.loss_effect = [], math.nan, math.nan
    light.consistency, deep.consistency = 0.01, 0.9
    for band in light.bands:
        for x in band.excerpts:
            x.loss_effects = [math.nan] * len(x.tokens)
    data.settings["deep"] = [deep.expert]
    write_dashboard(tmp_path / "d", data, progress=False)
    pages = {
        e.expert: parts_of((tmp_path / "d" / "experts" / f"expert-{e.expert}.html").read_text())[0]
        for e in (light, deep)
    }
    for shown in ("Singular values", "loss effect", "effect on the next token&#39;s loss", "Suppresses"):
        assert shown not in pages[light.expert]
        assert shown.replace("&#39;", "'") in pages[deep.expert]
    assert "writes in no common direction (consistency 0.01)" in pages[light.expert]


def test_labels_are_shown_where_experts_are_named(tmp_path):
    data = made_up(12, d_sae=14)
    named = data.experts[0]
    data.settings["labels"] = {str(named.expert): "day of the <month>"}
    index = write_dashboard(tmp_path / "d", data, progress=False)
    label = "day of the &lt;month&gt;"
    markup, embedded = parts_of(index.read_text())
    assert f"<b>{label}</b>" in markup
    assert sum("day of the <month>" in text for text in embedded["texts"]) == 1
    own = (tmp_path / "d" / "experts" / f"expert-{named.expert}.html").read_text()
    assert f'<p class="label">{label}</p>' in own
    near = next(e for e in data.experts if named.expert in [n for n, _ in e.similar])
    assert f'title="{label}"' in (tmp_path / "d" / "experts" / f"expert-{near.expert}.html").read_text()


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ('{"17": "a", "2": {"label": "b", "score": 0.9}}', {17: "a", 2: "b"}),
        ('{"labels": {"3": "c"}}', {3: "c"}),
        ("{}", {}),
    ],
)
def test_a_file_of_labels(tmp_path, content, labels):
    (tmp_path / "labels.json").write_text(content)
    assert read_labels(tmp_path / "labels.json") == labels
    assert read_labels(tmp_path / "no.json") == {}


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": "b"}', '{"1": {"text": "b"}}'])
def test_what_is_no_file_of_labels_is_said(tmp_path, content):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match="is not a file of labels"):
        read_labels(tmp_path / "labels.json")


def test_the_prompt_is_one_of_the_experts_own():
    e = made_up(1).experts[0]
    top = e.bands[0].excerpts[0]
    prompt = own_prompt(e)
    assert "".join(top.tokens[: top.peak + 1]).strip().endswith(prompt)
    top.tokens = ["<|endoftext|>", " a", " b", *top.tokens[3:]]
    top.peak = 2
    assert own_prompt(e) == "a b"
    assert own_prompt(dead(3)) == "Let's talk about"


# Text of any kind


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" word", " word"),
        ("a\nb\t", "a↵b⇥"),
        ("\x00\x1b\r", "\\x00\\x1b\\r"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
        ("שלום مرحبا", "שלום مرحبا"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("<b>", "<b>"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text, shown):
    assert visible(text) == shown


def excerpt(tokens: list[str], values: list[float], peak: int) -> Excerpt:
    n = len(tokens)
    return Excerpt(tokens, list(range(n)), values, values, [math.nan] * n, peak, sequence=0, start=0)


def test_tokens_that_make_up_one_character_are_one_piece():
    x = excerpt(["a", "🤷", "", "", " b"], [0, 0, 0, 2.0, 1.0], peak=3)
    found = [(p["text"], p["n"], p["top"], p["level"]) for p in pieces(x, 2.0)]
    assert found == [("a", 1, False, ""), ("🤷", 3, True, "1.000"), (" b", 1, False, "0.500")]
    cut = excerpt(["", "", "c"], [0, 0, 1.0], peak=2)  # begins inside a character
    assert [(p["text"], p["n"]) for p in pieces(cut, 1.0)] == [("…", 2), ("c", 1)]


def hostile_data() -> DashboardData:
    texts = [[" before", text, " after"] for text in HOSTILE]
    texts += [["x" * 50_000], list("שלום עולם "), ["مرحبا ", "بالعالم"], ["🤷", "", "", " so"]]
    data = made_up(4, texts=texts)
    data.settings |= {
        "model_name": HOSTILE[0] + '"; import os',
        "text_name": HOSTILE[2] + "\ud800",  # as a file's name may be
        "architecture": HOSTILE[6],
        "layer": "C:\\layers\\\"</script><script>document.title='owned'</script>",
        HOSTILE[3]: HOSTILE[1],
    }
    return data


def test_hostile_text_stays_text(tmp_path):
    data = hostile_data()
    index = write_dashboard(tmp_path / "d", data, progress=False)
    own = {"index.html": 5, "expert": 2}
    for page in [index, *(tmp_path / "d" / "experts").iterdir()]:
        text = page.read_text(encoding="utf-8")
        outside = re.sub(r"<script type=\"text/plain\".*?</script>", "", text, flags=re.S)
        assert len(re.findall("<script", outside)) <= own["index.html" if page == index else "expert"]
        assert not re.search(r"<img|<!--|onerror=\"|<textarea", parts_of(text)[0])
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", parts_of(text)[0])


# The code on a page


@pytest.mark.parametrize(
    ("architecture", "layer", "line"),
    [
        (
            "mxd",
            ["smollm2-135m-mxd", "blocks.11.mlp"],
            'MxD.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp")',
        ),
        ("topk_skip_transcoder", "runs/a b", 'TopKSkipTranscoder.from_pretrained("runs/a b")'),
        ("standard", ["gpt2-small-res-jb", "x"], 'SAE.from_pretrained("gpt2-small-res-jb", "x")'),
        ("standard", "folder", 'SAE.load_from_disk("folder")'),
        ("mxd", "", 'MxD.from_pretrained("the layer\'s folder")'),
        ("mxd", 'a"b\\c\u202e', "MxD.from_pretrained('a\"b\\\\c\\u202e')"),
    ],
)
def test_the_snippet(architecture, layer, line):
    data = made_up(1)
    code, note = usage(data.settings | {"architecture": architecture, "layer": layer}, data.experts[0])
    assert f"layer = {line}" in code
    compile(code, "snippet", "exec")
    assert bool(note) == (not layer)


@pytest.mark.parametrize("text", ["plain", 'a"b', "a\\b", "a\nb", "naïve", "'", "\ud800"])
def test_a_literal_is_the_text(text):
    assert eval(ascii_literal(text)) == text
    assert ascii_literal(text).isascii()


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("cls", "release"), [(MxD, "smollm2-135m-mxd"), (TopKTranscoder, "smollm2-135m-transcoder")]
)
def test_the_snippet_of_a_bundled_release_runs(cls, release, capsys, monkeypatch, smollm2):
    monkeypatch.setattr("mxd_lens.models.load_model", lambda name: smollm2)
    monkeypatch.setattr("mxd_lens.load_model", lambda name: smollm2, raising=False)
    layer = cls.from_pretrained(release, "blocks.11.mlp")
    assert find_release(layer) == (release, "blocks.11.mlp")
    data = made_up(1, d_sae=layer.cfg.d_sae)
    settings = data.settings | {"architecture": layer.cfg.architecture(), "layer": find_release(layer)}
    code, _ = usage(settings, replace(data.experts[0], maximum=30.0))
    torch.manual_seed(0)
    exec(code, {})
    steered = capsys.readouterr().out
    prompt = own_prompt(data.experts[0])
    assert prompt
    assert steered.count(prompt) == 2
    with smollm2.saes(saes=[layer]):
        assert steered.strip().startswith(
            smollm2.generate(prompt, max_new_tokens=20, do_sample=False).strip()
        )


def test_a_layer_of_no_release():
    assert find_release(make_layer("mxd, k")) is None
    changed = MxD.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp", dtype="bfloat16")
    assert find_release(changed) == ("smollm2-135m-mxd", "blocks.11.mlp")  # rounded, it is still the same
    with torch.no_grad():
        changed.b_enc[7] += 1
    assert find_release(changed) is None


# From a model to pages


@pytest.fixture
def tokens(tiny_model, words) -> torch.Tensor:
    return torch.cat([tiny_model.to_tokens(text)[:, :12] for text in words[:30]])


QUICK = CollectionConfig(n_top=3, n_bands=2, n_per_band=2, n_tokens=4, n_neighbours=3)


@pytest.mark.parametrize("name", LAYERS)
def test_build_dashboard(name, tiny_model, tokens, tmp_path):
    layer = make_layer(name)
    index = build_dashboard(
        tiny_model, layer, tokens, [3, 17], tmp_path / "d", "words", cfg=QUICK, progress=False
    )
    data = DashboardData.load(tmp_path / "d" / "data")
    assert [e.expert for e in data.experts] == [3, 17]
    assert data.settings["text_name"] == "words"
    markup, _ = parts_of(index.read_text())
    assert "tokens of words" in markup
    for e in data.experts:
        page = (tmp_path / "d" / "experts" / f"expert-{e.expert}.html").read_text()
        assert f"{e.n_firings:,}" in page


def test_the_same_call_again_only_writes_and_another_is_refused(tiny_model, tokens, tmp_path, monkeypatch):
    layer = make_layer("mxd, k")
    arguments = (tiny_model, layer, tokens)
    build_dashboard(*arguments, [3, 17], tmp_path / "d", cfg=QUICK, progress=False)
    with monkeypatch.context() as m:
        m.setattr(type(tiny_model), "run_with_hooks", None)  # the model is not asked again
        build_dashboard(*arguments, [3, 17], tmp_path / "d", cfg=QUICK, progress=False)
    with pytest.raises(ValueError, match="holds the results of another run"):
        build_dashboard(*arguments, [3, 18], tmp_path / "d", cfg=QUICK, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt"):
        build_dashboard(*arguments, [3], tmp_path / "mine", cfg=QUICK, progress=False)


def test_a_killed_build_goes_on(tiny_model, tokens, tmp_path, monkeypatch):
    layer = make_layer("mxd, k")
    cfg = replace(QUICK, batch_size=4, checkpoint_every=1)
    whole = build_dashboard(tiny_model, layer, tokens, [3, 17], tmp_path / "a", cfg=cfg, progress=False)
    from mxd_lens.dashboards.collect import collection

    with monkeypatch.context() as m:
        m.setattr(collection, "histogram", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_dashboard(tiny_model, layer, tokens, [3, 17], tmp_path / "b", cfg=cfg, progress=False)
    assert not (tmp_path / "b" / "index.html").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    again = build_dashboard(tiny_model, layer, tokens, [3, 17], tmp_path / "b", cfg=cfg, progress=False)
    assert sorted(p.name for p in again.parent.iterdir()) == sorted(p.name for p in whole.parent.iterdir())
    page = Path("experts") / "expert-3.html"
    assert (again.parent / page).read_text() == (whole.parent / page).read_text()


def test_the_command(tiny_folder, words, tmp_path):
    layer = make_layer("mxd, k")
    layer.cfg.metadata.model_name = str(tiny_folder)
    layer.save_model(tmp_path / "layer")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(words))
    arguments = ["dashboard", str(tmp_path / "layer"), "--text", str(text), "--sequences", "4"]
    arguments += ["--no-loss-effects", "--experts"]
    result = CliRunner().invoke(app, [*arguments, "3,5-7", "--output", str(tmp_path / "d")])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "d" / "index.html") in result.output.replace("\n", "")
    pages = {p.name for p in (tmp_path / "d" / "experts").iterdir()}
    assert pages == {f"expert-{n}.html" for n in (3, 5, 6, 7)}
    page = (tmp_path / "d" / "experts" / "expert-3.html").read_text()
    assert ascii_literal(str(tmp_path / "layer")) in unescape(page)
    result = CliRunner().invoke(app, [*arguments, "4000", "--output", str(tmp_path / "e")])
    assert result.exit_code == 2
    assert "there is no expert 4000" in result.output


# In a notebook


def test_a_page_by_itself(tmp_path):
    data = made_up(3)
    n = data.experts[1].expert
    page = expert_page(data, n, height=500)
    frame = page._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts"')
    assert "height: 500px" in frame
    assert unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page.html
    assert page.save(tmp_path / "p.html").read_text() == page.html
    with pytest.raises(LookupError, match="nothing about expert 999"):
        expert_page(data, 999)


@pytest.mark.parametrize("name", LAYERS)
def test_the_card_of_an_expert(name, tiny_model, tokens):
    layer = make_layer(name)
    statistics = expert_statistics(tiny_model, layer, tokens, progress=False)
    n = int(statistics.fired.argmax())
    card = expert_card(layer, n, statistics)
    c, g = layer.W_dec.double(), layer.W_enc.double()
    assert card.gate_norm == pytest.approx(g[:, n].pow(2).sum().sqrt().item(), rel=1e-5)
    if isinstance(layer, MxD):
        W = (layer.W_out.double() * c[n]).detach().numpy()
        expected = torch.linalg.svdvals(torch.tensor(W))
        torch.testing.assert_close(card.spectrum.singular_values[0], expected)
    cosine = torch.nn.functional.cosine_similarity(g[:, [n]], g, dim=0)
    cosine[n] = -2
    assert card.fires_like.neighbours[0].tolist() == cosine.topk(5).indices.tolist()
    assert card.use["density"] == pytest.approx(statistics.fired[n].item() / statistics.n_tokens)
    text = StringIO()
    Console(file=text, width=120).print(card)
    for shown in (f"Expert {n} of", f"on {statistics.n_tokens:,} tokens", "writes like", "density"):
        assert shown in text.getvalue()
    assert "<table>" in card._repr_html_()


def test_cards_without_statistics_and_what_has_none():
    layer = make_layer("mxd, k")
    card = expert_card(layer, 0)
    assert card.use is None
    assert "density" not in card._repr_html_()
    with pytest.raises(IndexError, match="does not exist"):
        expert_card(layer, 4000)
    other = make_layer("mxd, k")
    with torch.no_grad():
        other.W_dec.mul_(2)
    from mxd_lens import ExpertStatistics

    with pytest.raises(ValueError, match="statistics of another layer"):
        expert_card(layer, 0, ExpertStatistics.of(other))


def test_importing_an_architecture_imports_no_card():
    import subprocess
    import sys

    code = "import sys, mxd_lens.architectures as a; print([m for m in sys.modules if 'expert_card' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, path: Path, width: int = 1280, **options) -> Iterator:
    """A page in the browser, which must ask nothing of any network and log nothing in its console."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.set_default_timeout(240_000)  # machines that test are busy
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "blob:")) else complaints.append(r.url))
    page.goto(path.as_uri())
    if path.name == "index.html":
        page.wait_for_selector("#overview[data-drawn]")
    yield page
    page.close()
    assert complaints == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    data = made_up(30, d_sae=400)
    return write_dashboard(tmp_path_factory.mktemp("dashboard") / "d", data, progress=False).parent


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory) -> Path:
    index = write_dashboard(tmp_path_factory.mktemp("hostile") / "d", hostile_data(), progress=False)
    return index.parent


@pytest.fixture(scope="module")
def data(folder) -> DashboardData:
    return DashboardData.load(folder / "data")


def visible_ids(page) -> list[int]:
    return [int(text) for text in page.locator("#experts tbody tr:not([hidden]) a").all_inner_texts()]


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_search(browser, folder, data):
    with opened(browser, folder / "index.html") as page:
        e = data.experts[7]
        page.keyboard.press("/")
        page.keyboard.type(str(e.expert))
        assert e.expert in visible_ids(page)
        assert len(visible_ids(page)) < 30
        page.keyboard.press("Enter")  # the id itself comes before what only begins with it
        page.wait_for_url(f"**/expert-{e.expert}.html*")
        page.go_back()
        assert page.input_value("#search") == str(e.expert)  # and is found again
        for query in ("river", "RIVER  music", "no such word"):
            page.fill("#search", query)
            words = query.lower().split()
            texts = {
                x.expert: "".join(t for ex in x.bands[0].excerpts for t in ex.tokens)
                + "".join(effect.token for effect in x.promoted)
                for x in data.experts
            }
            expected = {n for n, text in texts.items() if all(word in text for word in words)}
            assert set(visible_ids(page)) == expected
            assert page.inner_text("#found") == f"{len(expected)} found"
        page.keyboard.press("Escape")
        assert len(visible_ids(page)) == 30


@pytest.mark.parametrize("column", ["density", "loss_effect", "coherence", "expert"])
def test_sort(browser, folder, data, column):
    with opened(browser, folder / "index.html") as page:
        if column == "density":  # it is sorted by it already
            page.click("th[data-column=density] button")
        page.click(f"th[data-column={column}] button")
        up = [e.expert for e in sorted(data.experts, key=lambda e: getattr(e, column))]
        expected = up if column == "expert" else up[::-1]
        assert visible_ids(page) == expected
        page.click(f"th[data-column={column}] button")
        assert visible_ids(page) == expected[::-1]
        page.reload()
        assert visible_ids(page) == expected[::-1]
        assert page.locator("th[aria-sort]").get_attribute("data-column") == column


def test_unknown_numbers_are_sorted_last(browser, tmp_path):
    unknown = made_up(4, d_sae=20)
    unknown.experts[1].coherence = math.nan
    index = write_dashboard(tmp_path / "d", unknown, progress=False)
    with opened(browser, index) as page:
        for _ in range(2):
            page.click("th[data-column=coherence] button")
            assert visible_ids(page)[-1] == unknown.experts[1].expert


def test_the_index_by_keyboard(browser, folder):
    with opened(browser, folder / "index.html") as page:
        ids = visible_ids(page)
        for key in ("j", "ArrowDown", "j", "k"):
            page.keyboard.press(key)
        assert page.locator("tr.current a").inner_text() == str(ids[1])
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/expert-{ids[1]}.html")


def test_the_plot_of_all_experts(browser, folder, data):
    with opened(browser, folder / "index.html") as page:
        assert page.locator("#overview .scatterlayer .trace").count() == 2
        known = sum(not math.isnan(v) for v in data.overview["density"])
        assert page.locator("#overview .scatterlayer path.point").count() == known
        page.select_option("#axis-y", "consistency")
        page.wait_for_selector("#overview .ytitle:has-text('consistency')")
        own = page.locator("#overview .scatterlayer .trace").nth(1).locator("path.point")
        assert own.count() == 30
        box = own.nth(3).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector("#hovered:has-text('promotes')")
        n = int(page.inner_text("#hovered").split()[1].rstrip(";"))
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_url(f"**/expert-{n}.html")


def test_from_expert_to_expert_by_keyboard(browser, folder, data):
    ids = [e.expert for e in sorted(data.experts, key=lambda e: -e.density)]
    with opened(browser, folder / "experts" / f"expert-{ids[1]}.html") as page:
        for key, n in (("ArrowRight", ids[2]), ("j", ids[3]), ("k", ids[2]), ("ArrowLeft", ids[1])):
            page.keyboard.press(key)
            page.wait_for_url(f"**/expert-{n}.html")
        page.keyboard.press("/")
        page.keyboard.type("j")  # a letter like any other while one writes
        assert page.input_value("#search") == "j"
        page.fill("#search", str(ids[5]))
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/expert-{ids[5]}.html")
        page.keyboard.press("/")
        page.keyboard.type("river & music?")
        page.keyboard.press("Enter")
        page.wait_for_url("**/index.html#*")
        page.wait_for_selector("#overview[data-drawn]")
        assert page.input_value("#search") == "river & music?"
        page.go_back()
        page.keyboard.press("i")
        page.wait_for_url("**/index.html*")
        page.wait_for_selector("#overview[data-drawn]")


@pytest.mark.parametrize("column", ["coherence", "expert"])
def test_the_next_page_is_the_next_in_the_index(browser, folder, data, column):
    with opened(browser, folder / "index.html") as page:
        page.click(f"th[data-column={column}] button")
        ids = visible_ids(page)
        page.click(f"#experts tbody a:text-is('{ids[3]}')")
        for n in ids[4:7]:
            page.keyboard.press("j")
            page.wait_for_url(f"**/expert-{n}.html#*")
        page.keyboard.press("k")
        page.wait_for_url(f"**/expert-{ids[5]}.html#*")
        page.keyboard.press("i")
        page.wait_for_url("**/index.html#*")
        page.wait_for_selector("#overview[data-drawn]")
        assert visible_ids(page) == ids
        assert page.evaluate("document.querySelector('th[aria-sort]').dataset.column") == column


def test_embedded_a_page_is_the_expert_alone(browser, folder, data):
    path = folder / "experts" / f"expert-{data.experts[2].expert}.html"
    with opened(browser, path) as page:
        assert page.locator("nav").is_visible()
        page.goto(f"{path.as_uri()}?embed")
        for hidden in ("nav", ".usage", ".keys"):
            assert page.locator(hidden).is_hidden()
        assert page.locator(".excerpt").first.is_visible()
        assert page.locator("h1").inner_text().startswith(f"Expert {data.experts[2].expert}")


def test_what_an_expert_fires_on_is_seen_on_a_phone(browser, folder):
    with opened(browser, folder / "index.html", 420) as page:
        cell = page.locator("#experts tbody td.fires").first
        assert cell.is_visible()
        box = cell.bounding_box()
        assert box["width"] > 300
        assert box["x"] + box["width"] <= 420
        assert page.locator("#experts mark").first.is_visible()


def test_dead_experts_are_not_drawn(browser, tmp_path):
    some = made_up(5, d_sae=40)
    for n in {0, 1, 2, 3, 4, 5, 6, 7} - {e.expert for e in some.experts}:
        some.overview["density"][n] = 0.0
    n_dead = some.overview["density"].count(0.0)
    some.overview["consistency"] = [0.5] * 40
    index = write_dashboard(tmp_path / "d", some, progress=False)
    with opened(browser, index) as page:
        for axis in "xy":
            page.select_option(f"#axis-{axis}", "consistency")
        page.wait_for_timeout(300)
        assert n_dead
        assert page.locator("#overview .scatterlayer path.point").count() == 40 - n_dead


def test_hover_shows_a_tokens_numbers(browser, folder, data):
    e = data.experts[0]
    x = e.bands[0].excerpts[0]
    with opened(browser, folder / "experts" / f"expert-{e.expert}.html") as page:
        assert page.locator("#tip").is_hidden()
        page.locator(".excerpt").first.locator("span").nth(x.peak).hover()
        tip = page.inner_text("#tip")
        numbers = [float(found) for found in re.findall(r"[+-]?\d+\.?\d*(?:e-?\d+)?", tip)]
        expected = [x.values[x.peak], x.norms[x.peak], x.loss_effects[x.peak]]
        assert numbers == pytest.approx(expected, rel=1e-3)
        quiet = next(i for i, v in enumerate(x.values) if v == 0)
        page.locator(".excerpt").first.locator("span").nth(quiet).hover()
        assert "does not fire" in page.inner_text("#tip")
        page.locator("h1").hover()
        assert page.locator("#tip").is_hidden()


def test_tokens_by_keyboard(browser, folder, data):
    e = data.experts[0]
    x = e.bands[0].excerpts[0]
    with opened(browser, folder / "experts" / f"expert-{e.expert}.html") as page:
        page.locator(".excerpt").first.focus()
        assert f"coefficient {x.values[x.peak]:.4g}" in page.inner_text("#tip")
        page.keyboard.press("ArrowLeft" if x.peak else "ArrowRight")
        beside = x.peak - 1 if x.peak else 1
        assert page.inner_text("#tip").startswith(x.tokens[beside].strip()) or "fire" in page.inner_text(
            "#tip"
        )
        assert page.locator(".chosen").inner_text().strip() == x.tokens[beside].strip()
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        assert page.url.endswith(f"expert-{e.expert}.html")


def test_colours(browser, folder, data):
    e = data.experts[0]
    excerpts = [x for band in e.bands for x in band.excerpts]
    x, which = excerpts[0], excerpts[0].peak
    with opened(browser, folder / "experts" / f"expert-{e.expert}.html") as page:

        def level() -> float:
            span = page.locator(".excerpt").first.locator("span").nth(which)
            return float(span.evaluate("e => e.style.getPropertyValue('--v') || 0"))

        for quantity in ("values", "norms", "loss_effects"):
            known = [abs(v) for ex in excerpts for v in getattr(ex, quantity) if not math.isnan(v)]
            value = getattr(x, quantity)[which]
            value = 0 if math.isnan(value) else value
            assert level() == pytest.approx(abs(value) / max(known), abs=2e-3)
            page.keyboard.press("c")
        assert page.input_value("#colour") == "0"  # round it goes
        page.keyboard.press("c")
        page.keyboard.press("c")
        last = page.locator(".excerpt").first.locator("span").nth(which)
        assert ("up" in (last.get_attribute("class") or "")) == (x.loss_effects[which] > 0)


def test_copying(browser, folder, data):
    e = data.experts[0]
    path = folder / "experts" / f"expert-{e.expert}.html"
    with opened(browser, path, permissions=["clipboard-read", "clipboard-write"]) as page:
        for button, text in (("h1 button", str(e.expert)), (".code button", page.inner_text("#code"))):
            page.click(button)
            page.wait_for_selector(f"{button}:has-text('Copied')")
            assert page.evaluate("navigator.clipboard.readText()") == text
        assert f"{{{e.expert}: " in page.inner_text("#code")


@pytest.mark.parametrize("page_of", ["index", "expert"])
def test_light_and_dark(browser, folder, data, page_of):
    path = folder / "index.html"
    if page_of == "expert":
        path = folder / "experts" / f"expert-{data.experts[0].expert}.html"
    shades = {}
    for scheme in ("light", "dark"):
        with opened(browser, path, color_scheme=scheme) as page:
            for what in ("backgroundColor", "color"):
                rgb = page.evaluate(f"getComputedStyle(document.body).{what}")
                shades[scheme, what] = sum(map(int, re.findall(r"\d+", rgb)[:3])) / 3
    assert shades["light", "backgroundColor"] > 200 > 100 > shades["light", "color"]
    assert shades["dark", "backgroundColor"] < 50 < 200 < shades["dark", "color"]


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_pages_fit_their_window(browser, folder, data, hostile_folder, width):
    for where in (folder, hostile_folder):
        experts = sorted((where / "experts").iterdir())
        for path in (where / "index.html", *experts[:4]):
            with opened(browser, path, width) as page:
                assert fits(page), path


def test_nothing_hostile_is_executed_and_all_of_it_is_shown(browser, hostile_folder):
    with opened(browser, hostile_folder / "index.html") as page:
        assert page.title() != "owned"
        page.fill("#search", "<script>document")
        assert len(visible_ids(page)) > 0
        page.mouse.move(400, 700)
        links = page.locator("#experts tbody a").all()
        names = [link.get_attribute("href") for link in links]
        assert page.title() != "owned"
    data = DashboardData.load(hostile_folder / "data")
    for name in names:
        n = int(re.search(r"\d+", name)[0])
        with opened(browser, hostile_folder / name) as page:
            for span in page.locator(".excerpt span").all()[:60]:
                span.hover()
            page.keyboard.press("c")
            assert page.title() == f"Expert {n} - {visible(HOSTILE[6])} at {data.settings['hook_name_out']}"
            assert page.locator("img, textarea").count() == 0
            e = next(e for e in data.experts if e.expert == n)
            excerpts = [x for band in e.bands for x in band.excerpts]
            texts = page.locator(".excerpt").evaluate_all("all => all.map(e => e.textContent)")
            assert texts == [visible("".join(x.tokens)) for x in excerpts]


def test_right_to_left_text_runs_from_the_right(browser, hostile_folder):
    found = 0
    for path in (hostile_folder / "experts").iterdir():
        with opened(browser, path) as page:
            for text in page.locator(".excerpt").all():
                spans = text.locator("span").all()
                if spans[0].inner_text()[:1] in ("ש", "م"):
                    assert spans[0].bounding_box()["x"] > spans[-1].bounding_box()["x"]
                    found += 1
    assert found


def test_a_page_in_a_frame_is_apart_from_its_notebook(browser, data, tmp_path):
    notebook = tmp_path / "notebook.html"
    frame = expert_page(data, data.experts[0].expert)._repr_html_()
    style = "<style>* { color: red !important; display: block !important }</style>"
    notebook.write_text(f"<!doctype html><meta charset=utf-8>{style}<p id=out>text</p>{frame}")
    with opened(browser, notebook) as page:
        inside = page.frame_locator("iframe")
        assert inside.locator("h1").inner_text().startswith(f"Expert {data.experts[0].expert}")
        assert inside.locator("h1").evaluate("e => getComputedStyle(e).color") != "rgb(255, 0, 0)"
        inside.locator(".excerpt span.top").first.hover()
        assert "coefficient" in inside.locator("#tip").inner_text()
        font = "e => getComputedStyle(e).fontFamily"
        assert page.locator("#out").evaluate(font) != inside.locator("body").evaluate(font)
