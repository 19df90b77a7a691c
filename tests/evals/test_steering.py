"""Steered texts, their measures, the judges, and the scores of many experts."""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from attached import MODELS, random_mxd
from chat_stand_in import ChatStandIn
from rich.console import Console
from tiny import D_MODEL

from mxd_lens import TopKTranscoder, TopKTranscoderConfig, load_model, replacement_hooks
from mxd_lens.evals.judges import EndpointJudge, Judgement, LocalJudge, parse_judgement, token_agreement
from mxd_lens.evals.steering import (
    Measured,
    Sampling,
    SteeredSamples,
    measure,
    perplexity,
    repetition,
    steered_samples,
)
from mxd_lens.evals.steering_scores import (
    SCORES_FILENAME,
    SteeringScores,
    matched_coefficient,
    steering_scores,
)
from mxd_lens.models import SMOLLM2
from mxd_lens.reports.steering import ellipse, steering_figure, worth, write_steering_page

PROMPT = "the big cat"
MEASURED = Measured(3.0, 2.5, 0.0, 0.0)
SMALL = Sampling(prompt=PROMPT, n_samples=3, max_new_tokens=8, top_p=0.9)


@pytest.fixture(params=MODELS)
def any_model(request, tiny_folder):
    return MODELS[request.param](tiny_folder)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture
def mxd():
    return random_mxd(D_MODEL)


def small_samples(model, mxd, expert=5, **changes):
    settings = {"prompt": PROMPT, "n_samples": 3, "max_new_tokens": 8, "top_p": 0.9} | changes
    return steered_samples(model, mxd, expert, **settings)


# Texts


def test_the_same_seed_gives_the_same_texts(any_model, mxd):
    state = torch.get_rng_state()
    one = small_samples(any_model, mxd, coefficient=30.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert small_samples(any_model, mxd, coefficient=30.0) == one
    assert small_samples(any_model, mxd, coefficient=30.0, seed=1).steered_ids != one.steered_ids
    assert one.steered_ids != one.unsteered_ids
    assert len(one.steered) == len(one.unsteered) == 3
    assert all(len(ids) <= 8 for ids in one.steered_ids + one.unsteered_ids)
    assert any_model.tokenizer.decode(one.steered_ids[0], skip_special_tokens=True) == one.steered[0]


def test_unsteered_texts_are_those_of_the_replaced_model(any_model, mxd):
    zero = small_samples(any_model, mxd, coefficient=0.0)
    assert zero.steered_ids == zero.unsteered_ids
    with any_model.hooks(fwd_hooks=replacement_hooks(mxd)):
        assert SMALL.continuations(any_model) == zero.unsteered_ids
    assert SMALL.continuations(any_model) != zero.unsteered_ids


def test_texts_agree_between_the_libraries(tiny_folder, mxd):
    """The two `generate`s sample alike: top-p, temperature and the frequency penalty are the same."""
    one, other = (
        small_samples(MODELS[name](tiny_folder), mxd, coefficient=5.0)
        for name in ("HookedTransformer", "TransformerBridge")
    )
    assert one.steered_ids == other.steered_ids


def test_the_frequency_penalty_reaches_the_sampling(any_model, mxd):
    free, bound = (
        small_samples(any_model, mxd, frequency_penalty=penalty, n_samples=2, max_new_tokens=16)
        for penalty in (0.0, 1000.0)
    )
    assert max(max(Counter(ids).values()) for ids in free.unsteered_ids) > 1
    # So large a penalty forbids a word until all others have come.
    assert max(max(Counter(ids).values(), default=1) for ids in bound.unsteered_ids) == 1


def test_samples_are_kept_and_shown(model, mxd, tmp_path):
    samples = small_samples(model, mxd, coefficient=2.5)
    samples.save(tmp_path / "samples.json")
    assert SteeredSamples.load(tmp_path / "samples.json") == samples
    console = Console(width=120, record=True)
    console.print(samples)
    shown = console.export_text()
    assert "expert 5 + 2.5" in shown
    assert "not steered" in shown
    assert samples.steered[0].split()[0] in shown


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_samples": 0}, ValueError, "n_samples must be at least 1, got 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0"),
        ({"temperature": -1.0}, ValueError, "temperature must not be negative"),
        ({"frequency_penalty": -1.0}, ValueError, "frequency_penalty must not be negative"),
        ({"expert": 40}, IndexError, "expert 40 does not exist"),
        ({"mode": "multiply"}, ValueError, "mode must be one of"),
    ],
)
def test_wrong_settings(model, mxd, changes, error, message):
    with pytest.raises(error, match=message):
        small_samples(model, mxd, **changes)


