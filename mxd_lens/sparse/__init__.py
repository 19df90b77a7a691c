"""Top-k gate and sparse decode, with their gradients. Imports torch alone.

The operations that every architecture here is made of:

    values, indices = topk_gate(x, W_enc, b_enc, k)      a = TopK_k(relu(x W_enc + b_enc))
    values = sparse_encode(x, W_enc, b_enc, indices)     relu(x W_enc + b_enc) of chosen experts
    mixture = sparse_decode(values, indices, W_dec)      C^T a

Time and memory grow with d_sae through the gate's forward product alone: no
`[batch, d_sae]` matrix exists whole in the forward pass, and none exists in the
backward pass. Gradients are exact; they cannot be differentiated again. Under
`torch.compile` the operations run as they are, between compiled graphs: a step
compiles, but not with `fullgraph=True`.

Each operation has three implementations, chosen by the device of its input:
"reference" (dense, what the formula says), "cpu" and "triton" (CUDA). On first use
on a GPU the Triton kernels are compared with the reference; where they differ or
do not compile, the reference is used, with a warning. A test or a benchmark forces
an implementation with `implementation`:

    with sparse.implementation("reference"):
        ...

The fast ones want the encoder stored row by row, as `d_sae` rows of `d_in`
(`W_enc = torch.empty(d_sae, d_in).T`): its gradient arises in that layout. Any
other layout is right too, at the price of a transposed copy in each step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mxd_lens.sparse import autograd, first_use, reference

__all__ = [
    "Implementation",
    "implementation",
    "pre_activations",
    "sparse_decode",
    "sparse_encode",
    "topk_gate",
]

Implementation = Literal["reference", "cpu", "triton"]

_forced: ContextVar[Implementation | None] = ContextVar("mxd_lens_sparse", default=None)


@contextmanager
def implementation(name: Implementation) -> Iterator[None]:
    """Every operation inside uses this implementation, whatever the device."""
    if name not in ("reference", "cpu", "triton"):
        raise ValueError(f"no implementation {name!r}: choose 'reference', 'cpu' or 'triton'")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def topk_gate(
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """a = TopK_k(relu(x W_enc + b_enc)): the k values of each row and where they are.

    Values are in no particular order. Where fewer than k pre-activations are
    positive the rest are zero and pass no gradient. Under autocast this runs in
    the autocast dtype, as a linear layer does.

    Raises:
        ValueError: shapes or dtypes that do not fit, or k outside [1, d_sae].
    """
    x, W_enc, b_enc = _encoder("topk_gate", x, W_enc, b_enc)
    if not 1 <= k <= W_enc.shape[1]:
        raise ValueError(f"k must lie between 1 and d_sae = {W_enc.shape[1]}, not {k}")
    return _run("topk_gate", x, W_enc, b_enc, k)


def sparse_encode(
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    indices: Int[Tensor, "*batch k"],
) -> Float[Tensor, "*batch k"]:
    """relu(x W_enc + b_enc) at these indices, for gates that choose experts in a way of their own.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    x, W_enc, b_enc = _encoder("sparse_encode", x, W_enc, b_enc)
    if indices.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"sparse_encode takes indices [..., k] for x [..., d_in], not {list(indices.shape)} "
            f"for {list(x.shape)}"
        )
    return _run("sparse_encode", x, W_enc, b_enc, indices)


@torch.no_grad()
def pre_activations(
    x: Float[Tensor, "tokens d_in"], W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"]
) -> Iterator[Float[Tensor, "block d_sae"]]:
    """x W_enc + b_enc in blocks of tokens, in order, without gradients; a block lives until the next.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    x, W_enc, b_enc = _encoder("pre_activations", x, W_enc, b_enc)
    yield from _run("pre_activations", x, W_enc, b_enc)


def sparse_decode(
    values: Float[Tensor, "*batch k"],
    indices: Int[Tensor, "*batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
    *,
    unit_rows: bool = False,
) -> Float[Tensor, "*batch d_out"]:
    """C^T a: sum_j values_j W_dec[indices_j]. An index may occur twice in a row.

    With `unit_rows` the rows c_n of W_dec are taken to have unit norm, and each
    row's gradient loses its component along c_n, so that a small step along it
    leaves the norm alone. It costs a coefficient a row, not a pass over W_dec.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    values, W_dec = _autocast(values, W_dec)
    if values.shape != indices.shape or values.ndim == 0 or W_dec.ndim != 2:
        raise ValueError(
            "sparse_decode takes values [..., k], indices [..., k] and W_dec [d_sae, d_out], "
            f"not {list(values.shape)}, {list(indices.shape)} and {list(W_dec.shape)}"
        )
    _same_dtype(values=values, W_dec=W_dec)
    return _run("sparse_decode", values, indices, W_dec, unit_rows=unit_rows)


def _encoder(operation: str, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, ...]:
    x, W_enc, b_enc = _autocast(x, W_enc, b_enc)
    d_in, d_sae = W_enc.shape
    if x.ndim == 0 or x.shape[-1] != d_in or b_enc.shape != (d_sae,):
        raise ValueError(
            f"{operation} takes x [..., d_in], W_enc [d_in, d_sae] and b_enc [d_sae], "
            f"not {list(x.shape)}, {list(W_enc.shape)} and {list(b_enc.shape)}"
        )
    _same_dtype(x=x, W_enc=W_enc, b_enc=b_enc)
    return x, W_enc, b_enc


@torch.compiler.disable
def _run(operation: str, first: Tensor, *rest: Any, **options: Any) -> Any:
    name = _forced.get() or _by_device(first.device, first.dtype)
    if name == "reference":
        return getattr(reference, operation)(first, *rest, **options)
    kernels = import_module(f"mxd_lens.sparse.{name}")
    return getattr(autograd, operation)(kernels, first, *rest, **options)


def _by_device(device: torch.device, dtype: torch.dtype) -> Implementation:
    if device.type == "cpu":
        return "cpu"
    has_triton = device.type == "cuda" and find_spec("triton") is not None
    return (
        "triton" if has_triton and first_use.agrees_with_reference("triton", device, dtype) else "reference"
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _same_dtype(**tensors: Tensor) -> None:
    if len({t.dtype for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"one dtype is needed, not {found}")
