"""The layers, models and texts that a command is given by name: checked first, loaded when it runs."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

import mxd_lens
from mxd_lens.cli.config_fields import package_file
from mxd_lens.cli.options import best_device, checked

BUNDLED = Path(mxd_lens.__file__).parent / "pretrained" / "weights"
SMOLLM2_SHAPE = {"num_hidden_layers": 30, "hidden_size": 576}
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
FOREIGN = (".safetensors", ".npz", ".pt", ".pkl", ".gz")
"""Files of other libraries' layers; which of them is a layer, loading it says."""


@dataclass(frozen=True)
class LayerSource:
    """Where a layer is: a folder, or a release and an id in it."""

    given: str
    """As it was written, without NAME=."""
    name: str
    """What tables call it."""
    release: str
    """A folder or a release."""
    sae_id: str = ""
    """Of a folder, the subfolder; may be empty."""

    @classmethod
    def parse(cls, written: str) -> "LayerSource":
        """The layer that FOLDER or RELEASE:SAE_ID means, with NAME= before it or not.

        Raises:
            ValueError: the folder holds no layer, or there is no such release. Releases of SAELens and
                repositories on the hub are looked up when the layer is loaded.
        """
        exists = bool(written) and Path(written).expanduser().exists()
        name, equals, where = ("", "", written) if exists else written.rpartition("=")
        if equals and not name:
            raise ValueError(f"{written!r} has no name before the =. Write NAME=FOLDER.")
        path = Path(where).expanduser()
        if where and path.exists():
            if path.is_dir():
                check_layer_folder(path)
            return cls(where, name or path.resolve().name, str(path))
        release, colon, sae_id = where.partition(":")
        if not colon or re.match(r"[./~\\]", where):
            ids = bundled_ids(where)
            said = (
                f"Write {where}:{ids[0]}." if ids else f"A layer of a release is RELEASE:SAE_ID.{near(where)}"
            )
            raise ValueError(f"There is no folder {where or written!r}. {said}")
        if release and Path(release).expanduser().is_dir():
            if (Path(release).expanduser() / sae_id).is_dir():
                check_layer_folder(Path(release).expanduser() / sae_id)
            return cls(where, name or where, release, sae_id)
        check_release(release, sae_id)
        return cls(where, name or where, release, sae_id)

    @cached_property
    def folder(self) -> Path | None:
        """The layer's folder, if it is on this machine and not in the hub's cache."""
        for root in (Path(self.release).expanduser(), BUNDLED / self.release):
            if (root / self.sae_id / CONFIG).is_file():
                return root / self.sae_id
        return None

    @property
    def n_experts(self) -> int | None:
        """The layer's experts, if its folder says so."""
        try:
            return int(json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))["d_sae"])  # type: ignore[operator]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None  # loading it will say what is wrong

    @property
    def origin(self) -> str | tuple[str, str]:
        """What `from_pretrained` takes: a folder, or a release and an id."""
        in_release = self.folder is None or self.folder.is_relative_to(BUNDLED)
        return (self.release, self.sae_id) if in_release else str(self.folder)

    def load(self, device: str) -> Any:
        """The layer itself, whatever its architecture; a damaged folder ends in one error."""
        from mxd_lens import load_layer

        return load_layer(self.release, self.sae_id or None, best_device(device))


def check_layer_folder(folder: Path) -> None:
    """Raises ValueError where a folder holds no layer of SAELens' format nor files of another."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    foreign = len(missing) == 2 and any(file.suffix in FOREIGN for file in folder.iterdir())
    if missing and not foreign:
        found = sorted(config.parent.relative_to(folder).as_posix() for config in folder.glob(f"*/{CONFIG}"))
        layers = f" Its subfolders with a layer: {', '.join(found[:8])}." if found else ""
        raise ValueError(f"{folder} is not a saved layer: it has no {' and no '.join(missing)}.{layers}")


def bundled_ids(release: str) -> list[str]:
    """The layers of a release that comes with the package."""
    return sorted(config.parent.name for config in (BUNDLED / release).glob(f"*/{CONFIG}")) if release else []


def release_names() -> list[str]:
    """The releases known without a network: the bundled ones, and SAELens' by the lines of its directory."""
    listed = package_file("sae_lens", "pretrained_saes.yaml")
    saelens = re.findall(r"^([\w.-]+):", listed.read_text(encoding="utf-8"), re.M) if listed.is_file() else []
    return [*(folder.name for folder in BUNDLED.iterdir()), *saelens]


