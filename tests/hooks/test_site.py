"""Names mean one hook point on every model, and a layer at the wrong place is an error before a number."""

import pytest
import torch
from attached import MODELS, PROMPT, generate, greedy, random_mxd
from conftest import D_MODEL, HOOK_IN, HOOK_OUT
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

from mxd_lens import load_model, replacement_hooks, steer
from mxd_lens.hooks.site import check_fits, check_trained_on
from mxd_lens.models import check_fires, hook_point, hook_point_name, weight_processing

SAE_MODELS = ["HookedSAETransformer", "SAETransformerBridge"]


@pytest.fixture(params=SAE_MODELS)
def model(request, tiny_folder):
    return MODELS[request.param](tiny_folder)


@pytest.mark.parametrize(
    "name",
    ["hook_resid_mid", "hook_attn_out", "hook_mlp_out", "hook_resid_pre", "mlp.hook_pre", "mlp.hook_post"],
)
def test_a_name_means_the_same_activation_on_both(name: str, tiny_folder) -> None:
    seen = []
    for kind in SAE_MODELS:
        model = MODELS[kind](tiny_folder)
        point = hook_point_name(model, f"blocks.1.{name}")
        model.run_with_hooks(
            model.to_tokens(PROMPT), fwd_hooks=[(point, lambda x, hook: seen.append(x.clone()))]
        )
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bridge", ["hook_in", "hook_out", "ln2.hook_in", "attn.hook_out", "mlp.hook_out"])
def test_a_bridges_own_names_on_a_hooked_transformer(bridge: str, tiny_folder) -> None:
    tokens = torch.tensor([[1, 3, 4, 5]])
    seen = []
    for kind in SAE_MODELS:
        model = MODELS[kind](tiny_folder)
        point = hook_point_name(model, f"blocks.1.{bridge}")
        model.run_with_hooks(tokens, fwd_hooks=[(point, lambda x, hook: seen.append(x.clone()))])
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


def test_hooks_by_name_after_attaching_and_detaching(model) -> None:
    """SAELens leaves a hook point with another name on a bridge, and TransformerLens then finds none."""
    mxd = random_mxd(D_MODEL)
    tokens = model.to_tokens(PROMPT)
    expected = model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd))
    model.add_sae(mxd)
    model.reset_saes()
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)), expected)
    seen = []
    model.run_with_hooks(
        tokens, fwd_hooks=[(hook_point_name(model, HOOK_OUT), lambda y, hook: seen.append(y))]
    )
    assert len(seen) == 1


@pytest.mark.parametrize("kind", MODELS)
def test_a_hook_point_that_never_fires(kind: str, tiny_folder) -> None:
    model = MODELS[kind](tiny_folder)
    name = "blocks.1.hook_mlp_in"
    mxd = random_mxd(D_MODEL, hook_in=name)
    if name not in model.hook_dict:
        pytest.skip("not listed")
    for use in (
        lambda: check_fires(model, name),
        lambda: check_fits(model, mxd),
        lambda: steer(model, mxd, {3: 1.0}),
    ):
        with pytest.raises(ValueError, match=r"blocks\.1\.hook_mlp_in does not fire"):
            use()
    if hasattr(model, "add_sae"):
        with pytest.raises(ValueError, match=r"blocks\.1\.hook_mlp_in does not fire"):
            model.add_sae(mxd)
        assert not model.acts_to_saes


def test_replacement_hooks_pass_over_what_is_attached(model) -> None:
    one, two = random_mxd(D_MODEL), random_mxd(D_MODEL)
    two.b_dec.add_(1.0)
    tokens = model.to_tokens(PROMPT)
    expected = model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(two))
    for use_error_term in (False, True):
        with model.saes(saes=[one], use_error_term=use_error_term):
            got = model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(two))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", SAE_MODELS)
def test_processed_weights(kind: str, tiny_folder) -> None:
    model, mxd = MODELS[kind](tiny_folder), random_mxd(D_MODEL)
    assert weight_processing(model) == []
    mxd.cfg.metadata.weight_processing = []
    check_trained_on(model, mxd)
    if kind == "HookedSAETransformer":
        model.process_weights_()
    else:
        model.enable_compatibility_mode(disable_warnings=True)
    assert weight_processing(model) == ["fold_ln"]
    tokens = model.to_tokens(PROMPT)
    for use in (
        lambda: check_trained_on(model, mxd),
        lambda: model.add_sae(mxd),
        lambda: model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)),
    ):
        with pytest.raises(ValueError, match=r"trained on unprocessed weights.* processed \(fold_ln\)"):
            use()
    mxd.cfg.metadata.weight_processing = None
    with pytest.warns(UserWarning, match="does not record whether"):
        check_trained_on(model, mxd)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", SAE_MODELS)
def test_a_float32_layer_on_a_model_of_another_dtype(kind: str, dtype: torch.dtype, tiny_folder) -> None:
    classes = {"model_class": SAETransformerBridge} if kind == "SAETransformerBridge" else {}
    model, mxd = load_model(tiny_folder, dtype=dtype, **classes), random_mxd(D_MODEL)
    tokens = model.to_tokens(PROMPT)
    hooked = model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd))
    with steer(model, mxd, {3: 0.0}):
        assert torch.equal(model(tokens), hooked)
    with model.saes(saes=[mxd]):
        assert torch.equal(model(tokens), hooked)
    assert hooked.isfinite().all()


def test_special_tokens_are_left_to_the_mlp_in_generate_too(model) -> None:
    mxd = random_mxd(D_MODEL)
    tokens = model.to_tokens(PROMPT)
    point_in, point_out = hook_point_name(model, HOOK_IN), hook_point_name(model, HOOK_OUT)
    model_tokens: list[torch.Tensor] = []
    xs: list[torch.Tensor] = []

    def leave_special(y, hook):
        special = torch.isin(model_tokens[-1], torch.tensor([1, 2]))
        return torch.where(special.unsqueeze(-1), y, mxd(xs[-1]))

    def expected(tokens):
        model_tokens.append(tokens)
        hooks = [(point_in, lambda x, hook: xs.append(x)), (point_out, leave_special)]
        return model.run_with_hooks(tokens, fwd_hooks=hooks)

    written, logits = greedy(expected, tokens, 6), expected(tokens)
    model.add_sae(mxd, exclude_special_tokens=True)
    torch.testing.assert_close(model(tokens), logits)
    assert torch.equal(generate(model, tokens, 6), written)
    settings = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    assert torch.equal(model.generate(tokens, use_past_kv_cache=False, **settings), written)


def test_embeddings_hide_which_tokens_are_special(tiny_model) -> None:
    tiny_model.add_sae(random_mxd(D_MODEL), exclude_special_tokens=True)
    tokens = tiny_model.to_tokens(PROMPT)
    tiny_model(tokens)
    stream = tiny_model.run_with_cache(tokens)[1]["blocks.0.hook_resid_pre"]
    with pytest.raises(ValueError, match="the model was given embeddings"):
        tiny_model(stream, start_at_layer=0)


def test_what_cannot_be_attached_leaves_the_model_as_it_was(model) -> None:
    tokens = model.to_tokens(PROMPT)
    before, point = model(tokens), hook_point(model, HOOK_OUT)
    with pytest.raises(ValueError, match="d_in = 32"):
        model.add_sae(random_mxd(2 * D_MODEL))
    assert hook_point(model, HOOK_OUT) is point
    assert not model.acts_to_saes
    assert torch.equal(model(tokens), before)
