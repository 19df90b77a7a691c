"""SAEBench's own evaluations on layers of this package, and what the adapter promises it."""

import contextlib
import importlib.util
import json
import string
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attached import random_mxd
from sae_lens import SkipTranscoder, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import SkipTranscoderConfig
from test_probing import planted_texts, planted_transcoder
from tiny import D_MODEL, HOOK_IN, HOOK_OUT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mxd_lens import SkipTranscoder as KeptSkipTranscoder
from mxd_lens import SkipTranscoderConfig as KeptSkipTranscoderConfig
from mxd_lens import TopKTranscoder, TopKTranscoderConfig, evaluate, expert_statistics, load_model
from mxd_lens.adapters.saebench import InputsOfOutputs, SAEBenchLayer, for_sae_bench

BOS, PAD = 1, 2
sae_bench = pytest.mark.skipif(
    importlib.util.find_spec("sae_bench") is None,
    reason="sae-bench is not installed: make test-tools makes an environment with it",
)


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(3, 20, (6, 10), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = BOS
    return tokens


def transcoder(d_sae: int = 30, std: float = 0.5) -> TopKTranscoder:
    metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    layer = TopKTranscoder(
        TopKTranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=d_sae, k=4, metadata=metadata)
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return layer.requires_grad_(False)


def kept_skip() -> KeptSkipTranscoder:
    metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    layer = KeptSkipTranscoder(
        KeptSkipTranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=24, metadata=metadata)
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return layer.requires_grad_(False)


def topk_sae() -> TopKSAE:
    torch.manual_seed(0)
    cfg = TopKSAEConfig(d_in=D_MODEL, d_sae=24, k=4, metadata=SAEMetadata(hook_name=HOOK_OUT))
    return TopKSAE(cfg).requires_grad_(False)


LAYERS = {
    "mxd": lambda: random_mxd(D_MODEL),
    "transcoder": transcoder,
    "skip transcoder": kept_skip,
    "sae": topk_sae,
}


# What the adapter promises, SAEBench or not


@pytest.mark.parametrize("kind", LAYERS)
def test_at_the_output_it_gives_what_the_layer_puts_in_the_mlps_place(kind, tiny_model, tokens):
    sae = LAYERS[kind]()
    cache = tiny_model.run_with_cache(tokens)[1]
    expected = sae(cache[sae.cfg.metadata.hook_name])
    with for_sae_bench(tiny_model, {"layer": sae}) as [(name, layer)]:
        y = tiny_model.run_with_cache(tokens, names_filter=[HOOK_OUT])[1][HOOK_OUT]
        tiny_model(tokens.flip(0))  # another pass since
        assert name == "layer"
        torch.testing.assert_close(layer(y), expected)
        torch.testing.assert_close(layer(y[2:4, 3:]), expected[2:4, 3:])
        torch.testing.assert_close(layer(y.flatten(0, 1).flip(0)), expected.flatten(0, 1).flip(0))
        torch.testing.assert_close(layer.W_dec.norm(dim=-1), torch.ones(len(layer.W_dec)))


def test_at_the_input_it_encodes_the_mlps_input(tiny_model, tokens):
    mxd = random_mxd(D_MODEL)
    x = tiny_model.run_with_cache(tokens)[1][HOOK_IN]
    with for_sae_bench(tiny_model, {"mxd": mxd}, at="input") as [(_, layer)]:
        assert layer.cfg.metadata.hook_name == HOOK_IN
        torch.testing.assert_close(layer.encode(x) / layer.scale, mxd.encode(x))
        torch.testing.assert_close(layer(x), mxd(x))


def test_an_edited_activation_is_decoded_with_its_own_input(tiny_model, tokens):
    """As TPP ablates: in place, and after a first decode."""
    mxd = random_mxd(D_MODEL)
    cache = tiny_model.run_with_cache(tokens)[1]
    a = mxd.encode(cache[HOOK_IN])
    a[..., 3] = 0
    with for_sae_bench(tiny_model, {"mxd": mxd}) as [(_, layer)]:
        y = tiny_model.run_with_cache(tokens)[1][HOOK_OUT]
        f = layer.encode(y)
        layer.decode(f)
        f[..., 3] = 0
        torch.testing.assert_close(layer.decode(f), mxd.decode(a, cache[HOOK_IN]))


def test_zeros_are_tokens_that_do_not_count(tiny_model, tokens):
    with for_sae_bench(tiny_model, {"mxd": random_mxd(D_MODEL)}) as [(_, layer)]:
        y = tiny_model.run_with_cache(tokens)[1][HOOK_OUT]
        mask = (tokens != BOS).unsqueeze(-1)
        torch.testing.assert_close(layer.encode(y * mask) * mask, layer.encode(y) * mask)


def test_an_output_that_was_not_seen_is_refused(tiny_model, tokens):
    with for_sae_bench(tiny_model, {"mxd": random_mxd(D_MODEL)}, tokens_kept=10) as [(_, layer)]:
        with pytest.raises(ValueError, match="no output of the MLP"):
            layer.encode(torch.randn(2, D_MODEL))
        y = tiny_model.run_with_cache(tokens)[1][HOOK_OUT]
        layer.encode(y[-1])
        with pytest.raises(ValueError, match="among the last 10 tokens"):
            layer.encode(y)


def test_the_model_is_as_it_was_afterwards(tiny_model, tokens):
    name, load = tiny_model.cfg.model_name, HookedTransformer.from_pretrained_no_processing
    hooks = sum(len(module._forward_hooks) for module in tiny_model.modules())
    with contextlib.suppress(KeyError), for_sae_bench(tiny_model, {"mxd": random_mxd(D_MODEL)}):
        assert HookedTransformer.from_pretrained_no_processing("anything") is tiny_model
        assert tiny_model.cfg.model_name == f"{name}-{HOOK_OUT}"
        raise KeyError
    assert tiny_model.cfg.model_name == name
    assert HookedTransformer.from_pretrained_no_processing == load
    assert "run_with_cache" not in vars(tiny_model)
    assert sum(len(module._forward_hooks) for module in tiny_model.modules()) == hooks


def test_the_mean_direction_of_an_experts_contributions(tiny_model, tokens):
    mxd = random_mxd(D_MODEL)
    directions = expert_statistics(tiny_model, mxd, tokens, progress=False).mean_direction()
    with for_sae_bench(tiny_model, {"mxd": mxd}, directions={"mxd": directions}) as [(_, layer)]:
        y = tiny_model.run_with_cache(tokens)[1][HOOK_OUT]
        x = tiny_model.run_with_cache(tokens)[1][HOOK_IN]
        a = mxd.encode(x)
        fires = a.flatten(0, 1).any(0)
        torch.testing.assert_close(
            (layer.encode(y) @ layer.W_dec), (a[..., fires] @ directions[fires]), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(layer(y), mxd(x))


def test_what_cannot_be_shown_to_saebench(tiny_model):
    other = random_mxd(D_MODEL, "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    plain = SkipTranscoder(
        SkipTranscoderConfig(
            d_in=D_MODEL,
            d_out=D_MODEL,
            d_sae=24,
            apply_b_dec_to_input=False,
            metadata=kept_skip().cfg.metadata,
        )
    )
    for saes, options, message in (
        ({"a": random_mxd(D_MODEL), "b": other}, {}, "one hook point at a time"),
        ({"a": plain}, {}, "load it as mxd_lens.SkipTranscoder"),
        ({"a": other}, {"at": "middle"}, "'input' or 'output', got 'middle'"),
        ({"a": random_mxd(D_MODEL)}, {"directions": {"a": torch.ones(3, 3)}}, "one direction per expert"),
    ):
        with pytest.raises(ValueError, match=message), for_sae_bench(tiny_model, saes, **options):
            pass


def test_an_output_without_its_input_is_not_remembered():
    inputs = InputsOfOutputs()
    inputs.capture_output(None, None, torch.ones(1, 2))
    with pytest.raises(ValueError, match="no output"):
        SAEBenchLayer(transcoder(), inputs).encode(torch.ones(1, D_MODEL))


# SAEBench itself


class Store:
    """What core asks an ActivationsStore for, on tokens of ours."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.context_size, self.store_batch_size_prompts = tokens, tokens.shape[1], len(tokens)

    def get_batch_tokens(self, _batch_size: int) -> torch.Tensor:
        return self.tokens

    def reset_input_dataset(self) -> None:
        pass


@sae_bench
@pytest.mark.parametrize("kind", LAYERS)
def test_core_agrees_with_evaluate(kind, tiny_model, tokens):
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    sae = LAYERS[kind]()
    sae.cfg.metadata.exclude_special_tokens = [BOS]
    report = evaluate(tiny_model, sae, tokens, progress=False)
    settings = CoreEvalConfig(
        batch_size_prompts=len(tokens),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        exclude_special_tokens_from_reconstruction=True,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    with for_sae_bench(tiny_model, {kind: sae}) as [(name, layer)]:
        load_and_format_sae(name, layer, "cpu")
        metrics, features = core.run_evals(layer, Store(tokens), tiny_model, settings, ignore_tokens={BOS})
    performance = metrics["model_performance_preservation"]
    assert performance["ce_loss_without_sae"] == pytest.approx(report.ce_loss, rel=1e-5)
    assert performance["ce_loss_with_sae"] == pytest.approx(report.ce_loss_replaced, rel=1e-5)
    assert metrics["sparsity"]["l0"] == pytest.approx(report.l0)
    dead = sum(density == 0 for density in features["feature_density"]) / sae.cfg.d_sae
    assert dead == pytest.approx(report.silent_fraction)

    # The zero ablation of core leaves no token out, and its divergence no position: judged without either.
    sae.cfg.metadata.exclude_special_tokens = False
    report = evaluate(tiny_model, sae, tokens, progress=False)
    with for_sae_bench(tiny_model, {kind: sae}) as [(name, layer)]:
        load_and_format_sae(name, layer, "cpu")
        metrics, _ = core.run_evals(layer, Store(tokens), tiny_model, settings)
        logits = tiny_model(tokens)
        y = tiny_model.run_with_cache(tokens)[1][HOOK_OUT]
        errors = (layer(y) - y).pow(2).sum(-1)
        replaced = tiny_model.run_with_hooks(tokens, fwd_hooks=[(HOOK_OUT, lambda y, hook: layer(y))])
    performance = metrics["model_performance_preservation"]
    assert performance["ce_loss_with_ablation"] == pytest.approx(report.ce_loss_zero_ablated, rel=1e-5)
    assert performance["ce_loss_score"] == pytest.approx(report.ce_loss_recovered, rel=1e-3)
    assert (errors / y.pow(2).sum(-1)).mean().item() == pytest.approx(report.normalized_mse, rel=1e-4)
    unmodified, changed = logits.log_softmax(-1), replaced.log_softmax(-1)
    divergence = (unmodified.exp() * (unmodified - changed)).sum(-1)
    assert metrics["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(
        divergence.mean().item(), rel=1e-3
    )
    assert divergence[:, :-1].mean().item() == pytest.approx(report.kl_divergence, rel=1e-3)


@sae_bench
def test_core_from_a_local_data_set(tiny_model, words, tmp_path):
    """`multiple_evals`, which loads model and text, and writes the result."""
    from sae_bench.evals.core import main as core

    (tmp_path / "text").mkdir()
    lines = (json.dumps({"text": sentence}) for sentence in words)
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(lines))
    saes = {"mxd": random_mxd(D_MODEL), "transcoder": transcoder()}
    with for_sae_bench(tiny_model, saes) as selected:
        results = core.multiple_evals(
            selected,
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2,
            eval_batch_size_prompts=4,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(tmp_path / "text"),
            context_size=16,
            output_folder=str(tmp_path / "out"),
            device="cpu",
        )
    assert [result["sae_set"] for result in results] == ["mxd", "transcoder"]
    for name in saes:
        known = json.loads((tmp_path / "out" / f"{name}_custom_sae_eval_results.json").read_text())
        metrics = known["eval_result_metrics"]
        assert metrics["sparsity"]["l0"] <= 4
        assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
        assert len(known["eval_result_details"]) == saes[name].cfg.d_sae


@sae_bench
def test_sparse_probing_finds_the_planted_feature(tiny_model, tmp_path):
    from sae_bench.evals.sparse_probing import main as sparse_probing
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    task = planted_texts()
    config = SparseProbingEvalConfig(
        dataset_names=[task.name],
        probe_train_set_size=60,
        probe_test_set_size=20,
        context_length=12,
        llm_batch_size=16,
        llm_dtype="float32",
        model_name="tiny",
        k_values=[1, 2],
    )
    found = {}
    saes = {"planted": planted_transcoder(tiny_model), "random": transcoder(d_sae=8)}
    for name, sae in saes.items():
        with for_sae_bench(tiny_model, {name: sae}, at="input", tasks=[task]) as selected:
            results = sparse_probing.run_eval(
                config, selected, "cpu", str(tmp_path / "out"), artifacts_path=str(tmp_path / name)
            )
        (result,) = results.values()
        found[name] = result["eval_result_unstructured"][f"{task.name}_results"]["sae_top_1_test_accuracy"]
    for label in ("cat", "dog"):
        assert found["planted"][label] == 1
        assert found["random"][label] < 0.95


@sae_bench
def test_tpp_ablates_the_planted_feature(tiny_model, tmp_path):
    """Targeted probe perturbation, at the MLP's output: probes on y, latents ablated in what they write."""
    from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

    task = planted_texts()
    config = ScrAndTppEvalConfig(
        dataset_names=[task.name],
        perform_scr=False,
        train_set_size=60,
        test_set_size=20,
        context_length=12,
        llm_batch_size=16,
        llm_dtype="float32",
        model_name="tiny",
        n_values=[2],
    )
    with for_sae_bench(tiny_model, {"mxd": random_mxd(D_MODEL)}, tasks=[task]) as selected:
        results = scr_and_tpp.run_eval(
            config,
            selected,
            "cpu",
            str(tmp_path / "out"),
            artifacts_path=str(tmp_path / "artifacts"),
        )
    (result,) = results.values()
    metrics = result["eval_result_metrics"]["tpp_metrics"]
    assert -1 <= metrics["tpp_threshold_2_total_metric"] <= 1


@pytest.fixture
def spelling_model(tmp_path: Path):
    """A model whose embeddings hold a word's first letter, for SAEBench's absorption."""
    d_model, generator = 32, torch.Generator().manual_seed(0)
    words = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase[:10]]
    special = ["<unk>", "<s>", "</s>", ":", "has", "the", "first", "letter", *string.ascii_uppercase]
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / f"spelling-{uuid.uuid4().hex}"  # SAEBench keeps probes under the model's name
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=d_model,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    embeddings = 0.1 * torch.randn(len(vocabulary), d_model, generator=generator)
    letters = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator)).Q
    for word in words:
        embeddings[vocabulary[word]] += letters[ord(word[0]) - ord("a")]
    model.model.embed_tokens.weight.data = embeddings
    model.save_pretrained(folder)
    return load_model(folder)


