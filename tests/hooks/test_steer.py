"""Steering and ablation: the layer's output moves by what the formula says, there and nowhere else."""

import threading

import pytest
import torch
from attached import MODELS, PROMPT, generate, greedy, random_mxd
from sae_lens import JumpReLUTranscoder, SkipTranscoder, StandardSAE, StandardSAEConfig, Transcoder
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUTranscoderConfig, SkipTranscoderConfig, TranscoderConfig
from tiny import D_MODEL, HOOK_IN, HOOK_OUT
from transformer_lens import HookedTransformer

from mxd_lens import (
    MxDConfig,
    SkipMxD,
    SkipMxDConfig,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    ablate,
    load_model,
    replacement_hooks,
    steer,
)
from mxd_lens.hooks.site import hook_names
from mxd_lens.hooks.steer import _places
from mxd_lens.models import SMOLLM2, hook_point, hook_point_name

D_SAE = 40
EXPERT = 5


def with_random_weights(layer):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return layer.double().requires_grad_(False)


def of(layer_class, config_class, **settings):
    metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    if config_class in (MxDConfig, SkipMxDConfig):
        settings |= {"d_hidden": 24, "hidden_activation": "silu", "gated": True}
    cfg = config_class(
        d_in=D_MODEL, d_out=D_MODEL, d_sae=D_SAE, metadata=metadata, dtype="float64", **settings
    )
    return with_random_weights(layer_class(cfg))


def ordinary_sae():
    metadata = SAEMetadata(hook_name=HOOK_OUT)
    cfg = StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata, dtype="float64")
    return with_random_weights(StandardSAE(cfg))


OURS = {
    "mxd": lambda: random_mxd(D_MODEL, dtype="float64"),
    "skip_mxd": lambda: of(SkipMxD, SkipMxDConfig, k=4),
    "topk_transcoder": lambda: of(TopKTranscoder, TopKTranscoderConfig, k=4),
    "topk_skip_transcoder": lambda: of(TopKSkipTranscoder, TopKSkipTranscoderConfig, k=4),
    "mxd_relu": lambda: random_mxd(D_MODEL, dtype="float64", k=None),
}
SAELENS = {
    "Transcoder": lambda: of(Transcoder, TranscoderConfig, apply_b_dec_to_input=False),
    "SkipTranscoder": lambda: of(SkipTranscoder, SkipTranscoderConfig, apply_b_dec_to_input=False),
    "JumpReLUTranscoder": lambda: of(
        JumpReLUTranscoder, JumpReLUTranscoderConfig, apply_b_dec_to_input=False
    ),
    "StandardSAE": ordinary_sae,
}
LAYERS = OURS | SAELENS


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


@pytest.fixture
def mxd():
    return random_mxd(D_MODEL, dtype="float64")


def in_float64(model):
    model.to(torch.float64)
    model.cfg.dtype = torch.float64
    return model


@pytest.fixture(params=MODELS, scope="module")
def model(request, tiny_folder):
    return in_float64(MODELS[request.param](tiny_folder))


@pytest.fixture(params=["HookedSAETransformer", "SAETransformerBridge"], scope="module")
def sae_model(request, tiny_folder):
    return in_float64(MODELS[request.param](tiny_folder))


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return in_float64(load_model(tiny_folder))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def outputs(model, tokens) -> torch.Tensor:
    """What leaves the MLP's output hook point, whatever stands there."""
    seen = []
    handle = hook_point(model, HOOK_OUT).register_forward_hook(lambda _m, _a, y: seen.append(y))
    try:
        model(tokens)
    finally:
        handle.remove()
    return seen[0]


def input_of(model, layer, tokens):
    name = hook_point_name(model, layer.cfg.metadata.hook_name)
    return model.run_with_cache(tokens)[1][name]


def direction(layer, x, n: int) -> torch.Tensor:
    """By what a coefficient of 1 moves the output, written out: c_n * (D^T z), or c_n alone."""
    c = layer.W_dec[n]
    if not hasattr(layer, "W_out"):
        return c.expand(*x.shape[:-1], -1)
    z = torch.nn.functional.silu(x @ layer.W_hidden_gate + layer.b_hidden_gate)
    z = z * (x @ layer.W_hidden + layer.b_hidden)
    return torch.einsum("bsh,ho,o->bso", z, layer.W_out, c)


