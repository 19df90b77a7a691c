"""The one way a layer is decomposed into its experts.

    y = sum_n a_n u_n + skip + b        u_n what expert n writes at coefficient 1

u_n is c_n * (D^T z) for an MxD and the same direction at every token for a transcoder. An architecture
says what its experts write (`PairedTranscoder.experts_out`); `a_n u_n` is the contribution of expert n.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Self

from mxd_lens.architectures.base import expert_ids
from mxd_lens.architectures.inputs import EncodedInputs
from mxd_lens.sparse.coefficients import Active, Coefficients, Dense

ENTRIES = 16_384
"""Contributions formed at once, so that memory does not grow with the text."""


class Decomposable(Protocol):
    """What a layer says about its experts; every `PairedTranscoder` does."""

    b_dec: Any

    def coefficients(self, x: Tensor) -> Coefficients: ...

    def expert_input(self, x: Tensor) -> Tensor: ...

    def mixture(self, a: Coefficients) -> Tensor: ...

    def experts_out(self, mixture: Tensor, expert_input: Tensor) -> Tensor: ...

    def skip_out(self, x: Tensor) -> Tensor | None: ...

    def written_by(self, experts: Tensor, expert_input: Tensor) -> Tensor: ...

    def singular_values(self, batches: Iterable[Tensor]) -> Iterator[Tensor]: ...

    def expert_weight(self, n: int) -> Tensor: ...

    @property
    def writes_directions(self) -> bool: ...


class OfSAELens:
    """SAELens' own layer, in the terms of this package's: y = C^T a + skip + b."""

    writes_directions = True

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae = sae
        self.b_dec = sae.b_dec
        cfg = sae.cfg
        self._is_fixed = (
            cfg.normalize_activations not in ("layer_norm", "constant_norm_rescale")
            and cfg.reshape_activations == "none"
        )

    @cached_property
    def directions(self) -> Float[Tensor, "d_sae d_out"]:
        """What a coefficient of 1 writes: W_dec, or its rows at unit norm where the layer decodes with them.

        Raises:
            ValueError: that depends on the whole input.
        """
        sae, cfg = self.sae, self.sae.cfg
        if not self._is_fixed:
            raise ValueError(
                "What a feature of this layer writes depends on the whole input: it was made with "
                f"normalize_activations={cfg.normalize_activations!r} and "
                f"reshape_activations={cfg.reshape_activations!r}. Only layers with 'none' for both can be "
                "decomposed into their features."
            )
        if getattr(cfg, "rescale_acts_by_decoder_norm", False):
            return sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)
        return sae.W_dec

    def coefficients(self, x: Float[Tensor, "*batch d_in"]) -> Coefficients:
        kept = vars(self.sae).get("_encoded")
        if kept is None:
            return Dense(self.sae.encode(x))
        # No decode follows: a layer that remembers inputs for its decode must not remember this one.
        self.sae._encoded = EncodedInputs()
        try:
            return Dense(self.sae.encode(x))
        finally:
            self.sae._encoded = kept

    def expert_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
        return x.new_ones(*x.shape[:-1], 1)

    def mixture(self, a: Coefficients) -> Float[Tensor, "*batch d_out"]:
        # Where the input is rescaled, decode undoes what the encode just before it did.
        return a.mix(self.directions) if self._is_fixed else self.sae.decode(a.dense()) - self.b_dec

    def experts_out(self, mixture: Tensor, expert_input: Tensor) -> Tensor:
        return mixture * expert_input

    def skip_out(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | None:
        if hasattr(self.sae, "W_skip"):
            return x @ self.sae.W_skip.T
        return None

    def written_by(self, experts: Tensor, expert_input: Tensor) -> Tensor:
        return self.directions[experts] * expert_input.unsqueeze(-2)

    def singular_values(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for experts in batches:
            yield self.directions[experts].double().norm(dim=-1, keepdim=True)

    def expert_weight(self, n: int) -> Tensor:
        return self.directions[n].unsqueeze(0)


def decomposable(sae: SAE[Any]) -> Any:
    """The layer itself where it says what its experts write, else SAELens' layer in the same terms."""
    return sae if hasattr(sae, "experts_out") else OfSAELens(sae)


