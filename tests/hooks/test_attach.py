"""An attached layer's output is forward(x), in every way there is to attach one."""

import pytest
import torch
from attached import PROMPT, close, expected_logits, generate, greedy, random_mxd
from sae_lens import SAE, SkipTranscoder, TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import SkipTranscoderConfig
from tiny import D_MODEL, HOOK_IN, HOOK_OUT
from transformer_lens import HookedTransformer

from mxd_lens import MxD, load_model, replacement_hooks
from mxd_lens.hooks.site import check_fits
from mxd_lens.models import SMOLLM2, hook_point_name


@pytest.fixture
def mxd() -> MxD:
    return random_mxd(D_MODEL)


def test_replacement_hooks(any_model, mxd):
    tokens = any_model.to_tokens(PROMPT)
    original = any_model(tokens)
    expected = expected_logits(any_model, mxd, tokens)
    assert (expected - original).abs().max() > 0.01
    close(any_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)), expected)
    assert torch.equal(any_model(tokens), original)


def test_replacement_hooks_on_a_bridges_own_names(any_model):
    mxd = random_mxd(D_MODEL, hook_out="blocks.1.mlp.hook_out")
    tokens = any_model.to_tokens(PROMPT)
    expected = expected_logits(any_model, mxd, tokens)
    close(any_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)), expected)


def test_a_batch_and_two_layers(any_model, mxd):
    later = random_mxd(D_MODEL, "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", k=7)
    tokens = any_model.to_tokens([PROMPT, "a dog ran under the small hill then"])
    both = any_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd) + replacement_hooks(later))
    inputs = []
    capture = ("blocks.2.mlp.hook_in", lambda x, hook: inputs.append(x))
    any_model.run_with_hooks(tokens, fwd_hooks=[*replacement_hooks(mxd), capture])
    y = later.forward(inputs[0])
    replace = (hook_point_name(any_model, "blocks.2.hook_mlp_out"), lambda _, hook: y)
    close(both, any_model.run_with_hooks(tokens, fwd_hooks=[*replacement_hooks(mxd), replace]))


def test_run_with_saes(sae_model, mxd):
    tokens = sae_model.to_tokens(PROMPT)
    original, expected = sae_model(tokens), expected_logits(sae_model, mxd, tokens)
    close(sae_model.run_with_saes(tokens, saes=[mxd]), expected)
    with sae_model.saes(saes=[mxd]):
        close(sae_model(tokens), expected)
    sae_model.add_sae(mxd)
    close(sae_model(tokens), expected)
    sae_model.reset_saes()
    assert torch.equal(sae_model(tokens), original)


def test_run_with_cache_with_saes(sae_model, mxd):
    tokens = sae_model.to_tokens(PROMPT)
    expected = expected_logits(sae_model, mxd, tokens)
    x = sae_model.run_with_cache(tokens)[1][HOOK_IN]
    logits, cache = sae_model.run_with_cache_with_saes(tokens, saes=[mxd])
    close(logits, expected)
    base = hook_point_name(sae_model, HOOK_OUT)
    close(cache[f"{base}.hook_sae_acts_post"], mxd.encode(x))
    close(cache[f"{base}.hook_sae_output"], mxd(x))
    close(cache[f"{base}.hook_hidden_post"], mxd.hidden(x))


def test_run_with_hooks_with_saes_edits_a(sae_model, mxd):
    tokens = sae_model.to_tokens(PROMPT)
    x = sae_model.run_with_cache(tokens)[1][HOOK_IN]
    edited = 3 * mxd.encode(x)
    edited[..., 5] += 1
    y = mxd.decode(edited, x)
    base = hook_point_name(sae_model, HOOK_OUT)
    expected = sae_model.run_with_hooks(tokens, fwd_hooks=[(base, lambda _, hook: y)])

    def edit(a, hook):
        a = 3 * a
        a[..., 5] += 1
        return a

    logits = sae_model.run_with_hooks_with_saes(
        tokens, saes=[mxd], fwd_hooks=[(f"{base}.hook_sae_acts_post", edit)]
    )
    close(logits, expected)


def test_error_terms_give_the_unmodified_logits(sae_model, mxd):
    tokens = sae_model.to_tokens(PROMPT)
    original = sae_model(tokens)
    close(sae_model.run_with_saes(tokens, saes=[mxd], use_error_term=True), original)


def test_error_terms_do_not_hide_an_edit(sae_model, mxd):
    tokens = sae_model.to_tokens(PROMPT)
    original, cache = sae_model.run_with_cache(tokens)
    x, base = cache[HOOK_IN], hook_point_name(sae_model, HOOK_OUT)
    edited = mxd.decode(2 * mxd.encode(x), x) - mxd(x)
    expected = sae_model.run_with_hooks(tokens, fwd_hooks=[(base, lambda y, hook: y + edited)])
    sae_model.add_sae(mxd, use_error_term=True)
    logits = sae_model.run_with_hooks(
        tokens, fwd_hooks=[(f"{base}.hook_sae_acts_post", lambda a, hook: 2 * a)]
    )
    sae_model.reset_saes()
    close(logits, expected)
    assert (logits - original).abs().max() > 0.01


def test_excluded_tokens_keep_the_mlp(tiny_model, mxd):
    tokens = tiny_model.to_tokens(PROMPT)
    cache = tiny_model.run_with_cache(tokens)[1]
    y = torch.where((tokens == 1).unsqueeze(-1), cache[HOOK_OUT], mxd(cache[HOOK_IN]))
    expected = tiny_model.run_with_hooks(tokens, fwd_hooks=[(HOOK_OUT, lambda _, hook: y)])
    close(tiny_model.run_with_saes(tokens, saes=[mxd], exclude_special_tokens=True), expected)