# What is added is what the formula says


def test_steering_moves_the_output_by_the_formula(model, layer):
    tokens = model.to_tokens([PROMPT, "a dog ran under the small hill then"])
    x = input_of(model, layer, tokens)
    plain = layer(x)
    assert (layer.encode(x)[..., EXPERT] == 0).any() or not hasattr(layer.cfg, "k")
    with steer(model, layer, {EXPERT: 3.5}, positions=[0, 4, -1]):
        moved = outputs(model, tokens) - plain
    expected = torch.zeros_like(plain)
    expected[:, [0, 4, -1]] = 3.5 * direction(layer, x, EXPERT)[:, [0, 4, -1]]
    assert expected[:, 4].abs().min() > 1e-4
    close(moved, expected)


def test_coefficient_0_is_the_plain_replacement_to_the_bit(model, layer):
    tokens = model.to_tokens(PROMPT)
    original = model(tokens)
    plain = model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(layer))
    with steer(model, layer, {EXPERT: 0}):
        assert torch.equal(model(tokens), plain)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[]), plain)
        assert torch.equal(model.run_with_cache(tokens)[0], plain)
        assert torch.equal(model(tokens), plain)
    assert torch.equal(model(tokens), original)
    assert (plain - original).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["add", "set", "scale"])
def test_modes(model, mxd, mode):
    tokens = model.to_tokens(PROMPT)
    x = input_of(model, mxd, tokens)
    a = mxd.encode(x).clone()
    active = a.sum((0, 1)).argmax().item()
    silent = (a > 0).sum((0, 1)).argmin().item()
    for n, v in ((active, -1.5), (silent, 2.0)):
        a[..., n] = {"add": a[..., n] + v, "set": torch.full_like(a[..., n], v), "scale": v * a[..., n]}[mode]
    with steer(model, mxd, {active: -1.5, silent: 2.0}, mode=mode):
        close(outputs(model, tokens), mxd.decode(a, x))


@pytest.mark.parametrize("with_", ["zero", "mean"])
@pytest.mark.parametrize("means", ["tensor", "mapping", "metadata"])
def test_ablation(model, mxd, with_, means):
    tokens = model.to_tokens(PROMPT)
    x = input_of(model, mxd, tokens)
    a = mxd.encode(x)
    experts = a.sum((0, 1)).topk(3).indices
    mean = a.mean((0, 1))
    given = {"tensor": mean, "mapping": {int(n): float(mean[n]) for n in experts}, "metadata": None}[means]
    if means == "metadata":
        mxd.cfg.metadata.mean_coefficients = mean.tolist()
    edited = a.clone()
    edited[..., experts] = 0 if with_ == "zero" else mean[experts]
    with ablate(model, mxd, experts, with_, means=given):
        close(outputs(model, tokens), mxd.decode(edited, x))
    with ablate(model, mxd, int(experts[0]), with_, means=given, positions=2):
        edited = a.clone()
        edited[:, 2, experts[0]] = 0 if with_ == "zero" else mean[experts[0]]
        close(outputs(model, tokens), mxd.decode(edited, x))


def test_a_coefficient_per_position_and_its_gradient(model, mxd):
    tokens = model.to_tokens([PROMPT, "a dog ran under the small hill then"])
    x = input_of(model, mxd, tokens)
    v = torch.linspace(-1, 1, tokens.numel(), dtype=torch.float64).view(tokens.shape).requires_grad_()
    with steer(model, mxd, {EXPERT: v}):
        moved = outputs(model, tokens)
    unit = direction(mxd, x, EXPERT)
    close(moved - mxd(x), v.unsqueeze(-1) * unit)
    (gradient,) = torch.autograd.grad(moved.sum(), v)
    close(gradient, unit.sum(-1))
    with steer(model, mxd, {EXPERT: v}):
        (gradient,) = torch.autograd.grad(model(tokens).logsumexp(-1).sum(), v)
    assert gradient.abs().min() > 0
    for_each_sequence = torch.tensor([[1.0], [-2.0]])
    with steer(model, mxd, {EXPERT: for_each_sequence}):
        close(outputs(model, tokens) - mxd(x), for_each_sequence.double().unsqueeze(-1) * unit)


