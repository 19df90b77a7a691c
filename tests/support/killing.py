"""Jobs in a child process that is killed before its n-th file operation.

The child is a fork of the test's process, which has imported everything: a kill costs what the job costs.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def run_killed(job: Callable[[], object], below: Path, at: int | None) -> int:
    """Run `job` in a fork, killed before its `at`-th file operation below a folder; None lets it end.

    Returns:
        The number of its operations if it ended by itself, -1 if it was killed.

    Raises:
        RuntimeError: the job raised an exception; the message holds it.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            n_operations = _count_and_kill(str(below), at)
            job()
            os.write(write, str(n_operations()).encode())
        except BaseException:
            os.write(write, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return -1
    if not answer.isdecimal():
        raise RuntimeError(answer or f"the child ended with status {status} and no word")
    return int(answer)


def run_failing(job: Callable[[], object], below: Path, at: int, error: int) -> str:
    """Run `job` in a fork in which every file operation below a folder fails from the `at`-th on.

    Args:
        job: what to run.
        below: the folder on the disk that is full, or cannot be written to.
        at: the first operation that fails.
        error: the errno, errno.ENOSPC say.

    Returns:
        The exception as "TYPE: MESSAGE"; an empty string where the job ended well.
    """

    def fail() -> None:
        n = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal n
            if event not in FILE_OPERATIONS or not any(str(below) in str(argument) for argument in arguments):
                return
            if event == "open" and not writes(arguments):
                return
            n += 1
            if n >= at and event not in ("os.remove", "os.rmdir", "shutil.rmtree"):
                raise OSError(error, os.strerror(error))

        sys.addaudithook(count)
        job()

    return in_processes(fail)[0]


def writes(arguments: tuple[object, ...]) -> bool:
    """Whether an "open" of sys.audit is one to write."""
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def in_processes(*jobs: Callable[[], object]) -> list[str]:
    """Run jobs at the same time, each in a fork.

    Returns:
        For each the exception as "TYPE: MESSAGE"; an empty string where it ended well.
    """
    pipes = []
    for job in jobs:
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(read)
            try:
                job()
            except BaseException as e:
                os.write(write, f"{type(e).__name__}: {e}"[:4000].encode())
            finally:
                os._exit(0)
        os.close(write)
        pipes.append(read)
    answers = []
    for read in pipes:
        with os.fdopen(read) as pipe:
            answers.append(pipe.read())
        os.wait()
    return answers


def _count_and_kill(below: str, at: int | None) -> Callable[[], int]:
    done = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        if event not in FILE_OPERATIONS or not any(below in str(argument) for argument in arguments):
            return
        done += 1
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    return lambda: done


def hidden(folder: Path) -> list[str]:
    """What a finished job must not leave behind: partial files and locks."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name not in (".gitignore",)
    )
