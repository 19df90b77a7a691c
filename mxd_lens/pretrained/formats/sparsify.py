"""Layers of EleutherAI's sparsify: a folder named by its module, with cfg.json and sae.safetensors.

| there | here |
|---|---|
| encoder.weight [d_sae, d_in], encoder.bias | W_enc (transposed), b_enc |
| W_dec [d_sae, d_in], b_dec [d_in] | the same |
| W_skip [d_in, d_in], with skip_connection | W_skip |

A transcoder (`transcode`) reads a module's input and predicts its output, so that `layers.11.mlp` reads what
the MLP reads, after the norm's gain. An SAE reads the module's output less b_dec, which is folded into b_enc.
sparsify puts no BOS before its texts; the tokens it left out are in the run's config.json.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mxd_lens.architectures.saved import shown
from mxd_lens.pretrained.formats.foreign import ForeignLayer, block_of, mlp_module_output
from mxd_lens.pretrained.formats.source import (
    Source,
    check_shapes,
    joined,
    read_config,
    read_safetensors,
)

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TOKENIZER_ADDS_BOS = re.compile(r"gemma|mistral|(?<![a-z])llama", re.IGNORECASE)
"""Models whose tokenizer puts a BOS before every text, sparsify's too."""
MAX_WIDTH = 2**29


def recognises(source: Source, layer: str) -> bool:
    """Whether `layer` is a folder with sparsify's two files."""
    return source.has(joined(layer, CONFIG)) and source.has(joined(layer, WEIGHTS))


def layers(source: Source) -> list[str]:
    """The names of the layers in a release."""
    folders = (str(PurePosixPath(p).parent) for p in source.files() if PurePosixPath(p).name == WEIGHTS)
    return sorted(joined(folder) for folder in folders if source.has(joined(folder, CONFIG)))


def read(source: Source, layer: str) -> ForeignLayer:
    """The layer in the folder `layer` of a release.

    Raises:
        FileNotFoundError: there is no such layer.
        ValueError: its configuration cannot be, no layer here computes it, or the weights are others.
    """
    config_file, weights_file = source.fetch(joined(layer, CONFIG)), source.fetch(joined(layer, WEIGHTS))
    config = read_config(config_file)
    d_in, d_sae, k = _widths(config_file, config)
    transcodes, skips = (config.get(name, False) for name in ("transcode", "skip_connection"))
    if not isinstance(transcodes, bool) or not isinstance(skips, bool):
        raise ValueError(f"{config_file}: transcode and skip_connection should be true or false.")
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("signed", False):
        raise ValueError(
            f"{config_file}: no layer here has the activation {shown(str(activation))}"
            f"{' of absolute values' if config.get('signed') else ''}; topk is read."
        )
    weights = read_safetensors(weights_file)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if skips:
        shapes["W_skip"] = (d_in, d_in)
    check_shapes(weights_file, weights, shapes)
    ours: dict[str, Tensor] = {n: weights[n] for n in ("W_dec", "b_dec", "W_skip") if n in weights}
    ours["W_enc"], ours["b_enc"] = weights["encoder.weight"].T, weights["encoder.bias"]
    if not transcodes:
        shift = weights["encoder.weight"].double() @ weights["b_dec"].double()
        ours["b_enc"] = (ours["b_enc"].double() - shift).to(ours["b_enc"].dtype)
    run = _run_config(source, layer)
    model_name = run.get("model") if isinstance(run.get("model"), str) else None
    hooks = _hooks(_module(source, layer), transcodes, model_name)
    excluded = run.get("exclude_tokens")
    context_size, dataset = run.get("ctx_len"), run.get("dataset")
    return ForeignLayer(
        weights=ours,
        activation="topk",
        k=k,
        hook_name=hooks[0],
        hook_name_out=hooks[1],
        model_name=model_name,
        metadata={
            "prepend_bos": bool(TOKENIZER_ADDS_BOS.search(model_name or "")),
            "exclude_special_tokens": excluded if _is_ids(excluded) and excluded else False,
            "context_size": context_size if type(context_size) is int else None,
            "dataset_path": dataset if isinstance(dataset, str) else None,
            "source_format": NAME,
        },
    )


def _widths(file: Path, config: dict[str, Any]) -> tuple[int, int, int]:
    """d_in, d_sae and k."""

    def count(name: str) -> int:
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= MAX_WIDTH:
            raise ValueError(f"{file}: {name} should be a positive integer, got {shown(str(value))}.")
        return value

    d_in, k = count("d_in"), count("k")
    d_sae = count("num_latents") if config.get("num_latents") else d_in * count("expansion_factor")
    if k > d_sae:
        raise ValueError(f"{file}: k should be at most the number of latents, {d_sae}, got {k}.")
    return d_in, d_sae, k


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _run_config(source: Source, layer: str) -> dict[str, Any]:
    """The run's config.json, beside the layers' folders; empty where there is none."""
    parents = [str(parent) for parent in PurePosixPath(layer).parents]
    for parent in parents:
        if source.has(joined(parent, "config.json")):
            return read_config(source.fetch(joined(parent, "config.json")))
    beside = Path(source.location) / ".." / "config.json"
    # A layer's folder that is opened by itself.
    if joined(layer) == "" and beside.is_file():
        return read_config(beside)
    return {}


