"""The operations as their formulas say, in plain torch: slow, dense, obviously right."""

from collections.abc import Iterator

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mxd_lens.sparse.selection import largest


def topk_gate(
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """relu of the k largest pre-activations x W_enc + b_enc, and where they are."""
    pre = F.linear(x, W_enc.T, b_enc)
    values, indices = largest(pre.reshape(-1, pre.shape[-1]), k)
    return values.relu().view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def sparse_encode(
    x: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    indices: Int[Tensor, "*batch k"],
) -> Float[Tensor, "*batch k"]:
    """relu(x W_enc + b_enc) at these indices."""
    return F.linear(x, W_enc.T, b_enc).gather(-1, indices).relu()


def pre_activations(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
) -> Iterator[Float[Tensor, "block d_sae"]]:
    """x W_enc + b_enc."""
    yield F.linear(x, W_enc.T, b_enc)


def sparse_decode(
    values: Float[Tensor, "*batch k"],
    indices: Int[Tensor, "*batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
    *,
    unit_rows: bool = False,
) -> Float[Tensor, "*batch d_out"]:
    """sum_j values_j W_dec[indices_j].

    Dividing rows of unit norm by their norm changes no value, and its derivative
    is the projection away from the row.
    """
    if unit_rows:
        W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    a = values.new_zeros(*values.shape[:-1], W_dec.shape[0])
    return a.scatter_add(-1, indices, values) @ W_dec
