"""What fires on a prompt and what it writes, against sums written out expert by expert."""

import math
from io import StringIO

import pytest
import torch
from conftest import D_MODEL, HOOK_OUT
from rich.console import Console
from sae_lens import SkipTranscoder, TopKSAE, TopKSAEConfig, Transcoder
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    SkipTranscoderConfig,
    TranscoderConfig,
)
from test_attach import MODELS, PROMPT

import mxd_lens
from mxd_lens import (
    MxD,
    MxDConfig,
    SkipMxD,
    SkipMxDConfig,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    find_experts,
    top_experts,
)
from mxd_lens.analysis.decomposition import contributions, layer_input, take_apart, writes_directions
from mxd_lens.models import SMOLLM2

D_SAE = 40


class CosineMixture(TopKTranscoder):
    """A formula of somebody's own, neither MxD nor transcoder: y = (C^T a) * cos(x) + b."""

    def expert_input(self, x: torch.Tensor) -> torch.Tensor:
        return x.cos()


OURS = {
    "mxd": (MxD, MxDConfig, {"d_hidden": 24}),
    "gated mxd": (MxD, MxDConfig, {"d_hidden": 24, "hidden_activation": "silu", "gated": True}),
    "skip_mxd": (SkipMxD, SkipMxDConfig, {"d_hidden": 24}),
    "topk_transcoder": (TopKTranscoder, TopKTranscoderConfig, {}),
    "topk_skip_transcoder": (TopKSkipTranscoder, TopKSkipTranscoderConfig, {}),
    "own formula": (CosineMixture, TopKTranscoderConfig, {}),
}
SAELENS_TRANSCODERS = {
    "saelens transcoder": (Transcoder, TranscoderConfig),
    "saelens skip_transcoder": (SkipTranscoder, SkipTranscoderConfig),
    "saelens jumprelu_skip_transcoder": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
    "skip_transcoder that keeps its skip": (mxd_lens.SkipTranscoder, SkipTranscoderConfig),
    "jumprelu_skip_transcoder that keeps its skip": (
        mxd_lens.JumpReLUSkipTranscoder,
        JumpReLUSkipTranscoderConfig,
    ),
}
SAELENS = [*SAELENS_TRANSCODERS, "saelens topk", "saelens topk rescaled"]
LAYERS = [f"{name}, {k}" for name in OURS for k in ("k", "relu")] + SAELENS


def make_layer(kind: str, dtype: str = "float64", d_model: int = D_MODEL, layer: int = 1):
    """A random layer of any kind, in the place of the tiny model's second MLP."""
    settings = {"d_in": d_model, "d_sae": D_SAE, "dtype": dtype}
    hooks = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    metadata = SAEMetadata(**hooks, exclude_special_tokens=True)
    if kind in SAELENS_TRANSCODERS:
        made, config = SAELENS_TRANSCODERS[kind]
        sae = made(config(d_out=d_model, metadata=metadata, apply_b_dec_to_input=False, **settings))
    elif kind.startswith("saelens"):
        metadata = SAEMetadata(hook_name=HOOK_OUT, exclude_special_tokens=True)
        rescaled = kind.endswith("rescaled")
        sae = TopKSAE(
            TopKSAEConfig(k=4, metadata=metadata, rescale_acts_by_decoder_norm=rescaled, **settings)
        )
    else:
        name, sparsity = kind.split(", ")
        made, config, extra = OURS[name]
        k = 4 if sparsity == "k" else None
        sae = made(config(d_out=d_model, k=k, metadata=metadata, **settings, **extra))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in sae.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return sae.requires_grad_(False)


