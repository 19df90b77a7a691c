"""Replacing an MLP by a layer on any hooked model, no SAE-aware model needed."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from mxd_lens.models import attached_layer, equivalent_hook_names, hook_point_name, is_same_model, model_first

Replacement = Callable[[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch d_out"]], Tensor]
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


def replacement_hooks(sae: SAE[Any]) -> list[Hook]:
    """Forward hooks that put `sae(x)` in the place of the MLP's output.

        logits = model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(sae))

    Works on HookedTransformer, HookedSAETransformer, TransformerBridge and SAETransformerBridge, in
    `generate` too (inside `with model.hooks(fwd_hooks=...)`), and for SAELens' own SAEs and
    transcoders, skip connections included. A plain HookedTransformer has no `mlp.hook_in`: SAELens'
    `add_hook_in_to_mlp` gives it one.

    Args:
        sae: the layer; its metadata names the hooks.

    Returns:
        Pairs (hook name, function). Where the two libraries name a hook point differently, the name
        is a filter that knows both, which TransformerLens takes in its place.

    Raises:
        ValueError: the layer's metadata names no hook; when run, if the input's hook did not fire.
    """
    return paired_hooks(*hook_names(sae), lambda x, _y: sae(x))


def paired_hooks(hook_in: str, hook_out: str, replacement: Replacement) -> list[Hook]:
    """Forward hooks that put replacement(x, y) in the place of y, the activation at the output hook.

    Args:
        hook_in, hook_out: the hook points of x and of y; for an ordinary SAE they are one.
        replacement: called with x and y at every forward pass.
    """
    if hook_in == hook_out:
        return [(_filter(hook_in), lambda y, hook: replacement(y, y))]  # noqa: ARG005
    captured: list[Tensor] = []

    def capture(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        captured[:] = [x]

    def replace(y: Tensor, hook: Any) -> Tensor:
        if not captured:
            raise ValueError(
                f"{hook_in} did not fire before {hook.name}: this model has no such hook point. A plain "
                "HookedTransformer gets mlp.hook_in from SAELens' add_hook_in_to_mlp."
            )
        return replacement(captured.pop(), y)

    return [(hook_in, capture), (_filter(hook_out), replace)]


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


@model_first
def check_fits(model: Any, sae: SAE[Any]) -> None:
    """Raises ValueError where a layer was trained on another model, or on hooks this one lacks."""
    for name in hook_names(sae):
        if attached_layer(model, name) is None:
            hook_point_name(model, name)
    check_trained_on(model, sae)


@model_first
def check_trained_on(model: Any, sae: SAE[Any]) -> None:
    """Raises ValueError where a layer was trained on another model."""
    trained_on = sae.cfg.metadata.model_name
    if trained_on and not is_same_model(trained_on, model.cfg.model_name):
        raise ValueError(
            f"This layer was trained on {trained_on}, and the model is {model.cfg.model_name}. If they "
            f"are the same model, set sae.cfg.metadata.model_name = {model.cfg.model_name!r}."
        )


def _filter(name: str) -> str | Callable[[str], bool]:
    names = equivalent_hook_names(name)
    return name if len(names) == 1 else names.__contains__
