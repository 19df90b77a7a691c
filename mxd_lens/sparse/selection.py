"""The k largest of each row, without sorting through all of it."""

from math import isqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor


def largest(
    pre: Float[Tensor, "tokens d_sae"], k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """torch.topk(pre, k), in two stages where that is less to look through.

    Columns fall into groups of s. The k groups with the largest maxima hold k
    entries that nothing outside them exceeds, so the k largest entries are among
    their k s. Selecting from d_sae / s maxima and then from k s candidates is
    least work at s = sqrt(d_sae / k).
    """
    tokens, d_sae = pre.shape
    size = isqrt(d_sae // k)
    if size < 4:
        return torch.topk(pre, k, sorted=False)
    # Neighbouring groups are neighbours in memory, so that the maximum is elementwise.
    groups = d_sae // size
    grouped = groups * size
    maxima = pre[:, :grouped].view(tokens, size, groups).amax(1)
    chosen = torch.topk(maxima, k, sorted=False).indices
    members = torch.arange(0, grouped, groups, device=pre.device)
    rest = torch.arange(grouped, d_sae, device=pre.device)
    candidates = torch.cat(
        [(chosen[:, None] + members[:, None]).flatten(1), rest.expand(tokens, -1)], 1
    )
    values, positions = torch.topk(pre.gather(1, candidates), k, sorted=False)
    return values, candidates.gather(1, positions)
