"""Intervening on experts: steering and ablating them in a running model.

An intervention edits the coefficients a of a layer, at its hook_sae_acts_post, while a forward pass of
the model runs through the layer's block, and nowhere else: not where the same layer is called by itself
or stands in another model. Hooks of PyTorch's own do it, which no `reset_hooks` of TransformerLens takes
away, so that `run_with_hooks` and `run_with_cache` inside a with block see the intervention too.
"""

import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Self

from mxd_lens.architectures.base import expert_ids
from mxd_lens.hooks.positions import Pass, Positions, Where
from mxd_lens.hooks.replace import Replaced
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.models import block_of, hook_point_name, model_first, module_at, past_length

Mode = Literal["add", "set", "scale"]
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
        return cls(expert_ids(sae, list(experts)).tolist(), list(experts.values()), mode)

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


class Intervention(AbstractContextManager[Any]):
    """An edit of a layer's coefficients in a model, at some positions, while it is entered."""

    def __init__(self, model: Any, sae: SAE[Any], edit: Edit, where: Where) -> None:
        check_fits(model, sae)
        self.model = model
        self.sae = sae
        self.edit = edit
        self.where = where
        self._entered: list[tuple[object, Place]] = []
        self._reached = 0

    def __enter__(self) -> Any:
        entry = object()
        try:
            place = Place.shared(self.model, self.sae)
            self._entered.append((entry, place))
            place.guests[entry] = self
        except BaseException:
            self._leave(entry)
            raise
        return self.model

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        entry, _place = self._entered[-1]
        try:
            self._leave(entry)
        finally:  # an interrupt may have come while leaving
            self._leave(entry)
        if self._entered:
            return
        reached, self._reached = self._reached, 0
        if kind is None and 0 < reached <= self.where.last:
            raise ValueError(
                f"position {self.where.last} was asked for, and no forward pass reached it: the longest "
                f"sequence had {reached} positions."
            )

    def _leave(self, entry: object) -> None:
        for its, place in self._entered:
            if its is entry:
                place.leave(entry)
        self._entered = [e for e in self._entered if e[0] is not entry]

    def apply(self, now: Pass, feature_acts: Float[Tensor, "*batch d_sae"]) -> Tensor:
        """The edited coefficients."""
        if self.where.last >= 0:
            self._reached = max(self._reached, now.positions(feature_acts).stop)
        return self.edit(now, feature_acts, self.where.mask(now, feature_acts))


class Place:
    """A layer in its place in a model, for as long as anything intervenes on it.

    At every forward pass through its block it is there: attached by SAELens, or put in the MLP's place
    for that pass, so that whatever is attached and detached meanwhile does not matter.

    An interrupt may come at any time. So hooks do nothing unless there is a guest, they do not keep the
    place alive, and without it they are gone.
    """

    def __init__(self, model: Any, sae: SAE[Any]) -> None:
        self.model = model
        self.sae = sae
        hook_in, hook_out = hook_names(sae)
        self.name_out = hook_out
        self.hook_in, self.hook_out = hook_point_name(model, hook_in), hook_point_name(model, hook_out)
        self.layer, self.block = block_of(model, hook_out)
        if block_of(model, hook_in)[1] is not self.block:
            raise ValueError(
                f"this layer reads at {hook_in} and writes at {hook_out}: only layers within one "
                "block can be intervened on."
            )
        self.thread = threading.get_ident()
        self.guests: dict[object, Intervention] = {}
        """What intervenes, in the order of entering."""
        self.now: Pass | None = None
        """The forward pass through the block, if one is under way."""
        self._has_edited = False
        self._replaced: Replaced | None = None
        self._watching = ExitStack()
        weakref.finalize(self, self._watching.close)

    @classmethod
    def shared(cls, model: Any, sae: SAE[Any]) -> "Place":
        """The place of a layer in a model, one for all that intervene on it.

        Raises:
            ValueError: another layer is in this place, or another thread intervenes on the model.
        """
        with _lock:
            place = _places.get((id(model), id(sae)))
            if place is None:
                place = cls(model, sae)
                place._watch()
                _places[id(model), id(sae)] = place
            if not place.guests:
                place.thread = threading.get_ident()
            place._refuse_another_thread()
            return place

    def leave(self, entry: object) -> None:
        """One that intervened leaves; the last takes the layer away."""
        self.guests.pop(entry, None)
        if not self.guests:
            self._end()
            with _lock:
                if _places.get((id(self.model), id(self.sae))) is self:
                    del _places[id(self.model), id(self.sae)]
            self._watching.close()

    def _watch(self) -> None:
        self._is_attached()
        for other in list(_places.values()):
            if other.model is self.model and other.guests:
                other._refuse_another_thread()
                if other.hook_out == self.hook_out:
                    raise ValueError(
                        f"another layer is being intervened on at {self.name_out}: there is room for one."
                    )
        this = weakref.ref(self)

        def begin(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if place := this():
                place._begin([*args, *kwargs.values()])

        def end(_block: Any, _args: Any, output: Any) -> None:
            if place := this():
                place._end(is_complete=output is not None)

        def edit(_module: Any, _args: Any, feature_acts: Tensor) -> Tensor | None:
            place = this()
            return None if place is None else place._edit(feature_acts)

        for handle in (
            self.block.register_forward_pre_hook(begin, with_kwargs=True),
            self.block.register_forward_hook(end, always_call=True),
            self.sae.hook_sae_acts_post.register_forward_hook(edit),
        ):
            self._watching.callback(handle.remove)

    def _refuse_another_thread(self) -> None:
        if threading.get_ident() != self.thread:
            raise ValueError(
                f"{self.model.cfg.model_name} is being intervened on in another thread: a model has one set "
                "of hooks, so enter steer or ablate in the thread that runs it, one thread at a time."
            )

    def _is_attached(self) -> bool:
        """Whether SAELens has attached the layer. Raises ValueError if it has attached another."""
        attached = getattr(module_at(self.model, self.hook_out), "sae", None)
        if attached is not None and attached is not self.sae:
            raise ValueError(
                f"another layer is attached at {self.name_out}: intervene on that one, or take it away "
                "with model.reset_saes()."
            )
        return attached is not None

    def _begin(self, block_inputs: list[Any]) -> None:
        self._end()  # a pass that was interrupted has not ended
        if not self.guests:
            return
        self._refuse_another_thread()
        if not self._is_attached():
            self._replaced = Replaced(self.model, self.hook_in, self.hook_out, self._forward, is_first=True)
            self._replaced.begin()
        self.now, self._has_edited = Pass(past_length(block_inputs, self.layer)), False

    def _end(self, is_complete: bool = False) -> None:
        if self._replaced is not None:
            self._replaced.end()
        began, self.now, self._replaced = self.now is not None, None, None
        if began and is_complete and not self._has_edited:
            raise ValueError(
                f"{self.name_out} did not fire, so that nothing was steered: this model lists the hook point "
                "and does not run it."
            )

    def _forward(self, x: Tensor, _y: Tensor) -> Tensor:
        return self.sae(x.to(self.sae.W_dec.device))

    def _edit(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Tensor | None:
        if self.now is None or threading.get_ident() != self.thread:
            return None
        self._has_edited = True
        for intervention in self.guests.values():
            feature_acts = intervention.apply(self.now, feature_acts)
        return feature_acts


_places: weakref.WeakValueDictionary[tuple[int, int], Place] = weakref.WeakValueDictionary()
_lock = threading.RLock()