N = 9  # <s> and the eight words of the prompt

POSITIONS = {
    "all": (None, range(N)),
    "one": (3, [3]),
    "last": (-1, [N - 1]),
    "slice": (slice(2, 6, 2), [2, 4]),
    "open slice": (slice(4, None), range(4, N)),
    "slice from the end": (slice(-2, None), [N - 2, N - 1]),
    "backwards": (slice(5, 2, -1), [3, 4, 5]),
    "list": ([1, 7], [1, 7]),
    "range": (range(3), [0, 1, 2]),
    "none of them": ([], []),
    "tensor": (torch.tensor([2, 2, -9]), [0, 2]),
    "mask": (torch.arange(N) % 2 == 0, [0, 2, 4, 6, 8]),
    "mask of sequences": ((torch.arange(N) < 2).unsqueeze(0), [0, 1]),
    "long mask": (torch.arange(N + 3) >= 7, [7, 8]),
    "function": (lambda p: (p > 1) & (p < 5), [2, 3, 4]),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(tiny, mxd, name):
    positions, expected_at = POSITIONS[name]
    tokens = tiny.to_tokens(PROMPT)
    x = input_of(tiny, mxd, tokens)
    with steer(tiny, mxd, {EXPERT: 2.0}, positions=positions):
        moved = outputs(tiny, tokens) - mxd(x)
    at = torch.zeros(N, 1, dtype=torch.float64)
    at[list(expected_at)] = 1
    close(moved, at * 2 * direction(mxd, x, EXPERT))


def test_a_mask_tells_sequences_apart(model, mxd):
    tokens = model.to_tokens([PROMPT, "a dog ran under the small hill then"])
    x = input_of(model, mxd, tokens)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[0, 3:] = mask[1, 1] = True
    with steer(model, mxd, {EXPERT: 2.0}, positions=mask):
        close(outputs(model, tokens) - mxd(x), mask.unsqueeze(-1) * 2 * direction(mxd, x, EXPERT))


# Nesting, several layers, other hooks


def test_the_inner_edits_what_the_outer_left(model, mxd):
    tokens = model.to_tokens(PROMPT)
    x = input_of(model, mxd, tokens)
    plain, unit = mxd(x), direction(mxd, x, EXPERT)
    a_n = mxd.encode(x)[..., EXPERT].unsqueeze(-1)
    with steer(model, mxd, {EXPERT: 3.0}):
        with steer(model, mxd, {EXPERT: 2.0}, mode="scale"):
            close(outputs(model, tokens), plain + ((a_n + 3) * 2 - a_n) * unit)
            with ablate(model, mxd, EXPERT):
                close(outputs(model, tokens), plain - a_n * unit)
        close(outputs(model, tokens), plain + 3 * unit)
    with steer(model, mxd, {EXPERT: 2.0}, mode="scale"), steer(model, mxd, {EXPERT: 3.0}):
        close(outputs(model, tokens), plain + (a_n * 2 + 3 - a_n) * unit)


def test_leaving_in_another_order_and_entering_again(tiny, mxd):
    tokens = tiny.to_tokens(PROMPT)
    original = tiny(tokens)
    x = input_of(tiny, mxd, tokens)
    plain, unit = mxd(x), direction(mxd, x, EXPERT)
    one, two = steer(tiny, mxd, {EXPERT: 1.0}), steer(tiny, mxd, {EXPERT: 10.0})
    one.__enter__()
    two.__enter__()
    one.__enter__()
    close(outputs(tiny, tokens), plain + 12 * unit)
    one.__exit__(None, None, None)
    one.__exit__(None, None, None)
    close(outputs(tiny, tokens), plain + 10 * unit)
    two.__exit__(None, None, None)
    assert torch.equal(tiny(tokens), original)
    with two as given:
        assert given is tiny
        close(outputs(tiny, tokens), plain + 10 * unit)


def test_layers_at_once(model, mxd):
    later = random_mxd(D_MODEL, "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", k=7, dtype="float64")
    tokens = model.to_tokens(PROMPT)

    def steered(sae, coefficient):
        xs = []
        hook_in, hook_out = (hook_point_name(model, name) for name in hook_names(sae))
        return [
            (hook_in, lambda x, hook: xs.append(x)),
            (hook_out, lambda y, hook: sae(xs[-1]) + coefficient * direction(sae, xs[-1], EXPERT)),
        ]

    expected = model.run_with_hooks(tokens, fwd_hooks=[*steered(mxd, 2.0), *steered(later, -1.0)])
    with steer(model, mxd, {EXPERT: 2.0}), steer(model, later, {EXPERT: -1.0}):
        close(model(tokens), expected)


def test_hooks_before_and_after(model, mxd):
    tokens = model.to_tokens(PROMPT)
    x = input_of(model, mxd, tokens)
    hook_in, hook_out = hook_point_name(model, HOOK_IN), hook_point_name(model, HOOK_OUT)
    doubled = [(hook_in, lambda x, hook: 2 * x), (hook_out, lambda y, hook: -y)]
    unit = direction(mxd, 2 * x, EXPERT)
    expected = -(mxd(2 * x) + 3 * unit)
    seen = []

    def look(y, hook):
        seen.append(y)

    with steer(model, mxd, {EXPERT: 3.0}):
        model.run_with_hooks(tokens, fwd_hooks=[*doubled, (hook_out, look)])
    with model.hooks(fwd_hooks=[*doubled, (hook_out, look)]), steer(model, mxd, {EXPERT: 3.0}):
        model(tokens)
        _, cache = model.run_with_cache(tokens)
    assert len(seen) == 3
    for y in (*seen, cache[hook_out]):
        close(y, expected)


def test_it_survives_reset_hooks(model, mxd):
    tokens = model.to_tokens(PROMPT)
    original = model(tokens)
    with steer(model, mxd, {EXPERT: 3.0}):
        steered = model(tokens)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(tokens), steered)
    assert torch.equal(model(tokens), original)


