"""Releases by name: those that come with the package, and those that a user registers.

A release is a folder, or a Hugging Face repository, with one SAELens folder for each layer. SAELens
looks releases up in a directory of its own; here its directory gets ours as well, so that

    MxD.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp")
    SAE.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp")

are the same layer. The bundled releases need no network.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, logger
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.loading import pretrained_sae_loaders, pretrained_saes_directory
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mxd_lens.architectures.saved import read_folder, read_json
from mxd_lens.artifacts.tables import Table, Tabular

BUNDLED = Path(__file__).parent / "weights"
REPORT_FILENAME = "report.json"
"""A layer's report, as `mxd-lens demo` names it; where there are several, report-TEXT.json."""
LOADER = "mxd_lens"
"""What SAELens calls the loader of releases that are folders."""


@dataclass(frozen=True)
class PretrainedLayer:
    """One layer of a release. What is not known without a network is None."""

    release: str
    sae_id: str
    source: str
    """"bundled", a folder, or the Hugging Face repository."""
    architecture: str | None = None
    model_name: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None
    d_sae: int | None = None
    k: int | None = None
    n_parameters: int | None = None
    report: Mapping[str, Any] | None = None
    """The numbers of the `FaithfulnessReport` that lies beside the weights."""


class PretrainedLayers(Tabular, list[PretrainedLayer]):
    """Layers, which print as a table."""

    __repr__ = list.__repr__

    @property
    def tables(self) -> list[Table]:
        """Where the layers are from, how large they are, and how well they do."""
        origins, sizes, scores = [], [], []
        for layer in self:
            name = f"{layer.release}:{layer.sae_id}"
            weights = None if layer.n_parameters is None else f"{layer.n_parameters / 1e6:.1f} M"
            report = layer.report or {}
            origins.append([name, layer.model_name, layer.source])
            sizes.append([name, layer.architecture, layer.d_sae, layer.k, weights])
            scores.append(
                [name, *(report.get(key) for key in ("normalized_mse", "feature_share", "ce_loss_recovered"))]
            )
        return [
            Table(["layer", "model", "source"], origins, "Pretrained layers"),
            Table(["layer", "architecture", "experts", "K", "weights"], sizes, "Their sizes"),
            Table(["layer", "normalised MSE", "feature share", "loss recovered"], scores, "Their reports"),
        ]


@dataclass(frozen=True)
class Release:
    """A release, and where its layers are."""

    name: str
    source: str | Path
    """A folder, or a Hugging Face repository."""
    paths: Mapping[str, str]
    """sae_id -> the layer's folder in the source."""

    @property
    def is_local(self) -> bool:
        return isinstance(self.source, Path)

    def layers(self) -> list[PretrainedLayer]:
        """What is known of the layers without a network."""
        if not isinstance(self.source, Path):
            return [PretrainedLayer(self.name, sae_id, self.source) for sae_id in self.paths]
        source = "bundled" if self.source.is_relative_to(BUNDLED) else str(self.source)
        return [
            _describe(self.name, sae_id, source, self.source / path) for sae_id, path in self.paths.items()
        ]

    def lookup(self) -> PretrainedSAELookup:
        """As SAELens' directory has it."""
        layers = self.layers()
        reports = {layer.sae_id: layer.report or {} for layer in layers}
        models = {layer.model_name for layer in layers if layer.model_name}
        return PretrainedSAELookup(
            release=self.name,
            repo_id=str(self.source),
            model=", ".join(sorted(models)),
            conversion_func=LOADER if self.is_local else None,
            saes_map=dict(self.paths),
            expected_var_explained={
                sae_id: 1 - report.get("fraction_of_variance_unexplained", 0.0)
                for sae_id, report in reports.items()
            },
            expected_l0={sae_id: report.get("l0", 0.0) for sae_id, report in reports.items()},
            neuronpedia_id={},
            norm_scaling_factor={},
            config_overrides=None,
        )


_registered: dict[str, Release] = {}


def register_release(
    release: str, source: str | Path, saes: Mapping[str, str] | Iterable[str] | None = None
) -> None:
    """Gives a folder or a Hugging Face repository a name that `from_pretrained` knows.

        register_release("my-mxds", "runs/frontier/trained")
        MxD.from_pretrained("my-mxds", "layer12-mxd-k32-seed0")

    Args:
        release: the name; registering it again replaces it.
        source: a folder that holds SAELens folders, or `user/repo` on the hub.
        saes: the layers' folders in it by sae_id, or the folders, which are then their own ids. May be
            left out for a local folder: all there are, by their relative paths.

    Raises:
        FileNotFoundError: a local folder that does not exist, or a layer that is not in it.
        ValueError: the name is taken by SAELens or a bundled release, or no layers are named.
    """
    if release in _bundled() or release in _saelens_directory():
        raise ValueError(f"{release} is the name of a release that exists already: choose another.")
    if not release or "/" in release:
        raise ValueError(f"a release's name has no '/' and is not empty, got {release!r}.")
    folder = Path(source).expanduser()
    if folder.is_dir():
        found = _local_release(release, folder.resolve(), saes)
    elif saes is None or isinstance(source, Path) or source.count("/") != 1:
        raise FileNotFoundError(
            f"{source} is not a folder; a release on the hub is user/repo, with its layers named in saes."
        )
    else:
        found = Release(release, source, _paths(saes))
    if not found.paths:
        raise ValueError(f"{source} holds no layers: a layer is a folder with {SAE_CFG_FILENAME}.")
    _registered[release] = found
    directory.cache_clear()


