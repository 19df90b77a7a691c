"""Saved layers: folders on disk, or in a repository of the Hugging Face hub.

A saved layer is a folder with cfg.json and sae_weights.safetensors, as SAELens writes it. It may come from
anywhere: nothing in it is executed, and what is no layer ends in one error that names the file.
"""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from sae_lens.constants import DTYPE_MAP, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import load_safetensors_weights
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")
"""What weights are stored as, in safetensors' names."""


def read_folder(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A saved layer's configuration and weights; in SAELens' words, a disk loader.

    Raises:
        FileNotFoundError: the folder, its cfg.json or its weights are missing.
        ValueError: one of them cannot be read, or is not what its name says.
    """
    folder = Path(path)
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: a saved layer is a folder with {SAE_CFG_FILENAME} "
                f"and {SAE_WEIGHTS_FILENAME}."
            )
    config = read_json(folder / SAE_CFG_FILENAME)
    for name, known in (("architecture", SAE_CLASS_REGISTRY), ("dtype", DTYPE_MAP)):
        if config.get(name) not in list(known):
            raise ValueError(
                f"{folder / SAE_CFG_FILENAME} is not the configuration of a layer: its {name} is "
                f"{reprlib.repr(config.get(name))}, not one of {', '.join(known)}."
            )
    config |= {"device": device, **(cfg_overrides or {})}
    return config, read_weights(folder / SAE_WEIGHTS_FILENAME, device, str_to_dtype(config["dtype"]))


def read_json(file: Path, what: str = "the configuration of a layer") -> dict[str, Any]:
    """The JSON object in `file`. Raises ValueError where there is none, or one that is ambiguous."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not {what} ({type(e).__name__}: {e}).") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not {what}: it holds a {type(content).__name__}, not an object.")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [shown(name) for name, times in Counter(name for name, _ in pairs).items() if times > 1]:
        raise ValueError(f"named twice: {few(twice)}")
    return dict(pairs)


def read_weights(file: Path, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises ValueError where it is none, or they are no floats."""
    try:
        with safe_open(file, framework="pt", device=device) as weights:
            stored = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        if foreign := {name: kind for name, kind in stored.items() if kind not in FLOATS}:
            raise ValueError(
                f"{file} holds weights that are no floating-point numbers: "
                + few([f"{shown(name)} is {kind}" for name, kind in foreign.items()])
                + f". Expected one of {', '.join(FLOATS)}."
            )
        return load_safetensors_weights(file, device, dtype)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} is truncated or not a safetensors file ({e}).") from e


def shown(name: str) -> str:
    """A name that a file gives something, short and on one line."""
    return name if re.fullmatch(r"\w{1,60}", name) else reprlib.repr(name)


def few(faults: list[str], at_most: int = 12) -> str:
    """The first of many faults, and how many more there are."""
    more = f"; and {len(faults) - at_most} more" if len(faults) > at_most else ""
    return "; ".join(faults[:at_most]) + more


# Where a layer is


class NoSuchLayerError(FileNotFoundError):
    """A repository has no such layer in SAELens' format."""


Loader = Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]
"""What reads a layer from a path; in SAELens' words, a disk loader."""

other_formats: list[Callable[[str | Path, str | None, str | None, bool], Loader | None]] = []
"""Finders of layers in other libraries' files, from a release, a sae_id, a revision, and whether to download
again; `mxd_lens.pretrained.released` adds its own."""


def locate(
    release: str | Path, sae_id: str | None, revision: str | None = None, force_download: bool = False
) -> tuple[Path, Loader]:
    """Where a layer is, in a folder or on the hub, and what reads it.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `download_layer`.
    """
    check_revision(revision)
    folder = Path(release).expanduser() / (sae_id or "")
    if all((folder / name).is_file() for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)):
        config = read_json(folder / SAE_CFG_FILENAME)
        if "architecture" in config:
            return folder, read_folder
    if Path(release).expanduser().exists():
        return folder, _other_loader(release, sae_id, revision, force_download) or read_folder
    try:
        return download_layer(str(release), sae_id or "", revision, force_download), read_folder
    except NoSuchLayerError:
        loader = _other_loader(release, sae_id, revision, force_download)
        if loader is None:
            raise
        return folder, loader