def test_users_own_replacement_hooks_are_steered_too(model, mxd):
    tokens = model.to_tokens(PROMPT)
    with steer(model, mxd, {EXPERT: 3.0}):
        steered = model(tokens)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)), steered)
    with model.hooks(fwd_hooks=replacement_hooks(mxd)), steer(model, mxd, {EXPERT: 3.0}):
        assert torch.equal(model(tokens), steered)


# Attached layers


@pytest.mark.parametrize("name", OURS)
def test_an_attached_layer(sae_model, name):
    layer = OURS[name]()
    tokens = sae_model.to_tokens(PROMPT)
    x = input_of(sae_model, layer, tokens)
    with steer(sae_model, layer, {EXPERT: 3.0}):
        steered = sae_model(tokens)
    with sae_model.saes(saes=[layer]):
        plain = sae_model(tokens)
        with steer(sae_model, layer, {EXPERT: 3.0}):
            close(sae_model(tokens), steered)
            _, cache = sae_model.run_with_cache(tokens)
            base = next(name for name in cache if name.endswith("hook_sae_acts_post"))
            a = layer.encode(x)
            a[..., EXPERT] += 3
            close(cache[base], a)
        assert torch.equal(sae_model(tokens), plain)
    with steer(sae_model, layer, {EXPERT: 3.0}):
        with sae_model.saes(saes=[layer]):
            close(sae_model(tokens), steered)
        close(sae_model(tokens), steered)
        close(sae_model.run_with_saes(tokens, saes=[layer]), steered)
        close(sae_model(tokens), steered)


@pytest.mark.parametrize("name", OURS)
def test_error_terms(sae_model, name):
    """The output moves by exactly what the steering moves the layer's."""
    layer = OURS[name]()
    tokens = sae_model.to_tokens(PROMPT)
    x = input_of(sae_model, layer, tokens)
    y = sae_model.run_with_cache(tokens)[1][hook_point_name(sae_model, HOOK_OUT)]
    with sae_model.saes(saes=[layer], use_error_term=True):
        with steer(sae_model, layer, {EXPERT: 3.0}, positions=slice(2, None)):
            moved = outputs(sae_model, tokens) - y
        close(outputs(sae_model, tokens), y)
    expected = 3 * direction(layer, x, EXPERT)
    expected[:, :2] = 0
    close(moved, expected)


# Generation


SOMEWHERE = [None, 4, 11, slice(10, None), slice(None, 10), lambda p: p % 2 == 0]


