"""The loss of a training step, and the weights in a checkpoint, for every architecture."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from small_layers import sizes_of

from mxd_lens import TopKTranscoder, TrainingTopKTranscoder, TrainingTopKTranscoderConfig
from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.training.standardizer import Standardizer

D_IN, D_OUT, D_SAE = 6, 5, 24


def training_layer(name: str, **changes: Any) -> Any:
    """A layer in training with random weights, rows of unit norm where it keeps them there."""
    _, _, layer_class, config_class = ARCHITECTURES[name]
    settings = {"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "k": 4, "dtype": "float64"}
    settings |= sizes_of(config_class)
    layer = layer_class(config_class(**settings | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layer.normalize_decoder()
    return layer


@pytest.fixture(params=list(ARCHITECTURES))
def layer(request: pytest.FixtureRequest) -> Any:
    return training_layer(request.param)


def batch(n: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D_IN + D_OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(layer: Any, pairs: torch.Tensor, **coefficients: float) -> Any:
    wanted = dict.fromkeys(layer.get_coefficients(), 0.0) | coefficients
    return layer.training_forward_pass(TrainStepInput(pairs, wanted, None, 0, False))


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4])
def test_an_empty_target_is_left_out_and_counted(layer: Any, size: float) -> None:
    if "batch_topk" in layer.cfg.architecture():
        pytest.skip("an empty target's input still competes for the batch's features")
    pairs = batch()
    pairs[7, D_IN:] *= size
    without = torch.cat([pairs[:7], pairs[8:]])
    other = copy.deepcopy(layer)
    output, expected = step(layer, pairs), step(other, without)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.metrics["normalized_mse"], expected.metrics["normalized_mse"])
    assert (int(output.metrics["targets_left_out"]), int(expected.metrics["targets_left_out"])) == (1, 0)
    output.loss.backward()
    expected.loss.backward()
    for got, wanted in zip(layer.parameters(), other.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad)


def test_a_batch_of_empty_targets_teaches_nothing(layer: Any) -> None:
    pairs = batch()
    pairs[:, D_IN:] = 0
    output = step(layer, pairs)
    output.loss.backward()
    assert output.losses["mse_loss"] == 0
    assert output.metrics["targets_left_out"] == len(pairs)
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    "name", ["topk_transcoder", "topk_skip_transcoder", "skip_mxd", "affine_mxd", "molt"]
)
def test_the_l1_penalty_does_not_change_with_the_scale_of_an_expert(name: str) -> None:
    """sum_n a_n ||w_n||: the same layer, with smaller coefficients and larger rows, costs the same."""
    layer = training_layer(name, k=None, l1_coefficient=0.1)
    same = copy.deepcopy(layer)
    with torch.no_grad():
        same.W_enc.mul_(0.01)
        same.b_enc.mul_(0.01)
        for weight in (same.W_dec, getattr(same, "b_expert", torch.zeros(1))):
            weight.mul_(100)
    one, other = step(layer, batch(), l1=0.1), step(same, batch(), l1=0.1)
    torch.testing.assert_close(one.sae_out, other.sae_out)
    torch.testing.assert_close(one.losses["l1_loss"], other.losses["l1_loss"])
    if name != "affine_mxd":
        a = one.feature_acts.to_dense()
        norms = layer.W_dec.reshape(D_SAE, -1).norm(dim=-1)
        torch.testing.assert_close(one.losses["l1_loss"], 0.1 * (a * norms).sum(-1).mean())


def test_the_l1_penalty_of_rows_at_unit_norm_is_the_papers() -> None:
    layer = training_layer("mxd", k=None, l1_coefficient=0.1)
    output = step(layer, batch(), l1=0.1)
    torch.testing.assert_close(output.losses["l1_loss"], 0.1 * output.feature_acts.to_dense().sum(-1).mean())


# Standardised activations


def test_a_trained_layer_is_the_same_layer_at_the_start_of_further_training(layer: Any) -> None:
    pairs = 3 * batch(200) + 2
    expected = layer(pairs[:, :D_IN])
    scaler = Standardizer(layer, is_trained=True)
    scaled = scaler(pairs)
    assert scaled.norm(dim=-1).mean() < pairs.norm(dim=-1).mean()  # it does see standardised ones
    torch.testing.assert_close(layer(scaled[:, :D_IN]) * scaler.statistics["target_scale"], expected)
    scaler.fold(layer)
    torch.testing.assert_close(layer(pairs[:, :D_IN]), expected)


# The paper's own baseline


def test_unit_rows_are_the_papers_default_transcoder(tmp_path: Path) -> None:
    """Rows at unit norm at every step, a gradient without its part along the row, and a random start."""
    cfg = TrainingTopKTranscoderConfig(
        d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=4, dtype="float64", unit_rows=True
    )
    layer = TrainingTopKTranscoder(cfg)
    ones = torch.ones(D_SAE, dtype=torch.float64)
    torch.testing.assert_close(layer.W_dec.norm(dim=-1), ones)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for seed in range(4):
        optimizer.zero_grad()
        step(layer, batch(64, seed)).loss.backward()
        torch.testing.assert_close(layer.W_dec.norm(dim=-1), ones)
        torch.testing.assert_close((layer.W_dec.grad * layer.W_dec).sum(-1), 0 * ones)
        optimizer.step()
    layer.normalize_decoder()
    scaler = Standardizer(layer)
    scaler(3 * batch(200))
    scaler.fold(layer)
    torch.testing.assert_close(layer.W_dec.norm(dim=-1), ones)
    layer.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is TopKTranscoder
    torch.testing.assert_close(loaded(batch()[:, :D_IN]), layer(batch()[:, :D_IN]))


def test_by_default_rows_start_at_zero_and_are_free() -> None:
    layer = TrainingTopKTranscoder(TrainingTopKTranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=4))
    assert not layer.W_dec.any()
