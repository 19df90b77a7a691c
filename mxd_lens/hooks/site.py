"""Where a layer belongs in a model: the hook points of its metadata, and whether the model runs them.

Every function that takes a model and a layer asks here first, so that a layer at the wrong place is an
error before there is a number.
"""

import difflib
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.util import extract_layer_from_tlens_hook_name, extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mxd_lens.models import (
    attached_layer,
    hook_point,
    hook_point_name,
    is_same_model,
    model_first,
    weight_processing,
)

_fires: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()
"""The hook points that have been seen to fire, by model."""


def hook_names(sae: SAE[Any]) -> tuple[str, str]:
    """The hook points of a layer's input and output, as its metadata names them.

    Raises:
        ValueError: it names none.
    """
    metadata = sae.cfg.metadata
    if not metadata.hook_name:
        raise ValueError(
            "This layer does not say where it belongs: set sae.cfg.metadata.hook_name to its input's "
            "hook point, and hook_name_out to its output's."
        )
    return metadata.hook_name, metadata.hook_name_out or metadata.hook_name


def block_of_layer(sae: SAE[Any]) -> int:
    """The block whose MLP a layer stands for.

    Raises:
        ValueError: its metadata names none.
    """
    block = extract_layer_from_tlens_hook_name(hook_names(sae)[1])
    if block is None:
        raise ValueError(f"{hook_names(sae)[1]} is in no block: this layer stands for no MLP.")
    return block


@model_first
def check_fits(model: Any, sae: SAE[Any]) -> None:
    """Raises ValueError where a layer was trained on another model, or on hooks this one does not run."""
    check_trained_on(model, sae)
    check_fires(model, *hook_names(sae))


@model_first
def check_trained_on(model: Any, sae: SAE[Any]) -> None:
    """Raises ValueError where a layer was trained on another model, or on other weights of it."""
    metadata = sae.cfg.metadata
    if metadata.model_name and not is_same_model(metadata.model_name, model.cfg.model_name):
        raise ValueError(
            f"This layer was trained on {metadata.model_name}, and the model is {model.cfg.model_name}. If "
            f"they are the same model, set sae.cfg.metadata.model_name = {model.cfg.model_name!r}."
        )
    trained_on, runs_on = metadata.weight_processing, weight_processing(model)
    if trained_on is None and runs_on:
        warnings.warn(
            f"This layer does not record whether it was trained on processed weights; the weights of this "
            f"model are ({', '.join(runs_on)}). If it was not, its results here are wrong.",
            stacklevel=3,
        )
    elif trained_on is not None and sorted(trained_on) != sorted(runs_on):
        raise ValueError(
            f"This layer was trained on {_processed(trained_on)} weights, and this model has "
            f"{_processed(runs_on)} ones. load_model gives unprocessed weights, and "
            "HookedSAETransformer.from_pretrained, or a bridge's enable_compatibility_mode, processes them."
        )


def _processed(steps: list[str]) -> str:
    return f"processed ({', '.join(steps)})" if steps else "unprocessed"


def check_free(model: Any, name: str) -> None:
    """Raises ValueError where SAELens has attached a layer at a hook point."""
    if attached_layer(model, name) is not None:
        raise ValueError(
            f"a layer is attached at {name}: take it away with model.reset_saes() first, for the MLP's own "
            "output is needed."
        )


@torch.no_grad()
def check_fires(model: Any, *names: str) -> None:
    """Raises ValueError where a forward pass does not run a hook point, although the model lists it.

    The model runs one token, once for each hook point.
    """
    fired = _fires.setdefault(model, set())
    points = [hook_point_name(model, name) for name in names]
    if fired.issuperset(points) and all(attached_layer(model, point) is None for point in points):
        return
    now: set[str] = set()
    with ExitStack() as stack:
        for point in points:
            stack.callback(listen(hook_point(model, point), lambda *_, point=point: now.add(point)))
        run_one_token(model, points)
    for name, point in zip(names, points, strict=True):
        if point not in now:
            raise ValueError(_does_not_fire(model, name, point))
    fired |= now


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
