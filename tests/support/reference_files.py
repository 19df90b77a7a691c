"""Checkpoint files as the paper's code writes them, and the output of its layer in explicit sums."""

import gzip
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

D_IN, D_SAE, N_EXPERTS, TOPK = 6, 10, 14, 3
HOOK, HOOK_OUT = "blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"
FORMATS = ["zip.pt", "legacy.pt", "file.pkl", "file.pkl.gz"]
SETTINGS: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_point": HOOK,
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "out_hook_point": HOOK_OUT,
    "out_hook_point_layer": 8,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "d_in": D_IN,
    "d_out": D_IN,
    "d_sae": D_SAE,
    "n_experts": N_EXPERTS,
    "topk": TOPK,
    "use_conditional": True,
    "use_glu": False,
    "use_skip": False,
    "is_transcoder": True,
    "mlp_activation_fn": "gelu",
    "norm_dec": True,
    "dtype": torch.float32,
    "device": torch.device("cuda:1"),
    "checkpoint_path": PurePosixPath("/data/gpt2"),
    "use_ghost_grads": (False,),
    "nested": ((1, (2.5, "a")), [None, {"b": True}]),
    "lr": 1e-4,
    "run_name": "3072-L1-1e-05",
}
ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}


def shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d_in, d_sae, n = settings["d_in"], settings["d_sae"], settings["n_experts"]
    d_out = (settings["d_out"] if settings["is_transcoder"] else None) or d_in
    result: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_in,),
    }
    if settings["is_transcoder"]:
        result["b_dec_out"] = (d_out,)
    if settings["use_conditional"]:
        result |= {"gate": (n, d_in), "gate_bias": (n,), "W_cond": (d_out, n)}
    if settings["use_glu"]:
        result |= {"W_glu.weight": (d_sae, d_in), "W_glu.bias": (d_sae,)}
    if settings["use_skip"]:
        result |= {"W_skip.weight": (d_in, d_in)}
    return result


def random_weights(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> OrderedDict[str, Tensor]:
    """As the paper's code leaves them: W_enc and W_dec are transposes of a linear layer's weight."""
    generator = torch.Generator().manual_seed(5)
    weights: OrderedDict[str, Tensor] = OrderedDict()
    for name, shape in shapes(settings).items():
        weight = torch.randn(shape, generator=generator).to(dtype)
        weights[name] = weight.T.contiguous().T if name in ("W_enc", "W_dec") else weight
    weights._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    return weights


@contextmanager
def config_class(name: str = "LanguageModelSAERunnerConfig") -> Iterator[type]:
    """The config's class, in a module that is there only while a file is written."""

    @dataclass
    class Config:
        model_name: str

    Config.__module__, Config.__qualname__, Config.__name__ = "sae_training.config", name, name
    package, module = types.ModuleType("sae_training"), types.ModuleType("sae_training.config")
    setattr(module, name, Config)
    names = {"sae_training": package, "sae_training.config": module}
    assert not names.keys() & sys.modules.keys()
    sys.modules.update(names)
    try:
        yield Config
    finally:
        for module_name in names:
            del sys.modules[module_name]


@contextmanager
def checkpoint(settings: dict[str, Any], weights: Any) -> Iterator[dict[str, Any]]:
    """What the paper's code hands to torch.save or pickle.dump."""
    with config_class() as config:
        cfg = config("")
        cfg.__dict__.clear()
        cfg.__dict__.update(settings)
        yield {"cfg": cfg, "state_dict": weights}


def file_bytes(contents: Any, file_format: str) -> bytes:
    if file_format.endswith("pt"):
        buffer = io.BytesIO()
        torch.save(contents, buffer, _use_new_zipfile_serialization=file_format == "zip.pt")
        return buffer.getvalue()
    data = pickle.dumps(contents)
    return gzip.compress(data) if file_format.endswith("gz") else data


def write(
    folder: Path,
    settings: dict[str, Any] | None = None,
    weights: Any = None,
    file_format: str = "zip.pt",
) -> Path:
    """A checkpoint file in the folder, named by its format."""
    settings = SETTINGS if settings is None else settings
    weights = random_weights(settings) if weights is None else weights
    with checkpoint(settings, weights) as contents:
        (folder / file_format).write_bytes(file_bytes(contents, file_format))
    return folder / file_format


def largest_only(x: Tensor, k: int) -> Tensor:
    """x with all but the k largest of each row set to zero, row by row."""
    result = torch.zeros_like(x)
    for row, out in zip(x, result, strict=True):
        for i in sorted(range(len(row)), key=lambda i: -float(row[i]))[:k]:
            out[i] = row[i]
    return result


def formula(settings: dict[str, Any], weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The layer's output for inputs [tokens, d_in], in float64, with the file's own names."""
    x = x.double()
    w = {name: weight.double() for name, weight in weights.items()}
    sparse = (lambda a: a) if settings["topk"] < 0 else (lambda a: largest_only(a, settings["topk"]))
    phi = ACTIVATIONS[settings["mlp_activation_fn"]]
    if not settings["is_transcoder"]:
        a = sparse(phi((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]))
        return a @ w["W_dec"] + w["b_dec"]
    z = phi(torch.einsum("ti,ih->th", x, w["W_enc"]) + w["b_enc"])
    if settings["use_glu"]:
        z = (torch.einsum("ti,hi->th", x, w["W_glu.weight"]) + w["W_glu.bias"]) * z
    if settings["use_conditional"]:
        a = sparse((torch.einsum("ti,ni->tn", x, w["gate"]) + w["gate_bias"]).clamp(min=0))
        experts = torch.einsum("ho,on->nho", w["W_dec"], w["W_cond"])
        y = torch.einsum("tn,th,nho->to", a, z, experts)
    else:
        y = sparse(z) @ w["W_dec"]
    if settings["use_skip"]:
        y = y + torch.einsum("ti,oi->to", x, w["W_skip.weight"])
    return y + w["b_dec_out"]
