"""What a dashboard shows: saved and read, and every number against one computed apart from it."""

import json
import math

import pandas
import pyarrow.parquet as pq
import pytest

from mxd_lens.dashboards.data import (
    Band,
    DashboardData,
    Excerpt,
    ExpertData,
    Neighbour,
    TokenEffect,
)

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
