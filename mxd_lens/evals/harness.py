"""The one harness that runs a model with something in the place of an MLP's output, and measures it.

`evaluate`, `compare`, `ablation_study`, the effects of single experts and the frontier are all made of
`Forward`, a forward pass over one batch, and `Measurement`, the errors and losses of one replacement.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F

from mxd_lens.analysis.decomposition import Parts, decompose
from mxd_lens.analysis.firings import check_finite
from mxd_lens.analysis.sequences import Batch
from mxd_lens.hooks.positions import in_slice
from mxd_lens.hooks.replace import Replaced, Replacement
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.models import ordinary_tokens, special_token_ids


@dataclass(frozen=True)
class Target:
    """What a layer replaces: the MLP's output at the tokens that its training did not exclude."""

    hook_name: str
    """Where the layer reads."""
    hook_name_out: str
    """Where it writes."""
    excluded: tuple[int, ...]
    """Token ids that are left as they are, and not counted."""
    seqpos_slice: tuple[int | None, ...] | None = None
    """The positions that are replaced and counted; None: all."""

    @classmethod
    def of(cls, model: Any, sae: SAE[Any]) -> "Target":
        """The target of a layer. Raises ValueError where the layer does not belong to the model."""
        check_fits(model, sae)
        excluded = special_token_ids(model, sae.cfg.metadata.exclude_special_tokens)
        positions = sae.cfg.metadata.seqpos_slice
        return cls(*hook_names(sae), tuple(excluded), tuple(positions) if positions else None)

    @property
    def output(self) -> tuple[Any, ...]:
        """What decides the MLP's own output there, and the model with zero in its place."""
        return self.hook_name_out, self.excluded, self.seqpos_slice


class Forward:
    """One batch of sequences, run by a model with and without replacements."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model = model
        self.tokens = batch.tokens
        self.present = batch.present

    def counted(self, target: Target) -> Bool[Tensor, "sequences positions"]:
        """Which tokens are replaced and counted."""
        ordinary = ordinary_tokens(self.model, self.tokens, list(target.excluded))
        return self.present & ordinary & in_slice(self.tokens, target.seqpos_slice)

    def predicting(self, target: Target) -> Bool[Tensor, "sequences predictions"]:
        """The counted tokens whose next token is known."""
        return self.counted(target)[:, :-1] & self.present[:, 1:]

    def logits(
        self, replacements: Iterable[Replaced] = ()
    ) -> Float[Tensor, "sequences positions vocabulary"]:
        """The model's logits, with some replacements."""
        with ExitStack() as stack:
            for replacement in replacements:
                stack.enter_context(replacement)
            return self.model(self.tokens.to(self.model.cfg.device))

    def at(self, target: Target, replacement: Replacement) -> Replaced:
        """replacement(x, y) in the place of the MLP's output y at the counted tokens.

        `replacement` gets the whole sequences. A value that is not finite raises ValueError.
        """
        counted = self.counted(target)

        def replace(x: Tensor, y: Tensor) -> Tensor:
            here = counted.to(y.device)
            check_finite(y[here], target.hook_name_out)
            return torch.where(here.unsqueeze(-1), replacement(x, y).to(y), y)

        return Replaced(self.model, target.hook_name, target.hook_name_out, replace)

    def replaced(
        self, target: Target, replacement: Replacement
    ) -> Float[Tensor, "sequences positions vocabulary"]:
        """The model's logits with a replacement."""
        return self.logits([self.at(target, replacement)])

    def losses(
        self, logits: Float[Tensor, "sequences positions vocabulary"]
    ) -> Float[Tensor, "sequences positions"]:
        """The cross-entropy of the prediction of token t + 1 at t, in nats; NaN at the last token."""
        losses = [
            F.cross_entropy(of_sequence[:-1].float(), ids[1:], reduction="none")
            for of_sequence, ids in zip(logits, self.tokens.to(logits.device), strict=True)
        ]
        return F.pad(torch.stack(losses), (0, 1), value=torch.nan)


def zero(_x: Tensor, y: Tensor) -> Tensor:
    """Zero ablation of the MLP."""
    return torch.zeros_like(y)


