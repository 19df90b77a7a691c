"""Intervening on experts: steering and ablating them in a running model.

An intervention edits the coefficients a of a layer, at its hook_sae_acts_post, while a forward pass of
the model runs through the layer's block, and nowhere else: not where the same layer is called by itself
or stands in another model. Hooks of PyTorch's own do it, which no `reset_hooks` of TransformerLens takes
away, so that `run_with_hooks` and `run_with_cache` inside a with block see the intervention too.
"""

import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from mxd_lens.architectures.base import expert_ids
from mxd_lens.hooks.replace import check_fits, hook_names
from mxd_lens.models import attached_layer, block_of, hook_point, model_first, past_length

Mode = Literal["add", "set", "scale"]
PositionFilter = Callable[[Int[Tensor, " positions"]], Bool[Tensor, "*sequences positions"]]
Positions = int | slice | Sequence[int] | Tensor | PositionFilter | None
Coefficient = float | Float[Tensor, "*sequences positions"]


@model_first
def steer(
    model: Any,
    sae: SAE[Any],
    experts: Mapping[int, Coefficient],
    mode: Mode = "add",
    positions: Positions = None,
) -> AbstractContextManager[Any]:
    """Changes experts' coefficients in every forward pass inside the with block.

        with steer(model, sae, {17: 100.0}):
            text = model.generate("Let's talk about ")

    a_n becomes a_n + v ("add"), v ("set") or v a_n ("scale"), v being expert n's coefficient: "add" and
    "set" also where the expert was not active. Adding v to expert n of an `MxD` moves the layer's output
    by v c_n * (D^T z), of a transcoder by v c_n.

    A layer that SAELens has attached to this model (`add_sae`, `model.saes`) is steered where it is, error
    term included: the output moves by exactly what the steering moves the layer's. One that is not
    attached stands in the MLP's place for the with block, as by `replacement_hooks`; hooks at the MLP's
    output then see the layer's output, hooks at its input come before it. Any number of these may be
    open, on one layer or several: on one layer, the inner edits what the outer has left. All is undone
    at the end, after an exception too.

    Special tokens are steered, and replaced, like all others, also where the layer's training excluded
    them and `evaluate` leaves them to the MLP: in a forward pass of `generate` the model sees embeddings,
    not token ids. Leave them out of `positions`, which for BOS alone is `slice(1, None)`.

    Args:
        model: any hooked model.
        sae: the layer, of this package or of SAELens.
        experts: v by expert id. A tensor is broadcast to [sequences, positions], positions counted as
            below; gradients flow into it.
        mode: "add", "set" or "scale".
        positions: where. None: everywhere. Else a position, a slice or several positions; or a boolean
            mask, [positions] or [sequences, positions]; or a function of the positions of a forward
            pass, [positions], that returns such a mask of them. Positions are columns of the token
            matrix, padding included, counted from the sequence's start also where a key-value cache
            lets a forward pass see only the last token; a mask must reach as far as the sequence does.
            Negative ones count from the end of a forward pass that sees the whole sequence.

    Returns:
        A context manager; it gives the model, and may be entered again.

    Raises:
        ValueError: the layer does not fit the model, another one stands in its place, or a mode,
            coefficient, position or shape is wrong; when run with a key-value cache, for negative
            positions or where the position cannot be known; at the end of the with block, if positions
            were given that no forward pass reached.
        IndexError: there is no such expert.
        TypeError: an expert or a position is no integer.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
    return Intervention(model, sae, Edit.of(sae, experts, mode), Where(positions))


@model_first
def ablate(
    model: Any,
    sae: SAE[Any],
    experts: int | Sequence[int] | Int[Tensor, " experts"],
    with_: Literal["zero", "mean"] = "zero",
    positions: Positions = None,
    means: Mapping[int, float] | Float[Tensor, " d_sae"] | None = None,
) -> AbstractContextManager[Any]:
    """Sets experts' coefficients to zero, or to their mean, in every forward pass inside the with block.

        with ablate(model, sae, [3, 17]):
            logits = model(tokens)

    Args:
        model, sae, positions: as for `steer`, which also says what happens to the layer and to special
            tokens.
        experts: an expert id or several.
        with_: "zero", or "mean": the mean coefficient over a text, zeros of inactive tokens included.
        means: the mean coefficients, [d_sae] or by expert id; needed for "mean", unless the layer's
            metadata holds them as `mean_coefficients`.

    Raises:
        ValueError, IndexError, TypeError: as `steer`; ValueError also if there are no means.
    """
    ids = expert_ids(sae, experts).tolist()
    if with_ == "zero":
        values: dict[int, Coefficient] = dict.fromkeys(ids, 0.0)
    elif with_ == "mean":
        values = mean_coefficients(sae, ids, means)
    else:
        raise ValueError(f"with_ must be 'zero' or 'mean', got {with_!r}.")
    return Intervention(model, sae, Edit.of(sae, values, "set"), Where(positions))


def mean_coefficients(
    sae: SAE[Any], experts: Sequence[int], means: Mapping[int, float] | Float[Tensor, " d_sae"] | None
) -> dict[int, Coefficient]:
    """The mean coefficients of some experts, out of what is given or the layer's metadata."""
    known = sae.cfg.metadata.mean_coefficients if means is None else means
    if known is None:
        raise ValueError(
            "mean ablation needs the experts' mean coefficients: pass means=, [d_sae] or {expert: mean}, "
            "as sae.encode(x).mean(0) over the inputs of a text."
        )
    if isinstance(known, Mapping):
        if missing := [n for n in experts if n not in known]:
            raise ValueError(f"means has no mean for expert {', '.join(map(str, missing))}.")
    elif len(known) != sae.cfg.d_sae:
        raise ValueError(f"means must be [d_sae = {sae.cfg.d_sae}], or by expert id, got [{len(known)}].")
    return {n: float(known[n]) for n in experts}


