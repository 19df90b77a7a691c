"""Architectures of released transcoders: SAELens' numbers, attached as they run, and trainable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes import transcoder as saelens
from sae_lens.saes.sae import SAEMetadata, TrainStepInput

import mxd_lens
from mxd_lens import (
    JumpReLUSkipTranscoder,
    JumpReLUTranscoder,
    SkipTranscoder,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingJumpReLUSkipTranscoder,
    TrainingJumpReLUSkipTranscoderConfig,
    TrainingJumpReLUTranscoder,
    TrainingJumpReLUTranscoderConfig,
    replacement_hooks,
)

D_MODEL, N = 16, 40
HOOK, HOOK_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
OURS = {
    "skip_transcoder": (SkipTranscoder, saelens.SkipTranscoder, saelens.SkipTranscoderConfig),
    "jumprelu_transcoder": (
        JumpReLUTranscoder,
        saelens.JumpReLUTranscoder,
        saelens.JumpReLUTranscoderConfig,
    ),
    "jumprelu_skip_transcoder": (
        JumpReLUSkipTranscoder,
        saelens.JumpReLUSkipTranscoder,
        saelens.JumpReLUSkipTranscoderConfig,
    ),
}
X = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1))


def randomised(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            if name == "threshold":
                parameter.abs_()
    return layer


def of_saelens(name: str) -> Any:
    """SAELens' own layer with random weights."""
    _, layer_class, config_class = OURS[name]
    metadata = SAEMetadata(model_name="llama-of-words", hook_name=HOOK, hook_name_out=HOOK_OUT)
    config = config_class(d_in=D_MODEL, d_out=D_MODEL, d_sae=N, metadata=metadata, apply_b_dec_to_input=False)
    return randomised(layer_class(config))


@pytest.mark.parametrize("name", OURS)
def test_a_layer_that_saelens_saved_computes_the_same_and_keeps_its_skip_when_attached(
    name: str, tmp_path: Path, tiny_model: Any
) -> None:
    theirs = of_saelens(name)
    theirs.save_model(tmp_path)
    for layer in (SAE.load_from_disk(tmp_path), OURS[name][0].from_pretrained(tmp_path)):
        assert type(layer) is OURS[name][0]
        assert isinstance(layer, OURS[name][1])
        torch.testing.assert_close(layer(X), theirs(X), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.encode(X), theirs.encode(X), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.coefficients(X).dense(), layer.encode(X))
    tokens = torch.tensor([[1, 3, 4, 5, 6, 7]])
    plain = tiny_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(layer))
    with tiny_model.saes(saes=[layer]):
        attached = tiny_model(tokens)
    torch.testing.assert_close(attached, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_folding_the_decoder_norm_keeps_the_output(name: str, tmp_path: Path) -> None:
    of_saelens(name).save_model(tmp_path)
    layer = SAE.load_from_disk(tmp_path)
    before = layer(X)
    layer.fold_W_dec_norm()
    torch.testing.assert_close(layer.W_dec.norm(dim=1), torch.ones(N))
    torch.testing.assert_close(layer(X), before, rtol=1e-5, atol=1e-5)


TRAINING = [
    (TrainingJumpReLUTranscoder, TrainingJumpReLUTranscoderConfig),
    (TrainingJumpReLUSkipTranscoder, TrainingJumpReLUSkipTranscoderConfig),
]


@pytest.mark.parametrize(("layer_class", "config_class"), TRAINING)
def test_jumprelu_trains(layer_class: Any, config_class: Any) -> None:
    torch.manual_seed(0)
    layer = layer_class(
        config_class(d_in=D_MODEL, d_out=D_MODEL, d_sae=N, l0_coefficient=1e-3, jumprelu_bandwidth=0.2)
    )
    x = torch.randn(512, D_MODEL)
    pairs = torch.cat([x, torch.relu(x @ torch.randn(D_MODEL, D_MODEL)) / 4], dim=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    coefficients = {"l0": 1e-3}
    steps = []
    for n_steps in range(300):
        out = layer.training_forward_pass(
            TrainStepInput(
                sae_in=pairs,
                coefficients=coefficients,
                dead_neuron_mask=None,
                n_training_steps=n_steps,
                is_logging_step=False,
            )
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        steps.append(
            (
                float(out.metrics["normalized_mse"]),
                float(out.feature_acts.to_dense().gt(0).sum(1).float().mean()),
            )
        )
    assert steps[-1][0] < 0.6 * steps[0][0]
    assert steps[-1][1] < 0.8 * steps[0][1]
    assert (layer.threshold - layer.cfg.jumprelu_init_threshold).abs().max() > 0.01
    # What is saved for inference is what was trained.
    inference = getattr(mxd_lens, layer_class.__name__.removeprefix("Training"))(layer.cfg)
    inference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(inference(x), layer(x))


def test_the_thresholds_gradient_is_the_straight_through_estimate() -> None:
    """Of the loss sum(a) with bandwidth w: -theta/w for each pre-activation within w/2 of theta."""
    config = TrainingJumpReLUTranscoderConfig(
        d_in=1, d_out=1, d_sae=1, l0_coefficient=1.0, jumprelu_init_threshold=0.5, jumprelu_bandwidth=0.4
    )
    layer = TrainingJumpReLUTranscoder(config)
    with torch.no_grad():
        layer.W_enc.fill_(1)
    a = layer.coefficients(torch.tensor([[0.2], [0.4], [0.6], [0.8]])).dense()
    assert a.flatten().tolist() == pytest.approx([0, 0, 0.6, 0.8])
    a.sum().backward()
    assert float(layer.threshold.grad) == pytest.approx(2 * -0.5 / 0.4)


def test_settings_that_cannot_be() -> None:
    common: dict[str, Any] = {"d_in": 2, "d_out": 2, "d_sae": 4}
    with pytest.raises(ValueError, match="k must be None"):
        mxd_lens.JumpReLUTranscoderConfig(**common, k=2)
    with pytest.raises(ValueError, match="l0_coefficient must be positive"):
        TrainingJumpReLUTranscoderConfig(**common)
    with pytest.raises(ValueError, match="relu must be True, or False with a k"):
        TopKTranscoderConfig(**common, k=None, relu=False)


RAW = [(TopKTranscoder, TopKTranscoderConfig), (TopKSkipTranscoder, TopKSkipTranscoderConfig)]


@pytest.mark.parametrize(("layer_class", "config_class"), RAW)
def test_topk_of_the_raw_pre_activations(layer_class: Any, config_class: Any, tmp_path: Path) -> None:
    layer = randomised(layer_class(config_class(d_in=D_MODEL, d_out=D_MODEL, d_sae=N, k=30, relu=False)))
    pre = X @ layer.W_enc + layer.b_enc
    kept = pre >= pre.sort(dim=1, descending=True).values[:, 29:30]
    assert (pre[kept] < 0).any()
    expected = torch.where(kept, pre, 0) @ layer.W_dec + layer.b_dec
    expected = expected + (X @ layer.W_skip.T if hasattr(layer, "W_skip") else 0)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.coefficients(X).dense(), layer.encode(X))
    layer.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.relu is False
    assert torch.equal(loaded(X), layer(X))
