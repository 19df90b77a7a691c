"""Direct effects on a gate, against a residual stream put together by hand in float64."""

from io import StringIO

import pytest
import torch
from attached import MODELS, PROMPT
from layers import make_layer, skip_of, true_input, written_by
from rich.console import Console
from sae_lens.analysis.hooked_sae_transformer import add_hook_in_to_mlp
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from tiny import D_MODEL
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoModelForCausalLM

from mxd_lens import load_model
from mxd_lens.analysis.attribution import direct_effects

KINDS = ["mxd, k", "skip_mxd, relu", "topk_transcoder, k", "saelens skip_transcoder"]


@pytest.fixture(params=MODELS)
def any_model(request, tiny_folder):
    return MODELS[request.param](tiny_folder)


@pytest.fixture
def later():
    return make_layer("mxd, k", layer=2)


def by_name(effects) -> dict[tuple, float]:
    named = {(e.part, e.layer, e.index): e.effect for e in effects.effects}
    assert len(named) == len(effects.effects)
    return named


def total(effects) -> float:
    return sum(e.effect for e in effects.effects)


@torch.no_grad()
def by_hand(
    folder, sae, expert: int, tokens: torch.Tensor, position: int, layers, at: int = 2
) -> dict[tuple, float]:
    """The same from the transformers library's own model, its weights and its hidden states, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).model
    kept: dict[tuple, torch.Tensor] = {}
    for i, block in enumerate(model.layers):
        for name, module in (("o", block.self_attn.o_proj), ("mlp", block.mlp)):

            def keep(module, args, output, key=(name, i)):
                kept[key] = args[0][0, position], output[0, position]

            module.register_forward_hook(keep)
    model(tokens[None])
    read = sae.W_enc[:, expert]
    stream = model.embed_tokens(tokens)[position]
    summands = {("embedding", None, None): stream}
    for i in range(at + 1):
        o = model.layers[i].self_attn.o_proj.weight
        z = kept["o", i][0].reshape(2, 8)
        for h in range(2):
            summands["head", i, h] = o[:, 8 * h : 8 * h + 8] @ z[h]
        if i == at:
            break
        x, written = kept["mlp", i]
        if i in layers:
            mine, rest = layers[i], written.clone()
            for n in mine.encode(x).nonzero()[:, 0].tolist():
                summands["expert", i, n] = written_by(mine, x, n)
                rest -= summands["expert", i, n]
            summands["bias", i, None] = mine.b_dec
            if hasattr(mine, "W_skip"):
                summands["skip", i, None] = skip_of(mine, x)
                rest -= summands["skip", i, None]
            summands["error", i, None] = rest - mine.b_dec
        else:
            summands["mlp", i, None] = written
    norm = model.layers[at].post_attention_layernorm
    stream = sum(summands.values())
    scale = (stream.pow(2).mean() + norm.variance_epsilon).sqrt()
    effects = {name: (read @ (norm.weight * v / scale)).item() for name, v in summands.items()}
    effects["gate bias", at, None] = sae.b_enc[expert].item()
    return effects


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("position", [-1, 3])
def test_against_the_models_own_sums(tiny_folder, later, kind, position):
    model = load_model(tiny_folder, dtype="float64")
    layers = {} if kind is None else {i: make_layer(kind, layer=i) for i in (0, 1)}
    tokens = model.to_tokens(PROMPT)[0]
    found = direct_effects(model, later, 7, PROMPT, position, layers=layers.values())
    expected = by_hand(tiny_folder, later, 7, tokens, position, layers)
    named = by_name(found)
    assert named.keys() == expected.keys()
    for name, effect in expected.items():
        # transformers computes norms and softmaxes in float32, whatever the model's dtype.
        assert named[name] == pytest.approx(effect, rel=1e-4, abs=1e-6), name
    x = true_input(model, later, tokens[None])[0, position]
    pre_activation = (x @ later.W_enc + later.b_enc)[7].item()
    assert found.pre_activation == pytest.approx(pre_activation, abs=1e-12)
    assert total(found) == pytest.approx(pre_activation, abs=1e-12)
    sizes = [abs(e.effect) for e in found.effects]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("hook", ["mlp.hook_in", "ln2.hook_normalized"])
def test_on_every_model(any_model, tiny_folder, later, hook):
    with torch.no_grad():
        for name, parameter in any_model.named_parameters():
            if "blocks.2" in name and "ln2" in name:
                parameter.copy_(torch.linspace(0.5, 2, D_MODEL))
    later.cfg.metadata.hook_name = f"blocks.2.{hook}"
    layers = [make_layer("skip_mxd, k", layer=i) for i in (0, 1)]
    found = direct_effects(any_model, later, 7, PROMPT, layers=layers)
    x = true_input(any_model, later, any_model.to_tokens(PROMPT))[0, -1]
    assert found.pre_activation == pytest.approx((x @ later.W_enc + later.b_enc)[7].item(), abs=1e-5)
    assert total(found) == pytest.approx(found.pre_activation, abs=1e-5)
    parts = [e.part for e in found.effects]
    assert [parts.count(p) for p in ("head", "expert", "skip", "bias", "error")] == [6, 8, 2, 2, 2]


def test_both_libraries_agree(tiny_folder, later):
    layers = [make_layer("mxd, k", layer=0)]
    first, *others = (
        by_name(direct_effects(make(tiny_folder), later, 3, PROMPT, layers=layers))
        for make in MODELS.values()
    )
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)


def test_an_attached_layer_has_no_error(tiny_folder, later):
    model = load_model(tiny_folder, dtype="float64")
    earlier = make_layer("skip_mxd, k", layer=0)
    assert abs(by_name(direct_effects(model, later, 7, PROMPT, layers=[earlier]))["error", 0, None]) > 0.01
    with model.saes(saes=[earlier]):
        found = direct_effects(model, later, 7, PROMPT, layers=[earlier])
        assert by_name(found)["error", 0, None] == pytest.approx(0, abs=1e-12)
        assert total(found) == pytest.approx(found.pre_activation, abs=1e-12)
        x = true_input(model, later, model.to_tokens(PROMPT))[0, -1]
        assert found.pre_activation == pytest.approx((x @ later.W_enc + later.b_enc)[7].item())


@pytest.mark.parametrize("hook", ["mlp.hook_in", "ln2.hook_normalized"])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_layer_norm_with_biases(later, parallel, hook):
    """A GPT-like model; with attention and MLP side by side, a Pythia-like one."""
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=3,
            d_model=D_MODEL,
            n_ctx=16,
            d_head=8,
            n_heads=2,
            d_mlp=32,
            d_vocab=20,
            act_fn="gelu",
            normalization_type="LN",
            parallel_attn_mlp=parallel,
            dtype=torch.float64,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.tokenizer = type("Tokenizer", (), {"decode": lambda self, ids: str(ids), "padding_side": "right"})()
    for block in model.blocks:
        add_hook_in_to_mlp(block.mlp)
    model.setup()
    later.cfg.metadata.hook_name = f"blocks.2.{hook}"
    tokens = torch.tensor([3, 1, 4, 1, 5])
    earlier = make_layer("topk_transcoder, k", layer=1)
    earlier.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    found = direct_effects(model, later, 7, tokens, layers=[earlier])
    named = by_name(found)
    x = model.run_with_cache(tokens)[1][later.cfg.metadata.hook_name][0, -1]
    assert found.pre_activation == pytest.approx((x @ later.W_enc + later.b_enc)[7].item())
    assert total(found) == pytest.approx(found.pre_activation, abs=1e-10)
    assert sum(part == "head" for part, *_ in named) == (4 if parallel else 6)
    assert sum(part == "attention bias" for part, *_ in named) == (2 if parallel else 3)
    # TransformerLens' hook_normalized is before the weight and the bias.
    bias = model.blocks[2].ln2.b if hook == "mlp.hook_in" else torch.zeros(D_MODEL, dtype=torch.float64)
    constant = later.W_enc[:, 7] @ bias + later.b_enc[7]
    assert named["gate bias", 2, None] == pytest.approx(constant.item())


def test_results_print(tiny_model, later):
    found = direct_effects(tiny_model, later, 7, PROMPT, layers=[make_layer("mxd, k", layer=1)])
    frame = found.to_pandas()
    assert frame.effect.sum() == pytest.approx(found.pre_activation, abs=1e-5)
    assert list(frame.columns) == ["part", "layer", "index", "effect"]
    console = Console(file=StringIO(), width=120)
    console.print(found)
    assert f"expert 7 of layer 2 at token 8, 'mat': {found.pre_activation:.4g} in all" in found.title
    assert str(found.effects[0]) in console.file.getvalue()
    assert found._repr_html_().count("<tr>") == len(found.effects) + 1
    assert found.top(3).effects == found.effects[:3]


def test_what_does_not_fit_is_said(tiny_model, later):
    def effects(sae=later, expert=0, position=-1, layers=()):
        direct_effects(tiny_model, sae, expert, PROMPT, position, layers)

    with pytest.raises(IndexError, match="expert 40"):
        effects(expert=40)
    with pytest.raises(IndexError, match="no token 9: the prompt has 9"):
        effects(position=9)
    with pytest.raises(ValueError, match="block 2 is not earlier than block 2"):
        effects(layers=[later])
    with pytest.raises(ValueError, match="two layers stand for the MLP of block 0"):
        effects(layers=[make_layer("mxd, k", layer=0), make_layer("mxd, relu", layer=0)])
    with pytest.raises(ValueError, match="not the normalised residual stream"):
        effects(sae=make_layer("saelens topk"))
    later.cfg.metadata.hook_name_out = "hook_embed"
    with pytest.raises(ValueError, match="hook_embed is in no block"):
        effects()


@pytest.mark.real_model
def test_on_the_real_model(smollm2):
    later, *layers = (make_layer("mxd, k", "float32", 576, layer) for layer in (12, 3, 8))
    found = direct_effects(smollm2, later, 5, "The capital of France is", layers=layers)
    assert len(found.effects) == 2 + 13 * 9 + 10 + 2 * (4 + 2)
    size = sum(abs(e.effect) for e in found.effects)
    assert total(found) == pytest.approx(found.pre_activation, abs=1e-5 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["HookedSAETransformer", "SAETransformerBridge"])
def test_a_model_in_half_precision(tiny_folder, kind, dtype):
    """Its effects are those of the same model in float32, but for the rounding, which is a row."""
    model = MODELS[kind](tiny_folder)
    later = make_layer("mxd, k", "float32", layer=2)
    tokens = model.to_tokens(PROMPT)[0]
    precise = direct_effects(model, later, 3, tokens)
    rounded = direct_effects(model.to(dtype), later, 3, tokens)
    assert total(rounded) == pytest.approx(rounded.pre_activation, abs=1e-9)
    known, found = by_name(precise), by_name(rounded)
    assert found.keys() - known.keys() == {("rounding", 2, None)}
    size = sum(abs(effect) for effect in known.values())
    for name, effect in known.items():
        assert found[name] == pytest.approx(effect, abs=0.05 * size), name


def test_what_is_no_normalised_stream_is_refused_in_half_precision_too(tiny_folder):
    layer = make_layer("mxd, k", "float32", layer=2)
    layer.cfg.metadata.hook_name = "blocks.1.mlp.hook_in"
    with pytest.raises(ValueError, match=r"residual stream.*6\.2% are allowed.*bfloat16"):
        direct_effects(load_model(tiny_folder, dtype=torch.bfloat16), layer, 3, PROMPT)


PARALLEL = {
    "gptj": {
        "n_embd": D_MODEL,
        "n_layer": 3,
        "n_head": 2,
        "rotary_dim": 4,
        "n_positions": 64,
        "n_inner": 32,
    },
    "phi": {
        "hidden_size": D_MODEL,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    "falcon": {
        "hidden_size": D_MODEL,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": False,
    },
}


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_blocks_on_a_bridge(family, tiny_folder, tmp_path):
    """Attention and MLP read one norm: effects from the modules of transformers' own model."""
    from transformers import AutoConfig, AutoTokenizer

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=21, **PARALLEL[family]), dtype=torch.float32
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / f"tiny-{family}"
    theirs.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    model = load_model(folder, model_class=SAETransformerBridge)
    layer = make_layer("topk_transcoder, k", "float32", layer=2)
    tokens = model.to_tokens(PROMPT)[0]
    found = by_name(effects := direct_effects(model, layer, 3, tokens, position=4))
    assert total(effects) == pytest.approx(effects.pre_activation, rel=1e-4, abs=1e-5)

    kept = {}
    blocks = next(v for v in theirs.modules() if isinstance(v, torch.nn.ModuleList) and len(v) == 3)
    norm = getattr(blocks[2], "ln_1", None) or blocks[2].input_layernorm
    for i, block in enumerate(blocks):
        block.mlp.register_forward_hook(lambda *a, i=i: kept.__setitem__(i, a[2][0, 4].double()))
    norm.register_forward_hook(lambda *a: kept.update(r=a[1][0][0, 4].double(), x=a[2][0, 4].double()))
    with torch.no_grad():
        theirs.eval()(tokens[None])
    gate = layer.W_enc[:, 3].double()
    scale = (kept["r"].var(correction=0) + norm.eps).sqrt()
    for i in (0, 1):
        written = kept[i] - kept[i].mean()
        expected = gate @ (norm.weight.double() * written / scale)
        assert found["mlp", i, None] == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)
    assert effects.pre_activation == pytest.approx((gate @ kept["x"] + layer.b_enc[3]).item(), rel=1e-4)