def _other_loader(*where: Any) -> Loader | None:
    return next((loader for find in other_formats if (loader := find(*where)) is not None), None)


# The Hugging Face hub


def check_sae_id(sae_id: str) -> None:
    """Raises ValueError where `sae_id` cannot be a layer's folder in a repository."""
    a_name = r"[\w+=(\[][^/\\:*?\"'`<>|{}]*(?<![ .])"
    if not re.fullmatch(rf"{a_name}(/{a_name})*", sae_id) or not sae_id.isprintable() or len(sae_id) > 200:
        raise ValueError(
            f"sae_id must be the name of a folder in the repository, such as 'layer12' or "
            f"'blocks.12/mxd-k32', got {reprlib.repr(sae_id)}."
        )


def check_revision(revision: str | None) -> None:
    """Raises ValueError where `revision` cannot be a branch, tag or commit: it becomes part of a path."""
    if revision is not None and (
        not re.fullmatch(r"[A-Za-z0-9_][\w./-]{0,199}", revision, re.ASCII)
        or any(part in ("", ".", "..") for part in revision.split("/"))
    ):
        raise ValueError(
            f"revision must be the name of a branch, a tag or a commit, such as 'main', got "
            f"{reprlib.repr(revision)}."
        )


def layers_among(paths: list[str]) -> list[str]:
    """The sae_ids of the layers in a repository that holds the files `paths`."""
    folders = {str(PurePosixPath(path).parent) for path in paths if path.endswith(f"/{SAE_CFG_FILENAME}")}
    return sorted(folder for folder in folders if f"{folder}/{SAE_WEIGHTS_FILENAME}" in paths)


def download_layer(
    repo_id: str, sae_id: str, revision: str | None = None, force_download: bool = False
) -> Path:
    """The folder of a layer of the hub, in the hub's cache; its files are of one commit.

    Raises:
        FileNotFoundError: there is no such repository, revision, or layer in it; its layers are named.
        PermissionError: the token may not read it.
        ConnectionError: the hub cannot be reached, or HF_HUB_OFFLINE is set, and it is not in the cache.
        ValueError: `repo_id`, `sae_id` or `revision` cannot be a name.
    """
    check_sae_id(sae_id)
    check_revision(revision)
    with hub_errors(repo_id):
        try:
            config = hf_hub_download(
                repo_id, f"{sae_id}/{SAE_CFG_FILENAME}", revision=revision, force_download=force_download
            )
            folder = Path(config).parent
            commit = folder.parents[len(PurePosixPath(sae_id).parts) - 1].name
            hf_hub_download(
                repo_id, f"{sae_id}/{SAE_WEIGHTS_FILENAME}", revision=commit, force_download=force_download
            )
        except LocalEntryNotFoundError:
            raise
        except ValueError as e:
            if force_download and e.__cause__ is not None:  # it hides why it could not
                raise e.__cause__  # noqa: B904
            raise
        except EntryNotFoundError as e:
            known = layers_among(HfApi().list_repo_files(repo_id, revision=revision))
            raise NoSuchLayerError(
                f"{repo_id} has no layer {sae_id!r}. "
                + (f"Its layers: {few(known)}." if known else "There is no layer in it.")
            ) from e
    return folder


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """What the hub's client raises, as one sentence for a person; the cause stays chained."""
    hub = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as e:
        raise PermissionError(f"{repo_id} is gated: ask for access at {hub}/{repo_id}.") from e
    except RepositoryNotFoundError as e:
        raise FileNotFoundError(
            f"{hub} has no repository {repo_id}, or it is private and the token (hf auth login, or HF_TOKEN) "
            "may not see it."
        ) from e
    except RevisionNotFoundError as e:
        raise FileNotFoundError(f"{repo_id} has no such revision: {e.response.url}.") from e
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status == 401:
            raise PermissionError(f"{hub} does not know this token: renew it with hf auth login.") from e
        if status == 403:
            raise PermissionError(f"The token has no right to do this to {repo_id}.") from e
        raise ConnectionError(f"{hub} answered {status} about {repo_id}: {e.server_message or e}") from e
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        reason = str(e.__cause__ or e).partition("\n")[0]
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached ({reason})"
        raise ConnectionError(f"{why}, and the cache has not all of {repo_id} that is needed.") from e
