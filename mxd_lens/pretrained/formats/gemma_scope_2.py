"""Gemma Scope 2's transcoders for Gemma 3: a folder with config.json and params.safetensors.

| there | here |
|---|---|
| w_enc [d_in, d_sae], w_dec [d_sae, d_out] | W_enc, W_dec |
| b_enc, b_dec, threshold | the same |
| affine_skip_connection [d_in, d_out] | W_skip, transposed |

config.json names modules of transformers: pre_feedforward_layernorm.output, which is what the MLP reads,
after the norm's gain, and post_feedforward_layernorm.output, what the block adds to the residual stream.
SAELens 6.54 takes the first for hook_mlp_in, the residual stream before the norm. Special tokens were left
out of the training, and of chat models the first four positions.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mxd_lens.architectures.saved import shown
from mxd_lens.pretrained.formats.foreign import ForeignLayer, mlp_module_output
from mxd_lens.pretrained.formats.source import (
    CHAT_PREFIX,
    Source,
    check_shapes,
    joined,
    read_config,
    read_safetensors,
    safetensors_names,
    width_of,
)

NAME = "Gemma Scope 2"
CONFIG, WEIGHTS = "config.json", "params.safetensors"


def recognises(source: Source, layer: str) -> bool:
    """Whether `layer` is a folder with params.safetensors."""
    return source.has(joined(layer, WEIGHTS))


def layers(source: Source) -> list[str]:
    """The names of the layers in a release."""
    return sorted(joined(str(PurePosixPath(p).parent)) for p in source.files() if p.endswith(f"/{WEIGHTS}"))


def has_its_weights(file: Path) -> bool:
    """Whether a safetensors file has the names of this format."""
    return {"w_enc", "w_dec", "threshold"} <= safetensors_names(file)


def read(source: Source, layer: str) -> ForeignLayer:
    """The layer in the folder `layer` of a release.

    Raises:
        FileNotFoundError: there is no such layer, or no config.json beside its weights.
        ValueError: the file is none of Gemma Scope 2's, or it is an SAE or a cross-layer transcoder.
    """
    file = source.fetch(joined(layer, CONFIG))
    config = read_config(file)
    hooks = [_hook(file, config, name) for name in ("hf_hook_point_in", "hf_hook_point_out")]
    if hooks[1] is None or hooks[0] == hooks[1]:
        raise ValueError(
            f"{file} describes an SAE of {hooks[0]}, not a transcoder: SAELens reads these, "
            "sae_lens.SAE.from_pretrained."
        )
    foreign = read_weights(source.fetch(joined(layer, WEIGHTS)))
    if config.get("affine_connection", False) != ("W_skip" in foreign.weights):
        raise ValueError(
            f"{file} says affine_connection: {shown(str(config.get('affine_connection')))}, and the weights "
            f"{'have' if 'W_skip' in foreign.weights else 'lack'} an affine_skip_connection."
        )
    model_name = _model(config.get("model_name"))
    stated = config.get("l0")
    foreign.hook_name, foreign.hook_name_out, foreign.model_name = hooks[0], hooks[1], model_name
    foreign.metadata |= {
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "seqpos_slice": [CHAT_PREFIX, None] if (model_name or "").endswith("-it") else None,
        "context_size": 1024,
        "stated_l0": float(stated) if isinstance(stated, int | float) else None,
        "source_format": NAME,
    }
    return foreign


def read_weights(file: Path) -> ForeignLayer:
    """The weights of a params.safetensors; where in a model they belong is in config.json.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    weights = read_safetensors(file)
    d_in, d_sae = width_of(file, weights, "w_enc"), width_of(file, weights, "w_enc", 1)
    if weights.get("w_dec") is not None and weights["w_dec"].ndim == 3:
        raise ValueError(
            f"{file} is a cross-layer transcoder, which writes to many blocks at once; no layer here does."
        )
    d_out = width_of(file, weights, "w_dec", 1)
    shapes: dict[str, tuple[int, ...]] = {
        "w_enc": (d_in, d_sae),
        "w_dec": (d_sae, d_out),
        "b_enc": (d_sae,),
        "b_dec": (d_out,),
        "threshold": (d_sae,),
    }
    if "affine_skip_connection" in weights:
        shapes["affine_skip_connection"] = (d_in, d_out)
    check_shapes(file, weights, shapes)
    ours = {name.replace("w_", "W_"): weights[name] for name in weights if name != "affine_skip_connection"}
    if "affine_skip_connection" in weights:
        ours["W_skip"] = weights["affine_skip_connection"].T
    return ForeignLayer(ours, "jumprelu", None, None, None, None)


def _hook(file: Path, config: dict[str, Any], name: str) -> str | None:
    """The hook point of a module's output in transformers' names; None where there is none."""
    value = config.get(name)
    if value is None and name == "hf_hook_point_out":
        return None
    match = re.search(r"layers\.(\d+)\.([\w.]+)$", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{file}: {name} should name a module of a block, got {shown(str(value))}.")
    block, model = int(match[1]), str(config.get("model_name"))
    points = {
        "pre_feedforward_layernorm.output": f"blocks.{block}.mlp.hook_in",
        "mlp.input": f"blocks.{block}.mlp.hook_in",
        "post_feedforward_layernorm.output": f"blocks.{block}.hook_mlp_out",
        "mlp.output": mlp_module_output(block, model),
        "output": f"blocks.{block}.hook_resid_post",
        "self_attn.o_proj.input": f"blocks.{block}.attn.hook_z",
    }
    if match[2] not in points:
        raise ValueError(
            f"{file}: {name} is {shown(str(value))}, a place that no layer here reads or writes."
        )
    return points[match[2]]


def _model(name: Any) -> str | None:
    """The language model's name on the hub."""
    if not isinstance(name, str):
        return None
    name = name.rpartition("/")[2].replace("-v3", "-3")
    # The smallest base model has no suffix there.
    return f"google/{name.removesuffix('-pt') if '270m' in name else name}"
