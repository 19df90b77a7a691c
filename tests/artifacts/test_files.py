"""Atomic writes and locks: an interruption leaves the earlier result, and the next write cleans up."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mxd_lens.artifacts import files
from mxd_lens.artifacts.files import (
    LOCK,
    LockedError,
    WriteError,
    atomic_file,
    atomic_folder,
    full_path,
    locked,
    write_json,
    write_text,
)

FILES = Path(files.__file__)


def run(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process with the functions of artifacts/files.py alone, which imports in a moment."""
    start = f"""
        import importlib.util, os, sys, time
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("files", {str(FILES)!r})
        files = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(files)
        """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
    )


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "below" / "result.json"
    write_json(path, {"a": 1})
    assert write_json(path, {"a": 2}) == path
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_an_exception_leaves_the_earlier_file(tmp_path):
    path = write_text(tmp_path / "page.html", "old")

    def interrupted() -> None:
        with atomic_file(path) as partial:
            partial.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("operation", ["mkdtemp", "fsync", "write", "replace"])
def test_what_cannot_be_written_is_one_line_and_the_earlier_file_stays(
    tmp_path, monkeypatch, error, operation
):
    path = write_text(tmp_path / "report.json", "old")

    def fail(*_, **__):
        raise OSError(error, os.strerror(error))

    where = {"mkdtemp": files.tempfile, "fsync": os, "write": Path, "replace": Path}[operation]
    monkeypatch.setattr(where, "write_bytes" if operation == "write" else operation, fail)
    with pytest.raises(WriteError) as raised:
        write_text(path, "new")
    monkeypatch.undo()
    assert str(raised.value) == (
        f"Could not write {path}: {os.strerror(error)}. The earlier one is unchanged."
    )
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    file = write_text(tmp_path / "file", "old")
    with pytest.raises(WriteError, match="folder: it is a folder, and a file is to be written"):
        write_text(tmp_path / "folder", "new")
    with pytest.raises(WriteError, match="file: it is a file, and a folder is to"), atomic_folder(file):
        pass
    with pytest.raises(WriteError):
        write_text(file / "below", "new")
    with pytest.raises(WriteError, match="is a file, and a folder is needed"), locked(file / LOCK, "run"):
        pass
    assert file.read_text() == "old"


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    read, write = os.pipe()
    write_text(f"/dev/fd/{write}", "text")
    assert os.read(read, 10) == b"text"
    os.close(write)
    os.close(read)
    write_text(os.devnull, "text")
    assert not Path(os.devnull).is_file()


def test_a_folder_takes_the_place_of_the_earlier_one(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "dashboard") as partial:
            (partial / "experts").mkdir()
            (partial / "experts" / f"{content}.html").write_text(content)
    assert [p.name for p in (tmp_path / "dashboard" / "experts").iterdir()] == ["new.html"]
    assert os.listdir(tmp_path) == ["dashboard"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_earlier_folder_stays_when_the_new_one_fails(tmp_path, monkeypatch, can_exchange):
    folder = tmp_path / "dashboard"
    with atomic_folder(folder) as partial:
        (partial / "index.html").write_text("old")
    if not can_exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
        rename = Path.rename

        def fail_second(self: Path, target: Path) -> Path:
            if Path(target) == folder and not self.name.endswith(".replaced"):
                raise OSError(errno.EIO, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_second)

    def replace() -> None:
        with atomic_folder(folder) as partial:
            (partial / "index.html").write_text("new")
            if can_exchange:
                raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(WriteError, match=r"Input/output error\. The earlier one is unchanged"):
        replace()
    assert (folder / "index.html").read_text() == "old"
    assert os.listdir(tmp_path) == ["dashboard"]


def test_without_an_exchange_of_names_the_folder_is_still_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "dashboard") as partial:
            (partial / "index.html").write_text(content)
    assert (tmp_path / "dashboard" / "index.html").read_text() == "new"
    assert os.listdir(tmp_path) == ["dashboard"]


def test_the_partial_of_a_killed_process_is_removed_and_that_of_a_running_one_is_not(tmp_path):
    code = """
        with files.atomic_file("result.txt") as partial:
            partial.write_text("half")
            print("ready", flush=True)
            time.sleep(60)
        """
    running, killed = run(code, tmp_path), run(code, tmp_path)
    for process in (running, killed):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.glob(".partial-*"))) == 2
    write_text(tmp_path / "other.txt", "whole")
    assert len(list(tmp_path.glob(".partial-*"))) == 1
    running.kill()
    running.wait()
    files.remove_stale_partials(tmp_path)
    assert os.listdir(tmp_path) == ["other.txt"]


def test_a_folder_whose_exchange_was_killed_in_the_middle_comes_back(tmp_path):
    with atomic_folder(tmp_path / "dashboard") as partial:
        (partial / "index.html").write_text("old")
    code = """
        import signal
        files.ctypes.CDLL = lambda _: object()
        rename = Path.rename
        def killed_after_first(self, target):
            rename(self, target)
            if str(target).endswith(".replaced"):
                os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = killed_after_first
        with files.atomic_folder("dashboard") as partial:
            (partial / "index.html").write_text("new")
        """
    run(code, tmp_path).wait()
    assert not (tmp_path / "dashboard").exists()
    files.remove_stale_partials(tmp_path)
    assert (tmp_path / "dashboard" / "index.html").read_text() == "old"
    assert os.listdir(tmp_path) == ["dashboard"]


def test_a_lock_names_the_process_that_holds_it_and_outlives_no_process(tmp_path):
    code = """
        with files.locked("out/.lock", "training run"):
            print("ready", flush=True)
            time.sleep(60)
        """
    holder = run(code, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    with (
        pytest.raises(LockedError, match=rf"in use by another training run \(process {holder.pid} on "),
        locked(tmp_path / "out" / LOCK, "training run"),
    ):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / LOCK).exists()
    with locked(tmp_path / "out" / LOCK, "training run"):
        assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(LockedError), locked(tmp_path / "out" / LOCK, "training run"):
            pass
    assert os.listdir(tmp_path / "out") == []


def test_home_is_the_same_on_writing_as_on_reading(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert write_text("~/page.html", "x") == full_path("page.html") == tmp_path / "page.html"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.slow
def test_killed_at_any_file_operation_the_old_result_or_the_new_one_is_there(tmp_path):
    """A process that replaces a file and a folder, killed before its n-th file operation, for every n."""
    code = """
        import signal
        operations = 0
        def count(event, arguments):
            global operations
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir"):
                operations += 1
                if operations == int(sys.argv[1]):
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        files.write_text("file.txt", "new" * 1000)
        with files.atomic_folder("folder") as partial:
            for i in range(3):
                (partial / f"{i}.txt").write_text("new" * 1000)
        """
    write_text(tmp_path / "file.txt", "old" * 1000)
    for n in range(1, 200):
        with atomic_folder(tmp_path / "folder") as partial:
            for i in range(3):
                (partial / f"{i}.txt").write_text("old" * 1000)
        process = run(code.replace("sys.argv[1]", str(n)), tmp_path)
        code_of_exit = process.wait()
        contents = {path.read_text() for path in (tmp_path / "folder").iterdir()}
        assert contents in ({"old" * 1000}, {"new" * 1000})
        assert len(list((tmp_path / "folder").iterdir())) == 3
        assert (tmp_path / "file.txt").read_text() in ("old" * 1000, "new" * 1000)
        files.remove_stale_partials(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["file.txt", "folder"]
        if code_of_exit == 0:
            break
    else:
        pytest.fail("the process never came to its end")
    assert n > 20
