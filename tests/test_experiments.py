"""The lean loop of the experiments trains and evaluates as the project's own trainer and `evaluate` do."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from experiments.lean import Evaluation, LanguageModel, TrainingRun, greedy_matching, new_layer
from mxd_lens import TranscoderRunnerConfig, evaluate, load_model
from mxd_lens.training.standardizer import Standardizer
from mxd_lens.training.trainer import TranscoderTrainer

D = 16
STEPS, BATCH, LR = 12, 32, 1e-2


def layer_of(architecture: str) -> Any:
    settings = {"d_hidden": 8} if architecture.endswith("mxd") else {}
    return new_layer(architecture, D, 40, 4, 0, "cpu", settings)


@pytest.mark.parametrize("architecture", ["mxd", "affine_skip_mxd", "topk_skip_transcoder"])
def test_the_lean_loop_ends_with_the_trainers_weights(architecture: str) -> None:
    rows = torch.randn(STEPS, BATCH, 2 * D, generator=torch.Generator().manual_seed(1))
    lean = TrainingRun(layer_of(architecture), rows[0], LR, STEPS, warm_up=3, decay=6)
    for step in range(STEPS):
        lean.step(rows[step], torch.arange(BATCH))
    ours = lean.finish()

    sae: TrainingSAE[Any] = layer_of(architecture)
    cfg = TranscoderRunnerConfig(
        sae=sae.cfg,
        training_tokens=STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        lr=LR,
        lr_warm_up_steps=3,
        lr_decay_steps=6,
        n_checkpoints=0,
        output_path=None,
        device="cpu",
    )
    settings = dataclasses.replace(cfg.to_sae_trainer_config(), save_final_checkpoint=False)
    trainer = TranscoderTrainer(cfg=settings, sae=sae, data_provider=iter(rows))
    trainer.activation_scaler = Standardizer(sae)
    # SAELens' schedule counts the warm-up and the decay from one step to the next in its own way.
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: min(1.0, (step + 1) / 3) * min(1.0, (STEPS - step) / 6)
    )
    trainer.fit()
    sae.normalize_decoder()
    for a, b in zip(ours.parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_lean_evaluation_is_evaluates(tiny_folder: Path) -> None:
    tokens = torch.randint(3, 18, (4, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    sae = layer_of("affine_skip_mxd")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = (
        "blocks.1.mlp.hook_in",
        "blocks.1.hook_mlp_out",
    )
    sae.cfg.metadata["exclude_special_tokens"] = [1]
    report = evaluate(load_model(tiny_folder), sae, tokens, progress=False)
    found = Evaluation(LanguageModel(tiny_folder, "cpu"), tokens, [1]).layer(sae, 1)

    def mean(name: str) -> float:
        return sum(found[name]) / len(found[name])

    assert mean("nmse") == pytest.approx(report.normalized_mse, rel=1e-4)
    assert mean("mean_gate") == pytest.approx(report.normalized_mse_mean_gate, rel=1e-4)
    assert mean("ce") == pytest.approx(report.ce_loss_replaced, rel=1e-4)
    assert mean("kl") == pytest.approx(report.kl_divergence, rel=1e-3)
    assert found["silent"] == pytest.approx(report.silent_fraction)


def test_the_greedy_matching_pairs_the_most_similar_first() -> None:
    similarity = torch.rand(30, 40, generator=torch.Generator().manual_seed(0))
    partner, found = greedy_matching(similarity)
    left: Tensor = similarity.clone()
    for _ in range(30):
        row, column = divmod(int(left.argmax()), 40)
        assert partner[row] == column
        assert found[row] == similarity[row, column]
        left[row], left[:, column] = -1, -1
