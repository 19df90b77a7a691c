"""Loading a layer whose architecture is not known beforehand."""

from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.loading import pretrained_saes_directory
from sae_lens.registry import SAE_CLASS_REGISTRY

from mxd_lens.architectures.base import PairedTranscoder
from mxd_lens.architectures.saved import hub_errors, locate, read_folder, read_json


def load_layer(
    release: str | Path, sae_id: str | None = None, device: str = "cpu", dtype: str | None = None
) -> SAE[Any]:
    """Loads an MxD, a transcoder or an SAE, whatever its architecture, and checks the folder strictly.

    `SAE.load_from_disk` does the same for folders that nothing is wrong with. Here a damaged folder, or one
    of another kind, ends in one error that names the file.

    Args:
        release: a folder, a release that SAELens or this package knows, or `user/repo` on the hub.
        sae_id: which layer of it; of a folder, the subfolder.
        device: where to put the layer.
        dtype: of the layer. None: as it was saved.

    Raises:
        FileNotFoundError: there is no such folder, release or layer.
        ValueError: the folder is not a saved layer, or is damaged.
        ConnectionError: the hub cannot be reached, and the layer is not in its cache.
    """
    release_name = str(release)
    if not Path(release).expanduser().exists():
        if sae_id is None:
            raise FileNotFoundError(f"{release} is not a folder. A layer of a release needs its sae_id too.")
        known = pretrained_saes_directory.get_pretrained_saes_directory()
        if release_name in known or "/" not in release_name:
            if release_name in known and sae_id not in known[release_name].saes_map:
                ids = ", ".join(list(known[release_name].saes_map)[:5])
                raise FileNotFoundError(f"{release} has no layer {sae_id!r}. It has {ids}, ...")
            with hub_errors(release_name):
                return SAE.from_pretrained(release_name, sae_id, device, dtype or "float32")
    folder, reader = locate(release, sae_id)
    if reader is not read_folder:
        return SAE.load_from_disk(folder, device, dtype, converter=reader)
    if (folder / SAE_CFG_FILENAME).is_file():
        architecture = read_json(folder / SAE_CFG_FILENAME).get("architecture")
        classes = SAE_CLASS_REGISTRY.get(architecture) if isinstance(architecture, str) else None
        if classes and issubclass(classes[0], PairedTranscoder):
            return classes[0].load_from_disk(folder, device=device, dtype=dtype)
    try:
        return SAE.load_from_disk(folder, device, dtype, converter=read_folder)
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{folder} is not a saved layer that can be read ({type(e).__name__}: {e}).") from e
