"""Explanations and their scores: known ones for planted experts, judges that fail, and delphi's files."""

import json
import math

import numpy as np
import pytest
import torch
from chat_stand_in import ChatStandIn
from planted import FIRST, HOOK_OUT, N_WORDS, PlantedModel, planted_mxd, planted_tokens, planted_transcoder
from rich.console import Console
from safetensors.numpy import load_file

from mxd_lens.adapters.delphi import export_interpretations, export_latents
from mxd_lens.evals.autointerp import (
    AUTOINTERP_FILENAME,
    Autointerp,
    EndpointInterpreter,
    Interpretation,
    LocalInterpreter,
    Trial,
    autointerp,
    interpret,
    marked_spans,
    parse_answers,
    parse_explanation,
)
from mxd_lens.evals.passages import ExpertPassages, Passage, read_passages

BOS = 1
SMALL = {"length": 8, "n_explain": 6, "n_test": 6, "progress": False}


def passage(tokens: str, *coefficients: float) -> Passage:
    parts = [f" {word}" for word in tokens.split()]
    return Passage(list(range(len(parts))), parts, list(coefficients))


def interpreted(tmp_path, sae=None, **settings) -> Autointerp:
    sae = sae or planted_mxd()
    return autointerp(sae, PlantedModel(sae), planted_tokens(), tmp_path, **(SMALL | settings))


# Passages


def test_passages_hold_what_the_expert_does():
    sae, tokens = planted_mxd(), planted_tokens()
    model = PlantedModel(sae)
    (of,) = read_passages(sae, model, tokens, [4], 8, 6, 6, progress=False)
    a = sae.encode(model.input(tokens))[..., 4]
    a[:, 0] = 0  # BOS
    windows = a[:, :48].reshape(-1, 8)
    assert of.n_firing == (windows.amax(-1) > 0).sum()
    assert len(of.explain) == len(of.test) == len(of.silent) == 6
    assert all(p.fires for p in of.explain + of.test)
    assert not any(p.fires for p in of.silent)
    for p in of.explain + of.test + of.silent:
        assert p.text == "".join(f" w{i}" for i in p.ids)
        assert BOS not in p.ids
        assert p.coefficients == [2.0 if i == FIRST + 4 else 0.0 for i in p.ids]
    keys = [tuple(p.ids) for p in of.explain + of.test]
    assert len(set(keys)) == len(keys)


def test_what_is_tested_on_is_spread_over_the_strengths():
    sae = planted_transcoder(k=3)
    torch.manual_seed(0)
    sae.W_enc[FIRST:15, 0] = torch.rand(12) + 0.1  # expert 0 fires on every word, more or less
    (of,) = read_passages(sae, PlantedModel(sae), planted_tokens(20, 33), [0], 1, 8, 8, progress=False)
    peaks = [p.peak for p in of.test]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 2 * peaks[-1]
    assert max(p.peak for p in of.explain) >= peaks[0]


def test_the_batch_size_does_not_matter():
    sae, tokens = planted_mxd(), planted_tokens()
    one, other = (
        read_passages(sae, PlantedModel(sae), tokens, [0, 13], 8, 6, 6, batch_size=b, progress=False)
        for b in (1, 40)
    )
    assert one == other


def test_marks():
    p = passage("a b c d e", 0, 1.0, 0.9, 0.1, 0)
    assert p.strong == [1, 2]
    assert p.marked() == " a<< b c>> d e"
    assert p.silent == [0, 4]
    assert p.marked([0, 4]) == "<< a>> b c d<< e>>"
    assert marked_spans(p.marked([0, 4])) == [" a", " e"]
    assert passage("a b", 0, 0).marked() == " a b"


# The local interpreter on planted experts


def test_planted_words_are_explained_and_contexts_are_not(tmp_path):
    result = interpreted(tmp_path, experts=range(N_WORDS + 4))
    for i in result.interpretations[:N_WORDS]:
        assert i.explanation == f'The tokens [" w{FIRST + i.expert}"]'
        assert i.accuracy("detection") == i.accuracy("fuzzing") == 1
        assert len(i.detection) == 12
        assert sum(t.truth for t in i.detection) == 6
        assert not i.failure
    contexts = [i.accuracy("fuzzing") for i in result.interpretations[N_WORDS:]]
    assert sum(contexts) / 4 < 0.85
    assert result.mean("fuzzing") < 1


def test_an_expert_that_hardly_fires_is_marked(tmp_path, caplog):
    (dead,) = interpreted(tmp_path, experts=[N_WORDS + 5]).interpretations
    assert dead.failure == "it fires on 0 passages, and 4 are needed"
    assert dead.explanation == ""
    assert math.isnan(dead.accuracy("detection"))
    assert "Expert 17: it fires on 0 passages" in caplog.text


