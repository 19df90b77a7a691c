"""SIGKILL before random file operations of every job that resumes: it resumes, and ends as it would have."""

import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import hidden, run_killed
from resumable_jobs import Job, digest, training_jobs


@pytest.fixture
def jobs(tiny_model: Any, words: list[str]) -> dict[str, Job]:
    return training_jobs(tiny_model, words)


def attack(job: Job, folder: Path, n_kills: int, seed: int) -> None:
    """Kills the job `n_kills` times at random operations, on the way to several ends."""
    whole = folder / "whole"
    whole.mkdir()
    n_operations = run_killed(partial(job, whole), whole, None)
    expected = digest(whole, "cache")
    assert n_operations > 20
    assert expected
    rng, kills, ends = random.Random(seed), 0, 0
    while kills < n_kills:
        killed = folder / "killed"
        for _ in range(rng.randint(1, 4)):  # kills on the way to one end
            killed.mkdir(exist_ok=True)
            kills += run_killed(partial(job, killed), killed, rng.randint(1, n_operations)) == -1
        run_killed(partial(job, killed), killed, None)
        assert digest(killed, "cache") == expected
        assert hidden(killed) == []
        ends += 1
        shutil.rmtree(killed)
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