def test_generate_with_a_key_value_cache(any_model, mxd):
    tokens = any_model.to_tokens(PROMPT)
    with any_model.hooks(fwd_hooks=replacement_hooks(mxd)):
        expected = greedy(any_model, tokens, 8)
        assert torch.equal(generate(any_model, tokens, 8), expected)
    assert not torch.equal(generate(any_model, tokens, 8), expected)


def test_generate_with_an_attached_layer(sae_model, mxd):
    tokens = sae_model.to_tokens(PROMPT)
    with sae_model.saes(saes=[mxd]):
        expected = greedy(sae_model, tokens, 8)
        assert torch.equal(generate(sae_model, tokens, 8), expected)


def test_gradients_reach_the_models_input_through_an_attached_layer(sae_model, mxd):
    tokens = sae_model.to_tokens(PROMPT)
    gradients = []

    def watch(x, hook):
        x.requires_grad_()
        x.register_hook(gradients.append)

    with sae_model.saes(saes=[mxd]):
        logits = sae_model.run_with_hooks(tokens, fwd_hooks=[(hook_point_name(sae_model, HOOK_IN), watch)])
        logits.logsumexp(-1).sum().backward()
    assert gradients[0].abs().sum() > 0


def test_saelens_skip_transcoder_keeps_its_skip(any_model):
    cfg = SkipTranscoderConfig(
        d_in=D_MODEL,
        d_out=D_MODEL,
        d_sae=24,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT),
    )
    skip = SkipTranscoder(cfg).requires_grad_(False)
    skip.W_skip.normal_(generator=torch.Generator().manual_seed(0))
    tokens = any_model.to_tokens(PROMPT)
    close(
        any_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(skip)),
        expected_logits(any_model, skip, tokens),
    )


@pytest.mark.parametrize("at", [HOOK_OUT, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"])
def test_an_ordinary_sae_replaces_its_own_hook(any_model, at):
    cfg = TopKSAEConfig(d_in=D_MODEL, d_sae=24, k=3, metadata=SAEMetadata(hook_name=at))
    sae = TopKSAE(cfg).requires_grad_(False)
    tokens = any_model.to_tokens(PROMPT)
    name = hook_point_name(any_model, at)
    y = any_model.run_with_cache(tokens)[1][name]
    expected = any_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda _, hook: sae(y))])
    close(any_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(sae)), expected)


# What does not fit


def test_a_missing_input_hook_is_said(tiny_folder, mxd):
    model = load_model(tiny_folder, model_class=HookedTransformer)
    with pytest.raises((ValueError, KeyError), match=r"mlp\.hook_in"):
        model.run_with_hooks(model.to_tokens(PROMPT), fwd_hooks=replacement_hooks(mxd))


def test_a_layer_of_another_width_is_said(sae_model):
    wide = random_mxd(2 * D_MODEL)
    wide.cfg.metadata.model_name = "another-model"
    for run in (
        lambda tokens: sae_model.run_with_saes(tokens, saes=[wide]),
        lambda tokens: sae_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(wide)),
    ):
        with pytest.raises(ValueError, match=r"d_in = 32.*another-model at blocks\.1\.mlp\.hook_in"):
            run(sae_model.to_tokens(PROMPT))


def test_a_layer_without_hooks_is_said():
    with pytest.raises(ValueError, match="does not say where it belongs"):
        replacement_hooks(random_mxd(D_MODEL, hook_in=""))


def test_check_fits(any_model, mxd):
    check_fits(any_model, mxd)
    mxd.cfg.metadata.model_name = "gpt2"
    with pytest.raises(ValueError, match="was trained on gpt2, and the model is"):
        check_fits(any_model, mxd)
    mxd.cfg.metadata.model_name = any_model.cfg.model_name
    mxd.cfg.metadata.hook_name = "blocks.1.mlp.hook_inn"
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.1\.mlp\.hook_inn'. Near: .*blocks\.1\.mlp"):
        check_fits(any_model, mxd)


@pytest.mark.real_model
@pytest.mark.parametrize("model_class", [None, SAETransformerBridge])
def test_smollm2(model_class, tmp_path):
    """Every way on the real model, with a layer that was saved and loaded again."""
    model = load_model(SMOLLM2, **({"model_class": model_class} if model_class else {}))
    mxd = random_mxd(576, "blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out", d_sae=200, d_hidden=64, k=16)
    mxd.W_out.mul_(0.02)
    mxd.save_model(tmp_path)
    mxd = SAE.load_from_disk(tmp_path)
    tokens = model.to_tokens("Every attached layer equals its own forward pass.")
    with torch.no_grad():
        original = model(tokens)
        expected = expected_logits(model, mxd, tokens)
        assert (original - expected).abs().max() > 0.1
        for logits in (
            model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)),
            model.run_with_saes(tokens, saes=[mxd]),
            model.run_with_cache_with_saes(tokens, saes=[mxd])[0],
            model.run_with_hooks_with_saes(tokens, saes=[mxd], fwd_hooks=[]),
        ):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
        error_term = model.run_with_saes(tokens, saes=[mxd], use_error_term=True)
        torch.testing.assert_close(error_term, original, rtol=1e-4, atol=1e-3)
        with model.saes(saes=[mxd]):
            assert torch.equal(generate(model, tokens, 5), greedy(model, tokens, 5))
