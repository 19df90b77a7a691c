"""The trained result does not depend on how the sparse operations are computed."""

from itertools import islice

import pytest
import torch
from datasets import Dataset
from sae_lens.config import SAETrainerConfig

from mxd_lens import PairedActivationsStore, TrainingMxD, TrainingMxDConfig, TranscoderRunnerConfig, sparse
from mxd_lens.text import load_text, token_sequences
from mxd_lens.training.trainer import TranscoderTrainer

STEPS, BATCH = 200, 256
LAYER = {"d_in": 576, "d_out": 576, "d_sae": 500, "d_hidden": 128, "k": 16, "dtype": "float64"}


@pytest.fixture(scope="module")
def batches(smollm2) -> list[torch.Tensor]:
    """Activation pairs of SmolLM2's layer 12 on the embedded text, the same ones gone through again."""
    config = TrainingMxDConfig(**LAYER)
    tokens = token_sequences(smollm2, load_text("embedded"), 100)
    store = PairedActivationsStore.from_config(
        smollm2,
        TranscoderRunnerConfig(
            sae=config,
            hook_name="blocks.12.mlp.hook_in",
            hook_name_out="blocks.12.hook_mlp_out",
            train_batch_size_tokens=BATCH,
            n_batches_in_buffer=32,
            training_tokens=STEPS * BATCH,
        ),
        Dataset.from_dict({"tokens": tokens.tolist()}),
    )
    some = list(islice(store, 40))
    return [some[i % len(some)] for i in range(STEPS)]


def losses(batches: list[torch.Tensor], implementation: sparse.Implementation) -> list[float]:
    torch.manual_seed(0)
    sae = TrainingMxD(TrainingMxDConfig(**LAYER))
    settings = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=2e-3,
        lr_end=2e-3,
        lr_warm_up_steps=20,
    )
    trainer = TranscoderTrainer(cfg=settings, sae=sae, data_provider=iter(batches))
    with sparse.implementation(implementation):
        trainer.fit()
    return [entry["loss"] for entry in trainer.history]


@pytest.mark.real_model
def test_dense_and_sparse_training_give_the_same_losses(batches):
    """In float64: in float32 a rounding decides now and then which expert is the k-th largest."""
    dense, fast = losses(batches, "reference"), losses(batches, "cpu")
    assert len(dense) == STEPS
    assert dense[-1] < 0.8 * dense[0]
    assert fast == pytest.approx(dense, rel=1e-9)
