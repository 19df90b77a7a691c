"""Which input an activation tensor was encoded from.

SAELens attaches a layer by calling `encode(x)` and then `decode(a)`. Where the output depends on x twice,
decode has to know which x its activations came from.
"""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class EncodedInputs:
    """Which input each activation tensor was encoded from.

    An entry lives exactly as long as the activation tensor `encode` returned, so nothing is kept
    alive after use. A tensor that `encode` did not return (an edited copy) belongs to the last
    encode if no decode has followed it and no encode of another input is waiting for its own. An
    encode waits as long as its input or the activations it returned are alive.
    """

    def __init__(self) -> None:
        self._input_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._waiting: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = []
        """Input and activations of the encodes that no decode has followed, the last one at the end."""

    def remember(self, feature_acts: Tensor, sae_in: Tensor) -> None:
        others = [(x, a) for x, a in self._alive() if x() is not sae_in]
        self._waiting = [*others, (weakref.ref(sae_in), weakref.ref(feature_acts))]
        self._input_of[feature_acts] = sae_in

    def recall(self, feature_acts: Tensor) -> Tensor:
        """The input of `feature_acts`. Raises ValueError where that is not certain."""
        sae_in = self._input_of.get(feature_acts)
        if sae_in is None:
            shape = tuple(feature_acts.shape)
            waiting = self._alive()
            if len(waiting) > 1:
                raise ValueError(
                    f"decode got activations of shape {shape} that encode did not return, and more than "
                    "one encode is waiting for its decode: pass the input, decode(feature_acts, x)."
                )
            sae_in = waiting[0][0]() if waiting else None
            if sae_in is None:
                raise ValueError(
                    f"decode got activations of shape {shape} and no encode is waiting for its decode: "
                    "this layer's output depends on its input. Pass it, decode(feature_acts, x)."
                )
        self._waiting = []
        return sae_in

    def _alive(self) -> list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]]:
        return [(x, a) for x, a in self._waiting if x() is not None or a() is not None]

    def resolve(self, feature_acts: Tensor, x: Tensor | None) -> Tensor:
        """x, or where it is None the input of `feature_acts`. Raises ValueError where it does not fit."""
        sae_in = self.recall(feature_acts) if x is None else x
        if feature_acts.shape[:-1] != sae_in.shape[:-1]:
            raise ValueError(
                f"activations of shape {tuple(feature_acts.shape)} do not belong to an input of "
                f"shape {tuple(sae_in.shape)}: pass the input they were encoded from, "
                "decode(feature_acts, x)."
            )
        return sae_in

    def __deepcopy__(self, memo: dict[int, Any]) -> "EncodedInputs":
        return EncodedInputs()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
