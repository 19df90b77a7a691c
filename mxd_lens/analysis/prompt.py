"""Which experts contribute most to a layer's output at every token of one prompt."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.decomposition import decompose
from mxd_lens.analysis.firings import check_finite, layer_input
from mxd_lens.analysis.sequences import counted_tokens
from mxd_lens.artifacts.tables import Cell, Tabular, percent
from mxd_lens.hooks.site import hook_names
from mxd_lens.models import model_first

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class TopExperts(Tabular):
    """What `top_experts` found. y is the layer's output, b its bias.

    A share is <part, y - b> / ||y - b||^2: the part's length along y - b, as a share of it. The shares of
    a token's experts, of the other experts and of the skip connection sum to 1; a part that points
    against the sum has a negative share.
    """

    tokens: list[str]
    """The prompt's tokens."""
    experts: Int[Tensor, "positions k"]
    """The experts with the largest shares, by magnitude."""
    coefficients: Float[Tensor, "positions k"]
    """a_n; 0 where fewer than k experts are active."""
    shares: Float[Tensor, "positions k"]
    """Each expert's share of y - b; NaN where y = b."""
    norms: Float[Tensor, "positions k"]
    """||a_n u_n||, the length of what the expert writes."""
    other_shares: Float[Tensor, " positions"]
    """The share of all other active experts together."""
    skip_shares: Float[Tensor, " positions"] | None
    """The share of W_skip x; None without a skip connection."""
    skip_norms: Float[Tensor, " positions"] | None
    """||W_skip x||; None without a skip connection."""
    output_norms: Float[Tensor, " positions"]
    """||y - b||."""
    bias_norm: float
    """||b||. The bias is the same for every token and has no share."""
    n_active: Int[Tensor, " positions"]
    """Active experts."""
    excluded: Bool[Tensor, " positions"]
    """Special tokens that the layer's training excluded: it has not learnt to replace the MLP there."""
    hook_name_out: str
    """Where the layer writes."""

    @property
    def title(self) -> str:
        excluded = "; * excluded from the layer's training" if self.excluded.any() else ""
        return (
            f"{self.hook_name_out}: each token's top experts as 'id: coefficient, share of y - b', "
            f"||b|| = {self.bias_norm:.3g}{excluded}"
        )

    @property
    def columns(self) -> list[str]:
        skip = [] if self.skip_shares is None else ["skip"]
        experts = [f"expert {i + 1}" for i in range(self.experts.shape[1])]
        return ["", "token", "||y - b||", "active", *experts, "others", *skip]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for t, token in enumerate(self.tokens):
            row: list[Cell] = [t, token + "*" * bool(self.excluded[t])]
            row += [self.output_norms[t].item(), int(self.n_active[t])]
            for n, a, share in zip(
                self.experts[t].tolist(), self.coefficients[t].tolist(), self.shares[t].tolist(), strict=True
            ):
                row.append(f"{n}: {a:.3g}, {percent(share)}" if a else "")
            row.append(percent(self.other_shares[t].item()))
            if self.skip_shares is not None:
                row.append(percent(self.skip_shares[t].item()))
            yield row

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per part: position, token, part (expert, others, skip, bias), expert (the id, or missing),
        coefficient, norm and share."""
        import pandas

        rows: list[tuple[Any, ...]] = []
        for t, token in enumerate(self.tokens):
            for n, a, norm, share in zip(
                *(v[t].tolist() for v in (self.experts, self.coefficients, self.norms, self.shares)),
                strict=True,
            ):
                if a:
                    rows.append((t, token, "expert", n, a, norm, share))
            rows.append((t, token, "others", None, math.nan, math.nan, self.other_shares[t].item()))
            if self.skip_shares is not None and self.skip_norms is not None:
                norm, share = self.skip_norms[t].item(), self.skip_shares[t].item()
                rows.append((t, token, "skip", None, math.nan, norm, share))
            rows.append((t, token, "bias", None, math.nan, self.bias_norm, math.nan))
        columns = ["position", "token", "part", "expert", "coefficient", "norm", "share"]
        return pandas.DataFrame(rows, columns=columns).astype({"expert": "Int64"})


@torch.no_grad()
@model_first
def top_experts(model: Any, sae: SAE[Any], prompt: str | Int[Tensor, " positions"], k: int = 5) -> TopExperts:
    """The experts that contribute most to a layer's output, at every token of a prompt.

        top_experts(model, mxd, "The capital of France is")

    Args:
        model: any hooked model; the layer may be attached to it or not.
        sae: the layer.
        prompt: text, which gets a BOS as the model's `to_tokens` gives one, or token ids.
        k: experts per token, the ones with the largest share of y - b by magnitude. The coefficient alone
            does not say how much an expert of an MxD writes.

    Raises:
        ValueError: k is not positive, the prompt is empty or more than one, or the layer does not belong
            to the model.
    """
    if k < 1:
        raise ValueError(f"k must be a positive number of experts, got {k}.")
    tokens = one_prompt(model, prompt)
    x = layer_input(model, sae, tokens[None])[0]
    check_finite(x, hook_names(sae)[0])
    parts = decompose(sae, x)
    output = parts.output
    squared = output.pow(2).sum(-1)
    shares = parts.dots(output) / squared.unsqueeze(-1)
    order = parts.largest(shares, k)
    skip_shares = skip_norms = None
    if parts.skip is not None:
        skip_shares, skip_norms = (parts.skip * output).sum(-1) / squared, parts.skip.norm(dim=-1).cpu()
        skip_shares = skip_shares.cpu()
    top_shares = shares.gather(1, order)
    return TopExperts(
        tokens=[model.tokenizer.decode([t]) for t in tokens.tolist()],
        experts=parts.experts.gather(1, order).cpu(),
        coefficients=parts.coefficients.gather(1, order).cpu(),
        shares=top_shares.cpu(),
        norms=parts.norms().gather(1, order).cpu(),
        other_shares=(shares.sum(-1) - top_shares.sum(-1)).cpu(),
        skip_shares=skip_shares,
        skip_norms=skip_norms,
        output_norms=squared.sqrt().cpu(),
        bias_norm=parts.bias.norm().item(),
        n_active=(parts.coefficients != 0).sum(-1).cpu(),
        excluded=~counted_tokens(model, sae, tokens).cpu(),
        hook_name_out=hook_names(sae)[1],
    )


def one_prompt(model: Any, prompt: str | Int[Tensor, " positions"]) -> Int[Tensor, " positions"]:
    """The token ids of one prompt.

    Raises:
        ValueError: it is empty, or more than one.
    """
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        raise ValueError(f"a prompt is text or a tensor of token ids, got {type(prompt).__name__}.")
    if tokens.ndim == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"one prompt of at least one token is read at a time, got {tuple(tokens.shape)}.")
    return tokens
