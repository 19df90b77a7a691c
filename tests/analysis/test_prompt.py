"""What fires on a prompt, against sums written out expert by expert."""

import math
from io import StringIO

import pytest
import torch
from attached import MODELS, PROMPT
from layers import ALL_LAYERS, D_SAE, OURS, close, make_layer, skip_of, true_input, written_by
from rich.console import Console
from sae_lens.saes.sae import SAEMetadata

from mxd_lens import top_experts
from mxd_lens.models import SMOLLM2


@pytest.fixture(params=ALL_LAYERS)
def layer(request):
    return make_layer(request.param)


@pytest.fixture(params=MODELS)
def any_model(request, tiny_folder):
    return MODELS[request.param](tiny_folder)


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