@sae_bench
def test_absorption(spelling_model, tmp_path, monkeypatch):
    from sae_bench.evals.absorption import main as absorption
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

    monkeypatch.chdir(tmp_path)  # it writes its artifacts there
    (tmp_path / "out").mkdir()
    mxd = random_mxd(32, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", d_sae=64, k=8)
    config = AbsorptionEvalConfig(
        model_name="spelling",
        llm_dtype="float32",
        llm_batch_size=32,
        max_k_value=2,
        k_sparse_probe_num_epochs=3,
        min_GT_probe_f1=0.0,
        min_feats_for_eval=1,
    )
    tokens = spelling_model.to_tokens([" ".join(f"{a}{b}" for b in "abcdefghij") for a in "abcdefgh"])
    directions = expert_statistics(spelling_model, mxd, tokens, progress=False).mean_direction()
    with for_sae_bench(spelling_model, {"mxd": mxd}, directions={"mxd": directions}) as selected:
        results = absorption.run_eval(config, selected, "cpu", str(tmp_path / "out"))
    (result,) = results.values()
    mean = SimpleNamespace(**result["eval_result_metrics"]["mean"])
    assert 0 <= mean.mean_absorption_fraction_score <= 1
    assert 0 <= mean.mean_full_absorption_score <= 1
    assert result["eval_result_details"]
