"""The BatchTopK transcoder against its formula, written out densely."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import run_config
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput
from tiny import D_MODEL, HOOK_IN, HOOK_OUT

from mxd_lens import TranscoderTrainingRunner, build_dashboard, evaluate, replacement_hooks, sparse
from mxd_lens.architectures import (
    BatchTopKTranscoder,
    BatchTopKTranscoderConfig,
    TrainingBatchTopKTranscoder,
    TrainingBatchTopKTranscoderConfig,
)
from mxd_lens.architectures.batch_topk_transcoder import largest_of_batch
from mxd_lens.pretrained.model_card import model_card

D_IN, D_OUT, D_SAE, K, B = 6, 5, 40, 3, 50


def training_layer(**changes: Any) -> TrainingBatchTopKTranscoder:
    settings = {"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "k": K, "dtype": "float64"} | changes
    layer = TrainingBatchTopKTranscoder(TrainingBatchTopKTranscoderConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def pairs(n: int = B, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(n, D_IN + D_OUT, generator=generator, dtype=torch.float64)
    made[0] *= 30  # a token that needs many features
    return made


def step(layer: TrainingBatchTopKTranscoder, batch: torch.Tensor) -> Any:
    return layer.training_forward_pass(TrainStepInput(batch, {}, None, 0, False))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_training_step_keeps_the_largest_of_the_batch(implementation: Any) -> None:
    """Loss and gradients are those of SAELens' BatchTopK in the dense formula."""
    layer, batch = training_layer(), pairs()
    with sparse.implementation(implementation):
        output = step(layer, batch)
        output.loss.backward()
    dense = training_layer()
    x, y = batch.split([D_IN, D_OUT], dim=-1)
    a = BatchTopK(K)(x @ dense.W_enc + dense.b_enc)
    y_hat = a @ dense.W_dec + dense.b_dec
    loss = ((y_hat - y).pow(2).sum(-1) / y.norm(dim=-1)).mean() / D_OUT
    loss.backward()
    torch.testing.assert_close(output.feature_acts.to_dense(), a)
    torch.testing.assert_close(output.sae_out, y_hat)
    torch.testing.assert_close(output.loss, loss)
    assert (a > 0).sum() == K * B
    assert (a > 0).sum(-1).max() > 2 * K  # a token may have many more
    for (name, got), expected in zip(layer.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_the_largest_of_blocks_are_the_largest_of_all() -> None:
    pre = torch.randn(37, 12, generator=torch.Generator().manual_seed(2))
    for n in (1, 20, 150, 10_000):
        token, expert = largest_of_batch(iter(pre.split(5)), n)
        kept = torch.zeros_like(pre)
        kept[token, expert] = pre[token, expert]
        least = pre.relu().flatten().sort(descending=True).values[min(n, pre.numel()) - 1]
        torch.testing.assert_close(kept, torch.where((pre >= least) & (pre > 0), pre, 0))


def test_the_threshold_is_the_mean_of_the_smallest_active_coefficients() -> None:
    layer = training_layer(threshold_lr=0.1)
    expected = None
    for seed in range(5):
        output = step(layer, pairs(seed=seed))
        a = output.feature_acts.to_dense()
        smallest = a[a > 0].min()
        expected = smallest if expected is None else 0.9 * expected + 0.1 * smallest
    torch.testing.assert_close(layer.threshold, expected)
    x = pairs(seed=9)[:, :D_IN]
    pre = x @ layer.W_enc + layer.b_enc
    torch.testing.assert_close(layer.encode(x), torch.where(pre > expected, pre, 0))
    assert abs((layer.encode(x) > 0).sum(-1).double().mean() - K) < 1.5


def test_at_inference_a_token_does_not_depend_on_the_others() -> None:
    layer, x = training_layer(), pairs()[:, :D_IN]
    step(layer, pairs())
    torch.testing.assert_close(layer(x[3:4]), layer(x)[3:4])


def test_it_survives_saving_copying_and_saelens(tmp_path: Path) -> None:
    layer = training_layer()
    step(layer, pairs())
    layer.save_inference_model(tmp_path)
    x = pairs()[:, :D_IN]
    for loaded in (SAE.load_from_disk(tmp_path), BatchTopKTranscoder.load_from_disk(tmp_path)):
        assert type(loaded) is BatchTopKTranscoder
        assert loaded.threshold > 0
        torch.testing.assert_close(loaded(x), layer(x))
    copied = copy.deepcopy(layer)
    copied.threshold.zero_()
    assert layer.threshold > 0


def test_it_needs_k() -> None:
    with pytest.raises(ValueError, match="k must be a positive integer"):
        BatchTopKTranscoderConfig(d_in=2, d_out=2, d_sae=4, k=None)


@pytest.mark.slow
def test_a_newcomer_trains_attaches_is_measured_and_has_its_pages(
    tiny_model: Any, words: list[str], tmp_path: Path
) -> None:
    """All that a registered architecture gets without a line of its own elsewhere."""
    text = Dataset.from_dict({"text": words[:40]})
    layer_config = TrainingBatchTopKTranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=24, k=3)
    settings = {"training_tokens": 60 * 16, "lr": 3e-3, "standardize_activations": True}
    settings |= {"model_name": tiny_model.cfg.model_name, "output_path": str(tmp_path / "run")}
    config = replace(run_config(**settings), sae=layer_config)
    TranscoderTrainingRunner(config, text, tiny_model).run()
    layer = SAE.load_from_disk(tmp_path / "run")
    assert type(layer) is BatchTopKTranscoder
    assert layer.threshold > 0

    tokens = tiny_model.to_tokens("the big cat sat on the red mat")
    _, cache = tiny_model.run_with_cache(tokens)
    y = layer(cache[HOOK_IN])
    expected = tiny_model.run_with_hooks(tokens, fwd_hooks=[(HOOK_OUT, lambda _, hook: y)])
    for logits in (
        tiny_model.run_with_saes(tokens, saes=[layer]),
        tiny_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(layer)),
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    report = evaluate(tiny_model, layer, tokens, progress=False)
    assert 0 < report.l0 <= 24
    card = model_card(layer, {"a text": report}, release="user/repo", sae_id="layer")
    assert "A BatchTopK transcoder" in card
    assert f"a = threshold(relu(x @ W_enc + b_enc), {layer.threshold:.4g}, 0)" in card
    build_dashboard(tiny_model, layer, tokens, output=tmp_path / "pages", progress=False)
    assert list((tmp_path / "pages").rglob("*.html"))
