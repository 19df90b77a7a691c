"""SAELens' loaders: `SAE.from_pretrained` reads every format here, and says the right thing of some releases.

SAELens imports this package's side while it is imported itself, so that nothing here may import an
architecture before a layer is loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError
from sae_lens.loading import pretrained_sae_loaders
from torch import Tensor

from mxd_lens.architectures import saved
from mxd_lens.pretrained.formats.source import CHAT_PREFIX


def _find(*where: Any) -> Any:
    """A layer in files of another format; None where they are of none."""
    from mxd_lens.pretrained import released

    return released.find(*where)


def _loader_of(*where: Any) -> saved.Loader | None:
    found = _find(*where)
    return found.load if found else None


_READ_HERE = ("sae_lens", "sparsify")
"""SAELens' loaders whose place `load` takes: of repositories that are not in its directory, and sparsify's,
which transposes W_dec and drops the skip connection."""


def register_with_saelens() -> None:
    """Lets `SAE.from_pretrained` read every format, and repairs what SAELens says of some releases."""
    if _loader_of not in saved.other_formats:
        saved.other_formats.append(_loader_of)
    loaders = pretrained_sae_loaders.NAMED_PRETRAINED_SAE_LOADERS
    getters = pretrained_sae_loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS
    for name in _READ_HERE:
        if not hasattr(loaders[name], "replaced"):
            loaders[name] = _reading_other_formats(loaders[name], is_tried_first=name != "sae_lens")
    for name, repair in REPAIRS.items():
        if not hasattr(loaders[name], "replaced"):
            loaders[name] = _repairing(loaders[name], repair)
            getters[name] = _repairing_config(getters[name], repair)


def _reading_other_formats(theirs: Any, is_tried_first: bool) -> Any:
    def load(
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
        is_folder = Path(repo_id).expanduser().exists()
        if not is_tried_first and not is_folder:
            try:
                return theirs(repo_id, folder_name, device, force_download, cfg_overrides)
            except EntryNotFoundError as not_saelens:
                found = _find(repo_id, folder_name, None, force_download)
                if found is None:
                    raise not_saelens
        else:
            found = _find(repo_id, folder_name, None, force_download)
            if found is None:
                return theirs(repo_id, folder_name, device, force_download, cfg_overrides)
        return *found.load(repo_id, device, cfg_overrides), None

    load.replaced = theirs  # type: ignore[attr-defined]
    return load


def _repairing(theirs: Any, repair: Callable[[dict[str, Any]], None]) -> Any:
    def load(*args: Any, **kwargs: Any) -> Any:
        config, weights, sparsity = theirs(*args, **kwargs)
        repair(config)
        return config, weights, sparsity

    load.replaced = theirs  # type: ignore[attr-defined]
    return load


def _repairing_config(theirs: Any, repair: Callable[[dict[str, Any]], None]) -> Any:
    def config(*args: Any, **kwargs: Any) -> Any:
        made = theirs(*args, **kwargs)
        repair(made)
        return made

    return config


def _repair_gemma_scope_2(config: dict[str, Any]) -> None:
    """hook_mlp_in is the residual stream before the norm, and only where it is asked for; these layers read
    the norm's output."""
    hook = config.get("hook_name") or ""
    if hook.endswith(".hook_mlp_in"):
        config["hook_name"] = hook.removesuffix("hook_mlp_in") + "mlp.hook_in"
        config["exclude_special_tokens"] = True
        if str(config.get("model_name")).endswith("-it"):
            config["seqpos_slice"] = (CHAT_PREFIX, None)


def _repair_gemma_scope(config: dict[str, Any]) -> None:
    config["exclude_special_tokens"] = True


def _repair_mwhanna(config: dict[str, Any]) -> None:
    """SAELens says no BOS, and takes the training's batch size for the context size."""
    config.pop("context_size", None)
    config |= {"prepend_bos": True, "exclude_special_tokens": False, "seqpos_slice": (1, None)}


REPAIRS: dict[str, Callable[[dict[str, Any]], None]] = {
    "gemma_3": _repair_gemma_scope_2,
    "gemma_2_transcoder": _repair_gemma_scope,
    "mwhanna_transcoder": _repair_mwhanna,
}
"""What is wrong in the metadata that SAELens gives some releases, by the loader's name there."""