def list_pretrained() -> PretrainedLayers:
    """Every layer that can be loaded by name: the bundled ones and those registered.

    No network is asked: of a release on the hub only the names are known.
    """
    releases = (*_bundled().values(), *_registered.values())
    return PretrainedLayers(layer for release in releases for layer in release.layers())


def find_release(sae: SAE[Any]) -> tuple[str, str] | None:
    """The release and sae_id of a layer that a release on this machine holds, weight for weight.

    Looks in the bundled releases and in folders that were registered; None where it is in none of them.
    """
    for release in (*_bundled().values(), *_registered.values()):
        if isinstance(release.source, Path):
            for sae_id, path in release.paths.items():
                if _holds(release.source / path, sae):
                    return release.name, sae_id
    return None


def _holds(folder: Path, sae: SAE[Any]) -> bool:
    """Whether a folder holds these weights, up to the rounding of the layer's dtype."""
    try:
        with safe_open(folder / SAE_WEIGHTS_FILENAME, framework="pt") as weights:
            parameters = dict(sae.named_parameters())
            return set(weights.keys()) == parameters.keys() and all(
                weights.get_slice(name).get_shape() == list(p.shape)
                and torch.equal(weights.get_tensor(name).to(p.dtype), p.detach().cpu())
                for name, p in parameters.items()
            )
    except (OSError, SafetensorError):
        return False


def _paths(saes: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    return dict(saes) if isinstance(saes, Mapping) else {path: path for path in saes}


def _local_release(name: str, folder: Path, saes: Mapping[str, str] | Iterable[str] | None = None) -> Release:
    if saes is None:
        configs = sorted(folder.rglob(SAE_CFG_FILENAME))
        saes = [config.parent.relative_to(folder).as_posix() for config in configs]
    paths = _paths(saes)
    missing = [path for path in paths.values() if not (folder / path / SAE_CFG_FILENAME).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no layer {', '.join(missing)}.")
    return Release(name, folder, paths)


@cache
def _bundled() -> dict[str, Release]:
    names = sorted({config.relative_to(BUNDLED).parts[0] for config in BUNDLED.rglob(SAE_CFG_FILENAME)})
    return {name: _local_release(name, BUNDLED / name) for name in names}


def _describe(release: str, sae_id: str, source: str, folder: Path) -> PretrainedLayer:
    try:
        return PretrainedLayer(release, sae_id, source, **_contents(folder))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as e:
        logger.warning("%s is not a layer that can be read (%s: %s).", folder, type(e).__name__, e)
        return PretrainedLayer(release, sae_id, source)


def _contents(folder: Path) -> dict[str, Any]:
    cfg = read_json(folder / SAE_CFG_FILENAME)
    metadata = cfg.get("metadata", {})
    names = {name: metadata.get(name) for name in ("model_name", "hook_name", "hook_name_out")}
    if not all(isinstance(name, str | None) for name in [*names.values(), cfg["architecture"]]):
        raise ValueError(f"{folder / SAE_CFG_FILENAME} has a name that is not text")
    if not all(isinstance(n, int | None) for n in (cfg["d_sae"], cfg.get("k"))):
        raise ValueError(f"{folder / SAE_CFG_FILENAME} has a size that is not a whole number")
    # A layer evaluated on several texts has a report for each.
    reports = [folder / REPORT_FILENAME, *sorted(folder.glob("report-*.json"))]
    report = next((path for path in reports if path.is_file()), None)
    with safe_open(folder / SAE_WEIGHTS_FILENAME, framework="pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return {
        "architecture": cfg["architecture"],
        **names,
        "d_sae": cfg["d_sae"],
        "k": cfg.get("k"),
        "n_parameters": sum(torch.Size(shape).numel() for shape in shapes),
        "report": _numbers(report) if report else None,
    }


def _numbers(report: Path) -> dict[str, float] | None:
    """The numbers in a report; None, with a warning, where it is damaged: the layer is still one."""
    try:
        content = read_json(report, "a report")
    except ValueError as e:
        logger.warning("%s The layer is listed without it.", e)
        return None
    return {
        name: value
        for name, value in content.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


# SAELens' side

_saelens_directory = pretrained_saes_directory.get_pretrained_saes_directory


@cache
def directory() -> dict[str, PretrainedSAELookup]:
    """SAELens' directory of releases, with the bundled and the registered ones in it."""
    ours = {**_bundled(), **_registered}
    return _saelens_directory() | {name: release.lookup() for name, release in ours.items()}


def config_from_folder(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,  # noqa: ARG001
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration of a layer in a release that is a folder, as SAELens' config getters."""
    config = read_json(Path(repo_id) / folder_name / SAE_CFG_FILENAME)
    return config | ({"device": device} if device else {}) | (cfg_overrides or {})


def load_from_folder(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,  # noqa: ARG001
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """A layer in a release that is a folder, as SAELens' loaders: config, weights, log sparsity."""
    folder = Path(repo_id) / folder_name
    cfg, weights = read_folder(folder, device, cfg_overrides)
    sparsity = folder / SPARSITY_FILENAME
    log_sparsity = load_file(sparsity, device=device)["sparsity"] if sparsity.is_file() else None
    return cfg, weights, log_sparsity


def register_with_saelens() -> None:
    """Lets SAELens find the releases here.

    Its directory is read from a large file when it is first asked for, so ours is put in its place
    rather than into it: importing this package should not wait for that.
    """
    pretrained_sae_loaders.NAMED_PRETRAINED_SAE_LOADERS[LOADER] = load_from_folder
    pretrained_sae_loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[LOADER] = config_from_folder
    name = _saelens_directory.__name__
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("sae_lens.") and getattr(module, name, None) is _saelens_directory:
            setattr(module, name, directory)
