"""The k largest of each row, without sorting through all of it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GROUP = 8


def largest(
    pre: Float[Tensor, "tokens d_sae"], k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """torch.topk(pre, k), which is slow, over less than pre.

    Columns fall into groups. The k groups with the largest maxima, found in the same
    way, hold k entries that nothing outside these groups exceeds: the k largest
    entries are among their members. A maximum costs a fraction of a selection.
    """
    tokens, d_sae = pre.shape
    if d_sae < 2 * _GROUP * k:
        return torch.topk(pre, k, sorted=False)
    # Neighbouring groups are neighbours in memory, so that the maximum is elementwise.
    groups = d_sae // _GROUP
    grouped = groups * _GROUP
    _, chosen = largest(pre[:, :grouped].view(tokens, _GROUP, groups).amax(1), k)
    members = chosen[:, None] + torch.arange(0, grouped, groups, device=pre.device)[:, None]
    rest = torch.arange(grouped, d_sae, device=pre.device)
    candidates = torch.cat([members.flatten(1), rest.expand(tokens, -1)], 1)
    values, positions = torch.topk(pre.gather(1, candidates), k, sorted=False)
    return values, candidates.gather(1, positions)