def test_balanced_accuracy():
    def trials(*pairs):
        return [Trial([], [], "", truth, answer) for truth, answer in pairs]

    answered = trials((True, True), (True, True), (True, False), (False, False), (False, None))
    of = Interpretation(0, 9, "x", answered, trials((True, True)), "")
    assert of.accuracy("detection") == pytest.approx((2 / 3 + 1) / 2)
    assert math.isnan(of.accuracy("fuzzing"))


def test_results_are_kept_shown_and_gone_on_with(tmp_path):
    class Counting(LocalInterpreter):
        explained = 0

        def explain(self, passages):
            type(self).explained += 1
            if self.explained == 3:
                raise KeyboardInterrupt
            return super().explain(passages)

    with pytest.raises(KeyboardInterrupt):
        interpreted(tmp_path, experts=[1, 2, 13], interpreter=Counting())
    file = tmp_path / AUTOINTERP_FILENAME
    assert len(Autointerp.load(file).interpretations) == 2
    with file.open("a") as cut_off:
        cut_off.write('{"expert": 13, "n_fir')
    result = interpreted(tmp_path, experts=[1, 2, 13], interpreter=Counting())
    assert Counting.explained == 4
    assert Autointerp.load(file) == result
    assert result.interpretations == interpreted(tmp_path / "new", experts=[1, 2, 13]).interpretations
    console = Console(width=140, record=True)
    console.print(result)
    assert 'The tokens [" w4"]' in console.export_text()
    with pytest.raises(ValueError, match=r"other interpretations\. seed: 0 then, 1 now"):
        interpreted(tmp_path, experts=[1], seed=1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"experts": 0}, ValueError, "experts must be at least 1"),
        ({"experts": [18]}, IndexError, "expert 18 does not exist"),
        ({"length": 0}, ValueError, "length must be at least 1"),
        ({"length": 51}, ValueError, "Sequences of 50 tokens hold no passage of 51"),
        ({"n_test": 0}, ValueError, "n_test must be at least 1"),
    ],
)
def test_bad_input(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        interpreted(tmp_path, **settings)


# An interpreter behind an endpoint

PASSAGES = ExpertPassages(
    expert=5,
    explain=[passage("a b", 0, 2.0), passage("c b", 0, 1.0)],
    test=[passage("d b", 0, 1.5), passage("b e", 1.0, 0)],
    silent=[passage("d e", 0, 0), passage("a a", 0, 0)],
    n_firing=4,
)
SAID = '{"explanation": "the letter b"}'


def at(endpoint: ChatStandIn, **changes) -> EndpointInterpreter:
    settings = {"api_key": "a-key", "timeout": 5.0, "pause": 0.0, "attempts": 2} | changes
    return EndpointInterpreter(endpoint.url, "judge-1", **settings)


def test_what_the_endpoint_is_asked(endpoint):
    endpoint.answers = [(200, f"Sure:\n{SAID}"), (200, "[1, 0]"), (200, "[0, 1]"), (200, "```[1, 0]```")]
    result = interpret(at(endpoint, at_once=2), PASSAGES)
    assert result.explanation == "the letter b"
    assert not result.failure
    questions = [[m["content"] for m in body["messages"]] for _, _, body in endpoint.asked]
    assert "Passage 1:  a<< b>>\n\nPassage 2:  c<< b>>" in questions[0][1]
    assert [len(questions), len(result.detection), len(result.fuzzing)] == [4, 4, 2]
    assert "The description: the letter b" in questions[1][1]
    assert "<<" not in questions[1][1] + questions[2][1]
    assert questions[3][1].count("<<") == 2
    assert [t.answer for t in result.detection] == [True, False, False, True]
    assert [t.text for t in result.detection] == [
        line.split(": ", 1)[1] for question in questions[1:3] for line in question[1].split("\n\n")[1:]
    ]
    assert "a-key" not in repr(at(endpoint))
    assert "EndpointInterpreter(url=" in repr(at(endpoint))


def test_nonsense_is_marked_and_the_next_expert_has_its_turn(endpoint):
    endpoint.answers = [(200, "I cannot say.")]
    none = interpret(at(endpoint), PASSAGES)
    assert none.failure.startswith("no explanation: the interpreter was asked for")
    assert none.explanation == ""
    assert none.detection == none.fuzzing == []
    endpoint.answers = [(200, SAID), (200, "yes, no"), (200, "[1, 0, 1]"), (200, "[1, 0]")]
    half = interpret(at(endpoint), PASSAGES)
    assert half.failure == (
        "no detection: the interpreter was asked for a list of 4 numbers, each 0 or 1, and answered "
        "'[1, 0, 1]'."
    )
    assert [t.answer for t in half.detection] == [None] * 4
    assert math.isnan(half.accuracy("detection"))
    assert [t.answer for t in half.fuzzing] == [True, False]
    assert not math.isnan(half.accuracy("fuzzing"))


def test_an_interpreter_with_answers_too_few():
    class Curt(LocalInterpreter):
        def applies(self, explanation, texts, task):  # noqa: ARG002
            return [True]

    result = interpret(Curt(), PASSAGES)
    assert "no detection: 1 answers to 4 questions" in result.failure


def test_an_endpoint_that_does_not_answer_stops_the_run(endpoint, tmp_path):
    endpoint.answers = [(401, b"who are you?")]
    with pytest.raises(ConnectionError, match=r"answered 401 Unauthorized: who are you\?"):
        interpret(at(endpoint), PASSAGES)
    endpoint.answers = [("slow", SAID)]
    with pytest.raises(ConnectionError, match="no answer at attempt 2 of 2"):
        interpret(at(endpoint, timeout=0.1), PASSAGES)
    nobody = EndpointInterpreter("http://127.0.0.1:9", "judge-1", attempts=1, pause=0.0)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9 gave no answer"):
        interpreted(tmp_path, experts=[1], interpreter=nobody)


@pytest.mark.parametrize("answer", ["", None, "[]", '{"explanation": ""}', '{"explanation": 3}', "{a}"])
def test_malformed_explanations(answer):
    with pytest.raises(ValueError, match="the interpreter was asked for"):
        parse_explanation(answer)


@pytest.mark.parametrize("answer", ["", None, "[1]", "[1, 2]", "[1, 0, 1]", '["1", "0"]', "{}", "[[1], [0]]"])
def test_malformed_answers(answer):
    with pytest.raises(ValueError, match="a list of 2 numbers"):
        parse_answers(answer, 2)


def test_the_local_interpreter_knows_its_own_explanations_alone():
    with pytest.raises(ValueError, match="knows only its own"):
        LocalInterpreter().applies("the letter b", ["b"], "detection")
    with pytest.raises(ValueError, match="no passage on which the expert fires"):
        LocalInterpreter().explain([])


# delphi's files


def test_latents_as_delphi_keeps_them(tmp_path):
    sae, tokens = planted_mxd(), planted_tokens(7, 20)
    model = PlantedModel(sae)
    where = export_latents(tmp_path, sae, model, tokens, 3, "words", batch_size=2, progress=False)
    assert where == tmp_path / "latents" / HOOK_OUT
    a = sae.encode(model.input(tokens))
    a[:, 0] = 0  # BOS
    got = torch.zeros_like(a)
    files = sorted(where.glob("*.safetensors"), key=lambda f: int(f.stem.split("_")[0]))
    assert [f.stem for f in files] == ["0_5", "6_11", "12_17"]
    for file in files:
        # Read as delphi's loader reads: ids start at the number in the file's name.
        data = load_file(file)
        start, end = map(int, file.stem.split("_"))
        locations = data["locations"].astype(np.int64)
        assert data["locations"].dtype == np.uint16
        assert data["activations"].dtype == np.float16
        assert np.array_equal(data["tokens"], tokens.numpy())
        locations[:, 2] += start
        assert locations[:, 2].max() <= end
        assert np.all(np.diff(locations[:, 0] * 20 + locations[:, 1]) >= 0)
        got[tuple(torch.tensor(locations).T)] = torch.tensor(data["activations"]).float()
    torch.testing.assert_close(got, a)
    config = json.loads((where / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_tokens"], config["model_name"]) == (20, 140, "planted")
    with pytest.raises(ValueError, match="n_splits must be from 1 to d_sae = 18"):
        export_latents(tmp_path, sae, model, tokens, 19, progress=False)
    sae.W_enc[:, 0] *= 1e6
    with pytest.raises(ValueError, match=r"larger than 65,504"):
        export_latents(tmp_path, sae, model, tokens, progress=False)


def test_interpretations_as_delphi_keeps_them(tmp_path):
    sae = planted_mxd()
    result = interpreted(tmp_path / "run", sae, experts=[4, N_WORDS + 5])
    export_interpretations(tmp_path, sae, result)
    name = f"{HOOK_OUT}_latent4.txt"
    assert json.loads((tmp_path / "explanations" / name).read_text()) == 'The tokens [" w7"]'
    assert [f.name for f in (tmp_path / "explanations").iterdir()] == [name]  # the dead one has none
    for scorer in ("detection", "fuzz"):
        scores = json.loads((tmp_path / "scores" / scorer / name).read_text())
        assert all(s["correct"] is True and s["prediction"] is s["activating"] for s in scores)
        assert len(scores[0]["str_tokens"]) == len(scores[0]["activations"])
