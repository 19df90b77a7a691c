"""The page about a run: what it shows, and that text stays text."""

import math
import re
from dataclasses import fields, replace

import pytest
from conftest import HOOK_IN, HOOK_OUT

from mxd_lens import FaithfulnessReport
from mxd_lens.dashboards.run_page import field_docs, read_history, write_run_page

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
    docs = field_docs()
    assert list(docs) == [f.name for f in fields(FaithfulnessReport)]
    assert all(docs.values())
    page = write_run_page(tmp_path / "p.html", "t", HISTORY, report).read_text()
    for name in ("normalized_mse", "feature_share", "ce_loss_shuffled_gate", "n_tokens"):
        assert f"<td>{name}</td>" in page
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
    assert "http" not in markup
    assert not re.search(r"<script[^>]*src=", page)


def test_a_layer_without_history_and_numbers_that_are_not_there(report, tmp_path):
    assert read_history(tmp_path) == []
    page = write_run_page(tmp_path / "p.html", "t", [], replace(report, feature_share=math.nan)).read_text()
    assert "<td>feature_share</td>" in page
    assert "plotly.js v" in page
