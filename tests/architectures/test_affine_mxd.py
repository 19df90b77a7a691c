"""Affine experts and linear transforms beside the layers they contain."""

import pytest
import torch
from small_layers import sizes_of

from mxd_lens import (
    MOLT,
    AffineMxD,
    AffineMxDConfig,
    AffineSkipMxD,
    AffineSkipMxDConfig,
    MOLTConfig,
    MxD,
    MxDConfig,
    SkipMxD,
    SkipMxDConfig,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
)

WIDTHS = {"d_in": 7, "d_out": 5, "d_sae": 13, "k": 4, "dtype": "float64"}
X = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def randomised(layer_class, config, **more):
    torch.manual_seed(0)
    layer = layer_class(config(**WIDTHS, **sizes_of(config), **more)).requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("affine", "config", "inner", "inner_config"),
    [
        (AffineMxD, AffineMxDConfig, MxD, MxDConfig),
        (AffineSkipMxD, AffineSkipMxDConfig, SkipMxD, SkipMxDConfig),
    ],
)
def test_without_its_biases_it_is_an_mxd(affine, config, inner, inner_config, gated) -> None:
    layer, mxd = randomised(affine, config, gated=gated), randomised(inner, inner_config, gated=gated)
    layer.b_expert.zero_()
    for name, weight in mxd.named_parameters():
        weight.copy_(getattr(layer, name))
    torch.testing.assert_close(layer(X), mxd(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("affine", "config", "inner", "inner_config"),
    [
        (AffineMxD, AffineMxDConfig, TopKTranscoder, TopKTranscoderConfig),
        (AffineSkipMxD, AffineSkipMxDConfig, TopKSkipTranscoder, TopKSkipTranscoderConfig),
    ],
)
def test_without_its_decoder_branch_it_is_a_transcoder(affine, config, inner, inner_config) -> None:
    layer, transcoder = randomised(affine, config), randomised(inner, inner_config)
    layer.W_out.zero_()
    for name, weight in transcoder.named_parameters():
        weight.copy_(getattr(layer, "b_expert" if name == "W_dec" else name))
    torch.testing.assert_close(layer(X), transcoder(X), rtol=1e-12, atol=1e-12)


def test_an_experts_weight_is_its_map_of_the_hidden_units_and_one() -> None:
    layer = randomised(AffineMxD, AffineMxDConfig)
    z = torch.cat([layer.hidden(X), torch.ones(6, 1, dtype=torch.float64)], dim=1)
    written = layer.written_by(torch.tensor([9]).expand(6, 1), layer.expert_input(X)).squeeze(1)
    torch.testing.assert_close(z @ layer.expert_weight(9), written)
    with pytest.raises(IndexError, match="expert 13 does not exist"):
        layer.expert_weight(13)


def test_a_transforms_weight_is_its_map_of_the_input_and_one() -> None:
    layer = randomised(MOLT, MOLTConfig)
    x = torch.cat([X, torch.ones(6, 1, dtype=torch.float64)], dim=1)
    written = layer.written_by(torch.tensor([9]).expand(6, 1), X).squeeze(1)
    torch.testing.assert_close(x @ layer.expert_weight(9), written)
    assert torch.linalg.matrix_rank(layer.expert_weight(9)) == layer.cfg.rank
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        MOLTConfig(**WIDTHS, rank=0)


def test_rows_start_at_unit_norm_and_the_output_at_b() -> None:
    torch.manual_seed(0)
    layer = AffineSkipMxD(AffineSkipMxDConfig(**WIDTHS, d_hidden=6)).requires_grad_(False)
    torch.testing.assert_close(layer.W_dec.norm(dim=-1), torch.ones(13, dtype=torch.float64))
    assert (layer(X) == layer.b_dec).all()
