"""The session object calls the functions with its model and layers, and keeps layers apart."""

import pytest
import torch
from small_random import random_layer

from mxd_lens import Lens, ablate, evaluate, expert_card, expert_statistics, steer, top_experts

PROMPT = "the cat sat on the mat"
TOKENS = torch.randint(3, 21, (4, 12), generator=torch.Generator().manual_seed(1))
LAST = "blocks.2.hook_mlp_out"


@pytest.fixture
def layers(tiny_model):
    return [random_layer(tiny_model, block, "mxd", torch.float32) for block in (1, 2)]


@pytest.fixture
def lens(tiny_model, layers):
    return Lens(tiny_model, layers)


def test_one_layer_needs_no_name(tiny_model, layers, tmp_path):
    lens, layer = Lens(tiny_model, layers[1]), layers[1]
    assert str(lens.read(PROMPT)) == str(top_experts(tiny_model, layer, PROMPT))
    assert str(lens.card(3)) == str(expert_card(layer, 3))
    assert lens.evaluate(TOKENS, progress=False) == {
        LAST: evaluate(tiny_model, layer, TOKENS, progress=False)
    }
    expected = expert_statistics(tiny_model, layer, TOKENS, progress=False)
    assert str(lens.statistics(TOKENS, progress=False)) == str(expected)
    assert lens.find([PROMPT, "a dog ran"], ["it was big", "small red hill"]) is not None
    page = lens.dashboard(TOKENS, tmp_path / "pages", experts=[0], progress=False)
    assert page.is_file()


@torch.no_grad()
def test_steering_and_ablating(tiny_model, layers, lens):
    for ours, theirs in (
        (lens.steer({3: 2.0}, of=LAST), steer(tiny_model, layers[1], {3: 2.0})),
        (lens.ablate([0, 1], of=LAST), ablate(tiny_model, layers[1], [0, 1])),
    ):
        with ours:
            found = tiny_model(TOKENS)
        with theirs:
            expected = tiny_model(TOKENS)
        assert torch.equal(found, expected)
    with lens.steer({"blocks.1.hook_mlp_out": {3: 2.0}, LAST: {4: 1.0}}):
        found = tiny_model(TOKENS)
    with steer(tiny_model, layers[0], {3: 2.0}), steer(tiny_model, layers[1], {4: 1.0}):
        expected = tiny_model(TOKENS)
    assert torch.equal(found, expected)


def test_several_layers_are_told_apart(lens):
    with pytest.raises(ValueError, match="several layers; say which"):
        lens.read(PROMPT)
    with pytest.raises(KeyError, match=r"no layer named 'blocks\.7'"):
        lens.card(3, of="blocks.7")
    assert set(lens.evaluate(TOKENS, progress=False)) == {"blocks.1.hook_mlp_out", LAST}


def test_wrong_arguments_say_what_is_wrong(tiny_model, layers):
    with pytest.raises(TypeError, match="Lens\\(model, layers\\)"):
        Lens(layers[0], tiny_model)
    with pytest.raises(ValueError, match="at least one layer"):
        Lens(tiny_model, [])
    with pytest.raises(ValueError, match="Two layers are named"):
        Lens(tiny_model, [layers[0], layers[0]])


def test_a_saved_layer(tiny_model, layers, tmp_path):
    layers[0].save_model(tmp_path / "layer")
    lens = Lens.from_pretrained(tmp_path / "layer", model=tiny_model)
    assert torch.equal(lens.layer().W_dec, layers[0].W_dec)


@pytest.mark.real_model
@pytest.mark.slow
def test_a_bundled_release():
    lens = Lens.from_pretrained("smollm2-135m-mxd")
    assert "June" in str(lens.read("He was born in June"))
