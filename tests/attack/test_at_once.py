"""Two processes on one folder: one of them works, the other is told, and nothing is mixed."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import hidden, in_processes
from resumable_jobs import Job, digest, measuring_jobs, training_jobs

TOLD = ("LockedError", "FileExistsError")
"""What the loser is told: another process is writing there, or has written there already."""


@pytest.fixture
def jobs(tiny_model: Any, words: list[str]) -> dict[str, Job]:
    return training_jobs(tiny_model, words)


@pytest.mark.parametrize("name", ["single", "several"])
@pytest.mark.parametrize("pair", range(5))
def test_one_output_folder(jobs: dict[str, Job], tmp_path: Path, name: str, pair: int) -> None:
    (tmp_path / "alone").mkdir()
    assert in_processes(partial(jobs[name], tmp_path / "alone")) == [""]
    (tmp_path / "both").mkdir()
    answers = in_processes(*[partial(jobs[name], tmp_path / "both")] * 2)
    assert "" in answers
    for answer in answers:
        assert not answer or answer.startswith(TOLD), answer
        assert "\n" not in answer
    assert digest(tmp_path / "both") == digest(tmp_path / "alone")
    assert hidden(tmp_path / "both") == []


@pytest.mark.parametrize("pair", range(10))
def test_one_activation_cache(jobs: dict[str, Job], tmp_path: Path, pair: int) -> None:
    """Two runs that write apart and share a cache; afterwards a third one reads it."""
    cache = str(tmp_path / "cache")
    (tmp_path / "alone").mkdir()
    assert in_processes(partial(jobs["cached"], tmp_path / "alone")) == [""]
    weights = "run/sae_weights.safetensors"
    expected = digest(tmp_path / "alone")[weights]
    share = [partial(jobs["cached"], tmp_path / name, cached_activations_path=cache) for name in "ab"]
    answers = in_processes(*share)
    assert "" in answers
    for name, answer in zip("ab", answers, strict=True):
        if answer:
            assert answer.startswith(("LockedError", "ValueError: Another process has added")), answer
        else:
            assert digest(tmp_path / name)[weights] == expected
    third = partial(jobs["cached"], tmp_path / "c", cached_activations_path=cache)
    assert in_processes(third) == [""]
    assert digest(tmp_path / "c")[weights] == expected
    assert hidden(tmp_path) == []


def test_one_sweep(tiny_model: Any, words: list[str], tmp_path: Path) -> None:
    """Both would write frontier.json, each without what the other measured."""
    (sweep,) = measuring_jobs(tiny_model, words)["frontier"]
    answers = in_processes(*[partial(sweep, tmp_path)] * 2)
    assert "" in answers
    for answer in answers:
        assert not answer or "is in use by another sweep" in answer, answer
    assert hidden(tmp_path) == []
