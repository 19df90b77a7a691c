"""What one expert does for the predictions on a sequence: the model with the layer, with and without it."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.decomposition import Parts, decompose
from mxd_lens.analysis.firings import layer_input
from mxd_lens.analysis.sequences import batch_of, counted_tokens
from mxd_lens.evals.harness import Forward, Target, layer_output
from mxd_lens.hooks.replace import Replacement
from mxd_lens.models import model_first

Losses = Float[Tensor, "sequences positions"]


class Written(NamedTuple):
    """What one expert does on each of some sequences."""

    coefficients: Float[Tensor, "sequences positions"]
    """a_n; 0 at the tokens left to the MLP."""
    norms: Float[Tensor, "sequences positions"]
    """||a_n u_n||."""
    inputs: Float[Tensor, "sequences positions d_in"]
    """The layer's input."""


@model_first
def written_by(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"],
    experts: Int[Tensor, " sequences"],
) -> Written:
    """What one expert per sequence writes on it; the model runs up to the layer and no further.

    Raises:
        ValueError: as `layer_input` and `decompose`.
    """
    x = layer_input(model, sae, tokens)
    counted = counted_tokens(model, sae, tokens)
    return _written(x, decompose(sae, x.flatten(0, 1)), counted, experts)[0]


@model_first
def losses_with(model: Any, sae: SAE[Any], tokens: Int[Tensor, "sequences positions"]) -> Losses:
    """The cross-entropy of each prediction, with the layer in the MLP's place; else as `losses_without`."""
    return _losses(model, sae, tokens, layer_output(sae, lambda parts: parts.y))


@model_first
def losses_without(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"],
    experts: Int[Tensor, " sequences"],
) -> tuple[Losses, Written]:
    """The cross-entropy of each prediction, with the layer in the MLP's place and one expert per sequence
    left out.

        y - a_n u_n        at every token of the sequence; no other expert takes the place of n

    Tokens that the layer's training excluded are left to the MLP, as in `evaluate`.

    Args:
        model: any hooked model. It runs as a whole: hooked models have no way in common to run their upper
            part alone.
        sae: the layer. It must not be attached.
        tokens: ids. What follows a token changes nothing about it, so that sequences may be cut behind the
            last prediction of interest.
        experts: which expert is left out of each sequence.

    Returns:
        The losses in nats, of the prediction of token t + 1 at t, nan at the last token; and what the
        experts wrote.

    Raises:
        ValueError: the layer does not belong to the model; or as `decompose`.
    """
    counted = counted_tokens(model, sae, tokens)
    found: list[Written] = []

    def without(x: Tensor, _y: Tensor) -> Tensor:
        parts = decompose(sae, x.flatten(0, 1))
        written, contribution = _written(x, parts, counted, experts)
        found.append(written)
        return (parts.y - contribution).view(*x.shape[:-1], -1)

    return _losses(model, sae, tokens, without), found[0]


@torch.no_grad()
def _losses(
    model: Any, sae: SAE[Any], tokens: Int[Tensor, "sequences positions"], replacement: Replacement
) -> Losses:
    forward = Forward(model, batch_of(tokens))
    return forward.losses(forward.replaced(Target.of(model, sae), replacement))


def _written(
    x: Float[Tensor, "sequences positions d_in"],
    parts: Parts,
    counted: Bool[Tensor, "sequences positions"],
    experts: Int[Tensor, " sequences"],
) -> tuple[Written, Float[Tensor, "tokens d_out"]]:
    """What each sequence's expert does, and its contributions."""
    n = experts.to(parts.experts.device).repeat_interleave(counted.shape[1])
    a = (parts.coefficients * (parts.experts == n[:, None])).sum(-1) * counted.flatten().to(n.device)
    tokens = torch.arange(len(n), device=n.device)
    contribution = a[:, None] * parts.written_by(tokens, n)
    return Written(a.view(counted.shape), contribution.norm(dim=-1).view(counted.shape), x), contribution
