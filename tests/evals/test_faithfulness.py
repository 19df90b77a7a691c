"""The faithfulness report against the same numbers computed token by token, and against SAELens' own."""

import json
from io import StringIO

import pytest
import torch
from attached import random_mxd
from datasets import Dataset
from sae_lens import ActivationsStore, SkipTranscoder, TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import SkipTranscoderConfig
from sae_lens.training.activation_scaler import ActivationScaler
from tiny import D_MODEL, HOOK_IN, HOOK_OUT

from mxd_lens import FaithfulnessReport, evaluate, load_model
from mxd_lens.evals.faithfulness import evaluate_all
from mxd_lens.text import load_text, training_text

BOS = 1


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 20, (7, 12), generator=generator)
    tokens[:, 0] = BOS
    return tokens


def layer(kind: str):
    """A layer of each kind that `evaluate` must be right for."""
    if kind.startswith("mxd"):
        changes = {"k": None} if kind == "mxd with relu" else {}
        mxd = random_mxd(D_MODEL, **changes)
        mxd.cfg.metadata.exclude_special_tokens = True
        return mxd
    skip = SkipTranscoder(
        SkipTranscoderConfig(
            d_in=D_MODEL,
            d_out=D_MODEL,
            d_sae=24,
            apply_b_dec_to_input=False,
            metadata=SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT, exclude_special_tokens=[BOS]),
        )
    ).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in skip.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return skip


