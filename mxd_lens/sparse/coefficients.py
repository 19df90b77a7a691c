"""The experts' coefficients of some tokens, whichever way they are held.

An architecture writes its formula once, in terms of C^T a = `a.mix(C)`. Training and evaluation hand it
the active experts alone; SAELens' decode hands it a dense tensor.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mxd_lens.sparse import sparse_decode
from mxd_lens.sparse.autograd import TangentGradient


@dataclass(frozen=True)
class Dense:
    """Every expert's coefficient."""

    values: Float[Tensor, "*batch d_sae"]
    """a."""
    trains: bool = False
    """Whether gradients keep the unit rows of weights at unit norm."""

    def mix(self, weight: Float[Tensor, "d_sae d"], *, unit_rows: bool = False) -> Float[Tensor, "*batch d"]:
        """sum_n a_n weight[n]. With `unit_rows`, rows that training keeps at unit norm."""
        return self.values @ (TangentGradient.apply(weight) if self.trains and unit_rows else weight)

    def dense(self) -> Float[Tensor, "*batch d_sae"]:
        return self.values

    def active(self) -> tuple[Float[Tensor, "*batch n"], Int[Tensor, "*batch n"]]:
        """The coefficients that are not 0 and whose they are; n is the largest number of any token.

        A token with fewer is filled up with experts whose coefficient is 0.
        """
        n = int((self.values > 0).sum(-1).max()) if self.values.numel() else 0
        return self.values.topk(n, dim=-1)

    def sparse(self) -> Tensor:
        """a as a COO tensor, detached."""
        return self.values.detach().to_sparse()


@dataclass(frozen=True)
class Active:
    """The coefficients of n experts of each token; the others' are 0."""

    values: Float[Tensor, "*batch n"]
    """Their coefficients; 0 where fewer than n are active."""
    experts: Int[Tensor, "*batch n"]
    """Their ids, in no particular order."""
    d_sae: int
    """How many experts there are."""
    trains: bool = False
    """Whether gradients keep the unit rows of weights at unit norm."""

    def mix(self, weight: Float[Tensor, "d_sae d"], *, unit_rows: bool = False) -> Float[Tensor, "*batch d"]:
        """sum_n a_n weight[n]. With `unit_rows`, rows that training keeps at unit norm."""
        return sparse_decode(self.values, self.experts, weight, unit_rows=self.trains and unit_rows)

    def dense(self) -> Float[Tensor, "*batch d_sae"]:
        """a. An expert may be named twice; its coefficients then add up."""
        a = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return a.scatter_add(-1, self.experts, self.values)

    def active(self) -> tuple[Float[Tensor, "*batch n"], Int[Tensor, "*batch n"]]:
        """The coefficients and whose they are."""
        return self.values, self.experts

    def sparse(self) -> Tensor:
        """a of tokens [tokens, n] as a COO tensor, detached, as SAELens' trainer takes it."""
        tokens, n = self.values.shape
        token_of = torch.arange(tokens, device=self.values.device).repeat_interleave(n)
        return torch.sparse_coo_tensor(
            torch.stack([token_of, self.experts.flatten()]),
            self.values.detach().flatten(),
            (tokens, self.d_sae),
            check_invariants=False,
        )


@dataclass(frozen=True)
class Ragged:
    """The coefficients of as many experts of each token as are active, in rows of n entries.

    A token has as many rows as it needs; a row that is not full ends in entries with coefficient 0.
    """

    values: Float[Tensor, "rows n"]
    experts: Int[Tensor, "rows n"]
    token_of: Int[Tensor, " rows"]
    """Which token each row belongs to."""
    tokens: int
    d_sae: int
    trains: bool = False

    def _of_tokens(self, of_rows: Float[Tensor, "rows d"]) -> Float[Tensor, "tokens d"]:
        return of_rows.new_zeros(self.tokens, of_rows.shape[1]).index_add(0, self.token_of, of_rows)

    def mix(self, weight: Float[Tensor, "d_sae d"], *, unit_rows: bool = False) -> Float[Tensor, "tokens d"]:
        """sum_n a_n weight[n]. With `unit_rows`, rows that training keeps at unit norm."""
        return self._of_tokens(
            sparse_decode(self.values, self.experts, weight, unit_rows=self.trains and unit_rows)
        )

    def dense(self) -> Float[Tensor, "tokens d_sae"]:
        return self._of_tokens(Active(self.values, self.experts, self.d_sae).dense())

    def active(self) -> tuple[Float[Tensor, "tokens n"], Int[Tensor, "tokens n"]]:
        """As `Dense.active`."""
        return Dense(self.dense()).active()

    def sparse(self) -> Tensor:
        """a as a COO tensor, detached."""
        return torch.sparse_coo_tensor(
            torch.stack([self.token_of.repeat_interleave(self.values.shape[1]), self.experts.flatten()]),
            self.values.detach().flatten(),
            (self.tokens, self.d_sae),
            check_invariants=False,
        )


Coefficients = Dense | Active | Ragged
"""The experts' coefficients of some tokens."""
