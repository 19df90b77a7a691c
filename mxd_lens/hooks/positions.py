"""At which positions of which sequences an intervention acts."""

import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.models import ordinary_tokens

PositionFilter = Callable[[Int[Tensor, " positions"]], Bool[Tensor, "*sequences positions"]]
Positions = int | slice | Sequence[int] | Tensor | PositionFilter | None


def trained_positions(
    model: Any, sae: SAE[Any], tokens: Int[Tensor, "*batch positions"]
) -> Bool[Tensor, "*batch positions"]:
    """The positions that a layer was trained on: the rule that every measurement here follows.

    metadata.exclude_special_tokens leaves special tokens out (True), or the tokens with these ids;
    metadata.seqpos_slice keeps a slice of each sequence, as (1, None) all but the first position. Released
    layers have the rule of the library that trained them; set the two fields to override it.

    Args:
        model: the model, for its tokenizer's special tokens.
        sae: the layer.
        tokens: token ids; a sequence starts at position 0.
    """
    metadata = sae.cfg.metadata
    return ordinary_tokens(model, tokens, metadata.exclude_special_tokens) & in_slice(
        tokens, metadata.seqpos_slice
    )


def in_slice(
    tokens: Int[Tensor, "*batch positions"], seqpos_slice: Sequence[int | None] | None
) -> Bool[Tensor, " positions"]:
    """Which positions a slice of them, as (1, None), keeps; None keeps all."""
    kept = torch.zeros(tokens.shape[-1], dtype=torch.bool, device=tokens.device)
    kept[slice(*(seqpos_slice or (None,)))] = True
    return kept


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
