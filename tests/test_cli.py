"""The command line, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import D_MODEL, HOOK_IN, HOOK_OUT
from sae_lens import SAE
from typer.testing import CliRunner

import mxd_lens
from mxd_lens import MxD, TranscoderTrainingRunner, __version__
from mxd_lens.cli import app, named_layer, named_layers
from mxd_lens.text import token_sequences

COMMANDS = [
    "train",
    "evaluate",
    "carry",
    "steer",
    "compare",
    "dashboard",
    "frontier",
    "convert",
    "demo",
    "probe",
    "push",
    "pretrained",
]


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def text_file(tmp_path: Path, words: list[str]) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(words))
    return file


@pytest.fixture
def small(tiny_folder: Path, text_file: Path) -> list[object]:
    options = "--layer 1 --tokens 400 --batch 32 --context 16 --experts 40 --hidden 24 --k 4 --checkpoints 2"
    return ["--model", tiny_folder, "--text", text_file, *options.split()]


def test_train_and_evaluate(small, tiny_folder, text_file, tmp_path):
    out = tmp_path / "mxd"
    result = run("train", out, *small, "--activation", "silu", "--gated")
    assert f"mxd-lens evaluate {out}" in result.output
    mxd = MxD.from_pretrained(out)
    assert (mxd.cfg.d_sae, mxd.cfg.d_hidden, mxd.cfg.k, mxd.cfg.gated) == (40, 24, 4, True)
    assert (mxd.cfg.metadata.hook_name, mxd.cfg.metadata.hook_name_out) == (HOOK_IN, HOOK_OUT)
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    result = run("evaluate", out, "--text", text_file, "--sequences", 5, "--json", report, "--html", page)
    numbers = json.loads(report.read_text())
    assert f"{numbers['normalized_mse']:.3f}" in result.output
    assert 5 * 13 <= numbers["n_tokens"] <= 5 * 15  # of 16 tokens one is BOS, and one or two separate
    assert page.read_text().startswith("<!doctype html>")


def test_carry(small, text_file, tmp_path):
    one, other, out = (tmp_path / name for name in ("one", "other", "out"))
    for folder, seed in ((one, 1), (other, 2)):
        run("train", folder, *small, "--seed", seed)
    options = ["--text", text_file, "--sequences", 20, "--judged", 3]
    result = run("carry", out, one, "--again", other, *options)
    assert "found again from other seeds" in " ".join(result.output.split())
    report = json.loads((out / "carry.json").read_text())["one"]
    assert [found["by"] for found in report["stability"]] == ["decoder", "coactivation"]
    assert (out / "index.html").read_text().startswith("<!doctype html>")
    run("carry", out, one, other, *options)
    assert list(json.loads((out / "carry.json").read_text())) == ["one", "other"]
    assert "--again is for one layer" in run("carry", out, one, other, "--again", one, code=1).output
    assert "two of these layers have one name" in run("carry", out, one, one, code=1).output


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("skip_mxd", "SkipMxD"),
        ("topk_transcoder", "TopKTranscoder"),
        ("topk_skip_transcoder", "TopKSkipTranscoder"),
    ],
)
def test_other_architectures(small, tmp_path, architecture, name):
    options = ["--architecture", architecture, "--experts", 0, "--match-width", 80]
    run("train", tmp_path / "layer", *small, *options)
    layer = SAE.load_from_disk(tmp_path / "layer")
    assert type(layer).__name__ == name
    budget = 80 * (2 * D_MODEL + 1) + D_MODEL
    assert budget - 2 * D_MODEL - 1 < sum(p.numel() for p in layer.parameters()) <= budget
    assert "there is no moe" in run("train", tmp_path / "x", "--architecture", "moe", code=1).output


def test_relu_sparsity(small, tmp_path):
    run("train", tmp_path / "relu", *small, "--k", 0, "--l1", 0.01)
    assert MxD.from_pretrained(tmp_path / "relu").cfg.k is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", 41], "k must be at most d_sae, got k = 41 and d_sae = 40"),
        (["--activation", "swish"], "hidden_activation must be one of"),
        (["--hook-in", "blocks.1.mlp.hook_inn"], "no hook point 'blocks.1.mlp.hook_inn'. Near:"),
        (["--layer", 9], "no hook point 'blocks.9.mlp.hook_in'"),
        (["--text", "./nowhere.txt"], "There is no text at ./nowhere.txt"),
        (["--tokens", 10], "less than one batch"),
        (["--model", "./nowhere"], "not a Hugging Face model folder"),
    ],
)
def test_mistakes_are_said_in_a_line(arguments, message, small, tmp_path):
    result = run("train", tmp_path / "out", *small, *arguments, code=1)
    assert f"Error: {message}" in result.output or message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "cfg.json").exists()


def test_a_folder_with_another_run_is_kept(small, tmp_path):
    run("train", tmp_path / "out", *small)
    before = (tmp_path / "out" / "sae_weights.safetensors").read_bytes()
    result = run("train", tmp_path / "out", *small, code=1)
    assert "holds another run" in result.output
    assert (tmp_path / "out" / "sae_weights.safetensors").read_bytes() == before


def test_frontier(tiny_folder, text_file, tmp_path, words):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(reversed(words)))
    out = tmp_path / "sweep"
    options = "--layers 1,2 --k 2,4 --architectures mxd,topk_sae --tokens 320 --batch 32 --match-width 80"
    settings = ["--model", tiny_folder, "--text", text_file, "--other-text", other, "--sequences", 1]
    run("frontier", out, *settings, *options.split())
    known = json.loads((out / "frontier.json").read_text())
    assert len(known["points"]) == 8
    assert all(list(point["reports"]) == [str(text_file), str(other)] for point in known["points"])
    assert "TopK SAE on the output" in (out / "index.html").read_text()
    assert "expected numbers" in run("frontier", out, "--k", "8,x", code=1).output
    assert "there is no relu" in run("frontier", out, "--architectures", "relu", code=1).output


def test_steer(small, tmp_path):
    out, texts = tmp_path / "mxd", tmp_path / "texts.json"
    run("train", out, *small)
    options = ["--prompt", "the big cat", "--samples", 2, "--new-tokens", 5, "--coefficient", 40]
    result = run("steer", out, "--expert", 3, *options, "--json", texts)
    assert "expert 3 + 40" in result.output
    known = json.loads(texts.read_text())
    assert len(known["steered"]) == len(known["unsteered"]) == 2
    assert "expert 40 does not exist: there are 40" in run("steer", out, "--expert", 40, code=1).output
    assert "mode must be one of" in run("steer", out, "--expert", 3, "--mode", "x", code=1).output
    missing = run("steer", tmp_path / "none", "--expert", 3, code=1).output
    assert "is not a folder; a layer of a release is RELEASE:SAE_ID." in missing


def test_probe(small, tmp_path, words, monkeypatch):
    from mxd_lens.evals.probing.tasks import TASKS, Passage, ProbingTask

    passages = [Passage("cat" if "cat" in text else "no cat", text, text) for text in words]
    monkeypatch.setitem(
        TASKS, "cats", ProbingTask("cats", "whether there is a cat", "given", lambda: passages)
    )
    out, scores, page = tmp_path / "mxd", tmp_path / "probing.json", tmp_path / "probing.html"
    run("train", out, *small)
    options = ["--tasks", "cats", "--seeds", "0,1", "--k", "1,3", "--candidates", 10, "--texts", 80]
    result = run("probe", out, *options, "--json", scores, "--html", page)
    assert "Probing llama-of-words" in result.output
    known = json.loads(scores.read_text())
    assert list(known["settings"]["layers"]) == ["mxd"]
    assert known["tasks"]["cats"]["balance"] == {"cat": 40, "no cat": 40}
    assert page.read_text().startswith("<!doctype html>")
    assert "has 40: give fewer" in run("probe", out, "--tasks", "cats", "--k", 50, code=1).output
    assert (
        "no probing task 'x'" in run("probe", out, "--tasks", "x", "--k", 1, "--candidates", 9, code=1).output
    )


def test_rows_that_are_held_out(small, text_file, tmp_path, monkeypatch):
    """train --hold-out leaves out the very rows that evaluate --held-out judges on."""
    trained, judged = [], []

    class Runner(TranscoderTrainingRunner):
        def __init__(self, cfg, override_dataset=None, **others):
            trained.append(override_dataset)
            super().__init__(cfg, override_dataset=override_dataset, **others)

    def sequences(model, rows, *settings, **others):
        judged.append(rows)
        return token_sequences(model, rows, *settings, **others)

    monkeypatch.setattr(mxd_lens, "TranscoderTrainingRunner", Runner)
    monkeypatch.setattr(mxd_lens.text, "token_sequences", sequences)
    out, text = tmp_path / "mxd", ["--text", text_file, "--sequences", 2]
    assert f"evaluate {out} --text {text_file} --held-out" in run("train", out, *small, "--hold-out").output
    assert "judge it on another, or --held-out" in run("evaluate", out, *text).output
    assert "judge it on another" not in run("evaluate", out, *text, "--held-out").output
    everything, held_out = (set(rows["text"]) for rows in judged)
    assert not held_out & set(trained[0]["text"])
    assert held_out | set(trained[0]["text"]) == everything
    run("train", tmp_path / "all", *small)
    assert trained[1] is None


def test_layers_are_named_alike_everywhere(small, tmp_path):
    out = tmp_path / "mxd"
    run("train", out, *small)
    name, layer = named_layer(f"{out}", "cpu")
    assert (name, type(layer)) == ("mxd", MxD)
    assert named_layer(f"mine={out}", "cpu")[0] == "mine"
    name, layer = named_layer("smollm2-135m-mxd:blocks.11.mlp", "cpu")
    assert (name, layer.cfg.d_sae) == ("smollm2-135m-mxd:blocks.11.mlp", 5888)
    assert list(named_layers([f"a={out}", f"b={out}"], "cpu")) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=r"The layers of smollm2-135m-mxd: blocks\.11\.mlp\."):
        named_layer("smollm2-135m-mxd", "cpu")


def test_evaluate_says_what_is_wrong_with_a_folder(tmp_path):
    assert "cfg.json" in run("evaluate", tmp_path, code=1).output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command):
    from typer.main import get_command

    for parameter in get_command(app).commands[command].params:
        if parameter.name != "help":
            assert parameter.help, f"{command} {parameter.name}"


def test_version():
    assert run("--version").output.strip() == f"mxd_lens {__version__}"


def test_help_waits_for_nothing_heavy():
    """Seconds are not asserted: that torch and SAELens stay out is what keeps --help quick."""
    heavy = {"torch", "sae_lens", "transformers", "numpy"}
    code = f"import sys, mxd_lens.cli; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo(tiny_folder, tmp_path):
    from mxd_lens.demo import run_demo

    report = run_demo(
        tmp_path,
        layer=1,
        training_tokens=2000,
        text_tokens=1000,
        n_sequences=2,
        new_tokens=4,
        model_name=str(tiny_folder),
        k=8,
    )
    assert report.normalized_mse > 0
    assert (tmp_path / "report.json").exists()
    assert "with the layer in place of the MLP" in (tmp_path / "index.html").read_text()
    assert MxD.from_pretrained(tmp_path).cfg.d_in == D_MODEL
