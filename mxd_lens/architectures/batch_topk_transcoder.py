"""The BatchTopK transcoder: a batch of B tokens has k B active features, more where a token needs more.

In training, of the pre-activations relu(G^T x + b_G) of a batch of B tokens, [B, d_sae],

    a = the k B largest of them all, the others 0
    y = C^T a + b

What a token gets then depends on the others in its batch. At inference it does not: a feature is active
above a threshold, the mean over batches of the smallest active coefficient of a batch,

    a = pre where pre > threshold, else 0

Bussmann et al., "BatchTopK Sparse Autoencoders", arXiv 2412.06410; the running mean is SAELens'.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from mxd_lens.architectures.base import PairedTranscoder, PairedTranscoderConfig, register_architecture
from mxd_lens.architectures.training import TrainingPairedTranscoder, TrainingPairedTranscoderConfig
from mxd_lens.sparse import pre_activations, sparse_encode
from mxd_lens.sparse.coefficients import Coefficients, Dense, Ragged

__all__ = [
    "BatchTopKTranscoder",
    "BatchTopKTranscoderConfig",
    "TrainingBatchTopKTranscoder",
    "TrainingBatchTopKTranscoderConfig",
]


@dataclass(kw_only=True)
class BatchTopKTranscoderConfig(PairedTranscoderConfig):
    """Configuration of a `BatchTopKTranscoder`; k is the mean over tokens of the active features."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is None:
            raise ValueError("k must be a positive integer: BatchTopK keeps k features per token on average.")

    @classmethod
    @override
    def architecture(cls) -> str:
        return "batch_topk_transcoder"


class BatchTopKTranscoder(PairedTranscoder):
    """Transcoder with k active features per token on average: y = C^T a + b, see the module's formulas.

    Parameters: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], and the threshold,
    a number that training measures.
    """

    cfg: BatchTopKTranscoderConfig
    threshold: Tensor
    title: ClassVar[str] = "A BatchTopK transcoder"
    about: ClassVar[str] = (
        "Every feature n writes a_n times row n of W_dec, one direction. A token has as many active features "
        "as exceed the threshold."
    )

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("threshold", torch.zeros((), dtype=self.dtype, device=self.device))

    @override
    def get_activation_fn(self) -> nn.Module:
        return nn.ReLU()

    @override
    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return super().activate(pre) * (pre > self.threshold)

    @override
    def coefficients(self, x: Float[Tensor, "*batch d_in"]) -> Coefficients:
        return Dense(self.activate(self.pre_activations(x)))

    @override
    def gate_formula(self) -> str:
        return f"a = threshold(relu(x @ W_enc + b_enc), {self.threshold:.4g}, 0)"


@dataclass(kw_only=True)
class TrainingBatchTopKTranscoderConfig(BatchTopKTranscoderConfig, TrainingPairedTranscoderConfig):
    """Configuration of a `TrainingBatchTopKTranscoder`."""

    threshold_lr: float = 0.01
    """The weight of a batch in the running mean of the threshold."""


class TrainingBatchTopKTranscoder(TrainingPairedTranscoder, BatchTopKTranscoder):
    """A `BatchTopKTranscoder` in training. Outside of a training step it uses the threshold."""

    cfg: TrainingBatchTopKTranscoderConfig

    @override
    def training_coefficients(self, x: Float[Tensor, "tokens d_in"]) -> Coefficients:
        k = self.cfg.k
        assert k is not None  # the configuration sees to it
        token_of, expert = largest_of_batch(pre_activations(x, self.W_enc, self.b_enc), k * len(x))
        # Rows of k entries: as many as a token needs, the last one filled up.
        counts = token_of.bincount(minlength=len(x))
        n_rows = (counts + k - 1) // k
        row_token = torch.arange(len(x), device=x.device).repeat_interleave(n_rows)
        position = torch.arange(len(token_of), device=x.device) - (counts.cumsum(0) - counts)[token_of]
        slot = (n_rows.cumsum(0) - n_rows)[token_of] * k + position
        experts = expert.new_zeros(len(row_token), k)
        experts.view(-1)[slot] = expert
        filled = torch.zeros_like(experts, dtype=torch.bool)
        filled.view(-1)[slot] = True
        values = sparse_encode(x[row_token], self.W_enc, self.b_enc, experts) * filled
        return Ragged(values, experts, row_token, len(x), self.cfg.d_sae)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        coefficients = output.feature_acts.coalesce().values()
        active = coefficients[coefficients > 0]
        if len(active):
            smallest = active.min().to(self.threshold)
            weight = self.cfg.threshold_lr if self.threshold else 1.0
            self.threshold.lerp_(smallest, weight)
        output.metrics["threshold"] = self.threshold
        return output


def largest_of_batch(
    blocks: Iterable[Float[Tensor, "block d_sae"]], n: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Token and expert of the n largest pre-activations that are positive, in the order of tokens."""
    values, where, done, d_sae = None, None, 0, 1
    for block in blocks:
        d_sae, flat = block.shape[1], block.flatten()
        least = values.min() if values is not None and len(values) == n else 0
        candidates = (flat > least).nonzero()[:, 0]
        of_block = flat[candidates]
        values = of_block if values is None else torch.cat([values, of_block])
        where = candidates if where is None else torch.cat([where, candidates + done])
        if len(values) > n:
            values, chosen = values.topk(n, sorted=False)
            where = where[chosen]
        done += len(flat)
    assert where is not None  # a batch has tokens
    where = where.sort().values
    return where // d_sae, where % d_sae


register_architecture(
    BatchTopKTranscoder,
    BatchTopKTranscoderConfig,
    TrainingBatchTopKTranscoder,
    TrainingBatchTopKTranscoderConfig,
)
