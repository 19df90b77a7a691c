"""Where released files lie: in a folder, or in a repository of the Hugging Face hub."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
import yaml
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxd_lens.architectures.saved import FLOATS, few, hub_errors, shown

CHAT_PREFIX = 4
"""Positions of <bos><start_of_turn>user and a new line, at the start of every chat of Gemma 3."""

MAX_CONFIG_BYTES = 2**22
"""Of a configuration file; the largest released one has some kilobytes."""


class Source(Protocol):
    """Files by their path relative to a release's root."""

    location: str
    """What a person calls the release: a folder, or `user/repo`."""

    def has(self, path: str) -> bool:
        """Whether there is a file at this path."""
        ...

    def fetch(self, path: str) -> Path:
        """The file on this machine. Raises FileNotFoundError where there is none."""
        ...

    def files(self) -> list[str]:
        """The paths of all files."""
        ...


class Folder:
    """A release in a local folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.location = str(self.root)

    def has(self, path: str) -> bool:
        return (self.root / path).is_file()

    def fetch(self, path: str) -> Path:
        if not self.has(path):
            raise FileNotFoundError(f"{self.root} holds no {path}.")
        return self.root / path

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())


class Repository:
    """A release in a repository of the Hugging Face hub; its files are of one revision."""

    def __init__(self, repo_id: str, revision: str | None = None, force_download: bool = False) -> None:
        self.location = repo_id
        self.revision = revision
        self.force_download = force_download

    def has(self, path: str) -> bool:
        return path in self._listing

    def fetch(self, path: str) -> Path:
        if not self.has(path):
            raise FileNotFoundError(f"{self.location} holds no {path}.")
        with hub_errors(self.location):
            return Path(
                hf_hub_download(
                    self.location, path, revision=self.revision, force_download=self.force_download
                )
            )

    def files(self) -> list[str]:
        return sorted(self._listing)

    @cached_property
    def _listing(self) -> frozenset[str]:
        """The files of the repository; without a network, those in the cache."""
        with hub_errors(self.location):
            try:
                return frozenset(HfApi().list_repo_files(self.location, revision=self.revision))
            except (HTTPError, OfflineModeIsEnabled):
                cached = snapshot_download(self.location, revision=self.revision, local_files_only=True)
                return frozenset(Folder(cached).files())


# Files as they are, with errors that name them


def read_config(file: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file.

    Raises:
        ValueError: it is too large for a configuration, cannot be read, or holds something else.
    """
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MAX_CONFIG_BYTES:,} bytes")
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if file.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        reason = str(e).partition("\n")[0]
        raise ValueError(f"{file} is not a configuration ({type(e).__name__}: {reason}).") from e
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{file} is not a configuration: it holds a {type(content).__name__}.")
    return content


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, as they are stored.

    Raises:
        ValueError: it is truncated, or is not a safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} is truncated or not a safetensors file ({e}).") from e


def safetensors_names(file: Path) -> frozenset[str]:
    """The names of the tensors in a safetensors file; empty where it is none."""
    try:
        with safe_open(file, framework="pt") as weights:
            return frozenset(weights.keys())
    except (SafetensorError, OSError):
        return frozenset()


def check_shapes(file: Path, weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a file holds exactly these weights, as finite floating-point numbers.

    Raises:
        ValueError: it does not; all that is wrong is listed.
    """
    wrong = []
    for name in [*expected, *sorted(weights.keys() - expected.keys())]:
        if name not in weights:
            wrong.append(f"{name} is missing")
        elif name not in expected:
            wrong.append(f"{shown(name)} was not expected")
        elif tuple(weights[name].shape) != expected[name]:
            wrong.append(f"{name} has the shape {tuple(weights[name].shape)}, expected {expected[name]}")
        elif not weights[name].is_floating_point() or weights[name].dtype.itemsize < 2:
            wrong.append(f"{name} holds {weights[name].dtype}, expected one of {', '.join(FLOATS)}")
        elif not torch.linalg.vector_norm(weights[name].float(), ord=float("inf")).isfinite():
            wrong.append(f"{name} holds values that are not finite")
    if wrong:
        raise ValueError(f"{file} does not hold the weights of this format: {few(wrong)}.")


def width_of(file: Path, weights: Mapping[str, Tensor], name: str, dim: int = 0) -> int:
    """The size of one dimension of a weight. Raises ValueError where the weight has no such dimension."""
    weight = weights.get(name)
    if weight is None or weight.ndim <= dim:
        got = "is missing" if weight is None else f"has the shape {tuple(weight.shape)}"
        raise ValueError(f"{file} does not hold the weights of this format: {name} {got}.")
    return weight.shape[dim]


def joined(*parts: str) -> str:
    """Parts of a path in a release, as one; "" is the root."""
    path = PurePosixPath(*[part for part in parts if part])
    return "" if str(path) == "." else str(path)
