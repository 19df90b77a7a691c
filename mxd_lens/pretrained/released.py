"""Layers in other libraries' files: found by what the files are, read, converted, described.

    sae = TopKSkipTranscoder.from_pretrained("EleutherAI/skip-transcoders", "layers.11.mlp")
    sae = SAE.from_pretrained("user/a-circuit-tracer-set", "layer_5")
    convert(".../layer_19/width_16k/average_l0_15", "gemma-layer-19")

`from_pretrained` and `load_layer` ask here where a folder or repository is not one of SAELens' format. Each
format is a module of `formats/`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import get_sae_class
from torch import Tensor

from mxd_lens.architectures import saved
from mxd_lens.artifacts.files import atomic_folder
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.pretrained.formats import (
    circuit_tracer,
    dunefsky,
    gemma_scope,
    gemma_scope_2,
    llamascopium,
    paper,
    sparsify,
)
from mxd_lens.pretrained.formats.checkpoint_file import read_checkpoint_file
from mxd_lens.pretrained.formats.foreign import ForeignLayer, convention_of
from mxd_lens.pretrained.formats.source import Folder, Repository, Source, joined
from mxd_lens.pretrained.load import load_layer

Loaded = tuple[dict[str, Any], dict[str, Tensor]]
"""A configuration and weights, as SAELens' loaders give them."""


class Format(Protocol):
    """A module of `formats/`."""

    NAME: str

    def recognises(self, source: Source, layer: str) -> bool: ...

    def layers(self, source: Source) -> list[str]: ...

    def read(self, source: Source, layer: str) -> ForeignLayer: ...


FORMATS: tuple[Any, ...] = (sparsify, llamascopium, gemma_scope_2, gemma_scope, circuit_tracer, dunefsky)
"""Every format, in the order in which they are tried; no two recognise the same files."""
WRITERS: dict[str, Callable[..., Path]] = {
    circuit_tracer.NAME: circuit_tracer.write,
    sparsify.NAME: sparsify.write,
}
"""The formats that are written beside SAELens' own."""
SAELENS = "SAELens"
FILE_OF_A_FOLDER = (gemma_scope.WEIGHTS, gemma_scope_2.WEIGHTS, sparsify.WEIGHTS, SAE_WEIGHTS_FILENAME)
"""Files that mean the folder they are in."""


@dataclass(frozen=True)
class Found:
    """A layer in files of another format."""

    source: Source
    layer: str
    format: Any

    def load(
        self,
        path: str | Path,  # noqa: ARG002
        device: str = "cpu",
        cfg_overrides: dict[str, Any] | None = None,
    ) -> Loaded:
        """The configuration and the weights; in SAELens' words, a disk loader."""
        overrides = dict(cfg_overrides or {})
        if self.format is dunefsky and dunefsky.is_the_papers(self._checkpoint()):
            layer = paper.load_reference_checkpoint(
                self.source.fetch(self.layer), device, overrides.get("dtype")
            )
            return layer.cfg.to_dict() | overrides, dict(layer.state_dict())
        read: ForeignLayer = self.format.read(self.source, self.layer)
        return read.loaded(device, overrides.get("dtype"), overrides)

    @property
    def format_name(self) -> str:
        if self.format is dunefsky and dunefsky.is_the_papers(self._checkpoint()):
            return "the paper's code"
        return str(self.format.NAME)

    def _checkpoint(self) -> Any:
        return read_checkpoint_file(self.source.fetch(self.layer))