def output_with_gate(sae, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's output from its formula, with `gate` in the place of C^T a."""
    a = sae.encode(x)
    mixture = a @ sae.W_dec if gate is None else gate
    if isinstance(sae, SkipTranscoder):
        return mixture + x @ sae.W_skip.T + sae.b_dec
    return mixture * (sae.hidden(x) @ sae.W_out) + sae.b_dec


@torch.no_grad()
def by_hand(sae, model, tokens: torch.Tensor) -> dict[str, float]:
    """Every number of the report, a sequence and a token at a time."""
    xs, ys = [], []
    for row in tokens:
        cache = model.run_with_cache(row[None])[1]
        xs.append(cache[HOOK_IN][0, 1:])
        ys.append(cache[HOOK_OUT][0, 1:])
    acts = torch.cat([sae.encode(x) for x in xs])
    mean_gate = (acts @ sae.W_dec).mean(0)
    gates = {
        "": [x @ sae.W_enc * 0 for x in xs],  # replaced below
        "_mean_gate": [mean_gate.expand(len(x), D_MODEL) for x in xs],
        "_shuffled_gate": [(sae.encode(x) @ sae.W_dec).roll(len(x) // 2, 0) for x in xs],
    }
    y = torch.cat(ys)
    numbers: dict[str, float] = {
        "l0": (acts > 0).sum(-1).float().mean().item(),
        "silent_fraction": ((acts > 0).sum(0) == 0).float().mean().item(),
    }

    def loss_and_log_probabilities(outputs) -> tuple[float, torch.Tensor]:
        losses, distributions = [], []
        for row, out in zip(tokens, outputs, strict=True):

            def put(y, hook, out=out):
                return y if out is None else torch.cat([y[:, :1], out[None]], dim=1)

            logits = model.run_with_hooks(row[None], fwd_hooks=[(HOOK_OUT, put)])[0]
            distribution = logits.log_softmax(-1)[1:-1]
            losses += [-distribution[t, row[t + 2]] for t in range(len(distribution))]
            distributions.append(distribution)
        return torch.stack(losses).mean().item(), torch.cat(distributions)

    numbers["ce_loss"], base = loss_and_log_probabilities([None] * len(xs))
    numbers["ce_loss_zero_ablated"], _ = loss_and_log_probabilities([torch.zeros_like(y) for y in ys])
    for name, gate in gates.items():
        outputs = [output_with_gate(sae, x, g if name else None) for x, g in zip(xs, gate, strict=True)]
        error = (torch.cat(outputs) - y).pow(2).sum(-1)
        numbers[f"normalized_mse{name}"] = (error / y.pow(2).sum(-1)).mean().item()
        numbers[f"ce_loss{name or '_replaced'}"], distribution = loss_and_log_probabilities(outputs)
        if not name:
            numbers["fraction_of_variance_unexplained"] = (error.sum() / (y - y.mean(0)).pow(2).sum()).item()
            numbers["normalized_mse_median"] = (error / y.pow(2).sum(-1)).median().item()
            numbers["kl_divergence"] = (base.exp() * (base - distribution)).sum(-1).mean().item()
    numbers["feature_share"] = 1 - numbers["normalized_mse"] / numbers["normalized_mse_mean_gate"]
    numbers["ce_loss_recovered"] = (numbers["ce_loss_zero_ablated"] - numbers["ce_loss_replaced"]) / (
        numbers["ce_loss_zero_ablated"] - numbers["ce_loss"]
    )
    return numbers


@pytest.mark.parametrize("kind", ["mxd", "mxd with relu", "skip transcoder"])
def test_every_number_is_the_one_computed_by_hand(kind, tiny_model, tokens):
    sae = layer(kind)
    report = evaluate(tiny_model, sae, tokens, batch_size=3, progress=False).to_dict()
    for name, value in by_hand(sae, tiny_model, tokens).items():
        assert report[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert report["n_tokens"] == 7 * 11
    assert (report["hook_name"], report["hook_name_out"]) == (HOOK_IN, HOOK_OUT)


def test_the_batch_size_does_not_matter(tiny_model, tokens):
    sae = layer("mxd")
    one, all_ = (evaluate(tiny_model, sae, tokens, batch_size=b, progress=False).to_dict() for b in (1, 7))
    for name, value in one.items():
        if isinstance(value, float):
            assert all_[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_largest_tokens_are_the_largest(tiny_model, tokens):
    report = evaluate(tiny_model, layer("mxd"), tokens, progress=False)
    y = tiny_model.run_with_cache(tokens)[1][HOOK_OUT][:, 1:].flatten(0, 1)
    largest = y.norm(dim=-1).topk(5)
    assert [t["norm"] for t in report.largest_tokens] == pytest.approx(largest.values.tolist(), rel=1e-5)
    ids = tokens[:, 1:].flatten()[largest.indices]
    assert [t["token"] for t in report.largest_tokens] == [tiny_model.tokenizer.decode([i]) for i in ids]


def test_the_layer_itself_replaced_by_a_perfect_one_recovers_everything(tiny_model, tokens):
    from test_mxd import mlp_as_mxd

    mxd = mlp_as_mxd(tiny_model.blocks[1].mlp, "silu")
    mxd.cfg.metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    report = evaluate(tiny_model, mxd, tokens, progress=False)
    assert report.normalized_mse < 1e-9
    assert report.ce_loss_recovered == pytest.approx(1, abs=1e-4)
    assert report.kl_divergence == pytest.approx(0, abs=1e-5)
    # Its one expert is always on: the mean gate is as good, and the report says so.
    assert report.normalized_mse_mean_gate < 1e-9


def test_an_ordinary_sae_gets_saelens_own_numbers(tiny_model, tokens):
    sae = TopKSAE(
        TopKSAEConfig(
            d_in=D_MODEL,
            d_sae=24,
            k=3,
            metadata=SAEMetadata(hook_name=HOOK_OUT, context_size=12, prepend_bos=True),
        )
    ).requires_grad_(False)
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    store = ActivationsStore.from_sae(
        tiny_model, sae, dataset, streaming=False, store_batch_size_prompts=7, context_size=12
    )
    theirs, _ = run_evals(
        sae,
        store,
        tiny_model,
        ActivationScaler(),
        EvalConfig(
            batch_size_prompts=7,
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
        exclude_special_tokens=False,
        verbose=False,
    )
    ours = evaluate(tiny_model, sae, tokens, progress=False)
    ce = theirs["model_performance_preservation"]
    assert ours.ce_loss == pytest.approx(ce["ce_loss_without_sae"], rel=1e-4)
    assert ours.ce_loss_replaced == pytest.approx(ce["ce_loss_with_sae"], rel=1e-4)
    assert ours.ce_loss_zero_ablated == pytest.approx(ce["ce_loss_with_ablation"], rel=1e-4)
    assert ours.ce_loss_recovered == pytest.approx(ce["ce_loss_score"], rel=1e-3)
    assert ours.l0 == pytest.approx(theirs["sparsity"]["l0"], rel=1e-4)
    explained = theirs["reconstruction_quality"]["explained_variance"]
    assert 1 - ours.fraction_of_variance_unexplained == pytest.approx(explained, rel=1e-3)


def test_report_round_trip_and_table(tiny_model, tokens, tmp_path):
    from rich.console import Console

    report = evaluate(tiny_model, layer("mxd"), tokens, progress=False)
    report.save(tmp_path / "report.json")
    assert FaithfulnessReport.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["l0"] == report.l0
    console = Console(record=True, width=140, file=StringIO())
    console.print(report)
    text = console.export_text()
    assert f"{report.normalized_mse:.3f}" in text
    assert f"{report.ce_loss_mean_gate:.3f}" in text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4, dtype=torch.long), "tokens must be token ids"),
        (torch.zeros(4, 1, dtype=torch.long), "There are no tokens to evaluate on"),
        (torch.zeros(4, 5), "tokens must be token ids"),
        (torch.full((4, 5), BOS), "There are no tokens to evaluate on"),
        (torch.zeros(0, 5, dtype=torch.long), "tokens must be token ids"),
        ([], "There is no text"),
        (["the cat", ""], "A text has no token"),
    ],
)
def test_tokens_that_cannot_be_evaluated_on(bad, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model, layer("mxd"), bad, progress=False)


def test_what_is_neither_text_nor_tokens(tiny_model):
    with pytest.raises(TypeError, match="a list of int"):
        evaluate(tiny_model, layer("mxd"), [1, 2, 3], progress=False)


def test_strings_are_the_tokens_of_each(tiny_model):
    """Strings of different lengths give what their tokens give, one sequence each."""
    sae, texts = layer("mxd"), ["the big cat sat on the red mat", "a dog ran", "it was then"]
    of_strings = evaluate(tiny_model, sae, texts, batch_size=2, progress=False)
    sequences = [tiny_model.to_tokens(text)[0] for text in texts]
    of_tokens = evaluate(tiny_model, sae, sequences, batch_size=1, progress=False)
    for name, value in of_strings.to_dict().items():
        if isinstance(value, float):
            assert of_tokens.to_dict()[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert of_strings.n_tokens == 8 + 3 + 3
    assert of_strings.text_hash == of_tokens.text_hash
    # Filling up the shorter texts changes no loss: those of the longest alone are the same.
    longest = evaluate(tiny_model, sae, texts[0], progress=False)
    assert longest.ce_loss == pytest.approx(
        evaluate(tiny_model, sae, sequences[0][None], progress=False).ce_loss
    )


def test_a_long_string_is_cut_into_sequences_of_the_training(tiny_model):
    sae = layer("mxd")
    sae.cfg.metadata.context_size = 5
    report = evaluate(tiny_model, sae, " ".join(["the cat sat on"] * 3), progress=False)
    by_hand = torch.tensor([[BOS, *tiny_model.to_tokens("the cat sat on")[0, 1:].tolist()]] * 3)
    assert report.ce_loss == pytest.approx(evaluate(tiny_model, sae, by_hand, progress=False).ce_loss)


@pytest.mark.parametrize("at", [HOOK_IN, HOOK_OUT])
def test_activations_that_are_not_finite_are_refused(at, tiny_model, tokens):
    def overflow(activation, hook):
        activation[0, 3:4] = torch.inf
        return activation

    tiny_model.add_hook(at, overflow)
    with pytest.raises(ValueError, match="are NaN or infinite at 1 of"):
        evaluate(tiny_model, layer("mxd"), tokens, progress=False)


@pytest.mark.parametrize("kind", ["mxd", "mxd with relu", "skip transcoder"])
def test_under_autocast(kind, tiny_model, tokens):
    """The model runs in bfloat16; the layer is decomposed in the dtype of its weights."""
    report = evaluate(tiny_model, layer(kind), tokens, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = evaluate(tiny_model, layer(kind), tokens, progress=False)
    assert reduced.normalized_mse == pytest.approx(report.normalized_mse, rel=0.05)
    assert reduced.normalized_mse != report.normalized_mse


def test_held_out_is_said_only_where_it_is_proven(tiny_model, tokens, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"the cat sat {word} times" for word in ("one", "two", "three", "four")))
    sae = layer("mxd")
    text = load_text(str(source), streaming=False)
    other = Dataset.from_dict({"text": ["a dog ran"]})
    of = lambda rows: evaluate(tiny_model, sae, tokens, progress=False, rows=rows).provenance  # noqa: E731
    assert of(other) == of(None) == "unknown"  # the layer has no record
    sae.cfg.metadata.training_text = training_text(str(source), text)
    assert of(None) == "unknown"
    assert of(other) == "held-out"
    assert of(text.select([2])) == of(text) == "seen in training"
    source.write_text("another text")
    assert of(other) == "unknown"


def test_a_report_of_an_earlier_version(tiny_model, tokens, tmp_path):
    report = evaluate(tiny_model, layer("mxd"), tokens, progress=False, text_name="words")
    known = report.to_dict()
    for name in ("kl_divergence_zero_ablated", "text_name", "text_hash", "provenance"):
        del known[name]
    known["dead_fraction"] = known.pop("silent_fraction")
    file = tmp_path / "report.json"
    file.write_text(json.dumps(known))
    loaded = FaithfulnessReport.load(file)
    assert (loaded.l0, loaded.silent_fraction) == (report.l0, report.silent_fraction)
    assert loaded.provenance == "unknown"
    with pytest.warns(DeprecationWarning, match="silent_fraction now"):
        assert loaded.dead_fraction == report.silent_fraction
    for bad in ("[]", "{}", '{"l0": 1}', json.dumps(known | {"l0": "1"}), "{", "[" * 100_000):
        file.write_text(bad)
        with pytest.raises(ValueError, match=r"report\.json"):
            FaithfulnessReport.load(file)


def test_a_layer_of_another_model_is_refused(tiny_model, tokens):
    sae = layer("mxd")
    sae.cfg.metadata.model_name = "pythia-70m"
    with pytest.raises(ValueError, match="trained on pythia-70m"):
        evaluate(tiny_model, sae, tokens, progress=False)


def test_a_bridge_gives_the_same_numbers(tiny_model, tiny_folder, tokens):
    bridge = load_model(tiny_folder, model_class=SAETransformerBridge)
    ours, theirs = (
        evaluate(model, layer("mxd"), tokens, progress=False).to_dict() for model in (tiny_model, bridge)
    )
    for name, value in ours.items():
        if isinstance(value, float):
            assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_many_layers_are_evaluated_as_each_alone(tiny_model, tokens):
    """With one pass of the unmodified model, and one of the zero-ablated one for each MLP."""
    saes = {kind: layer(kind) for kind in ("mxd", "skip transcoder")}
    saes["skip transcoder"].cfg.metadata.exclude_special_tokens = True
    saes["all tokens"] = layer("mxd")
    saes["sae"] = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=24, k=3)).requires_grad_(False)
    saes["sae"].cfg.metadata.hook_name = HOOK_OUT
    saes["sae"].cfg.metadata.exclude_special_tokens = True
    saes["all tokens"].cfg.metadata.exclude_special_tokens = False
    alone = {name: evaluate(tiny_model, sae, tokens, progress=False) for name, sae in saes.items()}
    passes = []
    tiny_model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    assert evaluate_all(tiny_model, saes, tokens, progress=False) == alone
    assert len(passes) == 1 + 2 + 3 * 4
    assert alone["all tokens"].n_tokens > alone["mxd"].n_tokens