@pytest.fixture(params=LAYERS)
def layer(request):
    return make_layer(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written_by(sae, x: torch.Tensor, n: int) -> torch.Tensor:
    """What expert n writes, from the definition: a_n W_n^T z, or a_n c_n."""
    a = sae.encode(x)[..., n, None]
    if isinstance(sae, MxD):
        return a * (sae.hidden(x) @ sae.expert_weight(n))
    row = sae.W_dec[n]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        row = row / row.norm()
    if isinstance(sae, CosineMixture):
        row = row * x.cos()
    return a * row


def skip_of(sae, x: torch.Tensor) -> torch.Tensor:
    return x @ sae.W_skip.T if "skip" in type(sae).__name__.lower() else torch.zeros_like(x)


def close(actual, expected, tolerance: float = 1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_contributions_are_what_each_expert_writes(layer, x):
    named = [7, 0, 39, 7]
    close(contributions(layer, x, named), torch.stack([written_by(layer, x, n) for n in named], dim=-2))
    close(contributions(layer, x[0, 0], torch.tensor([5])), written_by(layer, x[0, 0], 5)[None])


def test_contributions_sum_to_the_output(layer, x):
    expected = layer(x) - layer.b_dec - skip_of(layer, x)
    close(contributions(layer, x).sum(-2), expected)
    close(contributions(layer, x, range(D_SAE)).sum(-2), expected)
    parts = take_apart(layer, x.flatten(0, 1))
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
    with pytest.raises(ValueError, match=r"by their ids, integers; got torch\.(float32|bool)"):
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


def true_input(model, sae, tokens) -> torch.Tensor:
    cache = model.run_with_cache(tokens)[1]
    name = sae.cfg.metadata.hook_name
    return cache[name if name in cache else name.replace("hook_mlp_out", "mlp.hook_out")].to(sae.dtype)


def check_reading(reading, sae, x, k: int) -> None:
    """Every number of a reading of the inputs x [positions, d_in]."""
    written = torch.stack([written_by(sae, x, n) for n in range(D_SAE)], dim=1)
    skip, output = skip_of(sae, x), sae(x) - sae.b_dec
    squared = output.pow(2).sum(-1)
    shares = torch.einsum("tnd,td->tn", written, output) / squared[:, None]
    acts = sae.encode(x)
    close(reading.output_norms, output.norm(dim=-1))
    assert reading.n_active.tolist() == (acts > 0).sum(-1).tolist()
    assert reading.bias_norm == pytest.approx(sae.b_dec.norm().item())
    for t in range(len(x)):
        expected = shares[t].abs().argsort(descending=True)[: min(k, int((acts[t] > 0).sum()))]
        ids = reading.experts[t][reading.coefficients[t] > 0]
        assert ids.tolist() == expected.tolist()
        n = len(ids)
        close(reading.coefficients[t, :n], acts[t, ids])
        close(reading.shares[t, :n], shares[t, ids])
        close(reading.norms[t, :n], written[t, ids].norm(dim=-1))
        skip_share = (skip[t] @ output[t]) / squared[t]
        close(reading.other_shares[t], shares[t].sum() - shares[t, ids].sum())
        if "skip" in type(sae).__name__.lower():
            close(reading.skip_shares[t], skip_share)
            close(reading.skip_norms[t], skip[t].norm())
        else:
            assert reading.skip_shares is None
        total = reading.shares[t].sum() + reading.other_shares[t] + skip_share
        assert total.item() == pytest.approx(1, abs=1e-9)


def test_top_experts(tiny_model, layer):
    tokens = tiny_model.to_tokens(PROMPT)
    reading = top_experts(tiny_model, layer, PROMPT, k=3)
    check_reading(reading, layer, true_input(tiny_model, layer, tokens)[0], 3)
    assert reading.tokens == ["<s>", *PROMPT.split()]
    assert reading.excluded.tolist() == [True] + [False] * 8


@pytest.mark.parametrize("kind", ["skip_mxd, k", "saelens topk"])
def test_top_experts_on_every_model(any_model, kind):
    sae = make_layer(kind)
    tokens = any_model.to_tokens(PROMPT)
    x = true_input(any_model, sae, tokens)[0]
    check_reading(top_experts(any_model, sae, PROMPT), sae, x, 5)
    x = true_input(any_model, sae, tokens[:, :4])[0]
    check_reading(top_experts(any_model, sae, tokens[0, :4], k=100), sae, x, 100)
    if hasattr(any_model, "add_sae"):
        sae = make_layer(kind, "float32")
        alone = top_experts(any_model, sae, PROMPT)
        other = make_layer("mxd, k", "float32")
        for attached in (sae, other) if kind != "saelens topk" else (sae,):
            with any_model.saes(saes=[attached]):
                inside = top_experts(any_model, sae, PROMPT)
            assert torch.equal(inside.experts, alone.experts)
            assert torch.equal(inside.shares, alone.shares)


def test_an_earlier_layer_that_is_attached_counts(tiny_model):
    sae, earlier = make_layer("mxd, k", "float32"), make_layer("mxd, k", "float32", layer=0)
    tokens = tiny_model.to_tokens(PROMPT)
    with tiny_model.saes(saes=[earlier]):
        x = layer_input(sae, tiny_model, tokens)
        close(x, true_input(tiny_model, sae, tokens), 1e-6)
    assert not torch.allclose(x, layer_input(sae, tiny_model, tokens))


def test_a_layer_that_writes_nothing_has_no_shares(tiny_model):
    sae = make_layer("topk_transcoder, k")
    sae.W_dec.zero_()
    reading = top_experts(tiny_model, sae, PROMPT)
    assert reading.shares.isnan().all()
    assert "nan" not in reading._repr_html_()


@pytest.mark.parametrize(
    ("prompt", "k", "message"),
    [
        (PROMPT, 0, "k must be a positive number"),
        (torch.zeros(2, 3, dtype=torch.long), 5, r"one prompt .* got \(2, 3\)"),
        (torch.zeros(0, dtype=torch.long), 5, "at least one token"),
        (torch.zeros(3), 5, "token ids"),
        ([PROMPT], 5, "got list"),
    ],
)
def test_what_is_no_prompt_is_said(tiny_model, prompt, k, message):
    with pytest.raises(ValueError, match=message):
        top_experts(tiny_model, make_layer("mxd, k"), prompt, k)


def test_another_model_or_hook_is_said(any_model):
    sae = make_layer("mxd, k")
    sae.cfg.metadata.hook_name = "blocks.1.mlp.hook_inn"
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.1\.mlp\.hook_inn'"):
        top_experts(any_model, sae, PROMPT)
    sae.cfg.metadata.model_name = "gpt2"
    with pytest.raises(ValueError, match="was trained on gpt2"):
        top_experts(any_model, sae, PROMPT)


def test_a_reading_prints(tiny_model):
    sae = make_layer("skip_mxd, k")
    reading = top_experts(tiny_model, sae, PROMPT, k=2)
    reading.tokens[2] = "<b>&[red]\n"
    html = reading._repr_html_()
    assert "&lt;b&gt;&amp;[red]\\n" in html
    assert "<b>" not in html
    console = Console(file=StringIO(), width=200)
    console.print(reading)
    printed = console.file.getvalue()
    assert "<b>&[red]\\n" in printed
    n, a = reading.experts[1, 0].item(), reading.coefficients[1, 0].item()
    assert f"{n}: {a:.3g}, " in printed
    assert "<s>*" in printed


def test_a_reading_as_a_data_frame(tiny_model):
    sae = make_layer("skip_mxd, relu")
    frame = top_experts(tiny_model, sae, PROMPT, k=2).to_pandas()
    assert (frame.groupby("position")["share"].sum() - 1).abs().max() < 1e-9
    assert frame.part.value_counts().to_dict() == {"expert": 18, "others": 9, "skip": 9, "bias": 9}
    bias = frame[frame.part == "bias"]
    assert bias.share.isna().all()
    assert bias.norm.iloc[0] == pytest.approx(sae.b_dec.norm().item())


# Two texts


@pytest.mark.parametrize("kind", ["mxd, k", "skip_mxd, relu", "saelens transcoder", "saelens topk rescaled"])
def test_find_experts(any_model, kind):
    sae = make_layer(kind)
    a, b = ["the big cat", "a dog ran under the small hill then"], PROMPT
    means = []
    for texts in (a, [b]):
        sums, n = torch.zeros(D_SAE, dtype=torch.float64), 0
        for text in texts:
            tokens = any_model.to_tokens(text)
            for acts in sae.encode(true_input(any_model, sae, tokens))[0][1:]:  # without BOS
                sums += acts
                n += 1
        means.append(sums / n)
    found = find_experts(any_model, sae, a, b, n=6, progress=False)
    difference = means[0] - means[1]
    assert found.experts.tolist() == difference.abs().argsort(descending=True)[:6].tolist()
    close(found.means_a, means[0][found.experts])
    close(found.means_b, means[1][found.experts])
    assert (found.n_tokens_a, found.n_tokens_b) == (11, 8)
    swapped = find_experts(any_model, sae, b, a, n=6, progress=False)
    assert swapped.to_pandas()["a - b"].tolist() == (-found.to_pandas()["a - b"]).tolist()


@pytest.mark.parametrize("text", ["", [], ["", ""]])
def test_a_text_without_tokens_is_said(tiny_model, text):
    with pytest.raises(ValueError, match="no token in this text"):
        find_experts(tiny_model, make_layer("mxd, k"), "the cat", text, progress=False)


def test_find_experts_wants_a_positive_number(tiny_model):
    with pytest.raises(ValueError, match="n must be"):
        find_experts(tiny_model, make_layer("mxd, k"), "the cat", "a dog", n=0)


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["mxd", "skip_mxd"])
def test_the_capital_of_france(smollm2, name):
    assert smollm2.cfg.model_name == SMOLLM2
    made, config, _ = OURS[name]
    metadata = SAEMetadata(hook_name="blocks.12.mlp.hook_in", hook_name_out="blocks.12.hook_mlp_out")
    sae = made(config(d_in=576, d_out=576, d_sae=2304, d_hidden=512, k=32, metadata=metadata))
    torch.manual_seed(0)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    reading = top_experts(smollm2, sae, "The capital of France is", k=8)
    assert [t.strip() for t in reading.tokens[-5:]] == ["The", "capital", "of", "France", "is"]
    total = reading.shares.sum(-1) + reading.other_shares
    if reading.skip_shares is not None:
        total = total + reading.skip_shares
    assert (total - 1).abs().max() < 1e-4
    assert not any(math.isnan(v) for v in reading.norms.flatten().tolist())
