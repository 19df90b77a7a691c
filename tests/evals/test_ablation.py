"""What experts contribute: known values of planted layers, and the same numbers computed otherwise."""

import math
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from attached import random_mxd
from planted import (
    CONTEXT,
    D_OUT,
    FIRST,
    N_CONTEXTS,
    N_WORDS,
    WORD,
    PlantedModel,
    planted_mxd,
    planted_tokens,
    planted_transcoder,
    without_experts,
)
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from scipy.stats import hypergeom
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score
from test_faithfulness import layer
from tiny import D_MODEL

import mxd_lens
from mxd_lens import MxD, TopKTranscoder
from mxd_lens.analysis.firings import Firings
from mxd_lens.evals.ablation import (
    AblationReport,
    BestConstant,
    ablation_study,
    load_ablations,
    only_strongest,
    save_ablations,
    what_experts_carry,
    without_strongest,
)
from mxd_lens.evals.stability import ByCoactivation, ByDecoder, match, read_usage, stability
from mxd_lens.evals.token_dependence import (
    BITS,
    StrongestFirings,
    binary_entropy,
    expected_conditional,
    firing_information,
    label_information,
    read_firings,
    surprise,
    token_information,
)
from mxd_lens.reports.ablation import (
    ablation_figure,
    information_figure,
    replacements_figure,
    write_ablation_page,
)

BOS = 1


def carried(sae, tokens=None, mlp=None, **settings) -> AblationReport:
    model = PlantedModel(mlp or sae)
    tokens = planted_tokens() if tokens is None else tokens
    settings = {"progress": False, "batch_size": 7} | settings
    return ablation_study(model, {"it": sae}, tokens, **settings)["it"]


# Known values


def test_a_planted_transcoder():
    report = carried(planted_transcoder())
    # Of every token, one expert writes 2 and one writes 1, each along an axis of its own.
    whole = WORD**2 + CONTEXT**2
    none, one, both = report.ablations
    assert [a.n for a in report.ablations] == [0, 1, 2]
    assert none.normalized_mse_kept == pytest.approx(1, abs=1e-6)
    assert none.normalized_mse_removed == pytest.approx(0, abs=1e-6)
    assert one.normalized_mse_kept == pytest.approx(CONTEXT**2 / whole, abs=1e-6)
    assert one.normalized_mse_removed == pytest.approx(WORD**2 / whole, abs=1e-6)
    assert both.normalized_mse_kept == pytest.approx(0, abs=1e-6)
    assert both.normalized_mse_removed == pytest.approx(1, abs=1e-6)
    assert both.ce_loss_kept == pytest.approx(report.faithfulness.ce_loss, abs=1e-6)
    assert report.half_explained_by == 1
    # The best constant is the mean; it leaves every component's variance.
    y = PlantedModel(planted_transcoder()).run_with_cache(planted_tokens()[:32])[1]
    y = y["blocks.0.hook_mlp_out"][:, 1:].flatten(0, 1)
    left = ((y - y.mean(0)).pow(2).sum(-1) / y.pow(2).sum(-1)).mean().item()
    assert report.normalized_mse_best_constant_gate == pytest.approx(left, abs=1e-5)
    assert report.explained_by_experts == pytest.approx(1, abs=1e-5)


def test_words_and_contexts_are_told_apart():
    information = carried(planted_transcoder(), planted_tokens(200)).information
    assert information.n_judged == D_OUT  # the dead ones are not
    by_token, by_previous, by_both = (information.of(x) for x in ("token", "previous token", "both"))
    lookups, contextual = N_WORDS, N_CONTEXTS
    assert by_token.lookups == pytest.approx(lookups / (lookups + contextual))
    assert by_previous.lookups == pytest.approx(contextual / (lookups + contextual))
    assert by_both.lookups == 1
    assert by_both.firing == pytest.approx(1)
    # Of the firing's entropy, the words' experts have their part, and nothing else is determined.
    of_words = N_WORDS * binary_entropy(torch.tensor(1 / N_WORDS)).item()
    of_contexts = N_CONTEXTS * binary_entropy(torch.tensor(1 / N_CONTEXTS)).item()
    share = of_words / (of_words + of_contexts)
    assert by_token.firing == pytest.approx(share, abs=0.01)
    assert by_previous.firing == pytest.approx(1 - share, abs=0.01)
    # The strongest expert is always the word's.
    assert by_token.strongest == pytest.approx(1)
    assert by_token.strongest_bits == pytest.approx(math.log2(N_WORDS), abs=0.1)
    assert abs(by_previous.strongest) < 0.01
    for dependence in information.dependences:
        assert abs(dependence.firing_shuffled) < 0.01
        assert sum(dependence.histogram) == D_OUT
    assert abs(information.of("position").firing) < 0.01
    assert {e.expert for e in information.lookups} <= set(range(N_WORDS))
    assert {e.expert for e in information.contextual[:contextual]} == set(range(N_WORDS, D_OUT))
    for example in information.lookups:
        assert example.tokens == [(f" w{FIRST + example.expert}", 1.0)]


