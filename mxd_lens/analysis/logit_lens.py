"""What a direction in the residual stream says in the model's own terms: the tokens it promotes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mxd_lens.artifacts.tables import Cell, Tabular

BLOCK = 256
"""Directions multiplied with the unembedding at once."""


@dataclass(frozen=True, repr=False)
class LogitLens(Tabular):
    """The tokens that directions promote and suppress, from `logit_lens`."""

    names: list[str]
    """What the directions are of."""
    promoted: list[list[str]]
    """For each direction the tokens with the largest logits, largest first."""
    promoted_logits: Float[Tensor, "n k"]
    """Their logits, less the mean over the vocabulary."""
    suppressed: list[list[str]]
    """The tokens with the smallest, smallest first."""
    suppressed_logits: Float[Tensor, "n k"]
    """Their logits, less the mean over the vocabulary."""

    @property
    def title(self) -> str:
        return "Logit lens: logits before the final norm's division, less their mean over the vocabulary"

    @property
    def columns(self) -> list[str]:
        return ["of", "rank", "promoted", "logit, promoted", "suppressed", "logit, suppressed"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for i, name in enumerate(self.names):
            for j, (up, down) in enumerate(zip(self.promoted[i], self.suppressed[i], strict=True)):
                up_logit, down_logit = self.promoted_logits[i, j].item(), self.suppressed_logits[i, j].item()
                yield [name, j + 1, up, up_logit, down, down_logit]


@torch.no_grad()
def logit_lens(
    model: Any,
    directions: Float[Tensor, "n d_model"] | Float[Tensor, " d_model"],
    k: int = 10,
    names: Sequence[Any] | None = None,
) -> LogitLens:
    """The tokens that directions in the residual stream promote and suppress most.

        logit_lens(model, statistics.mean_direction([5, 17]), names=[5, 17])

    See `direction_logits` for what is done about the final norm. Logits are given less their mean over
    the vocabulary, which changes no probability.

    Args:
        model: any hooked model.
        directions: one, or a row each.
        k: tokens on either side.
        names: what the rows are of, for the table; None numbers them.

    Raises:
        ValueError: the directions are not of the residual stream's width or not finite, or the names do
            not fit.
    """
    directions = directions.reshape(-1, directions.shape[-1])
    if not directions.isfinite().all():
        raise ValueError("a direction is not finite: an expert that never fired has no mean direction.")
    labels = [str(name) for name in (range(len(directions)) if names is None else names)]
    if len(labels) != len(directions):
        raise ValueError(f"there are {len(directions)} directions and {len(labels)} names.")
    (up, promoted), (down, suppressed) = extreme_logits(model, directions, k)
    words = [
        [[model.tokenizer.decode([t]) for t in row] for row in ids.tolist()] for ids in (promoted, suppressed)
    ]
    return LogitLens(labels, words[0], up, words[1], down)


@torch.no_grad()
def extreme_logits(
    model: Any, directions: Float[Tensor, "n d_model"], k: int
) -> tuple[tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]], tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]]:
    """The largest logits of each direction with their token ids, largest first, and the smallest likewise.

    See `direction_logits`; less the mean over the vocabulary. No [n, d_vocab] matrix is made.
    """
    sides: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for block in directions.split(BLOCK):
        logits = direction_logits(model, block)
        logits = logits - logits.mean(-1, keepdim=True)
        for largest, found in sides.items():
            values, tokens = logits.topk(k, largest=largest)
            found.append((values.cpu(), tokens.cpu()))
    up, down = (
        (torch.cat([values for values, _ in found]), torch.cat([tokens for _, tokens in found]))
        for found in sides.values()
    )
    return up, down


@torch.no_grad()
def direction_logits(model: Any, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """What a step along each direction adds to the logits, the final norm's scale held fixed: (w * d) W_U.

    The final norm makes w * r / rms(r) of the residual stream r (a layer norm subtracts the mean of r
    first, and then so does this). Its weight w is applied; its division is not, because the scale is
    another at every token: divide by rms(r) for a given token's logits. The norm's and the unembedding's
    biases add the same to every direction and are left out, as is a soft cap on the logits.

    Raises:
        ValueError: the directions are not of the residual stream's width.
    """
    W_U = model.W_U
    if directions.shape[-1] != len(W_U):
        raise ValueError(
            f"expected directions [..., d_model = {len(W_U)}], got {tuple(directions.shape)}: only a layer "
            "that writes into the residual stream has a logit lens."
        )
    return read_norm(model.ln_final, W_U).before_scale(directions.to(W_U)) @ W_U


class Norm(NamedTuple):
    """A layer norm or RMS norm: weight * (r [- mean r]) / scale(r) + bias."""

    weight: Float[Tensor, " d_model"]
    """Ones where it has been folded into what follows."""
    bias: Float[Tensor, " d_model"]
    """Zeros for an RMS norm."""
    centres: bool
    """Whether the mean is subtracted, as in a layer norm."""

    def before_scale(self, r: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """weight * (r [- mean r]): linear in r, as is the norm itself where its scale is held fixed."""
        return self.weight * (r - r.mean(-1, keepdim=True) if self.centres else r)


@torch.no_grad()
def read_norm(norm: Callable[[Tensor], Tensor], like: Float[Tensor, "d_model *other"]) -> Norm:
    """What a norm of a model does, found by doing it.

    To a vector of zero mean and unit root mean square, to its negative, and to the vector with 1 added: each
    library, and each family of models, keeps the weight in a form of its own (folded away; less 1; under
    another name). Right to the norm's epsilon, 1e-5 or less of the weight.

    Args:
        norm: the norm's module.
        like: a tensor as long as the residual stream is wide, of the model's dtype and device.
    """
    probe = torch.ones(len(like), dtype=like.dtype, device=like.device)
    probe[1::2] = -1
    probe = probe - probe.mean()
    probe = probe / probe.pow(2).mean().sqrt()
    plus, minus, moved = (norm(v.view(1, 1, -1)).view(-1) for v in (probe, -probe, probe + 1))
    centres = bool((moved - plus).norm() < 0.01 * (plus - minus).norm())
    return Norm((plus - minus) / (2 * probe), (plus + minus) / 2, centres)
