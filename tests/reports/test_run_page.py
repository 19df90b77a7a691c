"""The page about a run: what it shows, and that text stays text."""

import math
import re
from dataclasses import fields, replace

import pytest
from tiny import HOOK_IN, HOOK_OUT

from mxd_lens import FaithfulnessReport
from mxd_lens.artifacts.page import field_docs
from mxd_lens.evals.frontier import Frontier, Point
from mxd_lens.reports.frontier import frontier_figure, write_frontier_page, write_frontier_png
from mxd_lens.reports.run import read_history, write_run_page

HISTORY = [{"tokens": 100.0 * i, "normalized_mse": 1 / i, "dead": 3.0} for i in range(1, 6)]


@pytest.fixture
def report() -> FaithfulnessReport:
    numbers = {f.name: 0.25 + i / 100 for i, f in enumerate(fields(FaithfulnessReport)) if f.type == "float"}
    numbers |= {f.name: 0.25 for f in fields(FaithfulnessReport) if f.type is float}
    token = {"token": "<script>alert(1)</script>", "norm": 855.0, "normalized_mse": 0.5}
    return FaithfulnessReport(
        **numbers,
        largest_tokens=[token | {"share_of_squared_norm": 0.1}],
        n_tokens=1234,
        n_experts=40,
        n_parameters=5678,
        model_name="a&b",
        hook_name=HOOK_IN,
        hook_name_out=HOOK_OUT,
    )


def test_every_field_of_the_report_is_explained_and_shown(report, tmp_path):
    docs = field_docs(FaithfulnessReport)
    assert list(docs) == [f.name for f in fields(FaithfulnessReport)]
    assert all(docs.values())
    page = write_run_page(tmp_path / "p.html", "t", HISTORY, report).read_text()
    for name in ("normalized_mse", "feature_share", "ce_loss_shuffled_gate", "n_tokens"):
        assert f">{name}</td>" in page
    assert "1,234" in page


def test_text_from_outside_is_escaped(report, tmp_path):
    page = write_run_page(
        tmp_path / "p.html", "<i>title</i>", HISTORY, report, {"<b>": "<img src=x>"}, {"<u>": "</table>"}
    ).read_text()
    for hostile in ("<script>alert(1)", "<img src=x>", "<i>title", "<td></table>", "<b><b>"):
        assert hostile not in page
    assert "&lt;img src=x&gt;" in page


def test_the_page_needs_no_network(report, tmp_path):
    page = write_run_page(tmp_path / "p.html", "t", HISTORY, report).read_text()
    assert "plotly.js v" in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search("https?:", markup)
    assert not re.search(r"<script[^>]*src=", page)


def test_a_layer_without_history_and_numbers_that_are_not_there(report, tmp_path):
    assert read_history(tmp_path) == []
    page = write_run_page(tmp_path / "p.html", "t", [], replace(report, feature_share=math.nan)).read_text()
    assert ">feature_share</td>" in page
    assert "plotly.js v" in page


@pytest.fixture
def frontier(report) -> Frontier:
    """Two layers, two Ks, two seeds; "b" failed at the larger K."""

    def point(architecture: str, layer: int, k: int, seed: int) -> Point:
        point = Point(architecture, layer, k, seed, d_sae=40, n_parameters=5678)
        if (architecture, k) == ("b", 32):
            point.failure = "the loss is <nan>"
        else:
            error = 1 / k + layer / 100 + seed / 1000
            judged = replace(report, normalized_mse=error, ce_loss=4.0, ce_loss_replaced=4 + error)
            point.reports = {"wiki": judged, "brown": replace(judged, normalized_mse=2 * error)}
        return point

    settings = {
        "model_name": "<model>",
        "labels": {"a": "A & A", "b": "B"},
        "held_out": {"wiki": [2, 8], "brown": [2, 8]},
        "transcoder_width": 4608,
        "training_tokens": 1000,
        "text": "wiki",
    }
    points = [point(a, layer, k, seed) for a in "ab" for layer in (2, 12) for k in (8, 32) for seed in (0, 1)]
    return Frontier(settings, points)


def test_a_frontier_shows_every_architecture_layer_and_text(frontier, tmp_path):
    page = write_frontier_page(tmp_path / "f.html", frontier).read_text()
    for shown in ("A &amp; A", "wiki, 1,234 tokens", "brown, 1,234 tokens", "the loss is &lt;nan&gt;"):
        assert shown in page
    assert "the loss is <nan>" not in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search("https?:", markup)
    assert ">0.145</td>" in markup  # 1/8 + 2/100, the mean of both seeds
    assert ">–</td>" in markup  # where b failed


def test_the_lines_of_a_frontier(frontier):
    figure = frontier_figure(frontier, "brown")
    solid = [t for t in figure.data if t.line.dash == "solid" and t.name == "A & A" and t.xaxis == "x3"]
    (line,) = solid  # the second layer's errors
    assert list(line.x) == [8, 32]
    assert list(line.y) == pytest.approx([2 * (1 / 8 + 0.12 + 0.0005), 2 * (1 / 32 + 0.12 + 0.0005)])
    assert list(line.error_y.array) == pytest.approx([0.001, 0.001])
    assert [t.name for t in figure.data if t.showlegend] == ["A & A", "B", "zero ablated"]
    (short,) = [t for t in figure.data if t.line.dash == "dash" and t.name == "B" and t.xaxis == "x"]
    assert list(short.x) == [8]


def test_some_layers_of_a_frontier(frontier):
    """Only what was measured has a row, a tick and an entry in the legend."""
    frontier.points.append(Point("mxd", 20, 1024, 0, reports={}))
    shown = {a.text for a in frontier_figure(frontier, "brown").layout.annotations}
    assert not any("Layer 20" in title for title in shown)
    figure = frontier_figure(frontier, "brown", [2])
    titles = [a.text for a in figure.layout.annotations]
    assert titles == ["Layer 2: normalised MSE", "Layer 2: cross-entropy added, nats"]
    assert list(figure.layout.xaxis.tickvals) == [8, 32]
    frontier.points = [p for p in frontier.points if p.layer != 2 or p.architecture != "b"]
    assert sorted(t.name for t in frontier_figure(frontier, "brown").data if t.showlegend) == [
        "A & A",
        "B",
        "zero ablated",
    ]
    with pytest.raises(ValueError, match=r"Nothing was measured on 'wikipedia'.*\['wiki', 'brown'\]"):
        frontier_figure(frontier, "wikipedia")
    with pytest.raises(ValueError, match="at these layers"):
        frontier_figure(frontier, "brown", [20])


def test_a_frontier_as_a_picture(frontier, tmp_path):
    pytest.importorskip("kaleido")
    try:
        picture = write_frontier_png(tmp_path / "f.png", frontier, "wiki")
    except RuntimeError as e:
        pytest.skip(f"no browser: {e}")
    assert picture.read_bytes().startswith(b"\x89PNG")
