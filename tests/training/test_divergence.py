"""A run that gets worse, or learns from nothing, says so; one bad token does not ruin it."""

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import run_config
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from tiny import D_MODEL

from mxd_lens import TrainingMxD, TrainingMxDConfig, TranscoderTrainingRunner
from mxd_lens.training.divergence import Divergence, TrainingDiverged
from mxd_lens.training.trainer import TranscoderTrainer, check_activations


@pytest.mark.parametrize(
    ("errors", "diverged"),
    [
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], False),
        ([0.1] * 20, False),
        ([0.1] * 10 + [9.0, 9.0] + [0.1] * 3, False),  # two bad batches
        ([0.1] * 10 + [0.16] * 5, True),
        ([0.1] * 10 + [0.14] * 5, False),
        ([0.1] * 10 + [float("nan")] * 5, True),
        ([0.1] * 10 + [1e17] * 5, True),
    ],
)
def test_the_last_error_is_compared_with_the_best(errors: list[float], diverged: bool) -> None:
    verdict = Divergence.of(errors)
    assert verdict is not None
    assert verdict.has_diverged is diverged


def test_a_run_diverges_where_every_measure_rises() -> None:
    flat, risen = [0.1] * 15, [0.1] * 10 + [0.4] * 5
    for curves, rise in (((risen, flat), 1.0), ((flat, risen), 1.0), ((risen, risen), 4.0)):
        verdict = Divergence.of(*curves)
        assert verdict is not None
        assert verdict.rise == pytest.approx(rise)
        assert verdict.has_diverged is (rise > 1)


def test_tokens_with_very_large_targets_are_no_divergence() -> None:
    """As in Gemma 3: a batch with one target of norm 1,000 has a small ratio of sums."""
    generator = torch.Generator().manual_seed(0)
    ratios, means = [], []
    for n in range(40):
        y = torch.randn(16, 8, generator=generator)
        squared_error = torch.full((16,), 1.0)
        if n in range(10, 20):
            y[0] *= 1000 / y[0].norm()
        ratios.append(float(squared_error.sum() / y.pow(2).sum()))
        means.append(float((squared_error / y.pow(2).sum(-1)).mean()))
    alone, both = Divergence.of(ratios), Divergence.of(ratios, means)
    assert alone is not None
    assert both is not None
    assert (alone.has_diverged, both.has_diverged) == (True, False)


def test_a_short_curve_has_no_verdict() -> None:
    assert Divergence.of([1.0] * 4) is None