def unchanged(_x: Tensor, y: Tensor) -> Tensor:
    """The MLP's own output."""
    return y


def layer_output(sae: SAE[Any], change: Callable[[Parts], Tensor]) -> Replacement:
    """What change(parts) makes of a layer's decomposed output, [tokens, d_out], in the MLP's place."""

    def replace(x: Tensor, _y: Tensor) -> Tensor:
        return change(decompose(sae, x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], -1)

    return replace


class Measurement:
    """The errors and losses of one kind of replacement, over batches."""

    def __init__(self) -> None:
        self._squared_error: list[Tensor] = []
        self._squared_norm: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._divergences: list[Tensor] = []
        self._sum: Tensor | float = 0.0
        self._tokens = 0

    def add(
        self,
        forward: Forward,
        target: Target,
        replacement: Replacement,
        unmodified_logits: Tensor | None = None,
    ) -> None:
        """Runs a batch with a replacement and measures it."""
        logits = forward.logits([self.at(forward, target, replacement)])
        self.score(forward, target, logits, unmodified_logits)

    def at(self, forward: Forward, target: Target, replacement: Replacement) -> Replaced:
        """`replacement` in the MLP's place, with its error there measured."""
        counted = forward.counted(target)

        def measured(x: Tensor, y: Tensor) -> Tensor:
            y_hat = replacement(x, y)
            check_finite(y_hat[counted.to(y_hat.device)], f"{target.hook_name_out}, the layer's output,")
            target_values = y[counted.to(y.device)].double()
            self._squared_error.append(
                (y_hat[counted.to(y_hat.device)].to(target_values) - target_values).pow(2).sum(-1).cpu()
            )
            self._squared_norm.append(target_values.pow(2).sum(-1).cpu())
            self._sum = self._sum + target_values.sum(0).cpu()
            self._tokens += len(target_values)
            return y_hat

        return forward.at(target, measured)

    def score(
        self,
        forward: Forward,
        target: Target,
        logits: Float[Tensor, "sequences positions vocabulary"],
        unmodified_logits: Float[Tensor, "sequences positions vocabulary"] | None = None,
    ) -> None:
        """Measures the predictions made at the counted tokens."""
        predicting = forward.predicting(target).to(logits.device)
        log_probabilities = F.log_softmax(logits[:, :-1][predicting].float(), dim=-1)
        next_tokens = forward.tokens[:, 1:].to(logits.device)[predicting]
        self._losses.append(F.nll_loss(log_probabilities, next_tokens, reduction="none").cpu())
        if unmodified_logits is not None:
            unmodified = F.log_softmax(unmodified_logits[:, :-1][predicting].float(), dim=-1)
            divergence = F.kl_div(log_probabilities, unmodified, reduction="none", log_target=True)
            self._divergences.append(divergence.sum(-1).cpu())

    @property
    def squared_error(self) -> Float[Tensor, " tokens"]:
        return torch.cat(self._squared_error)

    @property
    def norm(self) -> Float[Tensor, " tokens"]:
        return torch.cat(self._squared_norm).sqrt()

    @property
    def ratio(self) -> Float[Tensor, " tokens"]:
        """||y_hat - y||^2 / ||y||^2."""
        return self.squared_error / torch.cat(self._squared_norm).clamp_min(1e-12)

    @property
    def variance(self) -> float:
        """sum over tokens of ||y - mean y||^2."""
        squared_mean = torch.as_tensor(self._sum).pow(2).sum() / self._tokens**2
        return (torch.cat(self._squared_norm).sum() - self._tokens * squared_mean).item()

    @property
    def normalized_mse(self) -> float:
        return self.ratio.mean().item()

    @property
    def losses(self) -> Float[Tensor, " predictions"]:
        """The cross-entropy of every prediction."""
        return torch.cat(self._losses).double()

    @property
    def ce_loss(self) -> float:
        return self.losses.mean().item()

    @property
    def kl_divergence(self) -> float:
        return torch.cat(self._divergences).double().mean().item()
