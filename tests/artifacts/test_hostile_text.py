"""No text of a file, a model, a tokenizer or a corpus is executed or breaks what shows it."""

import importlib
import io
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import rich
from payloads import BARE_CONTROLS, PAYLOADS, check_nothing_runs, chromium, poisoned  # noqa: F401
from rich.console import Console

import mxd_lens
from mxd_lens import FaithfulnessReport
from mxd_lens.artifacts.tables import Tabular, text_of
from mxd_lens.evals.frontier import Frontier, Point
from mxd_lens.evals.steering import Sampling, SteeredSamples
from mxd_lens.evals.steering_scores import SteeringScore, SteeringScores
from mxd_lens.pretrained.registry import PretrainedLayer, PretrainedLayers

SETTINGS = ("model_name", "judge", "layers", "labels", "held_out", "architecture", "hook_name", "interpreter")


def report() -> FaithfulnessReport:
    values = {f.name: {float: 0.25, int: 7, str: "name"}.get(f.type, []) for f in fields(FaithfulnessReport)}
    token = {"token": "a", "norm": 855.0, "normalized_mse": 0.5, "share_of_squared_norm": 0.1}
    return FaithfulnessReport(**values | {"largest_tokens": [token]})


def results() -> list[Tabular]:
    """One of each result that shows text of others."""
    point = Point("mxd", 2, 8, 0, 40, 5678, {"wiki": report()})
    failed = Point("mxd", 2, 16, 0, 40, 5678, failure="why")
    layer = PretrainedLayer("release", "id", "source", "mxd", "model", "in", "out", 40, 4, 5678, {"a": "b"})
    settings = {
        "model_name": "m",
        "judge": "j",
        "layers": ["layer"],
        "labels": {"mxd": "MxD"},
        "held_out": {"wiki": 1},
    }
    return [
        report(),
        Frontier(settings, [point, failed]),
        PretrainedLayers([layer]),
        SteeredSamples(
            "m", "out", 3, 2.0, "add", Sampling(), ["one", "two"], ["three", "four"], [[1]], [[1]]
        ),
        SteeringScores(settings, [SteeringScore("layer", "mxd", 3, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, ["text"])]),
    ]


@dataclass(frozen=True)
class Anything(Tabular):
    """A result whose title, heading and cells are the text."""

    text: str

    @property
    def title(self) -> str:
        return self.text

    @property
    def columns(self) -> list[str]:
        return [self.text, "number", self.text]

    @property
    def rows(self) -> list[list]:
        return [[self.text, 1.5, "x"], ["y", 2, self.text]]


def shown_with(payload: str) -> list[Tabular]:
    made = [poisoned(result, payload, ("mode",), SETTINGS) for result in results()]
    return [*made, Anything(payload)]


@pytest.mark.parametrize("width", ["40", "80", None])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_in_a_terminal(payload, width, monkeypatch):
    if width:
        monkeypatch.setenv("COLUMNS", width)
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    for result in shown_with(payload):
        printed = str(result)
        assert not set(BARE_CONTROLS) & set(printed), type(result)
        terminal = io.StringIO()
        # A real terminal: colours are on, and links would be too.
        Console(file=terminal, force_terminal=True, width=int(width or 200)).print(result)
        styled = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
        assert not set(BARE_CONTROLS) & set(styled), type(result)
        if width is None and len(payload) < 100:
            assert text_of(payload) in printed


def test_by_rich_itself(capsys):
    for payload in PAYLOADS:
        rich.print(Anything(payload))
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_a_browser(chromium, tmp_path):  # noqa: F811
    tables = [result._repr_html_() for payload in PAYLOADS for result in shown_with(payload)]
    page = tmp_path / "notebook.html"
    page.write_text("<!doctype html><meta charset=utf-8><body>" + "\n".join(tables), encoding="utf-8")
    text = check_nothing_runs(chromium, page)
    for payload in PAYLOADS:
        assert text_of(payload) in text


def test_every_result_shows_itself_by_the_one_table():
    """A class that wrote HTML or terminal text of its own would have to escape it itself."""
    for module in pkgutil.walk_packages(mxd_lens.__path__, "mxd_lens."):
        if "sae_dashboard" not in module.name and "__main__" not in module.name:
            importlib.import_module(module.name)

    def all_of(cls):
        return {cls}.union(*map(all_of, cls.__subclasses__()))

    for cls in all_of(Tabular):
        for name in ("_repr_html_", "__rich_console__", "__str__"):
            assert getattr(cls, name) is getattr(Tabular, name), (cls, name)
        assert not {"__rich__", "_repr_mimebundle_", "_repr_markdown_"} & set(dir(cls)), cls
    source = Path(mxd_lens.__path__[0])
    for file in source.rglob("*.py"):
        if file != source / "artifacts" / "tables.py":
            assert not re.search(r"^\s*(from|import) rich\b", file.read_text("utf-8"), re.M), file


def test_a_text_is_written_on_one_line():
    assert text_of("a\nb\x1b[1m\ud800👩\u200d🚀שלום") == "a\\nb\\x1b[1m\\ud800👩\u200d🚀שלום"
    assert text_of(None) == text_of(float("nan")) == "–"


def test_a_report_that_is_none_is_refused(tmp_path):
    report().save(tmp_path / "report.json")
    assert FaithfulnessReport.load(tmp_path / "report.json") == report()
    text = (tmp_path / "report.json").read_text()
    for changed in (text.replace("0.25", '"[b]"', 1), text.replace('"l0"', '"other"'), "[]"):
        (tmp_path / "report.json").write_text(changed)
        with pytest.raises(ValueError, match=r"not a report|a report is a JSON object"):
            FaithfulnessReport.load(tmp_path / "report.json")


def test_a_surrogate_can_be_printed():
    """A file's name may hold one, and no encoding of a terminal has it."""
    code = (
        "from mxd_lens.artifacts.tables import Table, Tabular\n"
        "class One(Tabular):\n    title = 'a\\ud800'\n    columns = ['b']\n    rows = [['\\udcff']]\n"
        "print(One())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