@dataclass(frozen=True)
class Pass:
    """A forward pass through a block: it sees positions past, ..., past + n - 1 of its sequences."""

    past: int | None
    """None where it cannot be known."""

    def positions(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> range:
        """The positions in the sequence of the activations' second dimension.

        Raises:
            ValueError: they are not known.
        """
        if self.past is None or feature_acts.ndim != 3:
            raise ValueError(
                f"the positions of activations of shape {tuple(feature_acts.shape)} cannot be known here"
                + (", with this key-value cache: run without it" if self.past is None else "")
                + ", or intervene everywhere, with positions=None and a number as coefficient."
            )
        return range(self.past, self.past + feature_acts.shape[1])


@dataclass(frozen=True)
class Edit:
    """What happens to the coefficients of some experts."""

    experts: list[int]
    coefficients: list[Coefficient]
    mode: Mode

    @classmethod
    def of(cls, sae: SAE[Any], experts: Mapping[int, Coefficient], mode: Mode) -> Self:
        """Raises IndexError, TypeError or ValueError where an expert or a coefficient is none."""
        if not isinstance(experts, Mapping):
            raise TypeError(f"experts must be a mapping, {{expert: coefficient}}, got {experts!r}.")
        for n, v in experts.items():
            if not isinstance(v, Tensor) and not math.isfinite(v):
                raise ValueError(f"the coefficient of expert {n} must be finite, got {v!r}.")
        return cls(expert_ids(sae, experts).tolist(), list(experts.values()), mode)

    def values(self, now: Pass, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n"]:
        """The coefficients v at the positions of a forward pass."""
        batch = feature_acts.shape[:-1]
        columns = []
        for n, v in zip(self.experts, self.coefficients, strict=True):
            v_here = torch.as_tensor(v, dtype=feature_acts.dtype, device=feature_acts.device)
            if v_here.ndim > 0 and v_here.shape[-1] != 1:  # it differs between positions
                seen = now.positions(feature_acts)
                if v_here.shape[-1] < seen.stop:
                    raise ValueError(
                        f"the coefficient of expert {n}, {tuple(v_here.shape)}, ends before the sequence, of "
                        f"{seen.stop} positions."
                    )
                v_here = v_here[..., seen.start : seen.stop]
            try:
                columns.append(v_here.expand(batch))
            except RuntimeError:
                raise ValueError(
                    f"the coefficient of expert {n} has shape {tuple(v_here.shape)}, which is not "
                    f"broadcast to [sequences, positions] = {tuple(batch)}."
                ) from None
        return torch.stack(columns, dim=-1)

    def __call__(
        self, now: Pass, feature_acts: Float[Tensor, "*batch d_sae"], where: Bool[Tensor, "*batch"] | None
    ) -> Float[Tensor, "*batch d_sae"]:
        """An edited copy of a."""
        if not self.experts:
            return feature_acts
        before, v = feature_acts[..., self.experts], self.values(now, feature_acts)
        after = {"add": before + v, "set": v, "scale": before * v}[self.mode]
        if where is not None:
            after = torch.where(where.unsqueeze(-1), after, before)
        edited = feature_acts.clone()
        edited[..., self.experts] = after
        return edited


class Where:
    """At which positions an intervention acts: see `steer`."""

    last = -1
    """The last position asked for by its number; -1 if there is none."""

    def __init__(self, positions: Positions) -> None:
        self._mask_of: Callable[[range], Tensor] | None
        if positions is None:
            self._mask_of = None
        elif isinstance(positions, slice):
            self._mask_of = partial(positions_in_slice, positions)
        elif callable(positions) and not isinstance(positions, Tensor):
            self._mask_of = partial(positions_by_function, positions)
        elif isinstance(positions, Tensor) and positions.dtype == torch.bool:
            if positions.ndim not in (1, 2):
                raise ValueError(
                    f"a mask of positions is [positions] or [sequences, positions], got "
                    f"{tuple(positions.shape)}."
                )
            self._mask_of = partial(positions_in_mask, positions)
        else:
            several = positions.flatten().tolist() if isinstance(positions, Tensor) else positions
            numbers = [position(p) for p in (several if isinstance(several, Sequence) else [several])]
            self._mask_of = partial(positions_by_number, numbers)
            self.last = max(numbers, default=-1)

    def mask(self, now: Pass, feature_acts: Float[Tensor, "*batch d_sae"]) -> Bool[Tensor, "*batch"] | None:
        """The mask of a forward pass; None: everywhere."""
        if self._mask_of is None:
            return None
        mask, batch = self._mask_of(now.positions(feature_acts)), feature_acts.shape[:-1]
        try:
            return mask.to(feature_acts.device).expand(batch)
        except RuntimeError:
            raise ValueError(
                f"a mask of positions of shape {tuple(mask.shape)} does not fit [sequences, positions] = "
                f"{tuple(batch)}."
            ) from None


def position(p: Any) -> int:
    """p, if it is an integer."""
    if not isinstance(p, bool):
        with suppress(TypeError):
            return operator.index(p)
    raise TypeError(
        f"positions must be None, integers, a slice, a boolean tensor or a function, got {p!r} among them."
    )


def positions_in_mask(given: Tensor, seen: range) -> Tensor:
    """The part of a mask of the whole sequence that a forward pass sees."""
    if given.shape[-1] < seen.stop:
        raise ValueError(
            f"the mask of positions, {tuple(given.shape)}, ends before the sequence, of {seen.stop} "
            "positions."
        )
    return given[..., seen.start : seen.stop]


def positions_by_function(given: PositionFilter, seen: range) -> Tensor:
    """What a function says about the positions of a forward pass."""
    mask = given(torch.tensor(seen))
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"the function of positions must return a boolean tensor, got {mask!r}.")
    return mask


def positions_in_slice(given: slice, seen: range) -> Tensor:
    """A mask of the positions of a forward pass that lie in a slice of the sequence."""
    refuse_negative([p for p in (given.start, given.stop) if p is not None], seen)
    chosen = range(seen.stop)[given]
    return torch.tensor([p in chosen for p in seen])


def positions_by_number(given: list[int], seen: range) -> Tensor:
    """A mask of the positions of a forward pass that are among some numbers, from the end if negative."""
    refuse_negative(given, seen)
    if given and min(given) < -seen.stop:
        raise ValueError(f"there is no position {min(given)} in a sequence of {seen.stop}.")
    chosen = {p % seen.stop if p < 0 else p for p in given}
    return torch.tensor([p in chosen for p in seen])


def refuse_negative(positions: list[int], seen: range) -> None:
    """Raises ValueError where the end of the sequence is not what it was at the first forward pass."""
    negative = [p for p in positions if p < 0]
    if negative and seen.start > 0:
        raise ValueError(
            f"position {negative[0]} counts from the end of the sequence, which moves when text is "
            "generated with a key-value cache: give positions from the start."
        )


class Intervention(AbstractContextManager[Any]):
    """An edit of a layer's coefficients in a model, at some positions, while it is entered."""

    def __init__(self, model: Any, sae: SAE[Any], edit: Edit, where: Where) -> None:
        check_fits(model, sae)
        self.model = model
        self.sae = sae
        self.edit = edit
        self.where = where
        self._entered: list[ExitStack] = []
        self._reached = 0

    def __enter__(self) -> Any:
        with ExitStack() as stack:
            place = stack.enter_context(standing_in(self.model, self.sae))

            def hook(_module: nn.Module, _args: Any, feature_acts: Tensor) -> Tensor | None:
                return None if place.now is None else self._apply(place.now, feature_acts)

            stack.callback(self.sae.hook_sae_acts_post.register_forward_hook(hook).remove)
            self._entered.append(stack.pop_all())
        return self.model

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._entered.pop().close()
        if self._entered:
            return
        reached, self._reached = self._reached, 0
        if kind is None and 0 < reached <= self.where.last:
            raise ValueError(
                f"position {self.where.last} was asked for, and no forward pass reached it: the longest "
                f"sequence had {reached} positions."
            )

    def _apply(self, now: Pass, feature_acts: Float[Tensor, "*batch d_sae"]) -> Tensor:
        if self.where.last >= 0:
            self._reached = max(self._reached, now.positions(feature_acts).stop)
        return self.edit(now, feature_acts, self.where.mask(now, feature_acts))


class Running(threading.local):
    """What is under way in a thread: two models may run one layer at once."""

    now: Pass | None = None
    """The forward pass through the layer's block, if one is under way."""
    replacing: tuple[RemovableHandle, ...] = ()
    """The hooks that put the layer in the MLP's place for that pass, if it is not attached."""


class Place:
    """A layer in its place in a model, for as long as anything intervenes on it.

    At every forward pass through its block it is there: attached by SAELens, or put in the MLP's place
    for that pass, so that whatever is attached and detached meanwhile does not matter.
    """

    def __init__(self, model: Any, sae: SAE[Any]) -> None:
        self.model = model
        self.sae = sae
        self.hook_in, self.hook_out = hook_names(sae)
        self.layer, self.block = block_of(model, self.hook_out)
        if block_of(model, self.hook_in)[1] is not self.block:
            raise ValueError(
                f"this layer reads at {self.hook_in} and writes at {self.hook_out}: only layers within one "
                "block can be intervened on."
            )
        self._running = Running()
        self._watching = ExitStack()
        self.guests = 0

    @property
    def now(self) -> Pass | None:
        """The forward pass through the block, if one is under way in this thread."""
        return self._running.now

    def open(self) -> None:
        """Begins to watch the block. Raises ValueError if another layer is in this place."""
        self._is_attached()
        output = hook_point(self.model, self.hook_out)
        for other in _places.values():
            if other.model is self.model and hook_point(other.model, other.hook_out) is output:
                raise ValueError(
                    f"another layer is being intervened on at {self.hook_out}: there is room for one."
                )
        for handle in (
            self.block.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.block.register_forward_hook(self._end, always_call=True),
        ):
            self._watching.callback(handle.remove)

    def close(self) -> None:
        self._watching.close()

    def _is_attached(self) -> bool:
        """Whether SAELens has attached the layer. Raises ValueError if it has attached another."""
        attached = attached_layer(self.model, self.hook_out)
        if attached is not None and attached is not self.sae:
            raise ValueError(
                f"another layer is attached at {self.hook_out}: intervene on that one, or take it away "
                "with model.reset_saes()."
            )
        return attached is not None

    def _begin(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_attached():
            self._running.replacing = self._replace()
        self._running.now = Pass(past_length([*args, *kwargs.values()], self.layer))

    def _end(self, *_: Any) -> None:
        for handle in self._running.replacing:
            handle.remove()
        self._running.now, self._running.replacing = None, ()

    def _replace(self) -> tuple[RemovableHandle, ...]:
        """Puts the layer in the MLP's place: after every hook at its input, before those at its output."""
        captured: list[Tensor] = []

        def capture(_module: nn.Module, _args: Any, x: Tensor) -> None:
            captured[:] = [x]

        def replace(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
            return self.sae(captured.pop() if self.hook_in != self.hook_out else y)

        output = hook_point(self.model, self.hook_out).register_forward_hook(replace, prepend=True)
        if self.hook_in == self.hook_out:
            return (output,)
        return hook_point(self.model, self.hook_in).register_forward_hook(capture), output


_places: dict[tuple[int, int], Place] = {}


@contextmanager
def standing_in(model: Any, sae: SAE[Any]) -> Iterator[Place]:
    """A layer in its place: shared by all that intervene on it, and closed by the last to leave."""
    key = id(model), id(sae)
    if key not in _places:
        place = Place(model, sae)
        place.open()
        _places[key] = place
    place = _places[key]
    place.guests += 1
    try:
        yield place
    finally:
        place.guests -= 1
        if place.guests == 0:
            del _places[key]
            place.close()
