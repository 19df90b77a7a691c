"""What one expert does for the predictions on a sequence: the model with the layer, with and without it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F

from mxd_lens.analysis.decomposition import Parts, kept_tokens, layer_input, take_apart
from mxd_lens.hooks.replace import paired_hooks
from mxd_lens.hooks.site import hook_names

Losses = Float[Tensor, "sequences positions"]


class Written(NamedTuple):
    """What one expert does on each of some sequences."""

    coefficients: Float[Tensor, "sequences positions"]
    """a_n; 0 at the tokens left to the MLP."""
    norms: Float[Tensor, "sequences positions"]
    """||a_n c_n * v||."""
    inputs: Float[Tensor, "sequences positions d_in"]
    """The layer's input."""


def written_by(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    experts: Int[Tensor, " sequences"],
) -> Written:
    """What an expert a sequence writes on it; the model runs up to the layer and no further.

    Raises:
        ValueError: as `layer_input` and `take_apart`.
    """
    x = layer_input(sae, model, tokens)
    kept = kept_tokens(sae, model, tokens)
    return _written(x, take_apart(sae, x.flatten(0, 1)), kept, experts)[0]


@torch.no_grad()
def losses_with(sae: SAE[Any], model: Any, tokens: Int[Tensor, "sequences positions"]) -> Losses:
    """The cross-entropy of each prediction, with the layer in the MLP's place; else as `losses_without`."""
    kept = kept_tokens(sae, model, tokens)
    return _losses(sae, model, tokens, kept, lambda _x, parts: parts.output + parts.bias)


@torch.no_grad()
def losses_without(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    experts: Int[Tensor, " sequences"],
) -> tuple[Losses, Written]:
    """The cross-entropy of each prediction, the layer in the MLP's place, an expert a sequence left out.

        y - a_n c_n * v        at every token of the sequence; no other expert takes the place of n

    Tokens that the layer's training excluded are left to the MLP, as in `evaluate`.

    Args:
        sae: the layer. It must not be attached.
        model: any hooked model. It runs as a whole: hooked models have no way in common to run their upper
            part alone.
        tokens: ids. What follows a token changes nothing about it, so that sequences may be cut behind the
            last prediction of interest.
        experts: which expert is left out of each sequence.

    Returns:
        The losses in nats, of the prediction of token t + 1 at t, nan at the last token; and what the
        experts wrote.

    Raises:
        ValueError: the layer does not belong to the model; or as `take_apart`.
    """
    kept = kept_tokens(sae, model, tokens)
    found: list[Written] = []

    def without(x: Tensor, parts: Parts) -> Tensor:
        written, contribution = _written(x, parts, kept, experts)
        found.append(written)
        return parts.output + parts.bias - contribution

    return _losses(sae, model, tokens, kept, without), found[0]


def _losses(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    kept: Bool[Tensor, "sequences positions"],
    output: Callable[[Tensor, Parts], Tensor],
) -> Losses:
    """With output(x, its parts) in the MLP's place at the kept tokens."""

    def replace(x: Tensor, y: Tensor) -> Tensor:
        y_hat = output(x, take_apart(sae, x.flatten(0, 1))).view(y.shape)
        return torch.where(kept.unsqueeze(-1).to(y.device), y_hat.to(y), y)

    hooks = paired_hooks(*hook_names(sae), replace)
    logits = model.run_with_hooks(tokens.to(model.cfg.device), fwd_hooks=hooks)
    losses = [
        F.cross_entropy(of_sequence[:-1].float(), ids[1:], reduction="none")
        for of_sequence, ids in zip(logits, tokens.to(logits.device), strict=True)
    ]
    return F.pad(torch.stack(losses), (0, 1), value=torch.nan)


def _written(
    x: Float[Tensor, "sequences positions d_in"],
    parts: Parts,
    kept: Bool[Tensor, "sequences positions"],
    experts: Int[Tensor, " sequences"],
) -> tuple[Written, Float[Tensor, "tokens d_out"]]:
    """What each sequence's expert does, and its contributions."""
    n = experts.to(parts.experts.device).repeat_interleave(kept.shape[1])
    a = (parts.coefficients * (parts.experts == n[:, None])).sum(-1) * kept.flatten().to(n.device)
    contribution = a[:, None] * parts.directions[n] * parts.decoder_out
    return Written(a.view(kept.shape), contribution.norm(dim=-1).view(kept.shape), x), contribution
