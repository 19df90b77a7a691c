"""Every page, with texts in every field that try to run a script."""

from dataclasses import fields
from pathlib import Path

import plotly.graph_objects as go
import pytest
from made_up_dashboard import made_up
from payloads import PAYLOADS, check_nothing_runs, chromium, poisoned  # noqa: F401
from planted import PlantedModel, planted_mxd, planted_tokens, planted_transcoder

from mxd_lens import FaithfulnessReport
from mxd_lens.artifacts.page import Section, Texts, facts, plain_text, write_page
from mxd_lens.artifacts.tables import Table, text_of
from mxd_lens.dashboards.render import write_dashboard
from mxd_lens.evals.ablation import ablation_study
from mxd_lens.evals.comparison import compare
from mxd_lens.evals.frontier import Frontier, Point
from mxd_lens.evals.probing.probing import (
    ALWAYS,
    CONSTANT,
    ONE,
    ClassProbes,
    ExpertProbe,
    Scores,
    SparseProbing,
    TaskFacts,
)
from mxd_lens.evals.steering_scores import SteeringScore, SteeringScores
from mxd_lens.reports.ablation import write_ablation_page
from mxd_lens.reports.comparison import write_comparison_page
from mxd_lens.reports.frontier import write_frontier_page
from mxd_lens.reports.probing import write_probing_page
from mxd_lens.reports.run import write_run_page
from mxd_lens.reports.steering import write_steering_page

SHORT = [payload for payload in PAYLOADS if len(payload) < 1000]
MIXED = [" ".join(SHORT[i : i + 5]) for i in range(0, len(SHORT), 5)]
"""All payloads, several in one text."""

SETTINGS = (
    *("model_name", "labels", "held_out", "transcoder_width", "training_tokens", "text", "judge", "layers"),
    *("ks", "seeds", "context_size", "d_sae", "architecture", ONE, CONSTANT, "k = 1", "train", "test"),
    *("token", "norm", "normalized_mse", "share_of_squared_norm", "n_candidates"),
)


def report() -> FaithfulnessReport:
    values = {
        f.name: 0.25 if f.type is float else 7 if f.type is int else "name"
        for f in fields(FaithfulnessReport)
        if f.type in (float, int, str)
    }
    token = {"token": "a", "norm": 855.0, "normalized_mse": 0.5, "share_of_squared_norm": 0.1}
    return FaithfulnessReport(**values | {"largest_tokens": [token]})


def frontier() -> Frontier:
    points = [Point("mxd", 2, k, 0, 40, 5678, {"wiki": report()}) for k in (8, 16)]
    points.append(Point("mxd", 2, 32, 0, 40, 5678, failure="why"))
    settings = {"model_name": "m", "labels": {"mxd": "MxD"}, "held_out": {"wiki": 1}, "text": "wiki"}
    return Frontier(settings | {"transcoder_width": 8, "training_tokens": 9}, points)


def probing() -> SparseProbing:
    scores = {ONE: Scores(0.5, 0.5), "k = 1": Scores(0.5, 0.5)}
    settings = {"model_name": "m", "layers": {"MxD": {"d_sae": 4, "architecture": "mxd"}}, "ks": [1]}
    facts = TaskFacts("provider", {"class": 3}, 12, 1, {"empty": 1}, {0: {"train": {"class": 2}}})
    probes = [
        ClassProbes("task", "class", "MxD", 0, scores, [ExpertProbe(1, 0.5, 0.5, 0.5, 0.5)]),
        ClassProbes("task", "class", ALWAYS, 0, {CONSTANT: Scores(0.1, 0.5)}, []),
    ]
    settings |= {"seeds": [0], "context_size": 8, "n_candidates": 3}
    return SparseProbing(settings, {"task": facts}, probes)


def steering() -> SteeringScores:
    score = SteeringScore("layer", "mxd", 3, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, ["text"])
    return SteeringScores({"model_name": "m", "judge": "j", "layers": ["layer"]}, [score, score])


@pytest.fixture(scope="module")
def comparison():
    layers = {"MxD": planted_mxd(), "transcoder": planted_transcoder()}
    return compare(PlantedModel(layers["MxD"]), layers, planted_tokens(1, 8)[0], progress=False)


@pytest.fixture(scope="module")
def ablation():
    layer = planted_mxd()
    return ablation_study(PlantedModel(layer), {"it": layer}, planted_tokens(8, 20), progress=False)["it"]


def write_all(folder: Path, text: str, comparison, ablation) -> list[Path]:
    """A page of each kind that shows the text wherever it can."""

    def of(result):
        return poisoned(result, text, ("mode", "variable", "by"), SETTINGS)

    probed = of(probing())
    probes = [p if i == 0 else type(p)(**vars(p) | {"features": ALWAYS}) for i, p in enumerate(probed.probes)]
    data = made_up(2, texts=[[" before", text.replace("\ud800", ""), " after"]])
    data.settings |= dict.fromkeys(("model_name", "text_name", "architecture", "layer", text), text)
    data.settings["labels"] = {str(e.expert): text for e in data.experts}
    index = write_dashboard(folder / "dashboard", data, progress=False)
    figure = go.Figure(go.Bar(x=[text], y=[1.0], name=text, text=[text], customdata=[[text]]))
    figure.update_layout(title=text, height=300, xaxis_title=text).add_annotation(text=text, x=0, y=1)
    shown = (figure, Table([text], [[text]], text), Texts({text: text}), facts({text: text}))
    return [
        index,
        folder / "dashboard" / "experts" / f"expert-{data.experts[0].expert}.html",
        write_run_page(folder / "run.html", text, [], of(report()), {text: text}, {text: text}),
        write_frontier_page(folder / "frontier.html", of(frontier())),
        write_probing_page(folder / "probing.html", SparseProbing(probed.settings, probed.tasks, probes)),
        write_steering_page(folder / "steering.html", of(steering())),
        write_ablation_page(folder / "ablation.html", {text: of(ablation)}, {text: text}),
        write_comparison_page(folder / "comparison.html", of(comparison)),
        write_page(folder / "any.html", text, text, [Section(text, text, shown)]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("text", MIXED)
def test_nothing_runs_on_any_page(text, comparison, ablation, chromium, tmp_path):  # noqa: F811
    for page in write_all(tmp_path, text, comparison, ablation):
        shown = check_nothing_runs(chromium, page)
        assert "owned" in shown or "evil" in shown, page.name
        policy = page.read_text(encoding="utf-8").split("Content-Security-Policy")[1][:120]
        assert "default-src &#39;none&#39;" in policy


def test_a_figure_shows_texts_as_they_are():
    text = "<a href='javascript:alert(1)'>a & b</a>\x1b"
    figure = go.Figure(go.Scatter(x=[text, 1.5], y=[float("nan"), 2], name=text, hovertemplate="<b>%{x}</b>"))
    shown = plain_text(figure.update_layout(title=text))
    escaped = "&lt;a href='javascript:alert(1)'&gt;a &amp; b&lt;/a&gt;\\x1b"
    assert shown.data[0].name == shown.layout.title.text == shown.data[0].x[0] == escaped
    assert shown.data[0].hovertemplate == "<b>%{x}</b>"
    assert shown.data[0].y[0] is None
    assert figure.data[0].name == text  # the figure itself is as it was


def test_a_page_shows_nothing_that_is_only_text(tmp_path):
    with pytest.raises(TypeError, match="not a str"):
        write_page(tmp_path / "p.html", "t", "l", [Section("h", "c", ("<b>markup</b>",))])
    assert text_of("x")
