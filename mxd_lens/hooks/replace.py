"""Replacing an MLP by a layer: one mechanism, as TransformerLens' hooks and as PyTorch's."""

import re
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from mxd_lens.hooks.site import attached_at, hook_names
from mxd_lens.models import check_processing, hook_point_name, listen, module_at

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
        """Raises ValueError at the end of a pass, or of a block, in which nothing was replaced."""
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

    replacing = Replacing(hook_in, hook_out, replaced)

    def capture(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        replacing.capture(x)

    def replace(y: Tensor, hook: Any) -> Tensor:
        if positions is not None and str(hook.name).endswith(".hook_sae_output"):
            raise attached_at(hook_out)
        return replacing.output(y)

    def end(_stream: Tensor, hook: Any) -> None:  # noqa: ARG001
        replacing.check_done()

    hooks: list[Hook] = [(AtHookPoint(hook_out, partial(check_processing, sae=sae)), replace)]
    if hook_in != hook_out:
        hooks.insert(0, (AtHookPoint(hook_in), capture))
    if match := re.match(r"blocks\.\d+\.", hook_out):
        hooks.append((AtHookPoint(f"{match[0]}hook_resid_post", optional=True), end))
    return hooks


class AtHookPoint:
    """A filter of hook points' names that is true at the one which a name means in the model that asks.

    Where SAELens has attached a layer there, it is true at what leaves that layer.

    Args:
        name: any name that `hook_point_name` knows.
        check: called with a model when it asks for the first time; it may raise.
        optional: whether a model may lack it.
    """

    def __init__(self, name: str, check: Callable[[Any], None] | None = None, optional: bool = False) -> None:
        self.name = name
        self.check = check
        self.optional = optional
        block = re.match(r"blocks\.\d+\.", name)
        self._prefix = block[0] if block else ""
        self._resolved: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

    def __call__(self, name: str) -> bool:
        if not name.startswith(self._prefix):
            return False
        point = self._in_the_model_that_asks()
        return name in (point, f"{point}.hook_sae_output")

    def _in_the_model_that_asks(self) -> str:
        model = _model_that_asks(sys._getframe(2))
        if model is None:
            return self.name
        if model not in self._resolved:
            if self.check is not None:
                self.check(model)
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


class Replaced(AbstractContextManager[None]):
    """replacement(x, y) in the place of y, the MLP's own output, in every forward pass of a with block.

    By hooks of PyTorch's own: what SAELens has attached at the output is passed over, and of other hooks
    there those set earlier change y and those set later see what this leaves. After the with block the hooks
    do nothing, wherever an interrupt may have left them.

    Args:
        model: any hooked model.
        hook_in, hook_out: the hook points of x and of y; for an ordinary SAE they are one.
        replacement: called with x and y at every forward pass.
        is_first: whether hooks set earlier, too, see what this leaves.

    Raises:
        ValueError: the model has no such hook points; at the end of the with block, if no forward pass has
            run them.
    """

    def __init__(
        self, model: Any, hook_in: str, hook_out: str, replacement: Replacement, is_first: bool = False
    ) -> None:
        self._model = model
        self._is_first = is_first
        self._points = hook_point_name(model, hook_in), hook_point_name(model, hook_out)
        self._replacing = Replacing(hook_in, hook_out, replacement)
        self._ends: list[Callable[[], None]] = []
        self._is_on = False

    def __enter__(self) -> None:
        try:
            self.begin()
        except BaseException:
            self.end()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.end()
        finally:  # an interrupt may have come meanwhile
            self.end()
        if kind is None:
            self._replacing.check_done()

    def begin(self) -> None:
        self._is_on = True
        point_in, point_out = self._points
        if point_in != point_out:
            self._ends.append(listen(module_at(self._model, point_in), self._capture))
        self._ends.append(listen(module_at(self._model, point_out), self._replace, self._is_first))

    def end(self) -> None:
        self._is_on = False
        while self._ends:
            self._ends[-1]()
            self._ends.pop()

    def _capture(self, _module: Any, _args: Any, x: Tensor) -> None:
        if self._is_on:
            self._replacing.capture(x)

    def _replace(self, module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if not self._is_on:
            return None
        return self._replacing.output(args[0] if hasattr(module, "sae") else y)
