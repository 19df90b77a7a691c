"""Checkpoint folders: complete or absent, and the older ones removed."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME, TRAINER_STATE_FILENAME
from safetensors import SafetensorError

PARTIAL = ".partial-"


def complete_checkpoints(folder: str | Path | None) -> list[Path]:
    """The checkpoints in `folder`, of one layer or of several, that were written to the end; oldest first."""
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
def atomic_checkpoint(final: Path, keep: int) -> Iterator[Path]:
    """A folder to write a checkpoint to, which gets its name when it is complete.

    The last `keep` complete ones beside it stay.

    Raises:
        OSError: it could not be written, for want of room for instance. Earlier ones are kept.
    """
    partial = final.with_name(f"{PARTIAL}{final.name}")
    try:
        yield partial
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, RuntimeError, SafetensorError) as e:
        shutil.rmtree(partial, ignore_errors=True)
        last = complete_checkpoints(final.parent)
        raise OSError(
            f"Could not write the checkpoint {final}: {e}. "
            f"The last complete one is {last[-1] if last else 'not there'}."
        ) from e
    for old in complete_checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
