"""Checkpoint folders: complete or absent, and the older ones removed."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_lens import logger
from sae_lens.constants import RUNNER_CFG_FILENAME, TRAINER_STATE_FILENAME

from mxd_lens.artifacts.files import atomic_folder


def complete_checkpoints(folder: str | Path | None) -> list[Path]:
    """Return the complete checkpoints in `folder`, of one layer or of several; oldest first."""
    if folder is None or not Path(folder).is_dir():
        return []
    tokens = {
        path: int(name[1])
        for path in Path(folder).iterdir()
        if (name := re.fullmatch("(?:final_)?([0-9]+)", path.name))
        and (path / RUNNER_CFG_FILENAME).is_file()
        and any(any(path.glob(f"{layer}{TRAINER_STATE_FILENAME}")) for layer in ("", "*/"))
    }
    return sorted(tokens, key=tokens.__getitem__)


@contextmanager
def atomic_checkpoint(final: Path, keep: int, reserve: int = 0) -> Iterator[Path]:
    """Yield a folder to write a checkpoint to, which gets its name when it is complete.

    The last `keep` complete ones beside it stay. Where the disk would have less than `reserve` bytes left
    beside a checkpoint as large as the last one, older ones are removed first.

    Raises:
        OSError: it could not be written, for want of room for instance. Earlier ones are kept.
    """
    try:
        _make_room(final.parent, reserve)
        with atomic_folder(final) as partial:
            try:
                yield partial
            except RuntimeError as e:  # what torch.save raises where the disk is full
                raise OSError(str(e).partition("\n")[0]) from e
    except OSError as e:
        last = complete_checkpoints(final.parent)
        raise OSError(
            f"{str(e).rstrip('.')}. "
            + (f"The last complete checkpoint is {last[-1]}." if last else "There is no complete checkpoint.")
        ) from e
    remove_old(final.parent, keep)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all complete checkpoints in `folder` but the newest `keep`."""
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _make_room(folder: Path, reserve: int) -> None:
    """Leave room for the trained layer: raises OSError where a checkpoint would take it."""
    found = complete_checkpoints(folder)
    if not found:
        return
    size = sum(file.stat().st_size for file in found[-1].rglob("*") if file.is_file())
    if _free(folder) < size + reserve and len(found) > 1:
        logger.warning("The disk is nearly full: only the newest checkpoint in %s stays.", folder)
        remove_old(folder, 1)
    if _free(folder) < size + reserve:
        raise OSError(
            f"Could not write another checkpoint to {folder}: {_free(folder):,} bytes are free, and "
            f"{size + reserve:,} are needed for it and for the trained layer"
        )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