def _module(source: Source, layer: str) -> str:
    """The name of the module that a layer's folder is named after; a run with seeds has one more folder."""
    path = PurePosixPath(joined(layer) or Path(source.location).name)
    return path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name


def _hooks(module: str, transcodes: bool, model_name: str | None) -> tuple[str, str]:
    """The hook points of a module's input and output."""
    match = re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)((?:\.\w+)*)", module)
    part = match[2] if match else ""
    if match is None or part not in (".mlp", "", ".attn", ".self_attn", ".attention"):
        raise ValueError(
            f"The folder {shown(module)} should be named after an MLP, as layers.11.mlp or h.11.mlp: it says "
            "which module the layer reads."
        )
    block = int(match[1])
    if transcodes and part != ".mlp":
        raise ValueError(
            f"This layer transcodes {module}, which is not an MLP; only an MLP's layers are attached here."
        )
    if transcodes:
        return f"blocks.{block}.mlp.hook_in", mlp_module_output(block, model_name)
    output = {"": f"blocks.{block}.hook_resid_post", ".mlp": mlp_module_output(block, model_name)}.get(
        part, f"blocks.{block}.hook_attn_out"
    )
    return output, output


def write(saes: Iterable[Any], folder: str | Path) -> Path:
    """Writes layers as sparsify does, each in its own folder, and returns the folder of them all.

    Raises:
        ValueError: a layer is not a TopK (skip) transcoder as wide as the model, from an MLP module's input
            to its output: sparsify computes nothing else.
    """
    folder = Path(folder)
    layers = list(saes)
    for sae in layers:
        _check(sae)
    for sae in layers:
        metadata, block = sae.cfg.metadata, block_of(sae.cfg.metadata.hook_name)
        blocks = "h" if "gpt2" in (metadata.model_name or "") else "layers"
        path = folder / f"{blocks}.{block}.mlp"
        path.mkdir(parents=True, exist_ok=True)
        weights = {
            "encoder.weight": sae.W_enc.T,
            "encoder.bias": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }
        if hasattr(sae, "W_skip"):
            weights["W_skip"] = sae.W_skip
        save_file({n: w.detach().cpu().contiguous() for n, w in weights.items()}, path / WEIGHTS)
        config = {
            "activation": "topk",
            "expansion_factor": max(1, sae.cfg.d_sae // sae.cfg.d_in),
            "normalize_decoder": False,
            "num_latents": sae.cfg.d_sae,
            "k": sae.cfg.k,
            "multi_topk": False,
            "skip_connection": hasattr(sae, "W_skip"),
            "transcode": True,
            "d_in": sae.cfg.d_in,
        }
        (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        excluded = metadata.exclude_special_tokens
        run = {
            "model": metadata.model_name,
            "dataset": metadata.dataset_path,
            "ctx_len": metadata.context_size,
            "exclude_tokens": excluded if _is_ids(excluded) else [],
        }
        known = {name: value for name, value in run.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(known), encoding="utf-8")
    return folder


def _check(sae: Any) -> None:
    architecture = sae.cfg.architecture()
    if architecture not in ("topk_transcoder", "topk_skip_transcoder") or sae.cfg.k is None:
        raise ValueError(
            f"sparsify computes TopK transcoders with or without a skip connection; this layer is a "
            f"{architecture}{'' if getattr(sae.cfg, 'k', 1) else ' with relu sparsity'}."
        )
    if not getattr(sae.cfg, "relu", True):
        raise ValueError("sparsify takes the relu before its TopK; this layer has the TopK without relu.")
    if sae.cfg.d_in != sae.cfg.d_out:
        raise ValueError(
            f"sparsify wants one width for input and output, got {sae.cfg.d_in} and {sae.cfg.d_out}."
        )
    metadata = sae.cfg.metadata
    block = block_of(metadata.hook_name)
    if block is None or metadata.hook_name != f"blocks.{block}.mlp.hook_in":
        raise ValueError(
            f"sparsify reads a module's input, here blocks.N.mlp.hook_in; this layer reads "
            f"{metadata.hook_name}."
        )
    if metadata.hook_name_out not in (
        f"blocks.{block}.mlp.hook_out",
        mlp_module_output(block, metadata.model_name),
    ):
        raise ValueError(
            f"sparsify predicts what the MLP returns, here "
            f"{mlp_module_output(block, metadata.model_name)}; this layer predicts {metadata.hook_name_out}."
        )
