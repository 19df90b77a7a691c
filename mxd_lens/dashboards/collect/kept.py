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
        folder: where; made when something is saved.
        identity: of the collection.

    Raises:
        ValueError: the folder holds what another collection has found.
    """

    def __init__(self, folder: Path | None, identity: RunIdentity) -> None:
        self.folder = folder
        self.identity = identity
        if folder is not None and (folder / IDENTITY_FILENAME).is_file():
            content = (folder / IDENTITY_FILENAME).read_text(encoding="utf-8")
            RunIdentity.from_dict(json.loads(content)).require(identity, folder.parent)

    def load(self, stage: str) -> dict[str, Tensor]:
        """What was kept of a stage; nothing if it has not begun."""
        file = None if self.folder is None else self.folder / f"{stage}.safetensors"
        return load_file(file) if file is not None and file.is_file() else {}

    def save(self, stage: str, state: dict[str, Tensor]) -> None:
        """Keep the state of a stage."""
        if self.folder is not None:
            if not (self.folder / IDENTITY_FILENAME).is_file():
                write_json(self.folder / IDENTITY_FILENAME, self.identity.to_dict())
            with atomic_file(self.folder / f"{stage}.safetensors") as partial:
                save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, partial)