@pytest.mark.parametrize("positions", SOMEWHERE)
def test_generation_with_and_without_a_cache(model, mxd, positions):
    check_generation(model, mxd, positions)
    with model.hooks(fwd_hooks=replacement_hooks(mxd)):
        check_generation(model, mxd, positions)


@pytest.mark.parametrize("positions", SOMEWHERE)
@pytest.mark.parametrize("use_error_term", [False, True])
def test_generation_with_an_attached_layer(sae_model, mxd, positions, use_error_term):
    with sae_model.saes(saes=[mxd], use_error_term=use_error_term):
        check_generation(sae_model, mxd, positions)


def check_generation(model, mxd, positions):
    tokens = model.to_tokens([PROMPT, "a dog ran under the small hill then"])
    settings = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with steer(model, mxd, {EXPERT: 4.0}, positions=positions):
        expected = greedy(model, tokens, 8)
        assert torch.equal(model.generate(tokens, use_past_kv_cache=True, **settings), expected)
        assert torch.equal(model.generate(tokens, use_past_kv_cache=False, **settings), expected)


def test_steering_changes_what_is_generated_from_there_on(model, mxd):
    tokens = model.to_tokens(PROMPT)
    with steer(model, mxd, {EXPERT: 0.0}):
        plain = generate(model, tokens, 12)
    with steer(model, mxd, {EXPERT: 50.0}, positions=slice(N + 3, None)):
        late = generate(model, tokens, 12)
    assert torch.equal(late[:, : N + 4], plain[:, : N + 4])
    assert not torch.equal(late, plain)


def test_a_mask_and_coefficients_over_generated_tokens(model, mxd):
    tokens = model.to_tokens(PROMPT)
    v = 4 * torch.cos(torch.arange(N + 8))
    mask = torch.arange(N + 8) > 3
    with steer(model, mxd, {EXPERT: v}, positions=mask):
        assert torch.equal(generate(model, tokens, 8), greedy(model, tokens, 8))


def test_what_a_cache_makes_impossible_is_said(model, mxd):
    tokens = model.to_tokens(PROMPT)
    for positions, message in (
        (-1, "counts from the end of the sequence, which moves"),
        (slice(-2, None), "counts from the end of the sequence, which moves"),
        (torch.ones(N, dtype=torch.bool), "ends before the sequence, of 10"),
    ):
        with pytest.raises(ValueError, match=message), steer(model, mxd, {EXPERT: 1.0}, positions=positions):
            generate(model, tokens, 3)
    with pytest.raises(ValueError, match="ends before the sequence"), steer(model, mxd, {0: torch.ones(N)}):
        generate(model, tokens, 3)


def test_a_cache_that_counts_otherwise_is_refused(tiny_folder, mxd):
    model = in_float64(MODELS["TransformerBridge"](tiny_folder))
    tokens = model.to_tokens(PROMPT)

    def lie(_block, args, kwargs):
        kwargs["past_key_values"].get_seq_length = lambda layer=0: 5

    handle = model.get_submodule("blocks.0").register_forward_pre_hook(lie, with_kwargs=True)
    with steer(model, mxd, {EXPERT: 1.0}):
        model(tokens)
    unknown = pytest.raises(ValueError, match="cannot be known here, with this key-value cache")
    with unknown, steer(model, mxd, {EXPERT: 1.0}, positions=3):
        model(tokens)
    handle.remove()


# Undone, whatever happens


def test_undone_after_an_exception(model, mxd):
    tokens = model.to_tokens(PROMPT)
    original, cached = model(tokens), model.run_with_cache(tokens)[0]
    hooks_before = count_hooks(model, mxd)

    def fail(y, hook):
        raise RuntimeError("in the middle of a pass")

    for name in (HOOK_IN, HOOK_OUT, "blocks.2.mlp.hook_in"):
        with pytest.raises(RuntimeError, match="in the middle"), steer(model, mxd, {EXPERT: 3.0}):
            model.run_with_hooks(tokens, fwd_hooks=[(hook_point_name(model, name), fail)])
        assert count_hooks(model, mxd) == hooks_before
        assert torch.equal(model(tokens), original)
    with steer(model, mxd, {EXPERT: 3.0}):
        with pytest.raises(RuntimeError, match="in the middle"):
            model.run_with_hooks(tokens, fwd_hooks=[(hook_point_name(model, HOOK_OUT), fail)])
        assert (model(tokens) - original).abs().max() > 0.01
        assert mxd.encode(torch.ones(1, 1, D_MODEL))[..., EXPERT] < 3
    assert count_hooks(model, mxd) == hooks_before
    assert torch.equal(model.run_with_cache(tokens)[0], cached)
    assert not len(_places)


