"""The kernels on a GPU, in Triton: any width, any k, float32 sums for half precision.

Both kernels give each output to one program that reads its entries in a fixed
order. Nothing is added atomically, so they are deterministic; what torch adds
around them is so under `torch.use_deterministic_algorithms`.

Run on an H200 with Triton 3.6 (results/gpu), in all four precisions. Where there is no GPU the tests run both
kernels in Triton's interpreter.
"""

# Triton reads its own types from a kernel's arguments.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 2**25
"""Pre-activations alive at once: 67 MB in half precision, enough rows for a full product."""

_BLOCK_ENTRIES = 16
_BLOCK_D = 256


def pre_activations(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
) -> Iterator[Float[Tensor, "block d_sae"]]:
    for block in x.split(max(64, _BLOCK // W_enc.shape[1])):
        yield torch.addmm(b_enc, block, W_enc)


def weighted_sums(
    weights: Float[Tensor, " entries"],
    rows: Int[Tensor, " entries"],
    starts: Int[Tensor, " sums_and_one"],
    matrix: Float[Tensor, "rows d"],
    less: tuple[Float[Tensor, " sums"], Float[Tensor, "sums d"]] | None = None,
) -> Float[Tensor, "sums d"]:
    n_sums, d = len(starts) - 1, matrix.shape[1]
    sums = matrix.new_empty(n_sums, d)
    # A pointer has to be given for what is not there; it is never read.
    coefficients, along = (weights, matrix) if less is None else less
    if sums.numel():
        with torch.cuda.device_of(matrix):
            _weighted_sums[n_sums, triton.cdiv(d, _BLOCK_D)](
                weights.contiguous(),
                rows,
                starts,
                matrix.contiguous(),
                coefficients,
                along.contiguous(),
                sums,
                d,
                SUBTRACT=less is not None,
                PRECISION=_precision(matrix),
                BLOCK_ENTRIES=_BLOCK_ENTRIES,
                BLOCK_D=_BLOCK_D,
            )
    return sums


def dot_products(
    left: Float[Tensor, "m d"],
    left_rows: Int[Tensor, " entries"],
    right: Float[Tensor, "n d"],
    right_rows: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    n_entries, d = len(left_rows), left.shape[1]
    products = torch.empty(
        n_entries, dtype=torch.promote_types(left.dtype, torch.float32), device=left.device
    )
    if n_entries:
        with torch.cuda.device_of(left):
            _dot_products[(triton.cdiv(n_entries, _BLOCK_ENTRIES),)](
                left.contiguous(),
                left_rows,
                right.contiguous(),
                right_rows,
                products,
                n_entries,
                d,
                PRECISION=_precision(left),
                BLOCK_ENTRIES=_BLOCK_ENTRIES,
                BLOCK_D=_BLOCK_D,
            )
    return products


def _precision(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def _weighted_sums(
    weights,
    rows,
    starts,
    matrix,
    coefficients,
    along,
    sums,
    d,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 64 bits, because rows times d exceeds 32 at the sizes of larger models.
    sum_index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    first = tl.load(starts + sum_index)
    last = tl.load(starts + sum_index + 1)
    total = tl.zeros([BLOCK_D], dtype=PRECISION)
    for begin in range(first, last, BLOCK_ENTRIES):
        entries = begin + tl.arange(0, BLOCK_ENTRIES)
        live = entries < last
        weight = tl.load(weights + entries, mask=live, other=0).to(PRECISION)
        row = tl.load(rows + entries, mask=live, other=0).to(tl.int64)
        values = tl.load(
            matrix + row[:, None] * d + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0,
        ).to(PRECISION)
        total += tl.sum(weight[:, None] * values, axis=0)
    if SUBTRACT:
        coefficient = tl.load(coefficients + sum_index).to(PRECISION)
        total -= coefficient * tl.load(along + sum_index * d + columns, mask=inside, other=0).to(PRECISION)
    tl.store(sums + sum_index * d + columns, total.to(sums.dtype.element_ty), mask=inside)


@triton.jit
def _dot_products(
    left,
    left_rows,
    right,
    right_rows,
    products,
    n_entries,
    d,
    PRECISION: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entries = tl.program_id(0) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    live = entries < n_entries
    left_row = tl.load(left_rows + entries, mask=live, other=0).to(tl.int64)
    right_row = tl.load(right_rows + entries, mask=live, other=0).to(tl.int64)
    total = tl.zeros([BLOCK_ENTRIES], dtype=PRECISION)
    for begin in range(0, d, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (columns < d)[None, :]
        a = tl.load(left + left_row[:, None] * d + columns[None, :], mask=inside, other=0)
        b = tl.load(right + right_row[:, None] * d + columns[None, :], mask=inside, other=0)
        total += tl.sum(a.to(PRECISION) * b.to(PRECISION), axis=1)
    tl.store(products + entries, total, mask=live)
