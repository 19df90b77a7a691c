"""Training on standardised activations gives a layer for the activations as they are."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from runs import run_config
from sae_lens import SAE, TopKTrainingSAEConfig, TrainingSAE
from small_layers import sizes_of
from test_transcoders import D_IN, D_OUT, K, N, randomised
from tiny import HOOK_OUT

from mxd_lens import TranscoderRunnerConfig, TranscoderTrainingRunner
from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.training.checkpoints import complete_checkpoints
from mxd_lens.training.standardizer import Standardizer
from mxd_lens.training.trainer import TrainingInterrupted


def layers() -> list:
    made = []
    for _, _, training, config in ARCHITECTURES.values():
        has_branch = "d_hidden" in config.__dataclass_fields__
        for extra in [{}, {"gated": True}] if has_branch else [{}]:
            sizes = {"d_in": D_IN, "d_out": D_OUT, "d_sae": N, "k": K, **sizes_of(config)}
            cfg = config(dtype="float64", **sizes, **extra)
            made.append(pytest.param(cfg, training, id=f"{training.__name__} {extra}"))
    return made


@pytest.mark.parametrize(("cfg", "training"), layers())
def test_folded_it_is_the_same_layer(cfg, training) -> None:
    layer = randomised(training(cfg))
    layer.normalize_decoder()
    pairs = 3 * torch.randn(50, D_IN + D_OUT, dtype=torch.float64) + torch.arange(D_IN + D_OUT)
    scaler = Standardizer(layer)
    standardised = scaler(pairs)
    expected = layer(standardised[:, :D_IN]) * scaler.statistics["target_scale"]
    acts = layer.encode(standardised[:, :D_IN])
    folded = copy.deepcopy(layer)
    folded.fold_standardization(**scaler.statistics)
    torch.testing.assert_close(folded(pairs[:, :D_IN]), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded.encode(pairs[:, :D_IN]), acts, rtol=1e-10, atol=1e-10)
    if layer.unit_rows:
        torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(scaler.unscale(standardised), pairs)


def test_what_the_layer_is_trained_on() -> None:
    cfg, training = layers()[0].values
    layer = training(cfg)
    pairs = 100 * torch.randn(400, D_IN + D_OUT, dtype=torch.float64) + 300
    first = Standardizer(layer)
    x, y = first(pairs).split([D_IN, D_OUT], dim=1)
    torch.testing.assert_close(x.mean(0), torch.zeros(D_IN, dtype=torch.float64), atol=1e-5, rtol=0)
    assert x.norm(dim=1).mean().item() == pytest.approx(D_IN**0.5, rel=1e-5)
    assert y.norm(dim=1).mean().item() == pytest.approx(D_OUT**0.5, rel=1e-5)
    torch.testing.assert_close(layer.b_dec, y.mean(0), rtol=1e-5, atol=1e-5)
    again = first(pairs + 1)  # the statistics stay those of the first batch
    torch.testing.assert_close(again[:, :D_IN] - x, torch.full_like(x, 1) / first.statistics["scale"])


@pytest.mark.parametrize("target", [0.0, 2.0])
def test_constant_activations(target: float) -> None:
    cfg, training = layers()[0].values
    pairs = torch.zeros(8, D_IN + D_OUT, dtype=torch.float64)
    pairs[:, D_IN:] = target
    assert Standardizer(training(cfg))(pairs).isfinite().all()


@pytest.fixture
def text(words: list[str]) -> Dataset:
    return Dataset.from_dict({"text": words[:40]})


def test_history_and_result_are_of_the_activations_themselves(tiny_model, text, tmp_path: Path) -> None:
    """At the end the saved layer has the error that the training curve says."""
    cfg = run_config(
        standardize_activations=True,
        training_tokens=1600,
        lr=1e-2,
        lr_warm_up_steps=0,
        output_path=str(tmp_path / "run"),
    )
    run = TranscoderTrainingRunner(cfg, text, tiny_model)
    run.run()
    pairs = next(run.activations_store)
    x, y = pairs.split(cfg.sae.d_in, dim=1)
    sae = SAE.load_from_disk(tmp_path / "run")
    error = ((sae(x) - y).pow(2).sum(1) / y.pow(2).sum(1)).mean().item()
    last = [entry["normalized_mse"] for entry in run.trainer.history[-10:]]
    assert error == pytest.approx(sum(last) / 10, rel=0.35)
    assert error < 0.7


def test_stopped_and_resumed(tiny_model, text, tmp_path: Path) -> None:
    settings = {"standardize_activations": True, "training_tokens": 20 * 16, "lr": 3e-3}
    whole = TranscoderTrainingRunner(run_config(**settings), text, tiny_model).run()
    settings |= {"output_path": str(tmp_path)}
    run = TranscoderTrainingRunner(run_config(**settings), text, tiny_model)
    train = run.trainer.step

    def stopping(batch: torch.Tensor):
        run.trainer.stop.requested = run.trainer.n_training_steps == 8
        return train(batch)

    run.trainer.step = stopping
    with pytest.raises(TrainingInterrupted):
        run.run()
    resumed = TranscoderTrainingRunner(
        run_config(**settings, resume_from_checkpoint="latest"), text, tiny_model
    ).run()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def normalized_mse(sae, pairs: torch.Tensor, d_in: int) -> float:
    x, y = pairs[:, :d_in], pairs[:, -sae.cfg.d_out :] if hasattr(sae.cfg, "d_out") else pairs
    return ((sae(x) - y).pow(2).sum(1) / y.pow(2).sum(1)).mean().item()


def sae_config(**changes) -> TranscoderRunnerConfig:
    cfg = run_config()
    same = ("context_size", "train_batch_size_tokens", "n_batches_in_buffer", "store_batch_size_prompts")
    return TranscoderRunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=cfg.sae.d_in, d_sae=24, k=3),
        hook_name=HOOK_OUT,
        hook_name_out=HOOK_OUT,
        **{name: getattr(cfg, name) for name in same},
        **{"output_path": None} | changes,
    )


@pytest.mark.parametrize("config", [run_config, sae_config])
def test_a_checkpoint_loads_as_a_layer_for_the_activations_themselves(
    tiny_model, text, tmp_path: Path, config
) -> None:
    """Through SAELens and through us, with the error that the trained layer has."""
    with torch.no_grad():
        tiny_model.blocks[1].mlp.W_out.mul_(20)  # so that it matters
    settings = {"training_tokens": 1600, "lr": 1e-2, "lr_warm_up_steps": 0, "n_checkpoints": 20}
    cfg = config(standardize_activations=True, output_path=str(tmp_path / "run"), **settings)
    run = TranscoderTrainingRunner(cfg, text, tiny_model)
    run.run()
    pairs = next(run.activations_store)
    checkpoint = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    final = normalized_mse(SAE.load_from_disk(tmp_path / "run"), pairs, cfg.sae.d_in)
    assert final < 0.7
    for load in (SAE.load_from_disk, TrainingSAE.load_from_disk):
        assert normalized_mse(load(checkpoint), pairs, cfg.sae.d_in) == pytest.approx(final, rel=0.2)


@pytest.mark.parametrize("config", [run_config, sae_config])
@pytest.mark.parametrize("start", ["from_pretrained_path", "override_sae"])
def test_a_trained_layer_trained_further_is_the_same_layer(
    tiny_model, text, tmp_path: Path, start: str, config
) -> None:
    """One step at a learning rate of nothing leaves it as it was."""
    with torch.no_grad():
        tiny_model.blocks[1].mlp.W_out.mul_(20)
    settings = {"standardize_activations": True, "lr_warm_up_steps": 0, "n_checkpoints": 0}
    cfg = config(training_tokens=1600, lr=1e-2, output_path=str(tmp_path / "run"), **settings)
    run = TranscoderTrainingRunner(cfg, text, tiny_model)
    run.run()
    pairs = next(run.activations_store)
    before = normalized_mse(SAE.load_from_disk(tmp_path / "run"), pairs, cfg.sae.d_in)
    further = {"from_pretrained_path": str(tmp_path / "run")} if start == "from_pretrained_path" else {}
    layer = None if further else TrainingSAE.load_from_disk(tmp_path / "run")
    again = TranscoderTrainingRunner(
        config(training_tokens=16, lr=1e-12, **settings, **further), text, tiny_model, override_sae=layer
    ).run()
    assert normalized_mse(again, pairs, cfg.sae.d_in) == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(("cfg", "training"), layers())
def test_unfolded_and_folded_again_it_is_the_same_layer(cfg, training) -> None:
    layer = randomised(training(cfg))
    layer.normalize_decoder()
    pairs = 3 * torch.randn(50, D_IN + D_OUT, dtype=torch.float64) + torch.arange(D_IN + D_OUT)
    expected = layer(pairs[:, :D_IN])
    scaler = Standardizer(layer, is_trained=True)
    x = scaler(pairs)[:, :D_IN]
    torch.testing.assert_close(layer(x) * scaler.statistics["target_scale"], expected, rtol=1e-6, atol=1e-6)
    scaler.fold(layer)
    torch.testing.assert_close(layer(pairs[:, :D_IN]), expected, rtol=1e-6, atol=1e-6)


def test_a_new_layer_given_is_standardised_as_a_new_one(tiny_model, text) -> None:
    """Its biases are zero: nothing was trained that could be lost."""
    cfg = run_config(standardize_activations=True)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        given = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
    one = TranscoderTrainingRunner(cfg, text, tiny_model).run()
    other = TranscoderTrainingRunner(cfg, text, tiny_model, override_sae=given).run()
    assert all(torch.equal(w, other.state_dict()[name]) for name, w in one.state_dict().items())


def test_an_sae_of_saelens(tiny_model, text, tmp_path: Path) -> None:
    cfg = sae_config(
        training_tokens=100 * 16,
        standardize_activations=True,
        lr=3e-3,
        lr_warm_up_steps=0,
        output_path=str(tmp_path / "sae"),
    )
    run = TranscoderTrainingRunner(cfg, text, tiny_model)
    run.run()
    error = normalized_mse(SAE.load_from_disk(tmp_path / "sae"), next(run.activations_store), cfg.sae.d_in)
    assert error == pytest.approx(run.trainer.history[-1]["normalized_mse"], rel=0.5)


def test_one_scaling_is_enough() -> None:
    with pytest.raises(ValueError, match="both scale the activations"):
        TranscoderRunnerConfig(
            sae=TopKTrainingSAEConfig(d_in=4, d_sae=8, k=2, normalize_activations="expected_average_only_in"),
            hook_name=HOOK_OUT,
            hook_name_out=HOOK_OUT,
            standardize_activations=True,
        )
