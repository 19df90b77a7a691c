"""SAELens' metrics: its own numbers for an ordinary SAE, and right ones where its own are not."""

import pytest
import torch
from datasets import Dataset
from planted import PlantedModel, planted_tokens, planted_transcoder
from sae_lens import ActivationsStore, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from tiny import D_MODEL, HOOK_OUT

from mxd_lens import evaluate
from mxd_lens.adapters.saelens_metrics import saelens_metrics

BOS = 1


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(3, 20, (7, 12), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = BOS
    return tokens


def ordinary_sae(kind: str, excluded):
    metadata = SAEMetadata(
        hook_name=HOOK_OUT, context_size=12, prepend_bos=True, exclude_special_tokens=excluded
    )
    config, cls = {
        "topk": (lambda **s: TopKSAEConfig(k=3, **s), TopKSAE),
        "relu": (StandardSAEConfig, StandardSAE),
    }[kind]
    torch.manual_seed(0)
    sae = cls(config(d_in=D_MODEL, d_sae=24, metadata=metadata)).requires_grad_(False)
    sae.b_dec.normal_(std=0.1)
    return sae


def theirs(sae, model, tokens, excluded):
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    store = ActivationsStore.from_sae(
        model, sae, dataset, streaming=False, store_batch_size_prompts=7, context_size=12
    )
    everything = get_eval_everything_config(7, 1, 1)
    return run_evals(
        sae, store, model, ActivationScaler(), everything, exclude_special_tokens=excluded, verbose=False
    )


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_an_ordinary_sae_gets_saelens_names_and_numbers(kind, tiny_model, tokens):
    sae = ordinary_sae(kind, False)
    expected, _ = theirs(sae, tiny_model, tokens, False)
    metrics = saelens_metrics(evaluate(tiny_model, sae, tokens, batch_size=3, progress=False))
    for group, values in metrics.items():
        for name, value in values.items():
            # SAELens counts the divergence at the last token too, and every token of the text.
            if group in ("model_behavior_preservation", "token_stats"):
                assert name in expected[group]
            else:
                assert value == pytest.approx(expected[group][name], rel=2e-4, abs=1e-5), name


def test_run_evals_is_wrong_for_a_layer_with_two_hooks():
    """What this mapping is for: SAELens calls a perfect transcoder a bad one."""
    sae, tokens = planted_transcoder(), planted_tokens()
    metrics = saelens_metrics(evaluate(PlantedModel(sae), sae, tokens, progress=False))
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(1)
    assert metrics["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-6)
    assert metrics["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert metrics["model_behavior_preservation"]["kl_div_score"] == pytest.approx(1, abs=1e-6)
    assert metrics["sparsity"]["l0"] == 2
    assert metrics["token_stats"]["total_tokens_eval_reconstruction"] == tokens[:, 1:].numel()


def test_the_divergence_of_zero_ablation(tiny_model, tokens):
    """KL(unmodified || zero ablated), from logits run here."""
    sae = ordinary_sae("topk", False)
    zeroed = tiny_model.run_with_hooks(tokens, fwd_hooks=[(HOOK_OUT, lambda y, hook: 0 * y)])
    log_p, log_q = (logits[:, :-1].double().log_softmax(-1) for logits in (tiny_model(tokens), zeroed))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    metrics = saelens_metrics(evaluate(tiny_model, sae, tokens, progress=False))
    assert metrics["model_behavior_preservation"]["kl_div_with_ablation"] == pytest.approx(expected, rel=1e-5)


def test_what_is_no_report(tiny_model, tokens):
    with pytest.raises(TypeError, match=r"saelens_metrics\(evaluate\(model, sae, tokens\)\)"):
        saelens_metrics(tiny_model)
