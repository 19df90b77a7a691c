"""Files of released transcoders, as their writers make them, with random weights."""

import io
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

D_MODEL, N = 16, 40
MODEL = "llama-of-words"


def weights(seed: int = 0, skip: bool = False, threshold: bool = False) -> dict[str, Tensor]:
    """Random weights by our names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 4

    made = {
        "W_enc": normal(D_MODEL, N),
        "b_enc": normal(N),
        "W_dec": normal(N, D_MODEL),
        "b_dec": normal(D_MODEL),
    }
    if skip:
        made["W_skip"] = normal(D_MODEL, D_MODEL)
    if threshold:
        made["threshold"] = normal(N).abs()
    return made


def output(x: Tensor, w: dict[str, Tensor], activation: str, k: int = 5) -> Tensor:
    """y, by the formula, in float64."""
    x, w = x.double(), {name: t.double() for name, t in w.items()}
    pre = x @ w["W_enc"] + w["b_enc"]
    match activation:
        case "relu":
            a = pre.relu()
        case "jumprelu":
            a = torch.where(pre > w["threshold"], pre, 0.0)
        case "topk" | "raw_topk":
            pre = pre.relu() if activation == "topk" else pre
            a = torch.where(pre >= pre.topk(k).values[..., -1:], pre, 0.0)
        case _:
            raise ValueError(activation)
    y = a @ w["W_dec"] + w["b_dec"]
    return y + x @ w["W_skip"].T if "W_skip" in w else y


def circuit_tracer_set(folder: Path, layers: list[dict[str, Tensor]], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_name": MODEL,
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    } | config
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for i, w in enumerate(layers):
        theirs = {"W_enc": w["W_enc"].T, **{n: t for n, t in w.items() if n not in ("W_enc", "threshold")}}
        if "threshold" in w:
            theirs["activation_function.threshold"] = w["threshold"]
        save_file({n: t.contiguous() for n, t in theirs.items()}, folder / f"layer_{i}.safetensors")
    return folder


def sparsify_folder(folder: Path, w: dict[str, Tensor], k: int = 5, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        **{n: w[n] for n in ("W_dec", "b_dec", "W_skip") if n in w},
    }
    save_file({n: t.contiguous() for n, t in theirs.items()}, folder / "sae.safetensors")
    settings = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": N,
        "k": k,
        "multi_topk": False,
        "skip_connection": "W_skip" in w,
        "transcode": True,
        "d_in": D_MODEL,
    } | config
    (folder / "cfg.json").write_text(json.dumps(settings))
    return folder


def gemma_scope_folder(folder: Path, w: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in w.items()})
    return folder


def gemma_scope_2_folder(folder: Path, w: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {
        "w_enc": w["W_enc"],
        "w_dec": w["W_dec"],
        **{n: w[n] for n in ("b_enc", "b_dec", "threshold")},
    }
    if "W_skip" in w:
        theirs["affine_skip_connection"] = w["W_skip"].T
    save_file({n: t.contiguous() for n, t in theirs.items()}, folder / "params.safetensors")
    settings = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-270m-pt",
        "hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output",
        "width": N,
        "l0": 12,
        "affine_connection": "W_skip" in w,
    } | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def llamascopium_folder(folder: Path, w: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "sae_type": "sae",
        "hook_point_in": "blocks.1.ln2.hook_normalized",
        "hook_point_out": "blocks.1.hook_mlp_out",
        "d_model": D_MODEL,
        "expansion_factor": N / D_MODEL,
        "use_decoder_bias": True,
        "act_fn": "topk",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 5,
        "use_glu_encoder": False,
        "dtype": "torch.float32",
    } | config
    theirs = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"]}
    if settings["use_decoder_bias"]:
        theirs["b_D"] = w["b_dec"]
    if "threshold" in w:
        theirs["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    for hook, norm in (("hook_point_in", 3.2), ("hook_point_out", 7.5)):
        theirs[f"dataset_average_activation_norm.{settings[hook]}"] = torch.tensor(norm)
    save_file({n: t.contiguous() for n, t in theirs.items()}, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def transcoder_circuits_file(file: Path, w: dict[str, Tensor], b_dec_in: Tensor, **config: Any) -> Path:
    """A checkpoint of transcoder_circuits; its class exists while the file is written."""
    module = types.ModuleType("sae_training.config")
    made = type("LanguageModelSAERunnerConfig", (), {"__module__": "sae_training.config"})
    module.LanguageModelSAERunnerConfig = made  # type: ignore[attr-defined]
    settings = {
        "model_name": MODEL,
        "hook_point": "blocks.1.ln2.hook_normalized",
        "out_hook_point": "blocks.1.hook_mlp_out",
        "is_transcoder": True,
        "d_in": D_MODEL,
        "d_out": D_MODEL,
        "d_sae": N,
        "context_size": 128,
        "dataset_path": "Skylion007/openwebtext",
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    } | config
    cfg = made()
    cfg.__dict__.update(settings)
    state = {
        "W_enc": w["W_enc"],
        "b_enc": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": b_dec_in,
        "b_dec_out": w["b_dec"],
    }
    sys.modules |= {"sae_training": types.ModuleType("sae_training"), "sae_training.config": module}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".pt":
            torch.save({"cfg": cfg, "state_dict": state}, file)
        else:
            content = io.BytesIO()
            pickle.dump({"cfg": cfg, "state_dict": state}, content)
            file.write_bytes(content.getvalue())
    finally:
        del sys.modules["sae_training"], sys.modules["sae_training.config"]
    return file
