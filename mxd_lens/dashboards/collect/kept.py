"""What a collection under way has found so far, kept in a folder so that a killed one resumes."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mxd_lens.artifacts.files import atomic_file, write_json
from mxd_lens.artifacts.identity import RunIdentity

IDENTITY_FILENAME = "identity.json"


class Kept:
    """Tensors by the name of a stage. Without a folder nothing is kept.

    Args:
        folder: where; made if it does not exist.
        identity: of the collection.

    Raises:
        ValueError: the folder holds what another collection has found.
    """

    def __init__(self, folder: Path | None, identity: RunIdentity) -> None:
        self.folder = folder
        if folder is None:
            return
        file = folder / IDENTITY_FILENAME
        if file.is_file():
            known = RunIdentity.from_dict(json.loads(file.read_text(encoding="utf-8")))
            known.require(identity, folder.parent)
        else:
            write_json(file, identity.to_dict())

    def load(self, stage: str) -> dict[str, Tensor]:
        """What was kept of a stage; nothing if it has not begun."""
        file = None if self.folder is None else self.folder / f"{stage}.safetensors"
        return load_file(file) if file is not None and file.is_file() else {}

    def save(self, stage: str, state: dict[str, Tensor]) -> None:
        """Keep the state of a stage."""
        if self.folder is not None:
            with atomic_file(self.folder / f"{stage}.safetensors") as partial:
                save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, partial)
