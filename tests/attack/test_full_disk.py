"""A disk that is full, read-only or gone, at any file operation: one line, and the old result intact."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from killing import hidden, in_processes, run_failing
from resumable_jobs import Job, digest

from mxd_lens import TranscoderTrainingRunner

ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "quota": errno.EDQUOT}


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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which `resized` makes smaller and larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or not is_mounted(folder, "-t", "tmpfs", "tmpfs"):
        pytest.skip("needs the right to mount a disk")
    try:
        if not is_mounted(folder, "-o", "remount,size=1M"):
            pytest.skip("needs the right to change the size of a disk")
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def is_mounted(folder: Path, *arguments: str) -> bool:
    """Mounts a disk; returns whether this machine lets us."""
    line = ["mount", *arguments, str(folder)]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


def resized(disk: Path, size: int) -> None:
    assert is_mounted(disk, "-o", f"remount,size={size}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "cached", "several", "frontier", "scores", "data"])
def test_a_disk_that_fills(
    jobs: dict[str, Job], others: dict[str, tuple[Job, ...]], disk: Path, tmp_path: Path, name: str
) -> None:
    job = jobs[name] if name in jobs else others[name][0]
    (tmp_path / "whole").mkdir()
    assert in_processes(partial(job, tmp_path / "whole")) == [""]
    expected = digest(tmp_path / "whole", "cache", "activations")
    needed = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    full = 0
    for share in (0.2, 0.5, 0.8):
        resized(disk, max(4096, int(share * needed)))
        (answer,) = in_processes(partial(job, disk))
        assert "\n" not in answer
        assert "Errno" not in answer
        assert not answer or os.strerror(errno.ENOSPC) in answer, answer
        if answer or name == "frontier":  # a sweep goes on without a layer that failed
            full += 1
            resized(disk, 2**30)
            assert in_processes(partial(job, disk)) == [""]
        assert digest(disk, "cache", "activations") == expected
        assert hidden(disk) == []
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert full  # a run may drop checkpoints, and end


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