def test_where_the_best_was() -> None:
    verdict = Divergence.of([5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    assert verdict is not None
    assert (verdict.best, verdict.last, verdict.best_at) == (1.0, 3.0, 6)
    assert str(verdict) == "the error is 3, and was 1 at its best"
    assert Divergence.of([1.2] * 9).is_worse_than_zero


@pytest.fixture
def text(words: list[str]) -> Dataset:
    return Dataset.from_dict({"text": words[:40]})


def diverging(**changes: Any) -> Any:
    """A run that learns for twenty steps, and then takes steps that are far too long."""
    return run_config(training_tokens=60 * 16, lr=1e-2, lr_warm_up_steps=0, sae={"gated": True}, **changes)


def let_diverge(run: TranscoderTrainingRunner) -> None:
    step = run.trainer.step

    def unstable(batch: torch.Tensor) -> Any:
        if run.trainer.n_training_steps == 40:
            for group in run.trainer.optimizer.param_groups:
                group["lr"] = 3.0
            run.trainer.lr_scheduler.base_lrs = [3.0]
        return step(batch)

    run.trainer.step = unstable


def test_a_diverged_run_warns_and_its_layer_says_so(
    tiny_model, text: Dataset, tmp_path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sae_lens"), "propagate", True)
    run = TranscoderTrainingRunner(diverging(output_path=str(tmp_path / "run")), text, tiny_model)
    let_diverge(run)
    run.run()
    assert "Training diverges at step 4" in caplog.text
    assert "A lower learning rate" in caplog.text
    assert "The run has diverged: the error is" in caplog.text
    metadata = SAE.load_from_disk(tmp_path / "run").cfg.metadata
    assert metadata.diverged is True
    assert metadata.last_error > 1.5 * metadata.best_error


def test_asked_to_it_stops(tiny_model, text: Dataset, tmp_path) -> None:
    cfg = diverging(output_path=str(tmp_path / "run"), stop_on_divergence=True)
    run = TranscoderTrainingRunner(cfg, text, tiny_model)
    let_diverge(run)
    with pytest.raises(
        TrainingDiverged, match=r"diverges at step 4.*The last checkpoint is .*run/checkpoints"
    ):
        run.run()
    assert not (tmp_path / "run" / "cfg.json").exists()


def test_a_run_that_converges_says_that_too(tiny_model, text: Dataset, tmp_path) -> None:
    cfg = run_config(training_tokens=60 * 16, lr=1e-2, lr_warm_up_steps=0, output_path=str(tmp_path / "run"))
    TranscoderTrainingRunner(cfg, text, tiny_model).run()
    metadata = SAE.load_from_disk(tmp_path / "run").cfg.metadata
    assert metadata.diverged is False
    assert 0 < metadata.best_error <= metadata.last_error < 1


# Batches that ruin a run


@pytest.mark.parametrize("value", [1e17, -1e19, 3e38])
def test_activations_that_float32_cannot_square_stop_the_run(value: float) -> None:
    batch = torch.randn(6, 8)
    batch[2, 3] = value
    with pytest.raises(FloatingPointError, match=r"activations are as large as .* exceed float32"):
        check_activations(batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers_stop_the_run(value: float) -> None:
    batch = torch.randn(6, 8)
    batch[2, 3] = batch[4, 1] = value
    with pytest.raises(FloatingPointError, match="2 of 6 activation pairs are NaN or infinite"):
        check_activations(batch)


def test_large_activations_of_a_standardised_run_are_not_saved_as_nan(
    tiny_model, text: Dataset, tmp_path
) -> None:
    with torch.no_grad():
        tiny_model.blocks[1].mlp.W_out.mul_(1e20)
    cfg = run_config(standardize_activations=True, output_path=str(tmp_path / "run"))
    with pytest.raises(FloatingPointError, match="exceed float32"):
        TranscoderTrainingRunner(cfg, text, tiny_model).run()
    assert not (tmp_path / "run" / "cfg.json").exists()


def test_weights_that_are_not_finite_are_not_saved(tiny_model, text: Dataset, tmp_path) -> None:
    run = TranscoderTrainingRunner(run_config(output_path=str(tmp_path / "run")), text, tiny_model)
    with torch.no_grad():
        run.sae.W_out[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="is not saved: its W_out holds values that are not finite"):
        run.save_final_sae()
    assert not (tmp_path / "run" / "cfg.json").exists()


@pytest.mark.parametrize("length", [0.0, 1e-4])
def test_one_target_of_zero_does_not_ruin_the_layer(length: float) -> None:
    """In every batch of 128 one target has no length: the others are learnt as if it were not there."""

    def error(spoiled: bool) -> float:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(D_MODEL, D_MODEL, generator=generator)

        def batches():
            while True:
                x = torch.randn(128, D_MODEL, generator=generator)
                y = torch.relu(x) @ weights
                if spoiled:
                    y[0] *= length
                yield torch.cat([x, y], dim=1)

        torch.manual_seed(0)
        sae = TrainingMxD(TrainingMxDConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=64, d_hidden=32, k=8))
        settings = SAETrainerConfig(
            total_training_samples=150 * 128, train_batch_size_samples=128, lr=1e-2, lr_end=1e-2
        )
        trainer = TranscoderTrainer(cfg=settings, sae=sae, data_provider=batches())
        trainer.fit()
        assert min(entry["left_out"] for entry in trainer.history) == int(spoiled)
        x = torch.randn(500, D_MODEL, generator=generator)
        y = torch.relu(x) @ weights
        return float((sae(x) - y).detach().pow(2).sum() / y.pow(2).sum())

    assert error(spoiled=True) < 1.25 * error(spoiled=False)