def check_release(release: str, sae_id: str) -> None:
    """Raises ValueError where there is no such release, or no such layer in a bundled one."""
    if ids := bundled_ids(release):
        if sae_id not in ids:
            raise ValueError(f"{release} has no layer {sae_id!r}. It has {', '.join(ids)}.")
    elif "/" not in release and release not in release_names():
        raise ValueError(f"There is no release {release!r}.{near(release)}")


def near(name: str) -> str:
    """The releases with a similar name."""
    found = difflib.get_close_matches(name.partition(":")[0], release_names(), n=3)
    return f" Near: {', '.join(found)}." if found else " `mxd-lens pretrained` lists the releases here."


def one_layer(written: str) -> str:
    LayerSource.parse(written)
    return written


def several_layers(written: list[str]) -> list[str]:
    """Checks layers that are told apart by their names."""
    names = [LayerSource.parse(layer).name for layer in written]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two of these layers have the name {', '.join(twice)}. Write NAME=FOLDER.")
    return written


LAYER = "The folder of a saved layer, or RELEASE:SAE_ID. NAME= before it gives it a name."
Layer = Annotated[str, typer.Argument(help=LAYER, callback=checked(one_layer))]
Layers = Annotated[
    list[str],
    typer.Argument(
        help="Each the folder of a saved layer, or RELEASE:SAE_ID, with NAME= before it if it needs a name.",
        callback=checked(several_layers),
    ),
]


def load_layers(written: Sequence[str], device: str) -> dict[str, Any]:
    """Layers by their names."""
    sources = [LayerSource.parse(layer) for layer in written]
    return {source.name: source.load(device) for source in sources}


def check_expert(source: LayerSource, experts: Sequence[int], option: str) -> None:
    """Raises typer.BadParameter where a layer has no such expert."""
    n = source.n_experts
    if n is not None and (missing := [expert for expert in experts if expert >= n]):
        raise typer.BadParameter(
            f"there is no expert {missing[0]}: the layer has {n:,}, 0 to {n - 1}.", param_hint=option
        )


def n_blocks_of(model: str) -> int | None:
    """The blocks of a language model, if a folder on this machine says so."""
    return _number_in_config(model, "num_hidden_layers", "n_layer", "num_layers")


def width_of(model: str) -> int | None:
    """The width of a language model's residual stream, if a folder on this machine says so."""
    return _number_in_config(model, "hidden_size", "n_embd", "d_model")


def _number_in_config(model: str, *names: str) -> int | None:
    config = SMOLLM2_SHAPE if model == "smollm2-135m-instruct" else {}
    file = Path(model).expanduser() / "config.json"
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    return next((int(config[name]) for name in names if name in config), None)


def load_language_model(name: str, device: str, bridge: bool = False) -> Any:
    """A language model as HookedSAETransformer, or as SAETransformerBridge."""
    from mxd_lens import load_model

    device = best_device(device)
    if not bridge:
        return load_model(name, device)
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    return load_model(name, device, model_class=SAETransformerBridge)


def load_its_model(sae: Any, name: str | None, device: str, bridge: bool) -> Any:
    """The language model that was named, or the one that a layer was trained on."""
    trained_on = sae.cfg.metadata.model_name
    if not (name or trained_on):
        raise typer.BadParameter(
            "the layer does not say which model it was trained on: name it.", param_hint="--model"
        )
    return load_language_model(name or trained_on, device, bridge)


def load_with_model(source: LayerSource, model: str | None, device: str, bridge: bool) -> tuple[Any, Any]:
    """A language model and a layer of it, in the order in which every function takes them."""
    sae = source.load(device)
    return load_its_model(sae, model, device, bridge), sae


def sequences_of(
    text: str, model: Any, sae: Any, n_sequences: int, skip: int = 0, held_out: bool = False
) -> Any:
    """Token sequences of a text, of the length that a layer was trained on, with BOS where it had it."""
    from mxd_lens.text import load_text, split_text, token_sequences

    metadata = sae.cfg.metadata
    rows = split_text(load_text(text, streaming=False))[1] if held_out else load_text(text)
    context = metadata.context_size or 128
    tokens = token_sequences(
        model, rows.skip(skip), n_sequences, context, prepend_bos=metadata.prepend_bos is not False
    )
    return tokens.to(model.cfg.device)
