"""SIGKILL before random file operations of every job that resumes: it resumes, and ends as it would have."""

import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import hidden, run_killed
from resumable_jobs import Job, digest, overwriting_jobs


def attack(job: Job, folder: Path, n_kills: int, seed: int, *earlier: Job) -> None:
    """Kills the job `n_kills` times at random operations, on the way to several ends.

    Args:
        job: what is killed, and run again in the same folder.
        folder: where it writes.
        n_kills: how many times.
        seed: of the operations.
        earlier: run before it to their ends: it adds to their results, or replaces them.
    """
    start, place = folder / "start", folder / "place"
    place.mkdir()
    for before in earlier:
        run_killed(partial(before, place), place, None)
    shutil.copytree(place, start)
    n_operations = run_killed(partial(job, place), place, None)
    expected = digest(place, "cache")
    assert n_operations > 20
    assert expected
    rng, kills, ends = random.Random(seed), 0, 0
    while kills < n_kills:
        shutil.rmtree(place)
        shutil.copytree(start, place)
        for _ in range(rng.randint(1, 4)):  # kills on the way to one end
            kills += run_killed(partial(job, place), place, rng.randint(1, n_operations)) == -1
        run_killed(partial(job, place), place, None)
        assert digest(place, "cache") == expected
        assert hidden(place) == []
        ends += 1
    print(f"{kills} kills on the way to {ends} ends, {n_operations} file operations each")  # noqa: T201


@pytest.mark.parametrize("name", ["single", "cached", "standardized", "several"])
def test_killed_a_few_times(jobs: dict[str, Job], tmp_path: Path, name: str) -> None:
    attack(jobs[name], tmp_path, n_kills=3, seed=len(name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["single", "cached", "standardized", "several"])
def test_killed_ten_times(jobs: dict[str, Job], tmp_path: Path, name: str, seed: int) -> None:
    """Two hundred kills in all."""
    attack(jobs[name], tmp_path, n_kills=10, seed=100 + seed)


MEASURING = (
    "frontier",
    "frontier, more",
    "scores",
    "scores, more",
    "data",
    "data, deeper",
    "dashboard",
    "dashboard, deeper",
)


@pytest.mark.parametrize("name", ["frontier", "scores", "data"])
def test_measuring_killed_a_few_times(others: dict[str, tuple[Job, ...]], tmp_path: Path, name: str) -> None:
    *earlier, job = others[name]
    attack(job, tmp_path, 3, len(name), *earlier)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURING)
def test_measuring_killed_25_times(others: dict[str, tuple[Job, ...]], tmp_path: Path, name: str) -> None:
    *earlier, job = others[name]
    attack(job, tmp_path, 25, 100 + len(name), *earlier)


LAST = {"statistics": "statistics.json", "graph": "graph.json", "delphi": "config.json"}
"""By job: the file without which a folder holds no result."""


@pytest.mark.parametrize("name", ["statistics", "graph", "probing", "delphi", "command"])
def test_a_result_that_takes_the_place_of_another(
    tiny_model: Any, words: list[str], tmp_path: Path, name: str
) -> None:
    """Killed at every operation: the old result, the new one, or none, and never parts of both."""
    jobs = overwriting_jobs(tiny_model, words)[name]
    results = []
    for i, job in enumerate(jobs):
        (tmp_path / str(i)).mkdir()
        run_killed(partial(job, tmp_path / str(i)), tmp_path, None)
        results.append(digest(tmp_path / str(i)))
    assert results[0] != results[1]
    place, at, killed, ends = tmp_path / "place", 0, True, set()
    while killed:
        at += 1
        shutil.copytree(tmp_path / "0", place)
        killed = run_killed(partial(jobs[1], place), place, at) == -1
        found = {file: content for file, content in digest(place).items() if "/." not in f"/{file}"}
        is_whole = name not in LAST or any(Path(file).name == LAST[name] for file in found)
        ends.add(results.index(found) if is_whole else None)
        run_killed(partial(jobs[1], place), place, None)
        assert digest(place) == results[1]
        assert hidden(place) == []
        shutil.rmtree(place)
    assert at > 8
    assert ends >= {0, 1}
