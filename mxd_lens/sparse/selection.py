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
    if d_sae < 4 * _GROUP * k:
        return torch.topk(pre, k, sorted=False)
    # Neighbouring groups are neighbours in memory, so that the maximum is elementwise.
    groups = d_sae // _GROUP
    grouped = pre[:, : groups * _GROUP].view(tokens, _GROUP, groups)
    _, chosen = largest(grouped.amax(1), k)
    members = grouped.gather(2, chosen[:, None].expand(-1, _GROUP, -1)).flatten(1)
    candidates = torch.cat([members, pre[:, groups * _GROUP :]], 1)
    values, positions = torch.topk(candidates, k, sorted=False)
    in_group = chosen.gather(1, positions % k) + positions // k * groups
    # What is left over beyond the last whole group follows the members.
    beyond = positions + (groups * _GROUP - members.shape[1])
    return values, torch.where(positions < members.shape[1], in_group, beyond)