# Measures


def test_perplexity_against_transformers(tiny_folder, model):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_folder)
    continuations = [[4, 7, 7, 9], [5], [], [3, 3, 12]]
    begin = model.to_tokens(PROMPT)[0].tolist()
    total = n = 0
    for ids in continuations:
        with torch.no_grad():
            logits = reference(torch.tensor([begin + ids])).logits[0].double()
        for i, token in enumerate(ids):
            total -= logits[len(begin) - 1 + i].log_softmax(-1)[token].item()
            n += 1
    assert perplexity(model, PROMPT, continuations) == pytest.approx(math.exp(total / n), rel=1e-5)
    assert math.isnan(perplexity(model, PROMPT, [[], []]))


def test_repetition():
    assert repetition([[1, 2, 3, 1, 2, 3, 1, 2, 3]]) == pytest.approx(4 / 7)
    assert repetition([[1, 1, 1, 1], [1, 2, 3, 4]]) == pytest.approx(1 / 4)
    assert repetition([[1, 2], []]) == 0


def test_token_agreement_against_explicit_sums():
    one, other = [[1, 1, 2], [5, 6]], [[1, 2, 2, 7]]
    p, q = {1: 2 / 3, 2: 1 / 3}, {1: 1 / 4, 2: 1 / 2, 7: 1 / 4}
    divergence = 0.0
    for token in (1, 2, 7):
        mean = (p.get(token, 0) + q[token]) / 2
        divergence += sum(d[token] * math.log2(d[token] / mean) / 2 for d in (p, q) if token in d)
    expected = torch.tensor([[1 - divergence], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(token_agreement(one, other), expected, rtol=1e-6, atol=1e-6)


def of_ids(steered, unsteered) -> SteeredSamples:
    return SteeredSamples(
        model_name="tiny",
        hook_name_out="blocks.1.hook_mlp_out",
        expert=5,
        coefficient=1.0,
        mode="add",
        sampling=SMALL,
        steered=["a text"] * len(steered),
        unsteered=["a text"] * len(unsteered),
        steered_ids=steered,
        unsteered_ids=unsteered,
    )


def test_the_local_judge(model):
    def judged(samples):
        return LocalJudge(model)(samples, measure(model, samples))

    plain = [[4, 5, 6, 7, 8], [5, 4, 7, 6, 8], [8, 7, 4, 5, 6]]
    concept = judged(of_ids([[10, 11, 12, 13], [13, 11, 12, 10], [12, 10, 11, 13]], plain))
    assert concept.concept > 90
    unmoved = judged(of_ids(plain, plain))
    assert unmoved.concept == 0
    assert unmoved.fluency == 100
    scattered = judged(of_ids([[9, 10], [11, 12], [13, 14]], plain))
    assert scattered.concept < concept.concept / 2
    loop = judged(of_ids([[10, 11] * 8, [11, 10] * 8], plain))
    assert loop.fluency < 20
    assert judged(of_ids([[], [], []], plain)) == Judgement(0, 0)
    with pytest.raises(ValueError, match="at least two"):
        judged(of_ids([[4]], plain))


# A judge behind an endpoint


def judge_at(server, **changes) -> EndpointJudge:
    settings = {"api_key": "a-key", "timeout": 5.0, "pause": 0.0} | changes
    return EndpointJudge(server.url, "judge-1", **settings)


GOOD = '{"concept_coherence": 70, "fluency": 35.5}'


def test_what_the_endpoint_is_asked(endpoint):
    endpoint.answers = [(200, f"Here you are:\n```json\n{GOOD}\n```")]
    samples = of_ids([[4], [5]], [[6]])
    assert judge_at(endpoint)(samples, MEASURED) == Judgement(70, 35.5)
    ((path, authorization, body),) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert authorization == "Bearer a-key"
    assert body["model"] == "judge-1"
    assert body["temperature"] == 0
    system, user = (message["content"] for message in body["messages"])
    assert "concept_coherence" in system
    assert "fluency" in system
    assert "Text 2: a text" in user
    assert PROMPT in user
    assert "a-key" not in repr(judge_at(endpoint))


@pytest.mark.parametrize(
    "first",
    [
        (200, "I would say seventy."),
        (200, '{"concept_coherence": 700, "fluency": 3}'),
        (200, '{"concept_coherence": 70}'),
        (200, '{"concept_coherence": "high", "fluency": 3}'),
        (200, "[]"),
        (200, b"<html>not a chat</html>"),
        (200, b'{"choices": []}'),
        (429, b"slow down"),
        (503, b"starting"),
    ],
)
def test_what_passes_is_asked_again(endpoint, first):
    endpoint.answers = [first, (200, GOOD)]
    assert judge_at(endpoint)(of_ids([[4]], [[5]]), MEASURED) == Judgement(70, 35.5)
    assert len(endpoint.asked) == 2


def test_what_does_not_pass_is_said(endpoint):
    samples = of_ids([[4]], [[5]])
    endpoint.answers = [(200, "No.")]
    with pytest.raises(ValueError, match=r"from 0 to 100 in a JSON object, and answered 'No\.'"):
        judge_at(endpoint, attempts=3)(samples, MEASURED)
    assert len(endpoint.asked) == 3
    endpoint.answers = [(401, b"who are you?")]
    with pytest.raises(ConnectionError, match=r"answered 401 Unauthorized: who are you\?"):
        judge_at(endpoint)(samples, MEASURED)
    assert len(endpoint.asked) == 4
    endpoint.answers = [(500, b"broken")]
    with pytest.raises(ConnectionError, match="answered 500"):
        judge_at(endpoint, attempts=2)(samples, MEASURED)
    endpoint.answers = [("slow", GOOD)]
    with pytest.raises(ConnectionError, match=r"no answer at attempt 2 of 2 within 0\.1 s.*[Tt]imeout"):
        judge_at(endpoint, attempts=2, timeout=0.1)(samples, MEASURED)
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        judge_at(endpoint, attempts=0)(samples, MEASURED)


def test_the_key_goes_to_no_other_host(endpoint):
    with ChatStandIn() as elsewhere:
        elsewhere.answers = [(200, GOOD)]

        def redirect(handler) -> None:
            handler.send_response(307)
            handler.send_header("Location", elsewhere.url + "/chat/completions")
            handler.end_headers()

        endpoint.answers = [(307, redirect)]
        with pytest.raises(ConnectionError, match=f"redirects to '{elsewhere.url}"):
            judge_at(endpoint)(of_ids([[4]], [[5]]), MEASURED)
        assert len(endpoint.asked) == 1
        assert elsewhere.asked == []


def truncated(handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def dripping(handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        if handler.server.released.wait(0.05):
            break


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (truncated, ConnectionError, "no answer at attempt 1 of 1"),
        (dripping, ConnectionError, r"within 0\.5 s"),
        (b"x" * 2_000_000, ValueError, "more than 1,000,000 bytes"),
        (b"[" * 200_000, ValueError, "does not answer as a chat endpoint does"),
        (b'{"choices": [{"message": {"content": 7}}]}', ValueError, "does not answer as a chat endpoint"),
    ],
)
def test_an_answer_that_is_cut_endless_too_long_or_too_deep(endpoint, content, error, message):
    endpoint.answers = [(200, content), (200, content)]
    with pytest.raises(error, match=message):
        judge_at(endpoint, attempts=1, timeout=0.5)(of_ids([[4]], [[5]]), MEASURED)
    endpoint.answers = [(200, content), (200, GOOD)]
    assert judge_at(endpoint, attempts=2, timeout=0.5)(of_ids([[4]], [[5]]), MEASURED) == Judgement(70, 35.5)


def test_an_endpoint_that_is_not_there(endpoint):
    judge = EndpointJudge("http://127.0.0.1:9", "judge-1", attempts=2, pause=0.0)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9 gave no answer at attempt 2 of 2"):
        judge(of_ids([[4]], [[5]]), MEASURED)


@pytest.mark.parametrize(
    "answer", ["", None, "{}", "{'fluency': 1}", '{"concept_coherence": -1, "fluency": 1}']
)
def test_malformed_judgements(answer):
    with pytest.raises(ValueError, match="the judge was asked for"):
        parse_judgement(answer)


# Many experts


class CountingJudge:
    name = "counting"

    def __init__(self, fail_at: int = -1) -> None:
        self.judged: list[int] = []
        self.fail_at = fail_at

    def __call__(self, samples, measured):  # noqa: ARG002
        if len(self.judged) == self.fail_at:
            raise KeyboardInterrupt
        self.judged.append(samples.expert)
        return Judgement(concept=float(samples.expert), fluency=100.0 - samples.expert)


def test_scores_of_several_layers(model, mxd, tmp_path):
    later = random_mxd(D_MODEL, "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", k=7)
    layers = {"one": mxd, "two": later}
    judge = CountingJudge()
    scores = steering_scores(
        model, layers, tmp_path, {"one": [3, 8], "two": [8]}, judge, 20.0, sampling=SMALL, progress=False
    )
    assert [(s.layer, s.expert) for s in scores.scores] == [("one", 3), ("one", 8), ("two", 8)]
    samples = small_samples(model, later, 8, coefficient=20.0)
    last = scores.scores[-1]
    assert last.texts == samples.steered
    assert last.perplexity == perplexity(model, PROMPT, samples.steered_ids)
    assert last.perplexity_unsteered == perplexity(model, PROMPT, samples.unsteered_ids)
    assert (last.concept, last.fluency, last.architecture) == (8.0, 92.0, "mxd")
    assert SteeringScores.load(tmp_path / SCORES_FILENAME) == scores
    console = Console(width=120, record=True)
    console.print(scores)
    assert "counting" in console.export_text()


def test_scores_go_on_where_they_stopped(model, mxd, tmp_path):
    settings = {"coefficient": 20.0, "sampling": SMALL, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        steering_scores(model, {"one": mxd}, tmp_path, 4, CountingJudge(fail_at=2), **settings)
    judge = CountingJudge()
    scores = steering_scores(model, {"one": mxd}, tmp_path, 4, judge, **settings)
    assert len(judge.judged) == 2
    whole = steering_scores(model, {"one": mxd}, tmp_path / "new", 4, CountingJudge(), **settings)
    assert scores == whole
    assert len({s.expert for s in scores.scores}) == 4
    changed = settings | {"coefficient": 30.0}
    with pytest.raises(ValueError, match=r"another run \(steered\.one\.coefficient: 20\.0 then, 30\.0 now\)"):
        steering_scores(model, {"one": mxd}, tmp_path, 4, judge, **changed)
    # Another checkpoint of the same shape, or another model of the same name, does not inherit them.
    other = random_mxd(D_MODEL)
    other.W_dec[20, 3] += 1e-3
    with pytest.raises(ValueError, match=r"another run \(steered\.one\.weights"):
        steering_scores(model, {"one": other}, tmp_path, 4, judge, **settings)
    before = model.W_U[0, 0].item()
    with torch.no_grad():
        model.unembed.W_U[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"another run \(model\.weights"):
        steering_scores(model, {"one": mxd}, tmp_path, 4, judge, **settings)
    with torch.no_grad():
        model.unembed.W_U[0, 0] = before
    both = steering_scores(model, {"one": mxd, "two": other}, tmp_path, 4, CountingJudge(), **settings)
    assert [score.layer for score in both.scores] == ["one"] * 4 + ["two"] * 4
    with pytest.raises(ValueError, match="experts names none for one"):
        steering_scores(model, {"one": mxd}, tmp_path, {"two": [1]}, judge, **settings)


def test_a_coefficient_of_each_layers_own(model, mxd, tmp_path):
    layers = {"one": mxd, "two": mxd}
    by_layer = {"one": 5.0, "two": 20.0}
    scores = steering_scores(
        model, layers, tmp_path, {"one": [3], "two": [3]}, CountingJudge(), by_layer, sampling=SMALL
    )
    for score in scores.scores:
        samples = small_samples(model, mxd, 3, coefficient=by_layer[score.layer])
        assert score.texts == samples.steered
    with pytest.raises(ValueError, match="coefficient names none for two"):
        steering_scores(model, layers, tmp_path, 1, CountingJudge(), {"one": 1.0}, sampling=SMALL)


@pytest.mark.parametrize("experts", [None, [3, 8, 21]])
def test_coefficients_that_change_outputs_alike(mxd, experts):
    x = torch.randn(40, mxd.cfg.d_in)
    y, z = mxd(x).double(), mxd.hidden(x).double() @ mxd.W_out.double()
    chosen = (mxd.encode(x) > 0).any(0).nonzero()[:, 0].tolist() if experts is None else experts
    lengths = torch.stack([(mxd.W_dec[n].double() * z).norm(dim=-1) for n in chosen])
    expected = 3 * (y - y.mean(0)).norm(dim=-1).median() / lengths.median()
    assert matched_coefficient(mxd, x, 3.0, experts) == pytest.approx(expected.item(), rel=1e-5)
    assert matched_coefficient(mxd, x, 6.0, experts) == pytest.approx(2 * expected.item(), rel=1e-5)


def test_a_transcoders_coefficient_and_what_has_none():
    topk = TopKTranscoder(TopKTranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=30, k=4))
    with torch.no_grad():
        topk.W_enc.normal_()
        topk.W_dec.normal_()
    x = torch.randn(40, D_MODEL)
    y = topk(x)
    expected = (y - y.mean(0)).norm(dim=-1).median() / topk.W_dec.norm(dim=-1).median()
    every = range(topk.cfg.d_sae)
    assert matched_coefficient(topk, x, 1.0, every) == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        topk.W_dec.zero_()
    with pytest.raises(ValueError, match="no length"):
        matched_coefficient(topk, x, 1.0, every)
    with pytest.raises(ValueError, match="no expert is active"):
        matched_coefficient(topk, x[:0], 1.0)
    with pytest.raises(IndexError):
        matched_coefficient(topk, x, 1.0, [topk.cfg.d_sae])


def test_the_figure(model, mxd, tmp_path):
    scores = steering_scores(
        model, {"one": mxd}, tmp_path, 5, CountingJudge(), sampling=SMALL, progress=False
    )
    points, around = steering_figure(scores).data
    assert sorted(points.x) == sorted(float(s.expert) for s in scores.scores)
    x, y = np.array(points.x), np.array(points.y)
    assert np.mean(around.x[:-1]) == pytest.approx(x.mean(), abs=1e-6)
    assert max(around.x) - x.mean() == pytest.approx(x.std(ddof=1), rel=1e-2)
    assert np.mean(around.y[:-1]) == pytest.approx(y.mean(), abs=1e-6)


def test_the_page_shows_means_and_the_best_and_worst_texts(model, mxd, tmp_path):
    scores = steering_scores(
        model, {"<one>": mxd}, tmp_path, 12, CountingJudge(), sampling=SMALL, progress=False
    )
    scores.scores[0] = replace(
        scores.scores[0], texts=["<script>alert(1)</script>"] * 3, concept=100, fluency=100
    )
    page = write_steering_page(tmp_path / "s.html", scores).read_text()
    markup = re.sub(r"<script type.*?</script>", "", page, flags=re.DOTALL)
    assert "alert(1)</script>" not in markup.replace("&lt;script&gt;", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; (3 times)" in markup
    ranked = [s.expert for s in sorted(scores.scores, key=worth, reverse=True)]
    assert [int(n) for n in re.findall(r"<b>expert (\d+):", markup)] == ranked[:5] + ranked[-5:]
    concepts = np.array([s.concept for s in scores.scores])
    error = concepts.std(ddof=1) / len(concepts) ** 0.5
    assert f"{concepts.mean():.1f} ± {error:.1f}<" in markup


def test_the_ellipse_is_at_mahalanobis_distance_1():
    x, y = np.random.default_rng(0).normal(size=(2, 50)) * [[3], [0.5]]
    y = y + 0.4 * x
    inverse = np.linalg.inv(np.cov(x, y))
    around = np.array(ellipse(x, y)) - [[x.mean()], [y.mean()]]
    np.testing.assert_allclose(np.einsum("in,ij,jn->n", around, inverse, around), 1)
    assert ellipse([2.0], [3.0])[0] == [2.0] * 90


@pytest.mark.real_model
def test_smollm2():
    model = load_model(SMOLLM2)
    mxd = random_mxd(576, "blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out", d_sae=200, d_hidden=64, k=16)
    mxd.W_out.mul_(0.02)
    before = model(model.to_tokens("Once upon a time"))
    samples = steered_samples(model, mxd, 7, n_samples=2, max_new_tokens=6)
    assert samples.steered_ids != samples.unsteered_ids
    assert samples == steered_samples(model, mxd, 7, n_samples=2, max_new_tokens=6)
    judgement = LocalJudge(model)(samples, measure(model, samples))
    assert all(0 <= number <= 100 for number in judgement)
    assert torch.equal(model(model.to_tokens("Once upon a time")), before)
