"""Layers of OpenMOSS' Llamascopium, as Llama Scope 2 is: config.json and sae_weights.safetensors.

| there | here |
|---|---|
| W_E [d_in, d_sae], b_E | W_enc, b_enc |
| W_D [d_sae, d_out], b_D | W_dec, b_dec |
| activation_function.log_jumprelu_threshold | threshold, its exponential |
| dataset_average_activation_norm.HOOK | folded in |

The layer was trained on activations scaled to an average norm of sqrt(d_model), s_in x for the input and
s_out y for the output, and `sparsity_include_decoder_norm` chooses features by a_n ||W_D[n]||. Both are
folded into the weights, exactly: with n = ||W_D|| for each feature (1 without that option),

    W_enc = n W_E    b_enc = n b_E / s_in    threshold = theta / s_in
    W_dec = W_D s_in / (n s_out)    b_dec = b_D / s_out

Activations here are then a_n = n times those there.
"""

import math
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from mxd_lens.architectures.saved import shown
from mxd_lens.pretrained.formats.foreign import ForeignLayer
from mxd_lens.pretrained.formats.source import (
    Source,
    check_shapes,
    joined,
    read_config,
    read_safetensors,
    width_of,
)

NAME = "Llamascopium"
CONFIG, WEIGHTS = "config.json", ("sae_weights.safetensors", "checkpoints/final.safetensors")
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.log_jumprelu_threshold"


def recognises(source: Source, layer: str) -> bool:
    """Whether `layer` is a folder with a config.json that has a `sae_type`, and weights."""
    return (
        _weights_path(source, layer) is not None
        and source.has(joined(layer, CONFIG))
        and "sae_type" in read_config(source.fetch(joined(layer, CONFIG)))
    )


def layers(source: Source) -> list[str]:
    """The names of the layers in a release."""
    folders = (joined(str(PurePosixPath(p).parent)) for p in source.files() if p.endswith(CONFIG))
    return sorted(folder for folder in folders if recognises(source, folder))


def _weights_path(source: Source, layer: str) -> str | None:
    paths = (joined(layer, name) for name in WEIGHTS)
    return next((path for path in paths if source.has(path)), None)


def read(source: Source, layer: str) -> ForeignLayer:
    """The layer in the folder `layer` of a release.

    Raises:
        FileNotFoundError: there is no such layer.
        ValueError: its configuration cannot be, no layer here computes it, or the weights are others.
    """
    config_file = source.fetch(joined(layer, CONFIG))
    config = read_config(config_file)
    _check(config_file, config)
    weights_file = source.fetch(_weights_path(source, layer) or joined(layer, WEIGHTS[0]))
    weights = read_safetensors(weights_file)
    hook, hook_out = config["hook_point_in"], config["hook_point_out"]
    d_in, d_sae = width_of(weights_file, weights, "W_E"), width_of(weights_file, weights, "W_E", 1)
    d_out = width_of(weights_file, weights, "W_D", 1)
    shapes: dict[str, tuple[int, ...]] = {"W_E": (d_in, d_sae), "b_E": (d_sae,), "W_D": (d_sae, d_out)}
    if config.get("use_decoder_bias", True):
        shapes["b_D"] = (d_out,)
    if config["act_fn"] == "jumprelu":
        shapes[THRESHOLD] = (d_sae,)
    shapes |= {name: () for name in (f"{NORM}{hook}", f"{NORM}{hook_out}") if name in weights}
    is_scaled = config.get("norm_activation", "dataset-wise") == "dataset-wise"
    if not is_scaled:  # what the file holds of the norm is not initialised then
        weights = {name: w for name, w in weights.items() if not name.startswith(NORM)}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(NORM)}
    check_shapes(weights_file, weights, shapes)
    s_in, s_out = (
        _scale(weights_file, weights, f"{NORM}{name}", d_in) if is_scaled else 1.0
        for name in (hook, hook_out)
    )
    model = re.search(r"Llama-Scope-2-([\w.-]+)", source.location, re.IGNORECASE)
    k = config.get("top_k")
    return ForeignLayer(
        weights=_folded(weights, s_in, s_out, config.get("sparsity_include_decoder_norm", True)),
        activation=config["act_fn"],
        k=k if config["act_fn"] == "topk" else None,
        hook_name=hook,
        hook_name_out=hook_out,
        model_name=model[1] if model else None,
        metadata={
            "prepend_bos": True,
            "exclude_special_tokens": True,
            "scale_folded": {"input": s_in, "output": s_out} if is_scaled else None,
            "source_format": NAME,
        },
    )


def _check(file: Path, config: dict[str, Any]) -> None:
    """Raises ValueError where no layer here computes what a configuration describes."""
    if config.get("sae_type") != "sae":
        raise ValueError(
            f"{file} describes a {shown(str(config.get('sae_type')))}; of Llamascopium's layers, an sae with "
            "two hook points (a transcoder) is read."
        )
    for name in ("hook_point_in", "hook_point_out"):
        if not isinstance(config.get(name), str):
            raise ValueError(f"{file}: {name} should be a hook point, got {shown(str(config.get(name)))}.")
    activation, norm = config.get("act_fn", "relu"), config.get("norm_activation", "dataset-wise")
    if activation not in ("relu", "topk", "jumprelu"):
        raise ValueError(
            f"{file}: its activation is {shown(str(activation))}; relu, topk and jumprelu depend on one "
            "token alone. Llamascopium converts a batchtopk layer to a jumprelu one."
        )
    config["act_fn"] = activation
    if norm not in ("dataset-wise", "inference"):
        raise ValueError(
            f"{file}: norm_activation is {shown(str(norm))}, a scale that depends on the token or the batch "
            "and cannot be folded into the weights; dataset-wise and inference can."
        )
    if config.get("use_glu_encoder", False):
        raise ValueError(f"{file}: no layer here has a gated encoder (use_glu_encoder).")
    k = config.get("top_k", 50)
    if activation == "topk" and (type(k) is not int or k < 1):
        raise ValueError(f"{file}: top_k should be a positive integer, got {shown(str(k))}.")
    config["top_k"] = k


def _scale(file: Path, weights: dict[str, Tensor], name: str, d_model: int) -> float:
    """sqrt(d_model) / the average norm of the activations there."""
    norm = weights[name].item() if name in weights else math.nan
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(
            f"{file}: {shown(name)} should be the average norm of the activations, with which the layer was "
            f"trained, got {norm if name in weights else 'nothing'}."
        )
    return math.sqrt(d_model) / norm


def _folded(weights: dict[str, Tensor], s_in: float, s_out: float, by_norm: bool) -> dict[str, Tensor]:
    dtype = weights["W_E"].dtype
    theirs = {name: w.double() for name, w in weights.items()}
    norm = theirs["W_D"].norm(dim=1) if by_norm else torch.ones(len(theirs["W_D"]), dtype=torch.float64)
    # A feature that writes nothing is chosen by nothing.
    by = torch.where(norm > 0, norm, 1.0)
    ours = {
        "W_enc": theirs["W_E"] * norm,
        "b_enc": theirs["b_E"] * norm / s_in,
        "W_dec": theirs["W_D"] / by[:, None] * (s_in / s_out),
        "b_dec": theirs.get("b_D", theirs["W_D"].new_zeros(theirs["W_D"].shape[1])) / s_out,
    }
    if THRESHOLD in theirs:
        ours["threshold"] = theirs[THRESHOLD].exp() / s_in
    return {name: w.to(dtype) for name, w in ours.items()}