@dataclass(frozen=True, eq=False, repr=False)
class Parts:
    """A layer's output on some tokens, decomposed: y = sum_n a_n u_n + skip + b."""

    layer: Any
    """The layer, as `Decomposable`."""
    d_sae: int
    """How many experts there are."""
    coefficients: Float[Tensor, "tokens n"]
    """a_n; 0 where fewer than n experts are active."""
    experts: Int[Tensor, "tokens n"]
    """Which experts they are of, in no particular order."""
    expert_input: Float[Tensor, "tokens s"]
    """All that u_n depends on beside n: D^T z for an MxD, 1 for a transcoder."""
    mixture: Float[Tensor, "tokens m"]
    """All that the coefficients contribute, C^T a for an MxD and a transcoder; linear in a."""
    skip: Float[Tensor, "tokens d_out"] | None
    """W_skip x; None without a skip connection."""
    bias: Float[Tensor, " d_out"]
    """b."""

    def __len__(self) -> int:
        return len(self.coefficients)

    @property
    def fired(self) -> tuple[Int[Tensor, " fired"], Int[Tensor, " fired"], Float[Tensor, " fired"]]:
        """Token, expert and coefficient, an entry for every active expert of every token."""
        token_of, slot = self.coefficients.nonzero(as_tuple=True)
        return token_of, self.experts[token_of, slot], self.coefficients[token_of, slot]

    @property
    def y(self) -> Float[Tensor, "tokens d_out"]:
        """The layer's output."""
        return self.with_mixture(self.mixture)

    @property
    def output(self) -> Float[Tensor, "tokens d_out"]:
        """y - b."""
        experts_out = self.experts_out(self.mixture)
        return experts_out if self.skip is None else experts_out + self.skip

    @property
    def rest(self) -> Float[Tensor, "tokens d_out"]:
        """skip + b, what the layer writes without its experts."""
        return self.bias.expand(len(self), -1) if self.skip is None else self.skip + self.bias

    def experts_out(self, mixture: Float[Tensor, "*tokens m"]) -> Float[Tensor, "tokens d_out"]:
        """What the experts write together at some mixture, or at one for every token."""
        with own_dtype(self.bias):
            return self.layer.experts_out(mixture.expand(len(self), -1), self.expert_input)

    def with_mixture(self, mixture: Float[Tensor, "*tokens m"]) -> Float[Tensor, "tokens d_out"]:
        """The layer's output with another mixture: its mean, or another token's."""
        y = self.experts_out(mixture) + self.bias
        return y if self.skip is None else y + self.skip

    def with_coefficients(self, coefficients: Float[Tensor, "tokens n"]) -> Self:
        """The same with other coefficients of the same experts."""
        with own_dtype(self.bias):
            mixture = self.layer.mixture(Active(coefficients, self.experts, self.d_sae))
        return replace(self, coefficients=coefficients, mixture=mixture)

    def contributions(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Token, expert, coefficient a_n and u_n [entries, d_out], for some of `fired` at a time."""
        for token_of, expert, a in zip(*(part.split(ENTRIES) for part in self.fired), strict=True):
            yield token_of, expert, a, self.written_by(token_of, expert)

    def written_by(
        self, token_of: Int[Tensor, " entries"], expert: Int[Tensor, " entries"]
    ) -> Float[Tensor, "entries d_out"]:
        """u_n at some tokens, what an expert writes there at coefficient 1."""
        with own_dtype(self.bias):
            return self.layer.written_by(expert[:, None], self.expert_input[token_of])[:, 0]

    def norms(self) -> Float[Tensor, "tokens n"]:
        """||a_n u_n||, the length of each contribution; 0 where fewer than n experts are active."""
        return self._of_fired((a[:, None] * u).norm(dim=-1) for _, _, a, u in self.contributions())

    def dots(self, y: Float[Tensor, "tokens d_out"]) -> Float[Tensor, "tokens n"]:
        """<a_n u_n, y>, how far each contribution goes along one vector per token; 0 where none is active."""
        return self._of_fired(a * (u * y[t]).sum(-1) for t, _, a, u in self.contributions())

    def largest(self, shares: Float[Tensor, "tokens n"], k: int) -> Int[Tensor, "tokens k"]:
        """The slots of a token's k largest shares by magnitude, active experts first; all of fewer than k."""
        order = shares.abs().nan_to_num().masked_fill(self.coefficients == 0, -1)
        return order.argsort(-1, descending=True)[:, :k]

    def _of_fired(self, blocks: Iterable[Float[Tensor, " block"]]) -> Float[Tensor, "tokens n"]:
        values = torch.zeros_like(self.coefficients)
        values[self.coefficients != 0] = torch.cat([values.new_zeros(0), *blocks])
        return values


def own_dtype(like: Tensor) -> AbstractContextManager[Any]:
    """A layer is decomposed in the dtype of its weights, inside autocast too: its parts must add up."""
    return torch.autocast(like.device.type, enabled=False)


def decompose(sae: SAE[Any], x: Float[Tensor, "tokens d_in"]) -> Parts:
    """Decompose a layer's output on x into its experts, its skip connection and its bias.

    For every layer of this package, and for SAELens' transcoders and SAEs. x is cast to the dtype and moved
    to the device of the layer's weights.

    Raises:
        ValueError: x has another width than the layer's input.
    """
    if x.shape[-1] != sae.cfg.d_in:
        metadata = sae.cfg.metadata
        raise ValueError(
            f"expected an input [..., d_in = {sae.cfg.d_in}], got {tuple(x.shape)}. This layer was trained "
            f"on {metadata.model_name or 'an unnamed model'} at {metadata.hook_name or 'an unnamed hook'}: "
            "check that the model is the same."
        )
    layer = decomposable(sae)
    with own_dtype(sae.W_dec):
        x = x.to(sae.W_dec)
        a = layer.coefficients(x)
        mixture, skip = layer.mixture(a), layer.skip_out(x)
        coefficients, experts = a.active()
        return Parts(
            layer=layer,
            d_sae=sae.cfg.d_sae,
            coefficients=coefficients,
            experts=experts,
            expert_input=layer.expert_input(x),
            mixture=mixture,
            skip=skip,
            bias=sae.b_dec,
        )


def active_experts(
    sae: SAE[Any], x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch n"], Int[Tensor, "*batch n"]]:
    """The coefficients of the active experts and their ids.

    n is k for a layer that has one. For the others it is the largest number active on any token, and a
    token with fewer is filled up with experts whose coefficient is 0.
    """
    with own_dtype(sae.W_dec):
        return decomposable(sae).coefficients(x.to(sae.W_dec)).active()


def dense_coefficients(sae: SAE[Any], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
    """What `encode(x)` returns, without the layer remembering x for a decode."""
    return decomposable(sae).coefficients(x.to(sae.W_dec)).dense()


def contributions(
    sae: SAE[Any],
    x: Float[Tensor, "*batch d_in"],
    experts: int | Sequence[int] | Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n d_out"]:
    """What experts write: a_n u_n, which is a_n c_n * (D^T z) for an MxD and a_n c_n for a transcoder.

    Over all active experts they sum to y - b, less W_skip x where there is a skip connection.

    Args:
        sae: the layer.
        x: its input.
        experts: whose; a contribution is 0 where the expert is not active. None: the active ones, in
            the order of `active_experts(sae, x)`.

    Raises:
        IndexError, TypeError: as `expert_ids`.
        ValueError: as `decompose`.
    """
    parts = decompose(sae, x.reshape(-1, x.shape[-1]))
    a, ids = parts.coefficients, parts.experts
    if experts is not None:
        named = expert_ids(sae, experts)
        a = a.new_zeros(len(a), sae.cfg.d_sae).scatter_add(1, ids, a)[:, named]
        ids = named.expand_as(a)
    with own_dtype(sae.W_dec):
        written = a.unsqueeze(-1) * parts.layer.written_by(ids, parts.expert_input)
    return written.view(*x.shape[:-1], *written.shape[1:])


def expert_directions(sae: SAE[Any]) -> Float[Tensor, "d_sae d_out"]:
    """One row per expert of W_dec, c_n. In a transcoder or an SAE it is what a coefficient of 1 writes.

    An architecture with several rows of W_dec per expert has them one behind the other.

    SAELens' SAEs with rescale_acts_by_decoder_norm decode with these rows at unit norm.

    Raises:
        ValueError: the layer is one of SAELens' that rescales or reshapes its input while it runs.
    """
    return getattr(decomposable(sae), "directions", sae.W_dec).reshape(sae.cfg.d_sae, -1)


def mixture_rows(sae: SAE[Any]) -> Float[Tensor, "d_sae m"]:
    """What a coefficient of 1 of each expert adds to the mixture: c_n for an MxD."""
    ids = torch.arange(sae.cfg.d_sae, device=sae.W_dec.device).unsqueeze(1)
    ones = torch.ones(len(ids), 1, dtype=sae.W_dec.dtype, device=ids.device)
    with own_dtype(sae.W_dec):
        return decomposable(sae).mixture(Active(ones, ids, sae.cfg.d_sae))


def writes_directions(sae: SAE[Any]) -> bool:
    """Whether an expert writes along the same direction at every token, as in a transcoder or an SAE."""
    return bool(decomposable(sae).writes_directions)