def count_hooks(*modules) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for module in modules for m in module.modules()
    )


def test_undone_when_a_generator_is_closed(tiny, mxd):
    tokens = tiny.to_tokens(PROMPT)
    original = tiny(tokens)

    def passes():
        with steer(tiny, mxd, {EXPERT: 3.0}):
            while True:
                yield tiny(tokens)

    running = passes()
    assert not torch.equal(next(running), original)
    running.close()
    assert torch.equal(tiny(tokens), original)
    assert not len(_places)


def test_the_layer_by_itself_and_in_another_model_is_not_steered(tiny_folder, mxd):
    one, other = in_float64(load_model(tiny_folder)), in_float64(MODELS["TransformerBridge"](tiny_folder))
    tokens = one.to_tokens(PROMPT)
    x = input_of(one, mxd, tokens)
    y = mxd(x)
    plain, other_plain = (m.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)) for m in (one, other))
    with steer(one, mxd, {EXPERT: 3.0}), other.hooks(fwd_hooks=replacement_hooks(mxd)):
        steered = one(tokens)
        assert torch.equal(mxd(x), y)
        assert torch.equal(other(tokens), other_plain)
        with steer(other, mxd, {EXPERT: -3.0}):
            assert torch.equal(one(tokens), steered)
            assert (other(tokens) - steered).abs().max() > 0.01
    assert (steered - plain).abs().max() > 0.01


def test_two_threads_with_one_layer(tiny_folder, mxd):
    """While one model is in its block, another's use of the layer is not steered."""
    one, other = in_float64(load_model(tiny_folder)), in_float64(load_model(tiny_folder))
    tokens = one.to_tokens(PROMPT)
    plain = other.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd))
    seen = []

    def run_other(x, hook):
        thread = threading.Thread(
            target=lambda: seen.append(other.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)))
        )
        thread.start()
        thread.join()

    with steer(one, mxd, {EXPERT: 3.0}):
        steered = one.run_with_hooks(tokens, fwd_hooks=[(HOOK_IN, run_other)])
    assert torch.equal(seen[0], plain)
    assert not torch.equal(steered, plain)


# What does not fit


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"experts": {D_SAE: 1.0}}, IndexError, "expert 40 does not exist: there are 40"),
        ({"experts": {-1: 1.0}}, IndexError, "expert -1 does not exist"),
        ({"experts": {1.5: 1.0}}, TypeError, r"named by an integer, got 1\.5"),
        ({"experts": {True: 1.0}}, TypeError, "named by an integer, got True"),
        ({"experts": [3]}, TypeError, "must be a mapping"),
        ({"experts": {3: float("nan")}}, ValueError, "expert 3 must be finite"),
        ({"mode": "multiply"}, ValueError, "mode must be one of add, set, scale, got 'multiply'"),
        ({"positions": 1.5}, TypeError, r"got 1\.5"),
        ({"positions": [1, True]}, TypeError, "got True"),
        ({"positions": "all"}, TypeError, "got 'a'"),
        ({"positions": torch.ones(1, 2, 3).bool()}, ValueError, r"got \(1, 2, 3\)"),
    ],
)
def test_what_is_wrong_is_said_at_once(tiny, mxd, changes, error, message):
    with pytest.raises(error, match=message):
        steer(tiny, mxd, **{"experts": {3: 1.0}} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": -10}, "no position -10 in a sequence of 9"),
        ({"positions": [2, 9]}, "position 9 was asked for.* longest sequence had 9"),
        ({"positions": torch.ones(8).bool()}, r"mask of positions, \(8,\), ends before the sequence, of 9"),
        ({"positions": torch.ones(3, 9).bool()}, r"\(3, 9\) does not fit .* = \(1, 9\)"),
        ({"positions": lambda p: p}, "must return a boolean tensor"),
        ({"experts": {3: torch.ones(2, 9)}}, r"expert 3 has shape \(2, 9\).* = \(1, 9\)"),
        ({"experts": {3: torch.ones(5)}}, r"expert 3, \(5,\), ends before the sequence, of 9"),
    ],
)
def test_what_is_wrong_is_said_when_run(tiny, mxd, changes, message):
    tokens = tiny.to_tokens(PROMPT)
    original = tiny(tokens)
    with pytest.raises(ValueError, match=message), steer(tiny, mxd, **{"experts": {3: 1.0}} | changes):
        tiny(tokens)
    assert torch.equal(tiny(tokens), original)


