"""Sets of transcoders as decoderesearch/circuit-tracer reads them: config.yaml and layer_0.safetensors, ...

One file holds the transcoder of one MLP:

| there | here |
|---|---|
| W_enc [d_sae, d_in] | W_enc, transposed |
| b_enc, W_dec, b_dec | the same |
| W_skip [d_out, d_in] | W_skip |
| activation_function.threshold | threshold of a JumpReLU |

config.yaml names the language model, the hook points inside a block and, where it is not relu or JumpReLU,
the activation. The TopK there is that of the raw pre-activations. circuit-tracer leaves the first position
to the MLP (the first four of Gemma 3's chat models), which becomes `seqpos_slice` here.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml
from sae_lens import logger
from safetensors.torch import save_file
from torch import Tensor

from mxd_lens.architectures.saved import shown
from mxd_lens.pretrained.formats.foreign import ForeignLayer, block_of, mlp_module_output
from mxd_lens.pretrained.formats.source import (
    CHAT_PREFIX,
    Repository,
    Source,
    check_shapes,
    joined,
    read_config,
    read_safetensors,
    width_of,
)

NAME = "circuit-tracer"
CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
INPUTS = ("mlp.hook_in", "ln2.hook_normalized", "hook_resid_mid", "hook_mlp_in")
OUTPUTS = ("hook_mlp_out", "mlp.hook_out")
ACTIVATIONS = ("relu", "topk", "jump_relu", "jumprelu", None)
RAW_TOPK_OF = {"facebook/crv-8b-instruct-transcoders": 128}
"""Sets whose config.yaml leaves k out; circuit-tracer knows it by the set's name."""


def recognises(source: Source, layer: str) -> bool:
    """Whether `layer` names a layer_N of a folder with circuit-tracer's config.yaml."""
    folder, index = _place(layer)
    if index is None or not source.has(joined(folder, CONFIG)):
        return False
    return source.has(joined(folder, f"layer_{index}.safetensors")) or (
        "transcoders" in read_config(source.fetch(joined(folder, CONFIG)))
    )


def layers(source: Source) -> list[str]:
    """The names of the layers in a release."""
    found = []
    for path in source.files():
        folder = str(PurePosixPath(path).parent)
        folder = "" if folder == "." else folder
        if PurePosixPath(path).name == CONFIG:
            listed = read_config(source.fetch(path)).get("transcoders")
            if isinstance(listed, list):
                found += [joined(folder, f"layer_{i}") for i in range(len(listed))]
        elif re.fullmatch(r"layer_\d+\.safetensors", PurePosixPath(path).name) and source.has(
            joined(folder, CONFIG)
        ):
            found.append(path.removesuffix(".safetensors"))
    return sorted(set(found), key=lambda name: (_place(name)[0], _place(name)[1] or 0))


def read(source: Source, layer: str) -> ForeignLayer:
    """The layer `folder/layer_N` of a release.

    Raises:
        FileNotFoundError: there is no such layer.
        ValueError: the set is of another kind than per-layer transcoders, its configuration cannot be, or
            the file does not hold such a layer.
    """
    folder, index = _place(layer)
    file = source.fetch(joined(folder, CONFIG))
    config = read_config(file)
    kind = config.get("model_kind")
    if kind != "transcoder_set":
        raise ValueError(
            f"{file} describes a {shown(str(kind))}, and only a transcoder_set has one layer for each MLP. "
            "A cross-layer transcoder writes to many blocks at once, which no layer here does."
        )
    if index is None:
        raise FileNotFoundError(f"{source.location} has one layer for each MLP: name one, as layer_0.")
    point, point_out = (
        _hook(file, config, "feature_input_hook", INPUTS),
        _hook(file, config, "feature_output_hook", OUTPUTS),
    )
    model_name = config.get("model_name")
    if not isinstance(model_name, str | None):
        raise ValueError(f"{file}: model_name should be a name, got {shown(str(model_name))}.")
    foreign = _weights(source, folder, index, config)
    foreign.hook_name = f"blocks.{index}.{'hook_resid_mid' if point == 'hook_mlp_in' else point}"
    foreign.hook_name_out = (
        mlp_module_output(index, model_name) if point_out == "mlp.hook_out" else f"blocks.{index}.{point_out}"
    )
    foreign.model_name = model_name
    is_gemma_3_chat = "gemma-3" in (model_name or "") and (model_name or "").endswith("-it")
    foreign.metadata |= {
        "prepend_bos": True,
        "exclude_special_tokens": False,
        "seqpos_slice": [CHAT_PREFIX if is_gemma_3_chat else 1, None],
        "source_format": NAME,
    }
    return foreign


