"""Skip connections and TopK transcoders: their formulas, and what they share with the MxD."""

import pytest
import torch
from sae_lens import SAE, SkipTranscoder, TrainingSAE, Transcoder
from sae_lens.saes.sae import SAEMetadata
from small_layers import sizes_of
from test_mxd import step_input
from tiny import D_MODEL, HOOK_IN, HOOK_OUT

import mxd_lens
from mxd_lens import MxD, SkipMxD, TopKSkipTranscoder, TopKTranscoder, replacement_hooks
from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.architectures.mxd import HIDDEN_ACTIVATIONS

D_IN, D_OUT, N, K = 7, 5, 13, 4
KINDS = {
    "TopKTranscoder": {},
    "TopKSkipTranscoder": {},
    "SkipMxD": {"d_hidden": 11},
    "AffineMxD": {"d_hidden": 11},
    "AffineSkipMxD": {"d_hidden": 11},
    "MOLT": {"rank": 3},
}
HAS_SKIP = {"TopKSkipTranscoder", "SkipMxD", "AffineSkipMxD"}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def make(kind: str, training: bool = False, **changes):
    prefix = "Training" if training else ""
    config = getattr(mxd_lens, f"{prefix}{kind}Config")
    settings = {"d_in": D_IN, "d_out": D_OUT, "d_sae": N, "k": K, "dtype": "float64"} | KINDS[kind] | changes
    torch.manual_seed(0)
    return getattr(mxd_lens, f"{prefix}{kind}")(config(**settings))


def randomised(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.requires_grad_(False)


def test_forward_is_the_explicit_sum_over_features(kind):
    layer = randomised(make(kind))
    x = torch.randn(6, D_IN, dtype=torch.float64)
    pre = x @ layer.W_enc + layer.b_enc
    for row, x_t, y_t in zip(pre, x, layer(x), strict=True):
        y = layer.b_dec + (layer.W_skip @ x_t if kind in HAS_SKIP else 0)
        for n in sorted(range(N), key=lambda n: -row[n])[:K]:
            if kind == "MOLT":
                V, v, U = layer.W_read[:, 3 * n : 3 * n + 3], layer.b_read[3 * n : 3 * n + 3], layer.W_dec
                expert = (x_t @ V + v) @ U[3 * n : 3 * n + 3]
            else:
                expert = layer.W_dec[n]
            if kind.endswith("MxD"):
                z = torch.nn.functional.gelu(x_t @ layer.W_hidden + layer.b_hidden)
                expert = z @ (layer.W_out @ torch.diag(layer.W_dec[n]))
            if kind.startswith("Affine"):
                expert = expert + layer.b_expert[n]
            y = y + row[n].clamp(min=0) * expert
        torch.testing.assert_close(y_t, y, rtol=1e-12, atol=1e-12)


def test_they_are_saelens_transcoders():
    assert issubclass(TopKTranscoder, Transcoder)
    assert not issubclass(TopKTranscoder, SkipTranscoder)
    assert issubclass(TopKSkipTranscoder, SkipTranscoder)
    assert issubclass(SkipMxD, MxD)
    assert issubclass(SkipMxD, SkipTranscoder)
    for kind in HAS_SKIP:
        assert make(kind).W_skip.shape == (D_OUT, D_IN)


def test_output_is_b_at_the_start(kind):
    layer = make(kind)
    x = torch.randn(3, D_IN, dtype=torch.float64)
    assert torch.equal(layer(x), layer.b_dec.expand(3, D_OUT))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(HIDDEN_ACTIVATIONS))
def test_a_skip_mxd_starts_as_a_skip_transcoder(activation, gated):
    mxd = make("SkipMxD", hidden_activation=activation, gated=gated).requires_grad_(False)
    transcoder = make("TopKSkipTranscoder").requires_grad_(False)
    for name, weight in transcoder.named_parameters():
        torch.nn.init.normal_(weight)
        getattr(mxd, name).copy_(weight)
    x = torch.randn(9, D_IN, dtype=torch.float64)
    torch.testing.assert_close(mxd(x), transcoder(x), rtol=1e-12, atol=1e-12)


def test_rows_are_free_in_training(kind):
    layer = make(kind, training=True)
    torch.nn.init.normal_(layer.W_dec, std=2)
    before = layer.W_dec.detach().clone()
    pairs = torch.randn(8, D_IN + D_OUT, dtype=torch.float64)
    layer.training_forward_pass(step_input(pairs)).loss.backward()
    ours = {name: p.grad.clone() for name, p in layer.named_parameters()}
    assert torch.equal(layer.W_dec, before)
    layer.zero_grad()
    x, y = pairs[:, :D_IN], pairs[:, D_IN:]
    ((layer(x) - y) ** 2 / y.norm(dim=-1, keepdim=True)).mean().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_attached_it_is_its_forward_pass(kind, tiny_model):
    metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    layer = randomised(make(kind, d_in=D_MODEL, d_out=D_MODEL, dtype="float32", metadata=metadata))
    tokens = tiny_model.to_tokens("the big cat sat on the red mat")
    original, cache = tiny_model.run_with_cache(tokens)
    y = layer(cache[HOOK_IN])
    expected = tiny_model.run_with_hooks(tokens, fwd_hooks=[(HOOK_OUT, lambda _, hook: y)])
    for logits in (
        tiny_model.run_with_saes(tokens, saes=[layer]),
        tiny_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(layer)),
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    error_term = tiny_model.run_with_saes(tokens, saes=[layer], use_error_term=True)
    torch.testing.assert_close(error_term, original, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a[0].__name__)
def test_every_architecture_saves_and_loads_bit_by_bit(architecture, dtype, tmp_path):
    inference, _, training, training_config = architecture
    sizes = {"d_in": D_IN, "d_out": D_OUT, "d_sae": N, "k": K, **sizes_of(training_config)}
    layer = randomised(training(training_config(dtype=dtype, **sizes)))
    x = torch.randn(9, D_IN, dtype=layer.dtype)
    layer.save_inference_model(tmp_path / "inference")
    for loaded in (
        SAE.load_from_disk(tmp_path / "inference"),
        inference.from_pretrained(tmp_path / "inference"),
    ):
        assert type(loaded) is inference
        assert torch.equal(loaded(x), layer(x))
    layer.save_model(tmp_path / "training")
    assert torch.equal(TrainingSAE.load_from_disk(tmp_path / "training")(x), layer(x))