def test_ablation_errors(tiny, mxd):
    with pytest.raises(IndexError, match="expert 99"):
        ablate(tiny, mxd, [1, 99])
    with pytest.raises(ValueError, match="with_ must be 'zero' or 'mean', got 'noise'"):
        ablate(tiny, mxd, 1, with_="noise")
    with pytest.raises(ValueError, match="needs the experts' mean coefficients"):
        ablate(tiny, mxd, 1, with_="mean")
    with pytest.raises(ValueError, match="no mean for expert 2"):
        ablate(tiny, mxd, [1, 2], with_="mean", means={1: 0.5})
    with pytest.raises(ValueError, match=r"d_sae = 40\], or by expert id, got \[7\]"):
        ablate(tiny, mxd, 1, with_="mean", means=torch.ones(7))


def test_another_layer_in_its_place(sae_model, mxd):
    other = random_mxd(D_MODEL, dtype="float64")
    attached = r"another layer is attached at blocks\.1\.hook_mlp_out"
    with sae_model.saes(saes=[other]), pytest.raises(ValueError, match=attached):
        steer(sae_model, mxd, {3: 1.0}).__enter__()
    with steer(sae_model, mxd, {3: 1.0}):
        with pytest.raises(ValueError, match=r"another layer is being intervened on at blocks\.1\.hook"):
            steer(sae_model, other, {3: 1.0}).__enter__()
        with pytest.raises(ValueError, match=attached):
            sae_model.run_with_saes(sae_model.to_tokens(PROMPT), saes=[other])
    assert not len(_places)


def test_a_layer_that_does_not_fit(tiny_folder, tiny, mxd):
    mxd.cfg.metadata.model_name = "gpt2"
    with pytest.raises(ValueError, match="was trained on gpt2"):
        steer(tiny, mxd, {3: 1.0})
    plain = load_model(tiny_folder, model_class=HookedTransformer)
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.1\.mlp\.hook_in'"):
        steer(plain, random_mxd(D_MODEL), {3: 1.0})
    across = random_mxd(D_MODEL, hook_out="blocks.2.hook_mlp_out")
    with pytest.raises(ValueError, match="only layers within one block"), steer(tiny, across, {3: 1.0}):
        pass
    embedding = random_mxd(D_MODEL, "hook_embed", "hook_embed")
    with pytest.raises(ValueError, match="hook point in a block"), steer(tiny, embedding, {3: 1.0}):
        pass


@pytest.mark.real_model
@pytest.mark.parametrize("model_class", [None, SAETransformerBridge])
def test_smollm2(model_class):
    """Steering changes what the real model writes, in every way of running it, and is undone."""
    model = load_model(SMOLLM2, **({"model_class": model_class} if model_class else {}))
    mxd = random_mxd(576, "blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out", d_sae=200, d_hidden=64, k=16)
    mxd.W_out.mul_(0.02)
    tokens = model.to_tokens("The weather today is")
    with torch.no_grad():
        original, written = model(tokens), generate(model, tokens, 8)
        with steer(model, mxd, {7: 0.0}):
            plain, plain_written = model(tokens), generate(model, tokens, 8)
        assert torch.equal(plain, model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)))
        with steer(model, mxd, {7: 60.0}):
            steered_written = generate(model, tokens, 8)
            assert torch.equal(steered_written, greedy(model, tokens, 8))
        assert not torch.equal(steered_written, plain_written)
        assert torch.equal(model(tokens), original)
        assert torch.equal(generate(model, tokens, 8), written)
