"""SAELens' metrics: its own numbers for an ordinary SAE, and right ones where its own are not."""

import math

import pytest
import torch
from conftest import D_MODEL, HOOK_OUT
from datasets import Dataset
from planted import CONTEXT, D_SAE, N_WORDS, WORD, PlantedModel, planted_tokens, planted_transcoder
from sae_lens import ActivationsStore, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from test_faithfulness import layer

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


@pytest.mark.parametrize("excluded", [False, [BOS]])
@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_an_ordinary_sae_gets_exactly_saelens_names_and_numbers(kind, excluded, tiny_model, tokens):
    sae = ordinary_sae(kind, excluded)
    expected, expected_features = theirs(sae, tiny_model, tokens, excluded)
    metrics, features = saelens_metrics(sae, tiny_model, tokens, batch_size=3, progress=False)
    assert {group: set(values) for group, values in metrics.items()} == {
        group: set(values) for group, values in expected.items()
    }
    for group, values in expected.items():
        for name, value in values.items():
            assert metrics[group][name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    assert set(features) == set(expected_features)
    for name, values in expected_features.items():
        assert features[name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name


def test_run_evals_is_wrong_for_a_layer_with_two_hooks():
    """What this module is for: SAELens calls a perfect transcoder a bad one."""
    sae, tokens = planted_transcoder(), planted_tokens()
    metrics, features = saelens_metrics(sae, PlantedModel(sae), tokens, progress=False)
    assert metrics["reconstruction_quality"]["mse"] == pytest.approx(0, abs=1e-9)
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(1)
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(1)
    assert metrics["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-6)
    assert metrics["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert metrics["shrinkage"]["l2_ratio"] == pytest.approx(1)
    assert metrics["shrinkage"]["relative_reconstruction_bias"] == pytest.approx(1)
    assert metrics["sparsity"]["l0"] == 2
    assert metrics["sparsity"]["l1"] == pytest.approx(WORD + CONTEXT)
    assert metrics["shrinkage"]["l2_norm_in"] == pytest.approx(math.hypot(WORD, CONTEXT))
    kept = tokens[:, 1:]
    for w in range(N_WORDS):
        here = kept == 3 + w
        assert features["feature_density"][w] == pytest.approx(here.double().mean().item())
        times = here.sum().item() / here.any(1).sum().item()
        assert features["consistent_activation_heuristic"][w] == pytest.approx(times)
    assert features["feature_density"][-1] == 0
    assert math.isnan(features["consistent_activation_heuristic"][-1])
    assert len(features["encoder_norm"]) == len(features["encoder_bias"]) == D_SAE
    assert "encoder_decoder_cosine_sim" not in features


@pytest.mark.parametrize("kind", ["mxd", "mxd with relu", "skip transcoder"])
def test_layers_with_two_hooks_against_the_faithfulness_report(kind, tiny_model, tokens):
    sae = layer(kind)
    report = evaluate(sae, tiny_model, tokens, progress=False)
    metrics, features = saelens_metrics(sae, tiny_model, tokens, batch_size=2, progress=False)
    unexplained = 1 - metrics["reconstruction_quality"]["explained_variance"]
    assert unexplained == pytest.approx(report.fraction_of_variance_unexplained, rel=1e-4)
    losses = metrics["model_performance_preservation"]
    assert losses["ce_loss_with_sae"] == pytest.approx(report.ce_loss_replaced, rel=1e-5)
    assert losses["ce_loss_without_sae"] == pytest.approx(report.ce_loss, rel=1e-5)
    assert metrics["sparsity"]["l0"] == pytest.approx(report.l0)
    never = sum(density == 0 for density in features["feature_density"]) / sae.cfg.d_sae
    assert never == pytest.approx(report.dead_fraction)


def test_the_order_and_the_batch_size_do_not_matter(tiny_model, tokens):
    sae = layer("mxd")
    one, features = saelens_metrics(sae, tiny_model, tokens, batch_size=1, progress=False)
    other, of_other = saelens_metrics(sae, tiny_model, tokens.flip(0), batch_size=7, progress=False)
    for group, values in one.items():
        assert other[group] == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert of_other["feature_density"] == pytest.approx(features["feature_density"])


def test_half_precision_is_close():
    sae, tokens = planted_transcoder(), planted_tokens()
    half = planted_transcoder().to(dtype=torch.float16)
    one, other = (saelens_metrics(s, PlantedModel(sae), tokens, progress=False)[0] for s in (sae, half))
    for group, values in one.items():
        assert other[group] == pytest.approx(values, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4, dtype=torch.long), "tokens must be ids"),
        (torch.zeros(4, 5), "tokens must be ids"),
        (torch.full((4, 5), BOS), "all are special tokens"),
        (torch.zeros(0, 5, dtype=torch.long), "no tokens to judge"),
    ],
)
def test_tokens_that_cannot_be_judged(bad, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        saelens_metrics(layer("mxd"), tiny_model, bad, progress=False)
