"""What an expert is and how experts are used, against loops over tokens and experts in float64."""

from io import StringIO

import numpy as np
import pytest
import torch
from attached import MODELS
from layers import ALL_LAYERS, D_SAE, LAYERS, close, make_layer, skip_of, true_input, written_by
from rich.console import Console
from tiny import D_MODEL, HOOK_OUT

from mxd_lens import ExpertStatistics, MxD, SkipMxD, expert_statistics, load_model, logit_lens
from mxd_lens.analysis.logit_lens import LogitLens, direction_logits, read_norm
from mxd_lens.analysis.statistics import share_along, usage_figure
from mxd_lens.analysis.weights import (
    coactive_experts,
    mean_gate_share,
    nearest_neurons,
    similar_experts,
    spectrum,
)
from mxd_lens.models import SMOLLM2

BOS = 1
WATCHED = [3, 17, 31]


@pytest.fixture(params=LAYERS)
def layer(request):
    return make_layer(request.param)


@pytest.fixture(params=MODELS)
def any_model(request, tiny_folder):
    return MODELS[request.param](tiny_folder)


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(3, 20, (7, 12), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = BOS
    tokens[2, 6] = BOS
    return tokens


@pytest.fixture
def rare(tiny_model, tokens):
    """An MxD some of whose experts never fire, and one of which always does."""
    mxd = make_layer("mxd, k")
    mxd.b_enc[:8] = -100
    mxd.b_enc[9] = 100
    return mxd


def by_hand(sae, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every statistic of the inputs x [tokens, d_in], an expert and a token at a time."""
    acts = sae.encode(x)
    found: dict[str, list] = {
        name: []
        for name in ("fired", "sum", "squares", "max", "direction", "consistency", "along", "contribution")
    }
    for n in range(D_SAE):
        on = [t for t in range(len(x)) if acts[t, n] > 0]
        a = [acts[t, n].item() for t in on]
        u = [written_by(sae, x[t], n) / acts[t, n] for t in on]
        found["fired"].append(len(on))
        found["sum"].append(sum(a))
        found["squares"].append(sum(v * v for v in a))
        found["max"].append(max(a, default=0.0))
        nowhere = torch.full((D_MODEL,), torch.nan, dtype=x.dtype)
        mean = sum(v * w for v, w in zip(a, u, strict=True)) / sum(a) if on else nowhere
        mean_square = sum(v * (w @ w) for v, w in zip(a, u, strict=True)) / sum(a) if on else torch.nan
        unit = mean / mean.norm()
        along = sum((v * w @ unit) ** 2 for v, w in zip(a, u, strict=True))
        whole = sum((v * w) @ (v * w) for v, w in zip(a, u, strict=True))
        found["direction"].append(mean.tolist())
        found["consistency"].append(float(mean @ mean / mean_square))
        found["along"].append(float(along / whole) if on else torch.nan)
        found["contribution"].append((float(whole) / len(on)) ** 0.5 if on else torch.nan)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def kept(model, sae, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([true_input(model, sae, row[None])[0][row != BOS] for row in tokens])


def check(statistics: ExpertStatistics, sae, x: torch.Tensor, tolerance: float) -> None:
    expected = by_hand(sae, x)
    assert statistics.n_tokens == len(x)
    assert statistics.fired.tolist() == expected["fired"].tolist()
    for actual, name in (
        (statistics.coefficient_sum, "sum"),
        (statistics.coefficient_squared_sum, "squares"),
        (statistics.coefficient_max, "max"),
        (statistics.mean_direction(), "direction"),
        (statistics.consistency, "consistency"),
        (statistics.contribution_rms, "contribution"),
    ):
        torch.testing.assert_close(
            actual.double(), expected[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )
    total = expected["sum"].sum()
    load = expected["sum"] / total
    torch.testing.assert_close(statistics.load_share, load, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(statistics.density, expected["fired"] / len(x), rtol=tolerance, atol=tolerance)
    assert statistics.l0 == pytest.approx(expected["fired"].sum().item() / len(x))
    spread = -sum(p * np.log(p) for p in load.tolist() if p)
    assert statistics.effective_number == pytest.approx(np.exp(spread), rel=max(tolerance, 1e-9))
    mean_output = (sae(x) - sae.b_dec - skip_of(sae, x)).mean(0)
    close(statistics.mean_contribution.sum(0).double(), mean_output.double(), tolerance)


@pytest.mark.parametrize("kind", ALL_LAYERS)
def test_statistics(tiny_model, kind, tokens):
    layer = make_layer(kind)
    x = kept(tiny_model, layer, tokens)
    empty = ExpertStatistics.of(layer)
    empty.add(layer, x)
    check(empty, layer, x, 1e-9)
    # Through the model, whose float32 sums depend on the batch.
    statistics = expert_statistics(tiny_model, layer, tokens, batch_size=3, progress=False)
    check(statistics, layer, x, 1e-4)


@pytest.mark.parametrize("kind", ["mxd, k", "skip_mxd, relu", "topk_transcoder, k", "saelens topk"])
def test_statistics_on_every_model(any_model, kind, tokens):
    sae = make_layer(kind)
    statistics = expert_statistics(any_model, sae, tokens, watched=WATCHED, progress=False)
    check(statistics, sae, kept(any_model, sae, tokens), 1e-4)


def test_a_transcoders_mean_direction_is_its_feature(tiny_model, tokens):
    sae = make_layer("topk_skip_transcoder, k")
    statistics = expert_statistics(tiny_model, sae, tokens, progress=False)
    on = statistics.fired > 0
    close(statistics.mean_direction()[on], sae.W_dec[on], 1e-9)
    close(statistics.consistency[on], torch.ones(int(on.sum()), dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("kind", ["mxd, k", "skip_mxd, relu", "saelens transcoder", "saelens topk rescaled"])
def test_share_along(tiny_model, tokens, kind):
    sae = make_layer(kind)
    x = kept(tiny_model, sae, tokens)
    expected = by_hand(sae, x)
    share = share_along(tiny_model, sae, tokens, expected["direction"], batch_size=2, progress=False)
    torch.testing.assert_close(share, expected["along"], rtol=1e-5, atol=1e-5, equal_nan=True)
    on = expected["fired"] > 0
    assert (share[on] <= 1 + 1e-9).all()
    if "mxd" not in kind:
        close(share[on], torch.ones(int(on.sum()), dtype=torch.float64), 1e-9)
    with pytest.raises(ValueError, match=r"one direction per expert, \(40, 16\), got \(3, 16\)"):
        share_along(tiny_model, sae, tokens, torch.zeros(3, 16))


def test_silent_and_always_on_experts(tiny_model, rare, tokens):
    statistics = expert_statistics(tiny_model, rare, tokens, progress=False)
    silent = set(statistics.silent.tolist())
    assert silent >= set(range(8))
    assert all(statistics.fired[n] == 0 for n in silent)
    with pytest.warns(DeprecationWarning, match="silent now"):
        assert torch.equal(statistics.dead, statistics.silent)
    assert statistics.always_on().tolist() == [9]
    assert statistics.always_on(1.0).tolist() == [9]
    assert statistics.mean_direction(0).isnan().all()
    histogram = statistics.density_histogram(bins=10)
    densities = np.log10(statistics.density[statistics.fired > 0].numpy())
    counts, edges = np.histogram(densities, bins=10, range=(-np.log10(statistics.n_tokens), 0))
    assert histogram.counts.tolist() == counts.tolist()
    assert np.allclose(histogram.edges.numpy(), edges)
    assert histogram.n_silent == len(silent)
    figure = usage_figure(statistics, bins=10)
    assert sum(figure.data[0].y) + histogram.n_silent == D_SAE
    assert f"{histogram.n_silent} do not fire" in figure.layout.title.text


@pytest.mark.parametrize("kind", ["mxd, k", "saelens transcoder"])
def test_statistics_of_two_texts_add_up(tiny_model, tokens, kind, tmp_path):
    sae = make_layer(kind)
    both = expert_statistics(tiny_model, sae, tokens, batch_size=1, watched=WATCHED, progress=False)
    first, second = (
        expert_statistics(tiny_model, sae, part, batch_size=1, watched=WATCHED, progress=False)
        for part in (tokens[:3], tokens[3:])
    )
    first.save(tmp_path / "first")
    added = ExpertStatistics.load(tmp_path / "first") + second
    for name, value in vars(both).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(added, name), value, rtol=1e-9, atol=1e-9)
        else:
            assert getattr(added, name) == value
    nothing = ExpertStatistics.of(sae, watched=WATCHED)
    assert torch.equal((nothing + first).direction_sum, first.direction_sum)


def test_statistics_that_do_not_belong_together(tiny_model, tokens, tmp_path):
    sae = make_layer("mxd, k")
    statistics = expert_statistics(tiny_model, sae, tokens, watched=[1], progress=False)
    # A layer that differs in one weight of one expert in the middle is another layer.
    for name in ("W_dec", "W_enc", "b_enc", "W_out", "b_dec"):
        other = make_layer("mxd, k")
        weight = getattr(other, name)
        weight[tuple(size // 2 for size in weight.shape)] += 1e-3
        with pytest.raises(ValueError, match="fingerprint"):
            _ = statistics + ExpertStatistics.of(other, watched=[1])
    with pytest.raises(ValueError, match="watched"):
        _ = statistics + ExpertStatistics.of(sae, watched=[1, 2])
    with pytest.raises(ValueError, match="watched"):
        _ = statistics + ExpertStatistics.of(sae, watched=[2])
    with pytest.raises(ValueError, match="statistics of another layer"):
        statistics.add(other, torch.zeros(1, D_MODEL))
    with pytest.raises(ValueError, match="statistics of another layer"):
        mean_gate_share(other, statistics)
    with pytest.raises(IndexError, match="expert 40 does not exist"):
        ExpertStatistics.of(sae, watched=[40])
    with pytest.raises(FileNotFoundError, match=r"holds no statistics\.safetensors"):
        ExpertStatistics.load(tmp_path)
    with pytest.raises(ValueError, match="tokens must be token ids"):
        expert_statistics(tiny_model, sae, tokens[0])


def test_no_token_is_no_error(tiny_model):
    sae = make_layer("mxd, k")
    statistics = expert_statistics(tiny_model, sae, torch.full((2, 3), BOS), progress=False)
    assert statistics.n_tokens == 0
    assert len(statistics.silent) == D_SAE
    Console(file=StringIO()).print(statistics)
    usage_figure(statistics)


@pytest.mark.parametrize("kind", ["mxd, k", "mxd, relu", "saelens topk"])
def test_coactivation(tiny_model, tokens, kind):
    sae = make_layer(kind)
    statistics = expert_statistics(
        tiny_model, sae, tokens, batch_size=2, watched=torch.tensor([31, 3, 17, 3]), progress=False
    )
    assert statistics.watched.tolist() == WATCHED
    fired = (sae.encode(kept(tiny_model, sae, tokens)) > 0).numpy()
    jaccard, correlation = statistics.coactivation(), statistics.coactivation("correlation")
    for i, n in enumerate(WATCHED):
        for m in range(D_SAE):
            both, either = (fired[:, n] & fired[:, m]).sum(), (fired[:, n] | fired[:, m]).sum()
            assert statistics.fired_together[m, i] == both
            if either:
                assert jaccard[i, m].item() == pytest.approx(both / either)
            if fired[:, n].std() and fired[:, m].std():
                expected = np.corrcoef(fired[:, n], fired[:, m])[0, 1]
                assert correlation[i, m].item() == pytest.approx(expected, abs=1e-9)
    for by, matrix in (("jaccard", jaccard), ("correlation", correlation)):
        found = coactive_experts(statistics, by, k=5)
        for i, n in enumerate(WATCHED):
            others = [v for m, v in enumerate(matrix[i].nan_to_num(nan=-2).tolist()) if m != n]
            known = sorted(others, reverse=True)[:5]
            assert n not in found.neighbours[i]
            assert found.similarities[i].nan_to_num(neginf=-2).tolist() == pytest.approx(known)
    with pytest.raises(ValueError, match="'jaccard' or 'correlation', got 'cosine'"):
        statistics.coactivation("cosine")
    with pytest.raises(ValueError, match="No expert is watched"):
        ExpertStatistics.of(sae).coactivation()


@pytest.mark.parametrize("kind", ["mxd, k", "gated mxd, k", "skip_mxd, relu"])
@pytest.mark.parametrize("d_hidden", [8, 24])
def test_spectrum_of_experts(kind, d_hidden):
    sae = make_layer(kind)
    sae.W_out.data = sae.W_out[:d_hidden].clone()
    sae.W_dec[5, 3:] = 0
    experts = [5, 0, 12]
    found = spectrum(sae, experts, batch_size=2, progress=False)
    for i, n in enumerate(experts):
        weight = sae.expert_weight(n).numpy()
        expected = np.linalg.svd(weight, compute_uv=False)
        np.testing.assert_allclose(found.singular_values[i].numpy(), expected, atol=1e-12)
        assert found.rank[i] == np.linalg.matrix_rank(weight)
        assert found.effective_rank[i].item() == pytest.approx((expected**2).sum() ** 2 / (expected**4).sum())
    assert found.rank.tolist() == [3, min(d_hidden, D_MODEL), min(d_hidden, D_MODEL)]
    assert len(spectrum(sae, progress=False).rank) == D_SAE
    assert spectrum(sae, 5, progress=False).rank.tolist() == [3]


@pytest.mark.parametrize("kind", ["topk_transcoder, k", "saelens skip_transcoder", "saelens topk rescaled"])
def test_a_feature_is_of_rank_one(kind):
    sae = make_layer(kind)
    sae.W_dec[4] = 0
    if not kind.endswith("rescaled"):
        found = spectrum(sae, [4, 7])
        assert found.rank.tolist() == [0, 1]
        assert found.singular_values[1].item() == pytest.approx(sae.W_dec[7].norm().item())
    else:
        assert spectrum(sae, [7]).singular_values[0].item() == pytest.approx(1)


def test_mean_gate_share(tiny_model, tokens, layer):
    statistics = expert_statistics(tiny_model, layer, tokens, progress=False)
    acts = layer.encode(kept(tiny_model, layer, tokens))
    c = layer.W_dec
    if getattr(layer.cfg, "rescale_acts_by_decoder_norm", False):
        c = c / c.norm(dim=1, keepdim=True)
    m = (acts @ c).mean(0)
    close(statistics.mean_mixture, m, 1e-5)
    shares = mean_gate_share(layer, statistics)
    for n in range(D_SAE):
        expected = (c[n] @ m) ** 2 / (c[n] @ c[n]) / (m @ m)
        assert shares[n].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("by", ["decoder", "gate"])
@pytest.mark.parametrize("experts", [[3, 0, 39], None])
def test_similar_experts(by, experts, monkeypatch):
    monkeypatch.setattr("mxd_lens.analysis.weights.BLOCK", 7)
    sae = make_layer("mxd, k")
    rows = sae.W_dec if by == "decoder" else sae.W_enc.T
    found = similar_experts(sae, experts, by, k=6)
    for i, n in enumerate(experts or range(D_SAE)):
        cosines = {
            m: (rows[n] @ rows[m] / rows[n].norm() / rows[m].norm()).item() for m in range(D_SAE) if m != n
        }
        expected = sorted(cosines, key=cosines.__getitem__, reverse=True)[:6]
        assert found.experts[i] == n
        assert found.neighbours[i].tolist() == expected
        assert found.similarities[i].tolist() == pytest.approx([cosines[m] for m in expected])


def test_similarity_errors():
    sae = make_layer("mxd, k")
    with pytest.raises(ValueError, match="'decoder' or 'gate', got 'both'"):
        similar_experts(sae, 3, "both")
    with pytest.raises(ValueError, match="1 to 39 neighbours, not k = 40"):
        similar_experts(sae, 3, k=40)
    assert similar_experts(sae, [], k=4).neighbours.shape == (0, 4)
    with pytest.raises(IndexError, match="expert 99"):
        similar_experts(sae, [3, 99])


# In the model's terms


def reweight(model, seed: int = 0) -> torch.Tensor:
    """Gives the final norm a weight that is not one."""
    norm = model.ln_final
    weight = next(p for name, p in norm.named_parameters() if name.split(".")[-1] in ("w", "weight"))
    with torch.no_grad():
        weight.copy_(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)))
    return weight.detach()


def test_logit_lens(any_model):
    weight = reweight(any_model)
    norm = read_norm(any_model.ln_final, any_model.W_U)
    close(norm.weight, weight, 1e-4)
    close(norm.bias, torch.zeros(D_MODEL), 1e-6)
    assert not norm.centres
    directions = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(2))
    logits = torch.zeros(3, any_model.W_U.shape[1], dtype=torch.float64)
    for i, direction in enumerate(directions):
        for j in range(D_MODEL):
            logits[i] += direction[j].double() * weight[j].double() * any_model.W_U[j].detach().double()
    close(direction_logits(any_model, directions).double(), logits, 1e-4)
    logits -= logits.mean(-1, keepdim=True)
    lens = logit_lens(any_model, directions, k=4, names=[5, "b", 7])
    assert lens.names == ["5", "b", "7"]
    for i in range(3):
        for ids, words, values in (
            (logits[i].argsort(descending=True)[:4], lens.promoted[i], lens.promoted_logits[i]),
            (logits[i].argsort()[:4], lens.suppressed[i], lens.suppressed_logits[i]),
        ):
            assert words == [any_model.tokenizer.decode([t]) for t in ids.tolist()]
            close(values.double(), logits[i, ids], 1e-4)
    assert logit_lens(any_model, directions[0], k=4).promoted == lens.promoted[:1]


def test_the_lens_is_the_gradient_of_the_logits_with_the_scale_frozen(any_model):
    """Moves the last residual stream along a direction and back by what the norm's scale took."""
    reweight(any_model)
    stream, direction = 3 * torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(4))
    # At right angles to the stream the scale does not change to first order, and is frozen.
    direction = direction - (direction @ stream) / (stream @ stream) * stream

    def logits(step: float) -> torch.Tensor:
        residual = (stream + step * direction).view(1, 1, -1)
        return any_model.unembed(any_model.ln_final(residual))[0, 0].detach()

    moved = (logits(1e-2) - logits(-1e-2)) / 2e-2 * stream.pow(2).mean().sqrt()
    close(direction_logits(any_model, direction[None])[0], moved, 2e-3)


@pytest.mark.parametrize("kind", ["LN", "LNPre"])
def test_a_layer_norm_subtracts_the_mean(tiny_model, kind):
    from transformer_lens.components import LayerNorm, LayerNormPre

    tiny_model.ln_final = (LayerNorm if kind == "LN" else LayerNormPre)(tiny_model.cfg)
    weight = torch.ones(D_MODEL)
    if kind == "LN":
        weight = reweight(tiny_model)
        tiny_model.ln_final.b.data += 3
    norm = read_norm(tiny_model.ln_final, tiny_model.W_U)
    assert norm.centres
    close(norm.weight, weight, 1e-4)
    close(norm.bias, torch.full((D_MODEL,), 3.0 if kind == "LN" else 0.0), 1e-5)
    direction = torch.randn(1, D_MODEL)
    expected = ((direction - direction.mean()) * weight) @ tiny_model.W_U
    close(direction_logits(tiny_model, direction), expected, 1e-4)
    close(direction_logits(tiny_model, direction + 5), expected, 1e-3)


def test_logit_lens_errors(tiny_model):
    with pytest.raises(ValueError, match=r"d_model = 16\], got \(1, 5\)"):
        logit_lens(tiny_model, torch.zeros(5))
    with pytest.raises(ValueError, match="not finite"):
        logit_lens(tiny_model, torch.full((D_MODEL,), torch.nan))
    with pytest.raises(ValueError, match="2 directions and 1 names"):
        logit_lens(tiny_model, torch.zeros(2, D_MODEL), names=[1])


@pytest.mark.parametrize("kind", ["mxd, k", "topk_transcoder, k"])
def test_nearest_neurons(any_model, tokens, kind):
    sae = make_layer(kind)
    statistics = expert_statistics(any_model, sae, tokens, progress=False)
    experts = [n for n in (3, 30, 12, 20) if statistics.fired[n]][:2]
    found = nearest_neurons(any_model, sae, statistics, experts, k=3)
    mlp = any_model.blocks[1].mlp
    for name, weight in (("output", mlp.W_out), ("input", mlp.W_in.T), ("gate", mlp.W_gate.T)):
        weight = weight.detach().double()
        assert weight.shape == (32, D_MODEL)
        for i, n in enumerate(experts):
            mine = statistics.mean_direction(n)[0] if name == "output" else sae.W_enc[:, n]
            cosines = [(mine @ row / mine.norm() / row.norm()).item() for row in weight]
            expected = sorted(range(32), key=lambda j: -abs(cosines[j]))[:3]
            assert found.neurons[name][i].tolist() == expected
            assert found.cosines[name][i].tolist() == pytest.approx([cosines[j] for j in expected], abs=1e-5)


def test_a_neuron_made_an_expert_is_found(any_model, tokens):
    mlp = any_model.blocks[1].mlp
    sae = make_layer("topk_transcoder, relu")
    sae.W_enc[:, 6] = -2 * mlp.W_gate[:, 11].detach().double()
    sae.b_enc[6] = 50
    sae.W_dec[6] = 3 * mlp.W_out[21].detach().double()
    statistics = expert_statistics(any_model, sae, tokens, progress=False)
    found = nearest_neurons(any_model, sae, statistics, 6)
    assert (found.neurons["output"][0, 0], found.neurons["gate"][0, 0]) == (21, 11)
    assert found.cosines["output"][0, 0].item() == pytest.approx(1, abs=1e-5)
    assert found.cosines["gate"][0, 0].item() == pytest.approx(-1, abs=1e-5)


def test_neurons_that_do_not_fit(tiny_model, tokens):
    sae = make_layer("mxd, k", d_model=17)
    statistics = ExpertStatistics.of(sae)
    with pytest.raises(ValueError, match="output weights are 16 wide, the layer's 17"):
        nearest_neurons(tiny_model, sae, statistics, 3)
    sae = make_layer("mxd, k")
    sae.cfg.metadata.hook_name_out = "hook_embed"
    with pytest.raises(ValueError, match="no MLP of neurons at hook_embed"):
        nearest_neurons(tiny_model, sae, ExpertStatistics.of(sae), 3)


def test_every_result_prints(tiny_model, tokens):
    sae = make_layer("mxd, k")
    statistics = expert_statistics(tiny_model, sae, tokens, watched=WATCHED, progress=False)
    n = int(statistics.fired.argmax())
    results = [
        statistics,
        spectrum(sae, [1, 2], progress=False),
        similar_experts(sae, [1, 2], k=3),
        coactive_experts(statistics, k=3),
        nearest_neurons(tiny_model, sae, statistics, n),
        logit_lens(tiny_model, statistics.mean_direction(n), k=3, names=[n]),
    ]
    for result in results:
        console = Console(file=StringIO(), width=150)
        console.print(result)
        assert result.title.split()[0] in console.file.getvalue()
        rows = list(result.rows)
        assert result._repr_html_().count("<tr>") == len(rows) + 1 > 1
        assert all(str(row[0]) in console.file.getvalue() for row in rows)
        assert len(repr(result)) < 300


def test_a_token_that_looks_like_markup_is_shown_as_text():
    lens = LogitLens(["5"], [["<b>", "[red]"]], torch.ones(1, 2), [["</b>", "x"]], torch.ones(1, 2))
    assert "&lt;b&gt;" in lens._repr_html_()
    assert "<b>" not in lens._repr_html_()
    assert "[red]" in str(lens)


def test_statistics_as_a_data_frame(tiny_model, tokens):
    """One row per expert, every number the property's."""
    statistics = expert_statistics(tiny_model, make_layer("mxd, k"), tokens, watched=WATCHED, progress=False)
    frame = statistics.to_pandas()
    assert frame.expert.tolist() == list(range(D_SAE))
    for name in ("fired", "density", "mean_coefficient", "load_share", "consistency", "contribution_rms"):
        np.testing.assert_array_equal(frame[name], getattr(statistics, name))
    assert frame.fired_with_17.tolist() == statistics.fired_together[:, 1].tolist()


@pytest.mark.real_model
def test_one_library_and_the_other_agree_on_the_real_model(smollm2):
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge = load_model(SMOLLM2, model_class=SAETransformerBridge)
    for model in (smollm2, bridge):
        norm = read_norm(model.ln_final, model.W_U)
        assert not norm.centres
        torch.testing.assert_close(norm.weight, smollm2.ln_final.w, rtol=1e-4, atol=1e-5)
    directions = smollm2.blocks[12].mlp.W_out[:4]
    ours, theirs = (logit_lens(m, directions.detach(), k=5) for m in (smollm2, bridge))
    assert ours.promoted == theirs.promoted
    assert ours.suppressed == theirs.suppressed
    torch.testing.assert_close(bridge.blocks[12].mlp.W_out, smollm2.blocks[12].mlp.W_out)
    torch.testing.assert_close(bridge.blocks[12].mlp.W_gate, smollm2.blocks[12].mlp.W_gate)
    sae = make_layer("mxd, k", "float32", d_model=576, layer=12)
    tokens = smollm2.to_tokens("The capital of France is Paris, and that of Italy is Rome.")
    one, other = (expert_statistics(m, sae, tokens, progress=False) for m in (smollm2, bridge))
    torch.testing.assert_close(one.coefficient_sum, other.coefficient_sum, rtol=1e-3, atol=1e-3)


def test_the_classes_are_the_ones_meant():
    assert isinstance(make_layer("mxd, k"), MxD)
    assert isinstance(make_layer("skip_mxd, k"), SkipMxD)
    assert make_layer("saelens topk").cfg.metadata.hook_name == HOOK_OUT