def open_source(
    release: str | Path,
    sae_id: str | None = None,
    revision: str | None = None,
    force_download: bool = False,
) -> tuple[Source, str] | None:
    """The files of a release, and the layer's path in them; None where there is neither folder nor
    repository of that name."""
    path = Path(release).expanduser()
    if path.is_file():
        layer = "" if path.name in FILE_OF_A_FOLDER else path.name
        return Folder(path.parent), layer
    if path.is_dir():
        return Folder(path), joined(sae_id or "")
    if isinstance(release, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", release) and not path.exists():
        return Repository(release, revision, force_download), joined(sae_id or "")
    return None


def find(
    release: str | Path,
    sae_id: str | None = None,
    revision: str | None = None,
    force_download: bool = False,
) -> Found | None:
    """The layer of a release in another library's files; None where they are of no known format.

    Raises:
        FileNotFoundError: the files are of a known format, and there is no such layer; those there are named.
        PermissionError, ConnectionError: as `from_pretrained`.
    """
    opened = open_source(release, sae_id, revision, force_download)
    if opened is None:
        return None
    source, layer = opened
    for known in FORMATS:
        if known.recognises(source, layer):
            return Found(source, layer, known)
    if layers := layers_of(source):
        what = f"has no layer {layer!r}" if layer else "holds several layers"
        raise FileNotFoundError(
            f"{source.location} {what}: name one by its sae_id. It has {saved.few(layers)}."
        )
    return None


def layers_of(source: Source) -> list[str]:
    """The names of the layers that a release holds in other libraries' files."""
    return [layer for known in FORMATS for layer in known.layers(source)]


# Converting


def convert(
    source: str | Path,
    folder: str | Path,
    sae_id: str | None = None,
    to: str = SAELENS,
    device: str = "cpu",
    dtype: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> SAE[Any]:
    """Writes a layer of any format in another, and returns it.

    Args:
        source: a folder, a file, a release, or `user/repo` on the hub.
        folder: where to write it; it must be new or empty.
        sae_id: which layer of the release.
        to: "SAELens", "circuit-tracer" or "sparsify".
        device, dtype: where the layer is put, and its dtype. None: that of the file.
        metadata: settings that replace or complete what the file says, as hook_name, hook_name_out and
            model_name.

    Raises:
        FileExistsError: the folder is not empty.
        FileNotFoundError, ValueError: the layer cannot be read, or `to` cannot express it.
    """
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise FileExistsError(f"{folder} is not empty. Name a new folder.")
    if to != SAELENS and to not in WRITERS:
        raise ValueError(f"to must be one of {', '.join([SAELENS, *WRITERS])}, got {to!r}.")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder, and nothing is overwritten: name another.")
    if to == SAELENS and not metadata and _is_the_papers(source, sae_id):
        # Its sparsity lies in a second file.
        return paper.convert(source, folder, device, dtype)
    sae = load_layer(source, sae_id, device, dtype)
    for name, value in (metadata or {}).items():
        sae.cfg.metadata[name] = value
    with atomic_folder(folder) as partial:
        if to == SAELENS:
            sae.save_model(partial)
        else:
            WRITERS[to]([sae], partial)
    return sae


def _is_the_papers(source: str | Path, sae_id: str | None) -> bool:
    path = Path(source).expanduser()
    if sae_id is not None or not path.is_file() or not path.name.endswith(dunefsky.SUFFIXES):
        return False
    return dunefsky.is_the_papers(read_checkpoint_file(path))


# Describing


@dataclass(frozen=True)
class SourceDescription(Tabular):
    """What a folder, a file or a repository holds."""

    location: str
    format: str | None
    """None where it is of no known format."""
    layers: list[str]
    """The layers in it, where it is a whole release."""
    config: Mapping[str, Any] | None
    """The configuration of the layer, where it is one."""

    @property
    def title(self) -> str:
        return f"{self.location}: {self.format or 'of no format that is known here'}"

    @property
    def columns(self) -> list[str]:
        return ["what", "value"]

    @property
    def rows(self) -> list[list[Cell]]:
        if self.config is None:
            return [["layers", ", ".join(self.layers) or "none"]]
        config = dict(self.config)
        known = dict(config.pop("metadata", {}))
        hook = known.get("hook_name")
        rows: list[list[Cell]] = [
            ["class", _class_name(config)],
            ["language model", known.get("model_name") or "not said"],
            ["reads", f"{hook or 'not said'}{_convention(hook)}"],
            ["writes", known.get("hook_name_out") or "not said"],
            [
                "widths",
                f"{config['d_in']} to {config.get('d_out', config['d_in'])}, {config['d_sae']:,} features",
            ],
            ["active on a token", str(config["k"]) if config.get("k") else "as many as pass the threshold"],
            ["positions left out", positions_in_words(known)],
            ["BOS before the text", "yes" if known.get("prepend_bos") else "no"],
            ["dtype", config.get("dtype")],
        ]
        for name in ("context_size", "stated_l0", "scale_folded", "dataset_path"):
            if known.get(name) is not None:
                rows.append([name.replace("_", " "), str(known[name])])
        return rows


def _class_name(config: Mapping[str, Any]) -> str:
    made = get_sae_class(str(config["architecture"]))[0]
    return f"{made.__module__.split('.')[0]}.{made.__name__}"


def _convention(hook: str | None) -> str:
    name = convention_of(hook)
    return f" ({name})" if name else ""


def positions_in_words(metadata: Mapping[str, Any]) -> str:
    """Which positions a layer's training left out, for a person."""
    special, positions = metadata.get("exclude_special_tokens"), metadata.get("seqpos_slice")
    said = []
    if positions and positions[0]:
        said.append(f"the first {positions[0]}" if positions[0] > 1 else "the first")
    if special:
        said.append("special tokens" if special is True else f"the tokens {special}")
    return " and ".join(said) or "none"


def inspect_source(source: str | Path, sae_id: str | None = None) -> SourceDescription:
    """What a folder, a file or a repository is: its format, and its layers or its one layer's settings.

    Raises:
        FileNotFoundError: there is no such folder, file or repository.
        ValueError: a file in it is damaged.
    """
    opened = open_source(source, sae_id)
    if opened is None:
        raise FileNotFoundError(f"{source} is not a folder, a file or user/repo on the Hugging Face hub.")
    files, layer = opened
    location = joined(files.location, layer) if layer else files.location
    if files.has(joined(layer, SAE_CFG_FILENAME)) and files.has(joined(layer, SAE_WEIGHTS_FILENAME)):
        config = saved.read_json(files.fetch(joined(layer, SAE_CFG_FILENAME)))
        if "sae_type" not in config and "architecture" in config:
            return SourceDescription(location, SAELENS, [], config)
    for known in FORMATS:
        if known.recognises(files, layer):
            found = Found(files, layer, known)
            return SourceDescription(location, found.format_name, [], found.load(location)[0])
    formats = {known.NAME: layers for known in FORMATS if (layers := known.layers(files))}
    own = sorted(
        joined(str(PurePosixPath(path).parent))
        for path in files.files()
        if PurePosixPath(path).name == SAE_WEIGHTS_FILENAME
        and files.has(joined(str(PurePosixPath(path).parent), SAE_CFG_FILENAME))
    )
    if own:
        formats[SAELENS] = own
    layers = [layer for names in formats.values() for layer in names]
    return SourceDescription(location, " and ".join(formats) or None, layers, None)