def test_a_planted_mxd_and_one_whose_experts_mean_nothing():
    with_experts = carried(planted_mxd())
    assert with_experts.faithfulness.normalized_mse == pytest.approx(0, abs=1e-6)
    assert with_experts.explained_by_experts == pytest.approx(1, abs=1e-4)
    empty = carried(without_experts())
    # Perfect, and so is any constant gate: nothing is left for the experts.
    assert empty.faithfulness.normalized_mse == pytest.approx(0, abs=1e-6)
    assert empty.normalized_mse_best_constant_gate == pytest.approx(0, abs=1e-6)
    assert empty.faithfulness.normalized_mse_shuffled_gate == pytest.approx(0, abs=1e-6)
    assert empty.information.n_judged == 0
    assert empty.information.n_always_on == 2
    assert all(math.isnan(d.firing) for d in empty.information.dependences)
    # In place of the planted MLP it explains what a dense layer can, and its experts none of it.
    drained = carried(without_experts(), mlp=planted_mxd())
    r = drained.faithfulness
    assert r.normalized_mse > 0.1
    assert r.feature_share == pytest.approx(0, abs=1e-6)
    assert drained.normalized_mse_best_constant_gate <= r.normalized_mse + 1e-6


# Gates and ablations, computed otherwise


@pytest.mark.parametrize("kind", ["mxd", "mxd with relu", "skip transcoder"])
def test_the_best_constant_is_that_of_least_squares(kind):
    sae = layer(kind)
    x, y = torch.randn(2, 90, D_MODEL, generator=torch.Generator().manual_seed(4))
    y[3] *= 100  # a massive activation
    gate = BestConstant(sae)
    for part in (slice(0, 17), slice(17, 90)):
        gate.add(x[part], y[part])
    if kind == "skip transcoder":
        v, rest = np.ones((90, D_MODEL)), (x @ sae.W_skip.T + sae.b_dec).double().numpy()
    else:
        v = (sae.hidden(x) @ sae.W_out).double().numpy()
        rest = sae.b_dec.double().numpy()
    weight = 1 / y.double().norm(dim=-1).numpy()
    target = y.double().numpy() - rest
    expected = [
        np.linalg.lstsq((weight * v[:, j])[:, None], weight * target[:, j], rcond=None)[0][0]
        for j in range(D_MODEL)
    ]
    np.testing.assert_allclose(gate.mixture.numpy(), expected, rtol=1e-5)
    expected = torch.tensor(np.array(expected) * v + rest)
    torch.testing.assert_close(gate.replacement()(x, y).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_dimension_the_layer_cannot_write_has_no_gate():
    sae = random_mxd(D_MODEL)
    sae.W_out[:, 3] = 0
    gate = BestConstant(sae)
    gate.add(*torch.randn(2, 5, D_MODEL))
    assert gate.mixture[3] == 0
    assert gate.mixture.isfinite().all()


def test_the_best_constants_of_affine_experts_are_those_of_least_squares():
    """Two for each dimension, where an expert writes a_n (c_n * v + e_n)."""
    sae = random_mxd(D_MODEL)
    affine = affine_of(sae)
    x, y = torch.randn(2, 90, D_MODEL, generator=torch.Generator().manual_seed(4))
    best = BestConstant(affine)
    best.add(x, y)
    v = (sae.hidden(x) @ sae.W_out).double().numpy()
    weight = 1 / y.double().norm(dim=-1).numpy()
    target = y.double().numpy() - sae.b_dec.double().numpy()
    for j in range(D_MODEL):
        design = weight[:, None] * np.stack([v[:, j], np.ones(90)], axis=1)
        expected = np.linalg.lstsq(design, weight * target[:, j], rcond=None)[0]
        np.testing.assert_allclose(best.mixture[[j, j + D_MODEL]].numpy(), expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def affine_of(mxd: MxD) -> MxD:
    """The MxD whose experts write a_n (c_n * v + e_n), e_n random."""

    class AffineMxD(type(mxd)):
        def mixture(self, a):
            return torch.cat([a.mix(self.W_dec), a.mix(self.W_offset)], dim=-1)

        def experts_out(self, mixture, expert_input):
            c, e = mixture.chunk(2, dim=-1)
            return c * expert_input + e

    made = AffineMxD(mxd.cfg)
    made.load_state_dict(mxd.state_dict())
    made.W_offset = torch.randn(mxd.W_dec.shape, generator=torch.Generator().manual_seed(8))
    return made.requires_grad_(False)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("kind", ["mxd", "mxd with relu", "skip transcoder"])
def test_ablations_against_sums_over_experts(kind, n):
    sae = layer(kind).to(dtype=torch.float64)
    x = torch.randn(2, 6, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    a = sae.encode(x)
    v = sae.hidden(x) @ sae.W_out if hasattr(sae, "hidden") else torch.ones_like(x)
    written = a.unsqueeze(-1) * sae.W_dec * v.unsqueeze(2)  # [2, 6, d_sae, d_out]
    rest = sae.b_dec + (x @ sae.W_skip.T if hasattr(sae, "W_skip") else 0)
    for i, j in np.ndindex(2, 6):
        order = written[i, j].norm(dim=-1).argsort(descending=True)
        for replacement, of in ((only_strongest, order[:n]), (without_strongest, order[n:])):
            expected = written[i, j, of].sum(0) + (rest[i, j] if rest.ndim > 1 else rest)
            torch.testing.assert_close(replacement(sae, n)(x, x)[i, j], expected, rtol=1e-9, atol=1e-9)


def test_an_ordinary_sae(tiny_model):
    cfg = TopKSAEConfig(d_in=D_MODEL, d_sae=24, k=3, metadata=SAEMetadata(hook_name="blocks.1.hook_mlp_out"))
    sae = TopKSAE(cfg).requires_grad_(False)
    tokens = torch.randint(3, 20, (7, 12), generator=torch.Generator().manual_seed(5))
    report = ablation_study(tiny_model, {"it": sae}, tokens, 5, progress=False)["it"]
    assert [a.n for a in report.ablations] == [0, 1, 2, 3]
    y = tiny_model.run_with_cache(tokens[:5])[1]["blocks.1.hook_mlp_out"].flatten(0, 1)
    a = sae.encode(y)
    strongest = (a * sae.W_dec.norm(dim=-1)).argmax(-1)
    one = a.gather(1, strongest[:, None]) * sae.W_dec[strongest] + sae.b_dec
    expected = ((one - y).pow(2).sum(-1) / y.pow(2).sum(-1)).mean().item()
    assert report.ablations[1].normalized_mse_kept == pytest.approx(expected, rel=1e-4)


def test_the_former_names():
    sae, tokens = planted_transcoder(), planted_tokens()
    with pytest.warns(DeprecationWarning, match="ablation_study"):
        former = what_experts_carry({"it": sae}, PlantedModel(sae), tokens, 5, progress=False)
    assert former["it"] == ablation_study(PlantedModel(sae), {"it": sae}, tokens, 5, progress=False)["it"]
    with pytest.warns(DeprecationWarning, match="AblationReport"):
        assert mxd_lens.CarryReport is AblationReport


# Information


def random_firings(n_tokens=600, n_experts=5, seed=0) -> tuple[Firings, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token = (torch.rand(n_tokens, generator=generator) ** 3 * 60).long()
    fires = torch.rand(n_tokens, n_experts, generator=generator) < torch.linspace(0.02, 0.6, n_experts)
    fires[:, 1] |= token % 3 == 0
    token_of, expert = fires.nonzero(as_tuple=True)
    strongest = (token % 4) * (torch.rand(n_tokens, generator=generator) < 0.7)
    position = torch.arange(n_tokens) % 50
    return made_firings(n_experts, token_of, expert, token, token.roll(1), position), strongest, fires


def made_firings(n_experts, token_of, expert, token, previous, position) -> Firings:
    sequence = torch.zeros_like(token)
    return Firings(n_experts, token_of, expert, expert + 1.0, token, previous, sequence, position)


def test_informations_are_scikit_learns():
    firings, labels, fires = random_firings()
    token = firings.token.numpy()
    got = firing_information(firings, firings.token, torch.arange(5))
    for n in range(5):
        one = fires[:, n].numpy()
        assert got.information[n].item() == pytest.approx(mutual_info_score(one, token) * BITS, rel=1e-9)
        expected = adjusted_mutual_info_score(one, token, average_method="min")
        assert got.share[n].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    got = label_information(labels, firings.token)
    expected = adjusted_mutual_info_score(labels, token, average_method="min")
    assert got.share.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("phi", [binary_entropy, surprise])
@pytest.mark.parametrize("n_tokens", [12, 3000])
def test_the_expectation_is_the_hypergeometric_one(phi, n_tokens):
    sizes = torch.tensor([1, 1, 3, 0, n_tokens - 5])
    labelled = torch.tensor([0, 1, 5, n_tokens - 1, n_tokens])
    for n, got in zip(labelled.tolist(), expected_conditional(labelled, sizes, n_tokens, phi), strict=True):
        expected = 0.0
        for m in sizes[sizes > 0].tolist():
            k = np.arange(m + 1)
            weights = hypergeom(n_tokens, n, m).pmf(k)
            expected += m / n_tokens * (weights * phi(torch.tensor(k / m)).numpy()).sum()
        assert got.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_the_correction_is_needed_and_right():
    """Of few tokens of many kinds, what fires at random seems half determined, as counted."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(400, (500,), generator=generator)
    fires = torch.rand(500, 40, generator=generator) < 0.1
    token_of, expert = fires.nonzero(as_tuple=True)
    firings = made_firings(40, token_of, expert, token, token, token)
    total = firing_information(firings, token, torch.arange(40)).total
    assert total.information / total.entropy > 0.5
    assert abs(total.share) < 0.03


def test_the_order_and_the_batch_size_do_not_matter():
    sae, tokens = planted_mxd(), planted_tokens()
    model = PlantedModel(sae)
    one = ablation_study(model, {"it": sae}, tokens, 40, batch_size=3, progress=False)["it"]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    other = ablation_study(model, {"it": sae}, tokens[order], 40, batch_size=16, progress=False)["it"]
    same_numbers(one, other, 1e-5)


def same_numbers(one, other, tolerance):
    for name, value, theirs in numbers(one, other):
        # A shuffled control is one draw, of an order of the tokens; ties have no order.
        if "shuffled" not in name or "gate" in name:
            assert theirs == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), name


def numbers(one, other, name=""):
    if isinstance(one, float):
        yield name, one, other
    elif isinstance(one, list) and all(hasattr(v, "variable") or hasattr(v, "n") for v in one):
        for mine, theirs in zip(one, other, strict=True):
            yield from numbers(mine, theirs, name)
    elif hasattr(one, "__dataclass_fields__"):
        for f in fields(one):
            yield from numbers(getattr(one, f.name), getattr(other, f.name), f.name)


def test_half_precision_is_close():
    sae, half, tokens = planted_mxd(), planted_mxd().to(dtype=torch.float16), planted_tokens()
    model = PlantedModel(planted_transcoder())
    one, other = (ablation_study(model, {"it": s}, tokens, progress=False)["it"] for s in (sae, half))
    same_numbers(one, other, 5e-3)


def test_special_tokens_are_left_out():
    model = PlantedModel(planted_transcoder())
    tokens = planted_tokens(5, 9)
    (found,) = read_firings(model, {"it": planted_transcoder()}, tokens, 2, progress=False).values()
    firings = found.firings
    assert firings.token.tolist() == tokens[:, 1:].flatten().tolist()
    assert firings.previous.tolist() == tokens[:, :-1].flatten().tolist()
    assert firings.position.tolist() == list(range(1, 9)) * 5
    assert firings.counts.sum() == 5 * 8 * 2
    assert found.strongest.tolist() == (tokens[:, 1:] - FIRST).flatten().tolist()


# Stability


@torch.no_grad()
def another_seed(kind: str):
    """The same planted layer with its experts in another order; an MxD with c and D scaled, too."""
    order = torch.randperm(D_OUT + 2, generator=torch.Generator().manual_seed(3))
    sae = planted_mxd() if kind == "mxd" else planted_transcoder()
    W_enc, b_enc, W_dec = (w.clone() for w in (sae.W_enc, sae.b_enc, sae.W_dec))
    if kind == "mxd":
        scale = torch.randn(D_OUT, generator=torch.Generator().manual_seed(4)) + 0.1
        W_dec *= scale
        sae.W_out /= scale
    sae.W_enc.copy_(W_enc[:, order])
    sae.b_enc.copy_(b_enc[order])
    sae.W_dec.copy_(W_dec[order])
    return sae, order


@pytest.mark.parametrize("exact", [4096, 1])
@pytest.mark.parametrize("kind", ["mxd", "transcoder"])
def test_the_same_experts_are_found_again(kind, exact):
    one = planted_mxd() if kind == "mxd" else planted_transcoder()
    other, order = another_seed(kind)
    model, tokens = PlantedModel(one), planted_tokens()
    x = model.input(tokens)
    torch.testing.assert_close(one(x)[:, 1:], other(x)[:, 1:], rtol=1e-4, atol=1e-4)
    decoder, coactivation = stability(
        model, {"one": one, "other": other}, tokens, exact=exact, progress=False
    )
    for found in (decoder, coactivation):
        assert found.matched == pytest.approx(1, abs=1e-5)
        assert found.found_again == 1
        assert found.agreement == 1
        assert found.matched_shuffled < 0.7
    assert coactivation.matched_shuffled < 0.15
    usages = [read_usage(model, sae, tokens, progress=False) for sae in (one, other)]
    matching = match(ByDecoder(*usages), exact)
    theirs = usages[1].alive[matching.partner]
    assert order[theirs].tolist() == usages[0].alive.tolist()


def test_layers_with_nothing_in_common():
    one, other = planted_transcoder(), planted_transcoder()
    torch.manual_seed(0)
    for w in (other.W_enc, other.W_dec):
        torch.nn.init.normal_(w)
    other.b_enc.fill_(0.5)
    decoder, coactivation = stability(
        PlantedModel(one), {"one": one, "other": other}, planted_tokens(), progress=False
    )
    assert decoder.matched == pytest.approx(decoder.matched_shuffled, abs=0.15)
    assert decoder.found_again < 0.2
    assert coactivation.found_again < 0.5


def test_coactivation_is_numpys_correlation():
    one, other = planted_transcoder(), random_transcoder()
    model, tokens = PlantedModel(one), planted_tokens(6, 20)
    usages = [read_usage(model, sae, tokens, 4, progress=False) for sae in (one, other)]
    x = model.input(tokens)[:, 1:].flatten(0, 1)
    fires = [(s.encode(x) > 0)[:, u.alive].numpy().T for s, u in zip((one, other), usages, strict=True)]
    kinds = ByCoactivation(*usages)
    expected = np.nan_to_num(np.corrcoef(*fires)[: len(fires[0]), len(fires[0]) :])
    got = torch.cat([kinds.block(slice(i, i + 3)) for i in range(0, len(fires[0]), 3)])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def random_transcoder() -> TopKTranscoder:
    sae = planted_transcoder(3)
    torch.manual_seed(0)
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec)
    return sae


def test_more_experts_than_the_other_layer_has():
    one, other = planted_transcoder(), planted_transcoder()
    other.b_enc[:5] = -10  # five of its words' experts never fire
    both = stability(PlantedModel(one), {"a": one, "b": other}, planted_tokens(), progress=False)
    turned = stability(PlantedModel(one), {"a": other, "b": one}, planted_tokens(), progress=False)
    for found in (both[0], turned[0]):
        assert found.matched == pytest.approx((D_OUT - 5) / D_OUT, abs=0.02)
        assert found.found_again == pytest.approx((D_OUT - 5) / D_OUT)


# Bad input, and what is kept


def test_reports_are_kept_and_shown(tmp_path):
    from rich.console import Console

    sae, tokens = planted_transcoder(), planted_tokens()
    report = carried(sae)
    other, _ = another_seed("transcoder")
    found = stability(PlantedModel(sae), {"a": sae, "b": other}, tokens, progress=False)
    report = replace(report, stability=found)
    save_ablations(tmp_path / "ablations.json", {"it": report})
    assert load_ablations(tmp_path / "ablations.json") == {"it": report}
    console = Console(width=140, record=True)
    console.print(report)
    shown = console.export_text()
    assert "only the 1 strongest" in shown
    assert "found again from other seeds, by decoder" in shown


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (planted_tokens(), {"ablated_sequences": 0}, "ablated_sequences must be at least 1, got 0"),
        (planted_tokens(), {"min_fired": 0}, "min_fired must be at least 1, got 0"),
        (torch.full((3, 5), BOS), {}, "no tokens to evaluate on"),
        (planted_tokens()[:0], {}, "tokens must be token ids"),
        (planted_tokens()[0], {}, "tokens must be token ids"),
    ],
)
def test_bad_input(tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        carried(planted_transcoder(), tokens, **settings)


def test_layers_that_cannot_be_compared():
    one, other = planted_transcoder(), planted_transcoder()
    model, tokens = PlantedModel(one), planted_tokens()
    with pytest.raises(ValueError, match="compares two layers or more, got 1"):
        stability(model, {"one": one}, tokens, progress=False)
    silent = planted_transcoder()
    silent.b_enc.fill_(-10)
    with pytest.raises(ValueError, match="nothing to match: 16 and 0 experts"):
        stability(model, {"one": one, "silent": silent}, tokens, progress=False)
    other.cfg.metadata.exclude_special_tokens = False
    with pytest.raises(ValueError, match="Only layers of one MLP"):
        stability(model, {"one": one, "other": other}, tokens, progress=False)
    empty = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="no tokens to learn from"):
        token_information(StrongestFirings(made_firings(3, *[empty] * 5), empty), str)


# The page


def test_the_page(tmp_path):
    sae, tokens = planted_transcoder(), planted_tokens()
    other, _ = another_seed("transcoder")
    report = carried(sae)
    with_seeds = replace(
        report, stability=stability(PlantedModel(sae), {"a": sae, "b": other}, tokens, progress=False)
    )
    reports = {"<it>": with_seeds, "empty": carried(without_experts())}
    page = write_ablation_page(tmp_path / "carry.html", reports, {"text": "<words>"}).read_text()
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<it>" not in markup
    assert "<words>" not in markup
    assert not re.search("https?:", markup)
    assert "The experts explain 100.0 %" in markup
    assert "Experts of another seed" in markup
    assert "No expert fires often enough to be measured" in markup
    assert "nan" not in markup
    alone = write_ablation_page(tmp_path / "one.html", {"it": report}).read_text()
    assert "Experts of another seed" not in alone
    with pytest.raises(ValueError, match="no report"):
        write_ablation_page(tmp_path / "none.html", {})


def test_the_figures():
    report = carried(planted_transcoder())
    curves = {(t.line.dash, t.xaxis): t for t in ablation_figure({"it": report}).data}
    kept = curves["solid", "x"]
    assert list(kept.customdata) == [0, 1, 2]
    assert list(kept.x) == [0.5, 1, 2]
    assert list(kept.y) == [a.normalized_mse_kept for a in report.ablations]
    lost = curves["dash", "x2"]
    base = report.faithfulness.ce_loss
    assert list(lost.y) == [a.ce_loss_removed - base for a in report.ablations]
    errors = next(t for t in replacements_figure({"it": report}).data if t.xaxis == "x")
    bars = dict(zip(errors.x, errors.y, strict=True))
    assert bars["best constant"] == report.normalized_mse_best_constant_gate
    assert bars["MLP zero-ablated"] == 1.0
    shares, histogram = information_figure({"it": report}).data
    assert list(shares.y) == [d.firing for d in report.information.dependences]
    assert sum(histogram.y) == pytest.approx(1)


@pytest.mark.real_model
def test_a_bundled_layer(smollm2):
    mxd = MxD.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp")
    text = (
        "The capital of France is Paris. It lies on the river Seine, in the north of the country, and more "
    )
    text += (
        "than two million people live there; the mayor is elected by the council of the city for six years."
    )
    tokens = smollm2.to_tokens(text)[:, :40]
    settings = {"min_fired": 2, "progress": False}
    report = ablation_study(smollm2, {"it": mxd}, tokens, **settings)["it"]
    r = report.faithfulness
    assert r.normalized_mse < report.normalized_mse_best_constant_gate < r.normalized_mse_mean_gate
    assert [a.n for a in report.ablations] == [0, 1, 2, 4, 8, 16, 32]
    kept = [a.normalized_mse_kept for a in report.ablations]
    assert kept[-1] == r.normalized_mse < kept[2] < kept[0]
    assert report.information.n_tokens == 39
