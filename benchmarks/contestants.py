"""What the training step is measured against: one small module a contestant.

Each takes the layer's input x and target y and returns its training loss. All
of them see the same sizes; the transcoders and the SAE have as many features as
give them the MxD's parameter count.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mxd_lens.sparse import sparse_decode, topk_gate


@dataclass(frozen=True)
class Size:
    """One layer and one batch."""

    d: int
    """Width of the layer's input and output."""
    n_experts: int
    """N."""
    d_hidden: int
    """H."""
    k: int
    """Active experts, or features, per token."""
    batch: int
    """Tokens per step."""

    @property
    def width(self) -> int:
        """Features of the transcoder that has the MxD's parameter count."""
        return self.n_experts + self.d_hidden


def normalized_mse(y_hat: Tensor, y: Tensor) -> Tensor:
    """The reference recipe's loss, (y_hat - y)^2 / ||y||_2 averaged over batch and width."""
    return ((y_hat - y) ** 2 / y.norm(dim=-1, keepdim=True)).mean()


def _uniform(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).uniform_(-1, 1) * columns**-0.5)


class _MxD(nn.Module):
    """y = mixture * dz + b, with z = gelu(E^T x + b_E) and dz = D^T z."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.k = size.k
        # Stored with the rows of its experts contiguous, the layout of its gradient.
        self.W_enc = nn.Parameter(_uniform(size.n_experts, size.d).detach().T)
        self.b_enc = nn.Parameter(torch.zeros(size.n_experts))
        self.W_dec = nn.Parameter(F.normalize(_uniform(size.n_experts, size.d).detach(), dim=-1))
        self.b_dec = nn.Parameter(torch.zeros(size.d))
        self.W_hidden = _uniform(size.d, size.d_hidden)
        self.b_hidden = nn.Parameter(torch.zeros(size.d_hidden))
        self.W_out = _uniform(size.d_hidden, size.d)

    def mixture(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """C^T a."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch d"], y: Float[Tensor, "batch d"]) -> Tensor:
        # Last in the forward pass is first in the backward pass: the decoder branch lets
        # go of its H-wide activations before the gradients of both [N, d] weights arise.
        mixture = self.mixture(x)
        dz = F.gelu(x @ self.W_hidden + self.b_hidden) @ self.W_out
        return normalized_mse(mixture * dz + self.b_dec, y)


class ReferenceMxD(_MxD):
    """The formula as it stands: K coefficients scattered into [batch, N], dense products."""

    def mixture(self, x: Tensor) -> Tensor:
        pre = (x @ self.W_enc + self.b_enc).relu()
        values, indices = torch.topk(pre, self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values) @ self.W_dec


class SparseMxD(_MxD):
    """The same layer on this project's gate and decode."""

    def mixture(self, x: Tensor) -> Tensor:
        return sparse_decode(*topk_gate(x, self.W_enc, self.b_enc, self.k), self.W_dec)


class Floor(_MxD):
    """Work that no formulation avoids: the gate's product forward, the whole decoder branch."""

    def mixture(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.addmm(self.b_enc, x, self.W_enc)
        return torch.ones_like(x)


class SparseTranscoder(nn.Module):
    """y = C^T a + b on this project's gate and decode."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.k = size.k
        self.W_enc = nn.Parameter(_uniform(size.width, size.d).detach().T)
        self.b_enc = nn.Parameter(torch.zeros(size.width))
        self.W_dec = nn.Parameter(F.normalize(_uniform(size.width, size.d).detach(), dim=-1))
        self.b_dec = nn.Parameter(torch.zeros(size.d))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        values, indices = topk_gate(x, self.W_enc, self.b_enc, self.k)
        return normalized_mse(sparse_decode(values, indices, self.W_dec) + self.b_dec, y)


class SparsifyTranscoder(nn.Module):
    """eai-sparsify's transcoder with its own loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        if not torch.cuda.is_available():
            # Its Triton kernel is chosen by Triton's presence, not by the device.
            os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
        from sparsify import SparseCoder, SparseCoderConfig

        cfg = SparseCoderConfig(num_latents=size.width, k=size.k, transcode=True)
        self.coder = SparseCoder(size.d, cfg)
        nn.init.normal_(self.coder.W_dec)
        self.coder.set_decoder_norm_to_unit_norm()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.coder(x, y).fvu


class SAELensTopK(nn.Module):
    """sae-lens' TopK training SAE, which has no transcoder: it reconstructs x."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

        cfg = TopKTrainingSAEConfig(d_in=size.d, d_sae=size.width, k=size.k)
        self.sae = TopKTrainingSAE(cfg)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        from sae_lens.saes.sae import TrainStepInput

        step = TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
        return self.sae.training_forward_pass(step).loss


CONTESTANTS: dict[str, Callable[[Size], nn.Module]] = {
    "reference MxD": ReferenceMxD,
    "MxD": SparseMxD,
    "transcoder": SparseTranscoder,
    "eai-sparsify transcoder": SparsifyTranscoder,
    "sae-lens TopK SAE": SAELensTopK,
    "floor": Floor,
}

_PACKAGES = {"eai-sparsify transcoder": "sparsify", "sae-lens TopK SAE": "sae_lens"}


def missing_package(name: str) -> str | None:
    """The package a contestant needs and this Python does not have."""
    package = _PACKAGES.get(name)
    return package if package and find_spec(package) is None else None