def _place(layer: str) -> tuple[str, int | None]:
    """The folder of a layer's set, and the layer's index in it."""
    path = PurePosixPath(layer)
    match = re.fullmatch(r"(?:layer_)?(\d+)(?:\.safetensors)?", path.name)
    if match is None:
        return joined(layer), None
    return joined(str(path.parent)), int(match[1])


def _hook(file: Path, config: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = config.get(name)
    if value not in known:
        raise ValueError(f"{file}: {name} should be one of {', '.join(known)}, got {shown(str(value))}.")
    return str(value)


def _weights(source: Source, folder: str, index: int, config: Mapping[str, Any]) -> ForeignLayer:
    """The layer's weights, from this release or from the one that config.yaml points to."""
    path = joined(folder, f"layer_{index}.safetensors")
    if source.has(path) or "transcoders" not in config:
        return _own_weights(source.fetch(path), source.location, config)
    listed = config["transcoders"]
    if not isinstance(listed, list) or index >= len(listed) or not isinstance(listed[index], str):
        count = len(listed) if isinstance(listed, list) else "no"
        raise FileNotFoundError(f"{source.location} has no layer_{index}: it lists {count} transcoders.")
    # Gemma Scope's files, listed by circuit-tracer's configuration, are in their own formats.
    from mxd_lens.pretrained.formats import gemma_scope, gemma_scope_2

    url = urlparse(listed[index])
    if url.scheme == "hf":
        repo, _, file_path = url.path.lstrip("/").partition("/")
        revision = parse_qs(url.query).get("revision", [None])[0]
        source, path = Repository(f"{url.netloc}/{repo}", revision), file_path
    else:
        path = joined(folder, listed[index])
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(
                f"{source.location}: the transcoder {shown(listed[index])} lies outside the release; only "
                "files in it, and hf:// addresses, are read."
            )
    file = source.fetch(path)
    if file.suffix == ".npz":
        return gemma_scope.read_weights(file)
    if gemma_scope_2.has_its_weights(file):
        return gemma_scope_2.read_weights(file)
    return _own_weights(file, source.location, config)


def _own_weights(file: Path, location: str, config: Mapping[str, Any]) -> ForeignLayer:
    weights = read_safetensors(file)
    weights.pop("k", None)  # circuit-tracer's own writer adds it; the configuration decides
    d_sae, d_in = width_of(file, weights, "W_enc"), width_of(file, weights, "W_enc", 1)
    d_out = width_of(file, weights, "W_dec", 1)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_sae, d_in),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
    }
    if "W_skip" in weights:
        shapes["W_skip"] = (d_out, d_in)
    activation, k = config.get("activation"), config.get("k")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{location}: no layer here has the activation {shown(str(activation))}.")
    if activation not in ("relu", "topk"):
        activation = "jumprelu" if THRESHOLD in weights else "relu"
    if activation == "jumprelu":
        shapes[THRESHOLD] = (d_sae,)
    if activation == "topk":
        k = k if k is not None else RAW_TOPK_OF.get(location)
        if type(k) is not int or not 1 <= k <= d_sae:
            raise ValueError(
                f"{location}: its activation is topk, with a k from 1 to the width, {d_sae}; got "
                f"{shown(str(k))}."
            )
    check_shapes(file, weights, shapes)
    names = ("b_enc", "W_dec", "b_dec", "W_skip")
    ours: dict[str, Tensor] = {name: weights[name] for name in names if name in weights}
    ours["W_enc"] = weights["W_enc"].T
    if activation == "jumprelu":
        ours["threshold"] = weights[THRESHOLD]
        if (ours["threshold"] < 0).any():
            raise ValueError(f"{file}: a JumpReLU's thresholds are not negative here; this one has some.")
    return ForeignLayer(
        weights=ours,
        activation="raw_topk" if activation == "topk" else activation,
        k=k if activation == "topk" else None,
        hook_name=None,
        hook_name_out=None,
        model_name=None,
    )


