"""This project's layers and what they are measured against: one module a contestant.

Each returns its training loss on the same x and y. All of them see the same
sizes; the transcoders and the SAE have as many features as give them the MxD's
parameter count. Where a recipe starts a weight at zero it is random here: a
gradient of zeros is not what training computes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch import Tensor, nn

from mxd_lens import TrainingMxD, TrainingMxDConfig, TrainingTopKTranscoder, TrainingTopKTranscoderConfig


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


class Layer(nn.Module):
    """A contestant."""

    def inputs(self, x: Float[Tensor, "batch d"], y: Float[Tensor, "batch d"]) -> tuple[Tensor, ...]:
        """What `forward` takes, in the layout in which its training gets it."""
        return x, y

    def forward(self, *inputs: Tensor) -> Tensor:
        """The training loss."""
        raise NotImplementedError


class ReferenceMxD(Layer):
    """The formula as it stands: K coefficients scattered into [batch, N], dense products."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.k = size.k
        # Stored with the rows of its experts contiguous, as this project's is.
        self.W_enc = nn.Parameter(_uniform(size.n_experts, size.d).detach().T)
        self.b_enc = nn.Parameter(torch.zeros(size.n_experts))
        self.W_dec = nn.Parameter(F.normalize(_uniform(size.n_experts, size.d).detach(), dim=-1))
        self.b_dec = nn.Parameter(torch.zeros(size.d))
        self.W_hidden = _uniform(size.d, size.d_hidden)
        self.b_hidden = nn.Parameter(torch.zeros(size.d_hidden))
        self.W_out = _uniform(size.d_hidden, size.d)

    def mixture(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """C^T a."""
        pre = (x @ self.W_enc + self.b_enc).relu()
        values, indices = torch.topk(pre, self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values) @ self.W_dec

    def forward(self, *inputs: Tensor) -> Tensor:
        """Of y_hat = mixture * dz + b, with z = gelu(E^T x + b_E) and dz = D^T z."""
        x, y = inputs
        mixture = self.mixture(x)
        dz = F.gelu(x @ self.W_hidden + self.b_hidden) @ self.W_out
        return normalized_mse(mixture * dz + self.b_dec, y)


class Floor(ReferenceMxD):
    """Work that no formulation avoids, by torch's own product: the gate's forward, the whole branch."""

    def mixture(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.addmm(self.b_enc, x, self.W_enc)
        return torch.ones_like(x)


class SAELensLayer(Layer):
    """A training class of SAELens' kind, through the method that its trainer calls."""

    def __init__(self, sae: TrainingSAE[Any]) -> None:
        super().__init__()
        self.sae = sae

    def to(self, *args: Any, **kwargs: Any) -> "SAELensLayer":
        self.sae.to(*args, **kwargs)  # it keeps its dtype beside its weights
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        (sae_in,) = inputs
        step = TrainStepInput(
            sae_in=sae_in,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
        return self.sae.training_forward_pass(step).loss


class SAELensTopK(SAELensLayer):
    """sae-lens' TopK training SAE, which has no transcoder: it reconstructs x."""

    def __init__(self, size: Size) -> None:
        super().__init__(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=size.d, d_sae=size.width, k=size.k)))

    def inputs(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        return (x,)


class MxD(SAELensLayer):
    """This project's MxD."""

    def __init__(self, size: Size) -> None:
        sae = TrainingMxD(
            TrainingMxDConfig(
                d_in=size.d, d_out=size.d, d_sae=size.n_experts, d_hidden=size.d_hidden, k=size.k
            )
        )
        sae.W_out = _uniform(size.d_hidden, size.d)
        super().__init__(sae)

    def inputs(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat([x, y], dim=-1),)


class Transcoder(SAELensLayer):
    """This project's TopK transcoder."""

    def __init__(self, size: Size) -> None:
        sae = TrainingTopKTranscoder(
            TrainingTopKTranscoderConfig(d_in=size.d, d_out=size.d, d_sae=size.width, k=size.k)
        )
        sae.W_dec = _uniform(size.width, size.d)
        super().__init__(sae)

    def inputs(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat([x, y], dim=-1),)


class SparsifyTranscoder(Layer):
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

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.coder(*inputs).fvu


CONTESTANTS: dict[str, Callable[[Size], Layer]] = {
    "reference MxD": ReferenceMxD,
    "MxD": MxD,
    "transcoder": Transcoder,
    "eai-sparsify transcoder": SparsifyTranscoder,
    "sae-lens TopK SAE": SAELensTopK,
    "floor": Floor,
}


def missing_package(name: str) -> str | None:
    """The package a contestant needs and this Python does not have."""
    return "sparsify" if name.startswith("eai-sparsify") and find_spec("sparsify") is None else None
