"""Two processes on one folder: one of them works, the other is told, and nothing is mixed."""

from functools import partial
from pathlib import Path

import pytest
from killing import hidden, in_processes
from resumable_jobs import Job, digest

TOLD = ("LockedError", "FileExistsError")
"""What the loser is told: another process is writing there, or has written there already."""


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


@pytest.mark.parametrize(("name", "said"), [("frontier", "sweep"), ("data", "dashboard")])
@pytest.mark.parametrize("pair", range(3))
def test_one_result(
    others: dict[str, tuple[Job, ...]], tmp_path: Path, name: str, said: str, pair: int
) -> None:
    """A sweep would lose what the other one measured, a dashboard's data would be of both."""
    for folder in ("alone", "both"):
        (tmp_path / folder).mkdir()
    assert in_processes(partial(others[name][0], tmp_path / "alone")) == [""]
    answers = in_processes(*[partial(others[name][0], tmp_path / "both")] * 2)
    assert "" in answers
    for answer in answers:
        assert not answer or f"is in use by another {said}" in answer, answer
    assert digest(tmp_path / "both") == digest(tmp_path / "alone")
    assert hidden(tmp_path / "both") == []
