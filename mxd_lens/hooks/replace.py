"""Replacing an MLP by a layer: one mechanism, as TransformerLens' hooks and as PyTorch's."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from mxd_lens.hooks.site import hook_names, listen
from mxd_lens.models import hook_point_name, module_at

Replacement = Callable[[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch d_out"]], Tensor]
Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class Replacing(threading.local):
    """One MLP's output replaced by replacement(x, y), x being its input in the same forward pass."""

    x: Tensor | None = None
    done = False

    def __init__(self, hook_in: str, hook_out: str, replacement: Replacement) -> None:
        self.hook_in, self.hook_out = hook_in, hook_out
        self.replacement = replacement

    def capture(self, x: Tensor) -> None:
        self.x, self.done = x, False

    def output(self, y: Tensor) -> Tensor:
        """replacement(x, y), in the dtype and on the device of y, which the model goes on with."""
        x = y if self.hook_in == self.hook_out else self.x
        self.x, self.done = None, True
        if x is None:
            raise ValueError(f"{self.hook_in} did not fire before {self.hook_out}, so there is no input.")
        return self.replacement(x, y).to(y)

    def check_done(self) -> None:
        """Raises ValueError at the end of a block in which nothing was replaced."""
        done, self.x, self.done = self.done, None, False
        if not done:
            raise ValueError(
                f"{self.hook_out} did not fire, so that nothing was replaced: this model lists the hook "
                "point and does not run it, or something was attached there after these hooks were set."
            )


def replacement_hooks(
    sae: SAE[Any], positions: Bool[Tensor, "sequences positions"] | None = None
) -> list[Hook]:
    """Forward hooks that put `sae(x)` in the place of the MLP's output.

        logits = model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(sae))

    Works on HookedTransformer, HookedSAETransformer, TransformerBridge and SAETransformerBridge, in
    `generate` too (inside `with model.hooks(fwd_hooks=...)`), and for SAELens' own SAEs and
    transcoders, skip connections included. Where SAELens has attached a layer already, the MLP is replaced
    by this one. A plain HookedTransformer has no `mlp.hook_in`: SAELens' `add_hook_in_to_mlp` gives it one.

    Args:
        sae: the layer; its metadata names the hooks.
        positions: where to replace the MLP; elsewhere its own output stays. Those that the layer was trained
            on, as `evaluate` counts them, are `trained_positions(model, sae, tokens)`. None: everywhere, as
            SAELens attaches a layer, which knows no tokens.

    Returns:
        Pairs (filter, function). The filter finds the hook point in the model that is run: only the model
        knows which of its hook points a name means.

    Raises:
        ValueError: the layer's metadata names no hook; when run, if the model has no such hook points or
            they do not fire.
    """
    hook_in, hook_out = hook_names(sae)

    def replaced(x: Tensor, y: Tensor) -> Tensor:
        y_hat = sae(x.to(sae.W_dec.device))
        if positions is None:
            return y_hat
        if positions.shape != y.shape[:-1]:
            raise ValueError(
                f"positions have the shape {tuple(positions.shape)}, and the model runs sequences of "
                f"{tuple(y.shape[:-1])}: give the positions of these tokens."
            )
        return torch.where(positions.unsqueeze(-1).to(y.device), y_hat.to(y), y)

    return _hooks(Replacing(hook_in, hook_out, replaced), needs_y=positions is not None)


def paired_hooks(hook_in: str, hook_out: str, replacement: Replacement) -> list[Hook]:
    """Forward hooks that put replacement(x, y) in the place of y, the activation at the output hook.

    Args:
        hook_in, hook_out: the hook points of x and of y; for an ordinary SAE they are one.
        replacement: called with x and y at every forward pass.

    Raises:
        ValueError: when run, as `replacement_hooks`, and where a layer is attached at the output.
    """
    return _hooks(Replacing(hook_in, hook_out, replacement), needs_y=True)


