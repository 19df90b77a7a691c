"""Atomic files and folders, and the lock that keeps two processes apart.

Everything this project writes for a user goes through this module: layers, checkpoints, caches, reports,
pages, tables, dashboards. An interrupted write, a full disk or a killed process leaves the earlier result as
it was.

    write_json(path, content)                      # a whole file at once
    with atomic_file(path) as partial:             # a writer that wants a path
        save_file(tensors, partial)
    with atomic_folder(path) as partial:           # a folder, which replaces an earlier one
        ...
    with atomic_files(path, "cfg.json") as partial:    # files of a folder that holds others too
        ...
    with locked(folder / LOCK, "training run"):    # one process at a time
        ...

A write happens in a hidden folder beside the target, `.partial-*`, whose lock its process holds. The next
write beside it, or `remove_stale_partials`, removes the folder of a process that died.
"""

import ctypes
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

LOCK = ".lock"
"""The name of the lock file in a folder that one process at a time may write to."""

PARTIAL = ".partial-"
_REPLACED = ".replaced"


class WriteError(OSError):
    """Something could not be written; what was there before is unchanged.

    Args:
        path: what was to be written.
        reason: why it could not be.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        kept = " The earlier one is unchanged." if path.exists() else ""
        super().__init__(f"Could not write {path}: {reason.rstrip('.')}.{kept}")


class LockedError(OSError):
    """Another process holds the lock."""


def full_path(path: str | Path) -> Path:
    """Return `path` as an absolute path without `~` and links: the same on reading and on writing."""
    return Path(path).expanduser().resolve()


def write_text(path: str | Path, text: str, errors: str = "strict") -> Path:
    """Write a UTF-8 file in one step, with `\\n` as the end of a line. Returns its full path.

    Raises:
        WriteError: it could not be written; an earlier file is unchanged.
    """
    return write_bytes(path, text.encode("utf-8", errors))


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> Path:
    """Write a JSON file in one step. Returns its full path.

    Raises:
        WriteError: it could not be written; an earlier file is unchanged.
    """
    return write_text(path, json.dumps(content, indent=indent) + "\n")


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file in one step. Returns its full path.

    Raises:
        WriteError: it could not be written; an earlier file is unchanged.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(content)
    return full_path(path)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to; at the end of the block it replaces `path` in one step.

    The path yielded ends in the same name, so that writers which go by the suffix work. Folders above `path`
    are made.

    Raises:
        WriteError: it could not be written; an earlier file is unchanged.
    """
    given, path = Path(path).expanduser(), full_path(path)
    with _writing(path):
        if given.is_dir():
            raise IsADirectoryError(None, "it is a folder, and a file is to be written")
        if (
            given.exists() and not given.is_file()
        ):  # a device or a pipe, such as /dev/stdout: not to be replaced
            yield given
            return
        with _partial_folder(path.parent) as folder:
            partial = folder / path.name
            yield partial
            _sync(partial)
            partial.replace(path)
        _sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder; at the end of the block it takes the place of `path` and all that was in it.

    Where the file system can exchange two names, as on Linux and macOS with a local disk, there is no moment
    without a folder at `path`. Elsewhere, after a process was killed between the two renames, the next write
    or `remove_stale_partials` puts the earlier folder back.

    Raises:
        WriteError: it could not be written; an earlier folder is unchanged.
    """
    path = full_path(path)
    with _writing(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(None, "it is a file, and a folder is to be written")
        with _partial_folder(path.parent) as folder:
            partial = folder / path.name
            partial.mkdir()
            yield partial
            for below in partial.rglob("*"):
                _sync(below)
            _sync(partial)
            if path.exists():
                _exchange(partial, path)
            else:
                partial.rename(path)
        _sync(path.parent)


@contextmanager
def atomic_files(folder: str | Path, last: str) -> Iterator[Path]:
    """Yield an empty folder; at the end of the block its files move into `folder`, beside what is there.

    For a folder that is complete once it holds the file `last`: an earlier one is removed first and the new
    one comes at the end, so that new files never lie beside old ones in a folder that looks complete.

    Raises:
        WriteError: they could not be written; nothing has changed unless they were already moving.
    """
    folder = full_path(folder)
    with _writing(folder):
        with _partial_folder(folder) as around:
            partial = around / "files"
            partial.mkdir()
            yield partial
            files = sorted(partial.iterdir(), key=lambda file: file.name == last)
            for file in files:
                _sync(file)
            (folder / last).unlink(missing_ok=True)
            for file in files:
                file.replace(folder / file.name)
        _sync(folder)


def remove_stale_partials(folder: str | Path) -> None:
    """Remove what processes that died were writing in `folder`; an interrupted exchange is undone.

    What a running process is writing stays.
    """
    for partial in full_path(folder).glob(f"{PARTIAL}*"):
        with suppress(Timeout, OSError), FileLock(partial / LOCK, timeout=0):
            for replaced in partial.glob(f"*{_REPLACED}"):
                target = partial.with_name(replaced.name.removesuffix(_REPLACED))
                if not target.exists():
                    replaced.rename(target)
            shutil.rmtree(partial)


def remove_stale(folder: str | Path) -> None:
    """Remove what processes that died left in `folder`: partial files, as above, and the lock."""
    folder = full_path(folder)
    remove_stale_partials(folder)
    if (folder / LOCK).exists():
        with suppress(OSError), locked(folder / LOCK, "clean-up"):  # a LockedError: it is in use
            pass


@contextmanager
def locked(file: str | Path, job: str) -> Iterator[None]:
    """Hold the lock `file` for the block.

    The file names the process: its id, its host and when it took the lock. The operating system frees the
    lock of a process that died, and the next one takes it over.

    Args:
        file: the lock, `folder / LOCK` for a folder; folders above it are made.
        job: what the folder is used for, as in "training run".

    Raises:
        LockedError: another process holds it.
        WriteError: the lock cannot be written there.
    """
    file = full_path(file)
    lock = FileLock(file, timeout=0)
    with _writing(file):
        if file.parent.exists() and not file.parent.is_dir():
            raise NotADirectoryError(None, f"{file.parent} is a file, and a folder is needed")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as e:
            raise LockedError(
                f"{file.parent} is in use by another {job}{_owner(file)}. Wait for it, stop it, or choose "
                "another folder."
            ) from e
        owner = {"job": job, "pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        # Not atomically: a new file would not be the locked one.
        file.write_text(json.dumps(owner), encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()


def _owner(file: Path) -> str:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        return f" (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (LockedError, UnicodeError):
        raise
    except (OSError, SafetensorError) as e:
        reason = e.reason if isinstance(e, WriteError) else getattr(e, "strerror", None) or str(e)
        raise WriteError(path, reason) from e


@contextmanager
def _partial_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent` that other processes leave alone while this one runs."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=parent))
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
            break
        except (Timeout, FileNotFoundError):  # another process took the new folder for a stale one
            continue
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders' names, in one step where the file system can."""
    names = os.fsencode(new), os.fsencode(old)
    with suppress(AttributeError, OSError):  # no such function in this C library
        c = ctypes.CDLL(None)
        if sys.platform == "darwin":
            failed = c.renamex_np(*names, 0x2)  # RENAME_SWAP
        else:
            at_cwd, exchange = -100, 2
            failed = c.renameat2(at_cwd, names[0], at_cwd, names[1], exchange)
        if not failed:
            return
    replaced = new.with_name(f"{new.name}{_REPLACED}")
    old.rename(replaced)
    try:
        new.rename(old)
    except BaseException:
        replaced.rename(old)
        raise
