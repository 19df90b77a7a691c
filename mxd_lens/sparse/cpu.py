"""The kernels on a CPU: oneDNN for the gate's product, embedding bags for the rest.

Half of their backward pass goes into faulting in the pages of two fresh `[d_sae, d]`
gradients. THP_MEM_ALLOC_ENABLE=1 in the environment, which has torch ask Linux for
huge pages, saves most of that.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 7_500_000
"""Pre-activations alive at once. 30 MB in float32: few blocks, because each one waits for
all threads several times, but below the 32 MB from which the allocator returns memory to
the system and every block would fault its pages in anew."""

_ROWS = 2_048
"""Sums formed at once where each is corrected afterwards, while it is still in the cache."""


def pre_activations(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
) -> Iterator[Float[Tensor, "block d_sae"]]:
    blocks = x.split(max(64, _BLOCK // W_enc.shape[1]))
    product = _onednn_product()
    if product is None or x.dtype != torch.float32:
        for block in blocks:
            yield torch.addmm(b_enc, block, W_enc)
    else:
        weight = W_enc.T.contiguous()
        for block in blocks:
            yield product(block, weight, b_enc, "none", [], "")


@cache
def _onednn_product() -> Callable[..., Tensor] | None:
    """x W^T + b by oneDNN, a third faster than MKL on AMD; None where torch lacks it.

    torch offers it to its compiler alone, under a name that may change: so it is tried.
    """
    x = torch.tensor([[2.0, 3.0]])
    try:
        product = torch.ops.mkldnn._linear_pointwise
        found = product(x, x, x[0, :1], "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return product if found.tolist() == [[15.0]] else None


def weighted_sums(
    weights: Float[Tensor, " entries"],
    rows: Int[Tensor, " entries"],
    starts: Int[Tensor, " sums_and_one"],
    matrix: Float[Tensor, "rows d"],
    less: tuple[Float[Tensor, " sums"], Float[Tensor, "sums d"]] | None = None,
) -> Float[Tensor, "sums d"]:
    if less is None:
        return F.embedding_bag(
            rows, matrix, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
    coefficients, along = less
    sums = torch.empty_like(along, memory_format=torch.contiguous_format)
    for first in range(0, len(sums), _ROWS):
        block = slice(first, first + _ROWS)
        ends = starts[first : first + _ROWS + 1]
        entries = slice(int(ends[0]), int(ends[-1]))
        part = weighted_sums(weights[entries], rows[entries], ends - ends[0], matrix)
        torch.addcmul(part, coefficients[block, None], along[block], value=-1, out=sums[block])
    return sums


def dot_products(
    left: Float[Tensor, "m d"],
    left_rows: Int[Tensor, " entries"],
    right: Float[Tensor, "n d"],
    right_rows: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    product = _embedding_bag_product()
    if product is not None:
        return product(left.contiguous(), right.contiguous(), right_rows, right_rows, left_rows, 0)
    rows = zip(left_rows.split(_ROWS), right_rows.split(_ROWS), strict=True)
    return torch.cat([left.new_empty(0), *((left[i] * right[j]).sum(-1) for i, j in rows)])


@cache
def _embedding_bag_product() -> Callable[..., Tensor] | None:
    """Products of rows as an embedding bag's gradient, five times faster; None where torch lacks it.

    torch has it for its own use, under a name that may change: so it is tried.
    """
    x, row = torch.tensor([[2.0, 3.0]]), torch.tensor([0])
    try:
        product = torch.ops.aten._embedding_bag_per_sample_weights_backward
        found = product(x, x, row, row, row, 0)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return None
    return product if found.tolist() == [13.0] else None
