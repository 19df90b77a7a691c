"""What fires on a prompt and what it writes, against sums written out expert by expert."""

import pytest
import torch
from attached import MODELS, PROMPT
from layers import ALL_LAYERS, D_SAE, close, make_layer, skip_of, true_input, written_by
from sae_lens import TopKSAE, TopKSAEConfig
from tiny import D_MODEL

from mxd_lens.analysis.decomposition import contributions, decompose, writes_directions
from mxd_lens.analysis.firings import layer_input


@pytest.fixture(params=ALL_LAYERS)
def layer(request):
    return make_layer(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_contributions_are_what_each_expert_writes(layer, x):
    named = [7, 0, 39, 7]
    close(contributions(layer, x, named), torch.stack([written_by(layer, x, n) for n in named], dim=-2))
    close(contributions(layer, x[0, 0], torch.tensor([5])), written_by(layer, x[0, 0], 5)[None])


def test_contributions_sum_to_the_output(layer, x):
    expected = layer(x) - layer.b_dec - skip_of(layer, x)
    close(contributions(layer, x).sum(-2), expected)
    close(contributions(layer, x, range(D_SAE)).sum(-2), expected)
    parts = decompose(layer, x.flatten(0, 1))
    close(parts.output.view_as(x), layer(x) - layer.b_dec)
    close(parts.bias, layer.b_dec)


def test_which_layers_write_directions(layer):
    """An expert writes along one line at every token, or it does not."""
    x = torch.randn(20, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    written = torch.stack([written_by(layer, x, n) for n in range(D_SAE)])
    ranks = [int(torch.linalg.matrix_rank(of, rtol=1e-9)) for of in written if of.any(-1).sum() > 1]
    assert (max(ranks) == 1) == writes_directions(layer)


def test_contributions_pass_a_gradient_to_the_input(x):
    mxd = make_layer("mxd, k")
    x.requires_grad_()
    mine = torch.autograd.grad(contributions(mxd, x).sum(), x)[0]
    close(mine, torch.autograd.grad(mxd(x).sum(), x)[0])


def test_reading_leaves_nothing_waiting_for_a_decode(x):
    """An edited `a` still decodes after a reading in between."""
    mxd = make_layer("mxd, relu")
    a = 2 * mxd.encode(x)
    contributions(mxd, x + 1)
    close(mxd.decode(a), mxd.decode(a, x))


@pytest.mark.parametrize("experts", [[40], [-1], [0, 41]])
def test_an_expert_that_does_not_exist_is_said(x, experts):
    with pytest.raises(IndexError, match=r"expert -?\d+ does not exist: there are 40, from 0"):
        contributions(make_layer("mxd, k"), x, experts)


@pytest.mark.parametrize("experts", [[1.5], torch.arange(D_SAE) < 3])
def test_experts_that_are_no_ids_are_said(x, experts):
    with pytest.raises(TypeError, match="an expert is named by an integer, got"):
        contributions(make_layer("mxd, k"), x, experts)


@pytest.mark.parametrize("kind", ["mxd, k", "saelens transcoder"])
def test_another_width_is_said(kind):
    with pytest.raises(ValueError, match=r"d_in = 16\], got \(5, 17\)"):
        contributions(make_layer(kind), torch.zeros(5, 17))


def test_a_layer_that_normalises_its_input_is_said(x):
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4, normalize_activations="layer_norm"))
    with pytest.raises(ValueError, match="normalize_activations='layer_norm'"):
        contributions(sae, x)


# On a model


@pytest.fixture(params=MODELS)
def any_model(request, tiny_folder):
    return MODELS[request.param](tiny_folder)


def test_an_earlier_layer_that_is_attached_counts(tiny_model):
    sae, earlier = make_layer("mxd, k", "float32"), make_layer("mxd, k", "float32", layer=0)
    tokens = tiny_model.to_tokens(PROMPT)
    with tiny_model.saes(saes=[earlier]):
        x = layer_input(tiny_model, sae, tokens)
        close(x, true_input(tiny_model, sae, tokens), 1e-6)
    assert not torch.allclose(x, layer_input(tiny_model, sae, tokens))
