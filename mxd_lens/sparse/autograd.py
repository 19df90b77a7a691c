"""The gradients of the operations, written once over three kernels.

With T tokens and k entries a token, entry e belongs to token t_e and selects row
n_e with value v_e. Two views of the same T k entries are all that is needed: by
token, as the gate leaves them, and by row, sorted once. Then

    C^T a                 a weighted sum of rows of C for each token
    d/dv_e                g_{t_e} . c_{n_e}
    d/dC, d/dG^T          a weighted sum of rows of g, or of x, for each row n

where g is the gradient of the loss with respect to C^T a. The component of
d/dC along c_n is p_n c_n with p_n = sum_e v_e (g_{t_e} . c_n): the dot products
are those of d/dv, so that removing it needs one coefficient a row.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxd_lens.sparse.selection import largest


class Kernels(Protocol):
    """What a device has to offer; a module with these three functions is one."""

    def pre_activations(
        self,
        x: Float[Tensor, "tokens d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
    ) -> Iterator[Float[Tensor, "block d_sae"]]:
        """x W_enc + b_enc in blocks of tokens, in order; a block lives until the next."""

    def weighted_sums(
        self,
        weights: Float[Tensor, " entries"],
        rows: Int[Tensor, " entries"],
        starts: Int[Tensor, " sums_and_one"],
        matrix: Float[Tensor, "rows d"],
        less: tuple[Float[Tensor, " sums"], Float[Tensor, "sums d"]] | None = None,
    ) -> Float[Tensor, "sums d"]:
        """sum of weights_e matrix[rows_e] over starts_s <= e < starts_{s+1}, for each s.

        `less = (p, C)` subtracts p_s C_s from sum s.
        """

    def dot_products(
        self,
        left: Float[Tensor, "m d"],
        left_rows: Int[Tensor, " entries"],
        right: Float[Tensor, "n d"],
        right_rows: Int[Tensor, " entries"],
    ) -> Float[Tensor, " entries"]:
        """left[left_rows_e] . right[right_rows_e], in the tensors' precision or better."""


class ByRow(NamedTuple):
    """The T k entries in the order of the rows they select."""

    order: Int[Tensor, " entries"]
    """Position of each entry in the order of tokens."""
    rows: Int[Tensor, " entries"]
    """The row each entry selects, ascending."""
    tokens: Int[Tensor, " entries"]
    """The token each entry belongs to."""
    starts: Int[Tensor, " d_sae_and_one"]
    """Row n has the entries starts_n <= e < starts_{n+1}."""


def by_row(indices: Int[Tensor, "tokens k"], n_rows: int) -> ByRow:
    # A stable sort makes the order of every sum, and with it its rounding, reproducible.
    rows, order = indices.flatten().sort(stable=True)
    bounds = torch.arange(n_rows + 1, device=rows.device)
    return ByRow(order, rows, order // indices.shape[1], torch.searchsorted(rows, bounds))


def topk_gate(
    kernels: Kernels,
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        values = rows.new_empty(len(rows), k)
        indices = torch.empty(len(rows), k, dtype=torch.int64, device=x.device)
        done = 0
        for block in kernels.pre_activations(rows, W_enc, b_enc):
            of_block = slice(done, done := done + len(block))
            values[of_block], indices[of_block] = largest(block, k)
        values.relu_()
    values = _Gate.apply(rows, W_enc, b_enc, values, indices, kernels)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def sparse_encode(
    kernels: Kernels,
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    indices: Int[Tensor, "*batch k"],
) -> Float[Tensor, "*batch k"]:
    rows, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
    with torch.no_grad():
        token_of = torch.arange(len(rows), device=x.device).repeat_interleave(chosen.shape[1])
        products = kernels.dot_products(rows, token_of, W_enc.T, chosen.flatten())
        values = (products + b_enc[chosen.flatten()]).relu_().to(x.dtype).view(chosen.shape)
    return _Gate.apply(rows, W_enc, b_enc, values, chosen, kernels).view(indices.shape)


def pre_activations(
    kernels: Kernels,
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
) -> Iterator[Float[Tensor, "block d_sae"]]:
    return kernels.pre_activations(x, W_enc, b_enc)


def sparse_decode(
    kernels: Kernels,
    values: Float[Tensor, "*batch k"],
    indices: Int[Tensor, "*batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
    *,
    unit_rows: bool = False,
) -> Float[Tensor, "*batch d_out"]:
    *batch, k = values.shape
    mixture = _SparseDecode.apply(values.reshape(-1, k), indices.reshape(-1, k), W_dec, unit_rows, kernels)
    return mixture.view(*batch, W_dec.shape[1])


class _Gate(torch.autograd.Function):
    """The values of chosen pre-activations, already computed: only their gradients are left."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 (its gradient is wanted)
        values: Tensor,
        indices: Tensor,
        kernels: Kernels,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.kernels = kernels
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_values: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices = ctx.saved_tensors
        d_sae = W_enc.shape[1]
        d_pre = d_values.masked_fill(values == 0, 0)
        d_x = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = _mixture(ctx.kernels, d_pre, indices, W_enc.T)
        if ctx.needs_input_grad[1]:
            entries = by_row(indices, d_sae)
            d_W = ctx.kernels.weighted_sums(
                d_pre.flatten()[entries.order], entries.tokens, entries.starts, x
            ).T
        if ctx.needs_input_grad[2]:
            d_b = _row_sums(d_pre.flatten(), indices.flatten(), d_sae).to(d_pre.dtype)
        return d_x, d_W, d_b, None, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, unit_rows: bool, kernels: Kernels
    ) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        ctx.unit_rows, ctx.kernels = unit_rows, kernels
        return _mixture(kernels, values, indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W_dec = ctx.saved_tensors
        needs_values, _, needs_W, *_ = ctx.needs_input_grad
        entries = by_row(indices, len(W_dec))
        d_values = d_W = less = None
        if needs_values or ctx.unit_rows:
            # In the order of rows each row of W_dec is read once, not once an entry.
            dots = ctx.kernels.dot_products(g, entries.tokens, W_dec, entries.rows)
        if needs_values:
            d_values = torch.empty_like(values)
            d_values.view(-1)[entries.order] = dots.to(values.dtype)
        if needs_W:
            weights = values.flatten()[entries.order]
            if ctx.unit_rows:
                less = (_row_sums(weights * dots, entries.rows, len(W_dec)), W_dec)
            d_W = ctx.kernels.weighted_sums(weights, entries.tokens, entries.starts, g, less)
        return d_values, None, d_W, None, None


def _mixture(
    kernels: Kernels,
    values: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    matrix: Float[Tensor, "d_sae d"],
) -> Float[Tensor, "tokens d"]:
    tokens, k = values.shape
    starts = torch.arange(0, tokens * k + 1, k, device=values.device)
    return kernels.weighted_sums(values.flatten(), indices.flatten(), starts, matrix)


def _row_sums(
    entries: Float[Tensor, " entries"], rows: Int[Tensor, " entries"], n_rows: int
) -> Float[Tensor, " d_sae"]:
    dtype = torch.promote_types(entries.dtype, torch.float32)
    sums = torch.zeros(n_rows, dtype=dtype, device=entries.device)
    return sums.index_add_(0, rows, entries.to(dtype))


class TangentGradient(torch.autograd.Function):
    """The identity, whose gradient loses its component parallel to each (unit norm) row."""

    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return W.view_as(W)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (W,) = ctx.saved_tensors
        return grad - (grad * W).sum(-1, keepdim=True) * W
