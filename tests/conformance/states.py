"""The states in which a model may be when a function is called with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from verbs import Case, layer

from mxd_lens import MxD


@contextmanager
def nothing(_model: Any, _mxd: MxD) -> Iterator[None]:
    yield


@contextmanager
def this_attached(model: Any, mxd: MxD) -> Iterator[None]:
    with model.saes(saes=[mxd]):
        yield


@contextmanager
def with_error(model: Any, mxd: MxD) -> Iterator[None]:
    with model.saes(saes=[mxd], use_error_term=True):
        yield


@contextmanager
def another_attached(model: Any, _mxd: MxD) -> Iterator[None]:
    other = layer()
    other.b_dec.add_(1.0)
    with model.saes(saes=[other]):
        yield


@contextmanager
def detached(model: Any, mxd: MxD) -> Iterator[None]:
    model.add_sae(mxd)
    model.reset_saes()
    yield


@contextmanager
def compatible(model: Any, _mxd: MxD) -> Iterator[None]:
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    yield


@contextmanager
def processed(model: Any, mxd: MxD) -> Iterator[None]:
    mxd.cfg.metadata.weight_processing = []
    process = getattr(model, "process_weights_", None) or model.enable_compatibility_mode
    process()
    yield


@contextmanager
def autocast(_model: Any, _mxd: MxD) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@dataclass(frozen=True)
class State:
    """How a model gets into a state, and what is right in it."""

    enter: Callable[[Any, MxD], Any] = nothing
    dtype: torch.dtype = torch.float32
    tolerance: float | None = None
    only: str = ""
    """The one class of models that it applies to."""
    leaves_out: tuple[str, ...] = ()
    """Functions that are no question in this state."""

    def case(self, model: Any, mxd: MxD, reference: Any) -> Case:
        return Case(model, mxd, reference, self.tolerance, keeps_error=self.enter is with_error)


STATES = {
    "nothing attached": State(),
    "this layer attached": State(this_attached, leaves_out=("SAELens' attach",)),
    "this layer attached, with its error term": State(with_error, leaves_out=("SAELens' attach",)),
    "another layer attached": State(another_attached, leaves_out=("SAELens' attach",)),
    "attached and detached": State(detached),
    "compatibility mode": State(compatible, only="bridge"),
    "weights processed (a layer trained on unprocessed ones)": State(
        processed, leaves_out=("train on pairs",)
    ),
    "autocast to bfloat16": State(autocast, tolerance=0.1),
    "bfloat16": State(dtype=torch.bfloat16, tolerance=0.1),
    "float16": State(dtype=torch.float16, tolerance=0.02),
    "float64": State(dtype=torch.float64),
}