def _hooks(replacing: Replacing, needs_y: bool) -> list[Hook]:
    def capture(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        replacing.capture(x)

    def replace(y: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return replacing.output(y)

    def end(_stream: Tensor, hook: Any) -> None:  # noqa: ARG001
        replacing.check_done()

    hooks: list[Hook] = [(AtHookPoint(replacing.hook_out, attached_is_wrong=needs_y), replace)]
    if replacing.hook_in != replacing.hook_out:
        hooks.insert(0, (AtHookPoint(replacing.hook_in), capture))
    if match := re.match(r"blocks\.\d+\.", replacing.hook_out):
        hooks.append((AtHookPoint(f"{match[0]}hook_resid_post", optional=True), end))
    return hooks


class AtHookPoint:
    """A filter of hook points' names that is true at the one which a name means in the model that asks.

    Args:
        name: any name that `hook_point_name` knows.
        attached_is_wrong: whether to refuse a hook point where SAELens has attached a layer; else what
            leaves that layer is taken.
        optional: whether a model may lack it.
    """

    def __init__(self, name: str, attached_is_wrong: bool = False, optional: bool = False) -> None:
        self.name = name
        self.attached_is_wrong = attached_is_wrong
        self.optional = optional
        block = re.match(r"blocks\.\d+\.", name)
        self._prefix = block[0] if block else ""
        self._resolved: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

    def __call__(self, name: str) -> bool:
        if not name.startswith(self._prefix):
            return False
        point = self._in_the_model_that_asks()
        if name.startswith(f"{point}.hook_sae_") and self.attached_is_wrong:
            raise ValueError(
                f"a layer is attached at {self.name}: take it away with model.reset_saes() first, for the "
                "MLP's own output is needed."
            )
        return name in (point, f"{point}.hook_sae_output")

    def _in_the_model_that_asks(self) -> str:
        model = _model_that_asks(sys._getframe(2))
        if model is None:
            return self.name
        if model not in self._resolved:
            try:
                self._resolved[model] = hook_point_name(model, self.name)
            except ValueError:
                if not self.optional:
                    raise
                self._resolved[model] = self.name
        return self._resolved[model]


def _model_that_asks(frame: FrameType | None) -> Any | None:
    """The model whose method calls a filter of names: TransformerLens gives filters nothing but the names."""
    for _ in range(4):
        if frame is None:
            return None
        model = frame.f_locals.get("self")
        if hasattr(model, "run_with_hooks"):
            return model
        frame = frame.f_back
    return None


class Replaced:
    """replacement(x, y) in the place of y, the MLP's own output, from `begin` to `end`.

    By hooks of PyTorch's own: what SAELens has attached at the output is passed over, hooks at the input
    come before it, and hooks at the output see what it leaves. After `end` the hooks do nothing, wherever an
    interrupt may have left them.

    Args:
        hook_in, hook_out: hook points by the model's own names for them.
        replacement: as for `paired_hooks`.
    """

    def __init__(self, hook_in: str, hook_out: str, replacement: Replacement) -> None:
        self._replacing = Replacing(hook_in, hook_out, replacement)
        self._ends: list[Callable[[], None]] = []
        self._is_on = False

    def begin(self, model: Any) -> None:
        hook_in, hook_out = self._replacing.hook_in, self._replacing.hook_out
        self._is_on = True
        if hook_in != hook_out:
            self._ends.append(listen(module_at(model, hook_in), self._capture))
        self._ends.append(listen(module_at(model, hook_out), self._replace, prepend=True))

    def end(self) -> None:
        self._is_on = False
        while self._ends:
            self._ends[-1]()
            self._ends.pop()

    def _capture(self, _module: Any, _args: Any, x: Tensor) -> None:
        if self._is_on:
            self._replacing.capture(x)

    def _replace(self, _module: Any, args: tuple[Tensor, ...], _y: Tensor) -> Tensor | None:
        return self._replacing.output(args[0]) if self._is_on else None


@contextmanager
def replaced(model: Any, hook_in: str, hook_out: str, replacement: Replacement) -> Iterator[None]:
    """replacement(x, y) in the place of y, the MLP's own output, in every forward pass of the with block.

    What SAELens has attached at the output is passed over.

    Args:
        model: any hooked model.
        hook_in, hook_out, replacement: as for `paired_hooks`.

    Raises:
        ValueError: the model has no such hook points.
    """
    inside = Replaced(hook_point_name(model, hook_in), hook_point_name(model, hook_out), replacement)
    try:
        inside.begin(model)
        yield
    finally:
        inside.end()