def write(saes: Iterable[Any], folder: str | Path) -> Path:
    """Writes layers as a set that circuit-tracer reads, and returns the folder.

    The layers are transcoders of one language model, one for each block from 0 to the last, with one
    width, one activation and one pair of hook points: circuit-tracer takes no other sets.

    Raises:
        ValueError: they are not; or a layer is not of a kind that circuit-tracer computes, as an MxD.
    """
    layers = {_block(sae): sae for sae in saes}
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise ValueError(
            "circuit-tracer wants a transcoder for every block from 0 to the last, got those of the blocks "
            f"{sorted(layers)}."
        )
    settings = [_settings(layers[i]) for i in range(len(layers))]
    if any(s != settings[0] for s in settings):
        raise ValueError(
            "circuit-tracer wants layers of one model, width, activation and pair of hook points, got "
            + " and ".join(sorted({str(s) for s in settings}))
            + "."
        )
    kind = settings[0]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, sae in layers.items():
        weights = {
            "W_enc": sae.W_enc.T,
            "b_enc": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }
        if hasattr(sae, "W_skip"):
            weights["W_skip"] = sae.W_skip
        if hasattr(sae, "threshold"):
            weights[THRESHOLD] = sae.threshold
        save_file(
            {name: w.detach().cpu().contiguous() for name, w in weights.items()},
            folder / f"layer_{i}.safetensors",
        )
    if kind["activation"] == "topk" and getattr(layers[0].cfg, "relu", True):
        logger.warning(
            "circuit-tracer's TopK is that of the raw pre-activations: on a token where fewer than k = %d of "
            "them are positive, it also keeps negative ones, which this layer does not.",
            kind["k"],
        )
    described = {name: value for name, value in kind.items() if value is not None and name != "d_sae"}
    config = {"model_kind": "transcoder_set", **described}
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder


def _block(sae: Any) -> int:
    block = block_of(sae.cfg.metadata.hook_name)
    if block is None:
        raise ValueError(
            f"circuit-tracer needs the block of a layer, and its input's hook point is "
            f"{sae.cfg.metadata.hook_name!r}."
        )
    return block


def _settings(sae: Any) -> dict[str, Any]:
    """What all layers of a set share."""
    metadata, block = sae.cfg.metadata, _block(sae)
    architecture = sae.cfg.architecture()
    if architecture not in ("topk_transcoder", "topk_skip_transcoder") and not architecture.startswith(
        "jumprelu"
    ):
        raise ValueError(
            f"circuit-tracer computes C^T a + W_skip x + b with a relu, topk or jumprelu; a {architecture} "
            "is not of that form."
        )
    if sae.cfg.d_in != sae.cfg.d_out:
        raise ValueError(
            f"circuit-tracer wants layers as wide as the model, got {sae.cfg.d_in} and {sae.cfg.d_out}."
        )
    point, point_out = (
        str(hook).removeprefix(f"blocks.{block}.") for hook in (metadata.hook_name, metadata.hook_name_out)
    )
    if point not in INPUTS or point_out not in OUTPUTS:
        raise ValueError(
            f"circuit-tracer reads {', '.join(INPUTS)} and writes {', '.join(OUTPUTS)}; this layer reads "
            f"{point} and writes {point_out}."
        )
    k = getattr(sae.cfg, "k", None)
    activation = "jump_relu" if hasattr(sae, "threshold") else "relu" if k is None else "topk"
    return {
        "model_name": metadata.model_name,
        "feature_input_hook": point,
        "feature_output_hook": point_out,
        "activation": activation,
        "k": k,
        "d_sae": sae.cfg.d_sae,
    }
