"""A disk that is full, read-only or gone, at any file operation: one line, and the old result intact."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import hidden, in_processes, run_failing
from resumable_jobs import Job, digest, training_jobs

from mxd_lens import TranscoderTrainingRunner

ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "quota": errno.EDQUOT}


@pytest.fixture
def jobs(tiny_model: Any, words: list[str]) -> dict[str, Job]:
    return training_jobs(tiny_model, words)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "cached", "several"])
@pytest.mark.parametrize("error", ERRORS)
def test_at_any_operation_it_is_one_line_and_it_resumes(
    jobs: dict[str, Job], tmp_path: Path, name: str, error: str
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert in_processes(partial(jobs[name], whole)) == [""]
    expected = digest(whole, "cache")
    for at in (1, 2, 5, 12, 25, 40, 60, 90):
        folder = tmp_path / f"at-{at}"
        folder.mkdir()
        answer = run_failing(partial(jobs[name], folder), folder, at, ERRORS[error])
        assert "\n" not in answer
        assert "Errno" not in answer
        if answer:
            assert os.strerror(ERRORS[error]) in answer, answer
            assert answer.startswith(("WriteError: Could not write", "OSError: Could not write")) or (
                name == "several" and answer.startswith("RuntimeError: Every layer failed")
            ), answer
        # With room again it ends as it would have.
        assert in_processes(partial(jobs[name], folder)) == [""]
        assert digest(folder, "cache") == expected
        assert hidden(folder) == []


def test_a_file_in_the_place_of_the_folder(jobs: dict[str, Job], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    (answer,) = in_processes(partial(jobs["single"], tmp_path))
    assert answer.startswith(("WriteError: Could not write", "FileExistsError", "NotADirectoryError")), answer
    assert f"{tmp_path / 'run'}" in answer
    assert "\n" not in answer
    assert "Errno" not in answer
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_vanishes_while_it_trains(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is written all the same, to the folder made again."""
    save = TranscoderTrainingRunner.save_final_sae

    def vanish_and_save(self: TranscoderTrainingRunner, *args: object) -> None:
        shutil.rmtree(tmp_path / "run")
        save(self, *args)

    monkeypatch.setattr(TranscoderTrainingRunner, "save_final_sae", vanish_and_save)
    jobs["single"](tmp_path)
    assert (tmp_path / "run" / "cfg.json").is_file()
