"""The command line, run as a user runs it."""

import inspect
import json
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import torch
import typer
from command_line import run
from sae_lens import LoggingConfig
from sae_lens.util import get_special_token_ids
from tiny import D_MODEL, HOOK_IN, HOOK_OUT
from typer.main import get_command

import mxd_lens
from mxd_lens import (
    MxD,
    TranscoderTrainingRunner,
    __version__,
    expert_card,
    expert_statistics,
    find_experts,
    load_layer,
    load_model,
    top_experts,
)
from mxd_lens.architectures.base import ARCHITECTURES
from mxd_lens.cli import app
from mxd_lens.cli.config_fields import COMPUTED, architecture_names, fields_of
from mxd_lens.cli.loading import LayerSource
from mxd_lens.cli.options import integers
from mxd_lens.demo import run_demo
from mxd_lens.text import load_text, token_sequences
from mxd_lens.training.config import NOT_SUPPORTED, TranscoderRunnerConfig

# `mxd_lens.cli.train` is the module; the command of this name is inside.
train = import_module("mxd_lens.cli.train")
members = train.members
COMMANDS = [name for name, command in get_command(app).commands.items() if not command.hidden]


@pytest.fixture
def text_file(tmp_path: Path, words: list[str]) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(words))
    return file


@pytest.fixture
def small(tiny_folder: Path, text_file: Path) -> list[object]:
    options = "--layer 1 --tokens 400 --batch 32 --context 16 --experts 40 --k 4 --checkpoints 2"
    return ["--model", tiny_folder, "--text", text_file, *options.split()]


@pytest.fixture
def mxd(small, tmp_path: Path) -> Path:
    run("train", tmp_path / "mxd", *small, "--hidden", 24)
    return tmp_path / "mxd"


def test_train_and_evaluate(small, tiny_folder, text_file, tmp_path):
    out = tmp_path / "mxd"
    result = run("train", out, *small, "--hidden", 24, "--activation", "silu", "--gated")
    assert f"mxd-lens evaluate {out}" in result.output
    assert "Training mxd with d_sae = 40" in result.output
    mxd = MxD.from_pretrained(out)
    assert (mxd.cfg.d_sae, mxd.cfg.d_hidden, mxd.cfg.k, mxd.cfg.gated) == (40, 24, 4, True)
    assert (mxd.cfg.metadata.hook_name, mxd.cfg.metadata.hook_name_out) == (HOOK_IN, HOOK_OUT)
    options = ["--text", text_file, "--sequences", 5]
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    result = run("evaluate", f"mine={out}", *options, "--json", report, "--html", page)
    numbers = json.loads(report.read_text())
    assert f"{numbers['normalized_mse']:.3f}" in result.output
    assert 5 * 13 <= numbers["n_tokens"] <= 5 * 15  # of 16 tokens one is BOS, and one or two separate
    html = page.read_text()
    assert "mine: how faithful it is" in html
    assert "The training curve" in html or "training" in html
    printed = json.loads(run("evaluate", out, *options, "--json", "-").stdout)
    assert printed == numbers
    bridge = json.loads(run("evaluate", out, *options, "--json", "-", "--bridge").stdout)
    assert bridge["normalized_mse"] == pytest.approx(numbers["normalized_mse"], rel=1e-4)


def test_ablation(mxd, small, text_file, tmp_path):
    other, out = tmp_path / "other", tmp_path / "out"
    run("train", other, *small, "--hidden", 24, "--seed", 2)
    options = ["--output", out, "--text", text_file, "--sequences", 20, "--evaluated", 3]
    result = run("ablation", mxd, "--again", other, *options)
    assert "from other seeds" in " ".join(result.output.split())
    report = json.loads((out / "ablation.json").read_text())["mxd"]
    assert [found["by"] for found in report["stability"]] == ["decoder", "coactivation"]
    assert (out / "index.html").read_text().startswith("<!doctype html>")
    printed = json.loads(run("ablation", mxd, other, *options, "--json", "-").stdout)
    assert list(printed) == ["mxd", "other"]
    assert "it is for one layer" in run("ablation", mxd, other, "--again", mxd, *options, code=2).output
    result = run("carry", mxd, *options)
    assert "deprecated" in result.output


@pytest.mark.parametrize("architecture", ["skip_mxd", "topk_transcoder", "topk_skip_transcoder"])
def test_other_architectures(small, tmp_path, architecture):
    options = [*small[: small.index("--experts")], "--k", 4, "--checkpoints", 2]
    run("train", tmp_path / "layer", *options, "--architecture", architecture, "--match-width", 80)
    layer = load_layer(tmp_path / "layer")
    assert layer.cfg.architecture() == architecture
    budget = 80 * (2 * D_MODEL + 1) + D_MODEL
    assert budget - 2 * D_MODEL - 1 < sum(p.numel() for p in layer.parameters()) <= budget


def test_relu_sparsity(small, tmp_path):
    run("train", tmp_path / "relu", *small, "--k", 0, "--l1", 0.01)
    assert MxD.from_pretrained(tmp_path / "relu").cfg.k is None


def test_several_layers_in_one_command(small, tmp_path):
    """One folder for each, as if trained alone; the layers of one release."""
    out = tmp_path / "all"
    result = run("train", out, *small, "--layers", "all", "--architectures", "mxd,topk_transcoder")
    names = [f"blocks.{block}.mlp-{name}" for block in range(3) for name in ("mxd", "topk_transcoder")]
    assert sorted(folder.parent.name for folder in out.glob("*/cfg.json")) == sorted(names)
    for name in names:
        assert f"{name}: normalised MSE" in result.output
        assert load_layer(out, name).cfg.metadata.hook_name == f"blocks.{name[7]}.mlp.hook_in"
    assert "holds another run" in run("train", out, *small, "--layers", "all", code=1).output


@pytest.mark.parametrize(
    ("layers", "seeds", "names"),
    [
        ("12", "42", ["blocks.12.mlp"]),
        ("0-6:3", "1", ["blocks.0.mlp", "blocks.3.mlp", "blocks.6.mlp"]),
        ("2,1", "0-1", [f"blocks.{block}.mlp-seed{seed}" for block in (2, 1) for seed in (0, 1)]),
    ],
)
def test_the_folders_of_several_layers(layers, seeds, names):
    assert list(train.members(layers, "mxd", "32", seeds, 30)) == names


# What is generated from the config classes


def test_the_fields_are_those_of_the_classes():
    """What is read from the source is what the classes have: names, and defaults where they are literal."""
    expected = {
        "TranscoderRunnerConfig": (train.RUN, TranscoderRunnerConfig),
        "LoggingConfig": (train.LOGGING, LoggingConfig),
    }
    for found, config in expected.values():
        assert list(found) == [f.name for f in fields(config)]
        for f in fields(config):
            if found[f.name].default is not COMPUTED and found[f.name].default != {}:
                assert found[f.name].default == f.default, f.name
    assert architecture_names(*train.LAYER_FILES) == {
        name: made.training_config.__name__ for name, made in ARCHITECTURES.items()
    }
    for made in ARCHITECTURES.values():
        ours = fields_of(made.training_config.__name__, *train.LAYER_FILES)
        assert set(ours) <= {f.name for f in fields(made.training_config)}


def test_every_field_of_the_config_has_one_option():
    options = [option for option in get_command(app).commands["train"].params if option.name != "help"]
    assert len({option.name for option in options}) == len(options)
    asked_otherwise = {
        "model_name": "model",
        "dataset_path": "text",
        "output_path": "output",
        "seed": "seeds",
    }
    names = {option.name for option in options}
    for f in (*fields(TranscoderRunnerConfig), *fields(LoggingConfig)):
        reached = asked_otherwise.get(f.name, f.name)
        assert reached in names or f.name in NOT_SUPPORTED or f.name in {
            "sae", "logger", "hook_eval", "sae_lens_version", "sae_lens_training_version",
            "llm_compilation_mode", "sae_compilation_mode",
        }, f.name  # fmt: skip


def test_the_settings_reach_the_run(small, tmp_path):
    options = (
        "--adam-beta1 0.5 --no-standardize --lr 0.01 --warm-up 3 --decay 2 --exclude-special-tokens [1,2]"
    )
    options += " --sequence-separator-token none --cached-activations-dtype float32 --run-name mine"
    run("train", tmp_path / "out", *small, *options.split(), "--keep-special-tokens")
    cfg = json.loads((tmp_path / "out" / "runner_cfg.json").read_text())
    assert (cfg["adam_beta1"], cfg["lr"], cfg["standardize_activations"]) == (0.5, 0.01, False)
    assert (cfg["lr_warm_up_steps"], cfg["lr_decay_steps"]) == (3, 2)
    assert cfg["sequence_separator_token"] is None
    assert cfg["logger"]["run_name"] == "mine"


@pytest.mark.parametrize(
    ("hook_in", "hook_out", "found"),
    [
        ("", "", ("blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out")),
        ("blocks.5.mlp.hook_in", "", ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")),
        ("", "blocks.5.hook_mlp_out", ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")),
        ("blocks.5.ln2.hook_normalized", "", ("blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out")),
        ("blocks.5.hook_resid_mid", "", None),
        ("a", "b", ("a", "b")),
    ],
)
def test_one_hook_tells_the_other(hook_in, hook_out, found):
    given = {"hook_name": hook_in, "hook_name_out": hook_out}
    member = train.Member(12, "mxd", 32, 0)
    if found is None:
        with pytest.raises(typer.BadParameter, match="give both"):
            train.hooks(member, "12", given)
    else:
        assert train.hooks(member, "12", given) == found


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--k", 41], 2, "41 active experts are more than --experts 40"),
        (["--activation", "swish"], 1, "hidden_activation must be one of"),
        (["--hook-in", "blocks.1.mlp.hook_inn", "--hook-out", HOOK_OUT], 1, "'blocks.1.mlp.hook_inn'"),
        (["--layer", 9], 2, "there is no block 9: the model has 3, 0 to 2"),
        (["--text", "./nowhere.txt"], 2, "There is no text at ./nowhere.txt"),
        (["--tokens", 10], 2, "10 tokens are less than one batch of 32"),
        (["--model", "./nowhere"], 2, "not a Hugging Face model folder"),
        (["--warm-up", 999999], 2, "more than the run's 12 steps"),
        (["--architecture", "moe"], 2, "there is no architecture 'moe'"),
        (["--architecture", "topk_transcoder", "--hidden", 9], 2, "topk_transcoder has no d_hidden"),
        (["--dtype", "float16"], 2, "Adam's epsilon is zero"),
        (["--k", 0], 2, "needs an L1 penalty"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_a_line(arguments, code, message, small, tmp_path):
    result = run("train", tmp_path / "out", *small, *arguments, code=code)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out" / "cfg.json").exists()


BAD = {
    int: ["-1", "x", "1.5", ""],
    float: ["x", "nan", "inf", ""],
    "layers": ["3-", "x", "0-9999999999", "5-2", "-1", "1,,2", "99"],
    "k": ["3-", "x", "0-9999999999", "-4", "1.5"],
    "seeds": ["3-", "x", "0-9999999999", "-1"],
    "experts": ["3-", "x", "0-9999999999", "-1", "99999"],
    "expert": ["99999"],
    "device": ["foo", "cuda:99", "gpu", ""],
    "model": ["./nowhere", "~/nowhere"],
    "text": ["./nowhere.txt", ""],
    "other_text": ["./nowhere.txt"],
    "mode": ["x", ""],
    "dtype": ["float16", "float8", "x"],
    "architectures": ["moe", "mxd,moe", ""],
    "json": ["/nosuchdir/x.json", "/"],
    "html": ["/nosuchdir/x.html", "/"],
    "output": ["/dev/null/x"],
    "cache": ["/dev/null/x"],
    "dry_run": ["/dev/null/x"],
    "again": ["./nowhere", "x=./nowhere", "smollm2-135m-mxd", "smollm2-135m-mxd:blocks.3.mlp"],
    "report": ["./nowhere.json"],
}
"""Values that no option of this name, or of this type, may have."""
BAD_LAYERS = [
    "./nowhere", "mine=./nowhere", "=", "=x", "smollm2-135m-mxd", "smollm2-135m-mxd:blocks.3.mlp",
    "smollm2-135m-mdx:blocks.11.mlp", "gemma-scope-2b-pt-ress:x", ":", "", "a b", "x:y",
]  # fmt: skip
LAYER_COMMANDS = (
    *("evaluate", "steer", "ablation", "compare", "dashboard", "probe"),
    *("read", "find", "card", "stats"),
)
NOT_ZERO = {
    *("training_tokens", "train_batch_size_tokens", "context_size", "d_sae", "d_hidden", "sequences"),
    *("n_batches_in_buffer", "store_batch_size_prompts", "n_checkpoints_kept", "judged", "samples"),
    *("new_tokens", "top_p", "predictions", "candidates", "texts", "tokens", "batch", "at_once"),
}


def good_lines(layer: Path, folder: Path, text: Path, model: Path) -> dict[str, list[str]]:
    """A command line of every command that runs as far as to the language model."""
    where = ["--text", str(text)]
    return {
        "train": [str(folder / "out"), "--model", str(model), *where, "--layers", "1"],
        "evaluate": [str(layer), *where],
        "ablation": [str(layer), "--output", str(folder / "out"), *where],
        "steer": [str(layer), "--expert", "3"],
        "compare": [str(layer), "--output", str(folder / "out.html"), "--prompt", "the cat", *where],
        "dashboard": [str(layer), "--output", str(folder / "out"), *where],
        "frontier": [str(folder / "out"), "--model", str(model), *where, "--layers", "1"],
        "probe": [str(layer), "--k", "1,2", "--candidates", "5"],
        "read": [str(layer), "--prompt", "the cat"],
        "find": [str(layer), "--with", "the cat", "--without", "a dog"],
        "card": [str(layer), "--expert", "3", *where],
        "stats": [str(layer), *where],
    }


def test_what_is_asked_about_experts(mxd, text_file, tiny_folder, tmp_path):
    model, sae = load_model(tiny_folder), load_layer(mxd)
    prompt, without = "the big cat sat", ["a dog ran", "the dog slept"]
    where = ["--model", tiny_folder]
    tokens = token_sequences(model, load_text(str(text_file)), 8, 16)
    counted = expert_statistics(model, sae, tokens, progress=False)
    of_text = ["--text", text_file, "--sequences", 8]
    results = {
        ("read", "--prompt", prompt, "--top", 3): top_experts(model, sae, prompt, 3),
        ("find", "--with", prompt, "--with", "a cat ran", "--without", without[0], "--without", without[1]): (
            find_experts(model, sae, [prompt, "a cat ran"], without, progress=False)
        ),
        ("card", "--expert", 3, *of_text): expert_card(sae, 3, counted),
        ("stats", *of_text): counted,
    }
    for (verb, *line), expected in results.items():
        said = run(verb, mxd, *line, *where, "--json", tmp_path / "out.json").output
        assert str(expected) in said
        rows = json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda _: 1 / 0)
        assert [list(row) for row in rows] == [list(expected.columns)] * len(list(expected.rows))


def test_jumprelu_has_a_penalty_in_place_of_k(small, tmp_path):
    options = [*small, "--architectures", "jumprelu_transcoder,topk_transcoder", "--k", "2,4"]
    result = run("train", tmp_path / "out", *options, code=2)
    assert "add --l0-coefficient" in result.output
    run(
        "train",
        tmp_path / "out",
        *options[:-4],
        "--architecture",
        "jumprelu_transcoder",
        "--l0-coefficient",
        0.1,
    )
    layer = load_layer(tmp_path / "out")
    assert (layer.cfg.architecture(), layer.cfg.k) == ("jumprelu_transcoder", None)
    names = members("1", "jumprelu_transcoder,topk_transcoder", "2,4", "0")
    assert [(n, m.k) for n, m in names.items()] == [
        ("blocks.1.mlp-jumprelu_transcoder", 0),
        ("blocks.1.mlp-topk_transcoder-k2", 2),
        ("blocks.1.mlp-topk_transcoder-k4", 4),
    ]


def bad_lines(good: dict[str, list[str]]) -> list[list[str]]:
    """Command lines with one argument that is wrong, for every option of every command."""
    lines = []
    callbacks = {info.callback.__name__: info.callback for info in app.registered_commands}
    for name, line in good.items():
        kinds = inspect.signature(callbacks[name]).parameters
        for parameter in get_command(app).commands[name].params:
            if parameter.name == "help":
                continue
            kind = get_args(kinds[parameter.name].annotation)[0]
            kind = next((number for number in (int, float) if number in (get_args(kind) or [kind])), str)
            values = BAD.get(parameter.name) or BAD.get(kind, [])
            for value in [*values, *(["0"] if parameter.name in NOT_ZERO else [])]:
                if parameter.param_type_name == "argument":
                    lines.append([name, value, *line[1:]])
                else:
                    lines.append([name, *line, f"{parameter.opts[0]}={value}"])
        if "layer" in line[0] or name in LAYER_COMMANDS:
            lines += [[name, layer, *line[1:]] for layer in BAD_LAYERS]
        lines += [[name], [name, *line, "--nosuch"], [name, *line, "--device"]]
    folder = good["evaluate"][0]
    lines += [
        ["push", "./nowhere", "user/repo"], ["push", folder, "user"], ["push", folder, "a/b/c"],
        ["push", folder], ["push", folder, "user/repo", "--report", "nowhere.json"],
        ["push", folder, "user/repo", "--dry-run", "/dev/null/x"],
        ["convert", "./nowhere.pt", "-o", "x"], ["convert", folder], ["convert"],
        ["pretrained", "x"], ["pretrained", "--json", "/nosuchdir/x"],
        ["demo", "--layer", "30"], ["demo", "--layer", "-1"], ["demo", "--tokens", "0"],
        ["demo", "--sequences", "0"], ["demo", "--output", "/dev/null/x"], ["demo", "x"],
        ["trian"], ["--nosuch"], ["steer", folder],
    ]  # fmt: skip
    return lines


@pytest.mark.slow
def test_bad_arguments_are_refused_before_a_model_is_loaded(
    mxd, text_file, tiny_folder, tmp_path, monkeypatch
):
    loaded = []
    monkeypatch.setattr("mxd_lens.models.load_model", lambda *a, **k: loaded.append(a) or 1 / 0)
    good = good_lines(mxd, tmp_path, text_file, tiny_folder)
    lines = bad_lines(good)
    assert len(lines) >= 300
    wrong = []
    for line in lines:
        loaded.clear()
        result = run(*line, code=None)
        output = result.output
        if (
            result.exit_code not in (1, 2)
            or loaded
            or any(word in output for word in ("Traceback", "Errno", "islice", "fault in mxd_lens"))
            or not output.strip()
        ):
            wrong.append((line, result.exit_code, output[-300:]))
    assert wrong == []
    for name, line in good.items():  # the lines are bad for the one argument that is changed
        loaded.clear()
        run(name, *line, code=1)
        assert loaded, name


@pytest.mark.slow
def test_bad_arguments_wait_for_nothing_heavy(mxd, text_file, tiny_folder, tmp_path):
    """SAELens takes seconds to import: what is wrong is said before."""
    lines = bad_lines(good_lines(mxd, tmp_path, text_file, tiny_folder))
    lines = [line for line in lines if line[0] != "frontier" or "--architectures" not in line[-1]]
    lines.sort(key=lambda line: "cuda" in line[-1])  # whether there is one, torch knows
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from mxd_lens.cli import app\n"
        "for line in json.load(sys.stdin):\n"
        "    CliRunner().invoke(app, line)\n"
        "    assert 'sae_lens' not in sys.modules, line\n"
        "    assert 'torch' not in sys.modules or 'cuda' in line[-1], line\n"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(lines), text=True, check=True)


def test_help_waits_for_nothing_heavy():
    """Seconds are not asserted: that torch and SAELens stay out is what keeps --help quick."""
    heavy = {"torch", "sae_lens", "transformers", "numpy"}
    code = f"import sys, mxd_lens.cli; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_that_nobody_expected_is_one_line(mxd, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise KeyError("layer_norm")

    monkeypatch.setattr("mxd_lens.models.load_model", fails)
    output = run("evaluate", mxd, code=1).output
    assert "KeyError: 'layer_norm'" in output
    assert "MXD_LENS_TRACEBACK=1" in output
    monkeypatch.setenv("MXD_LENS_TRACEBACK", "1")
    with pytest.raises(KeyError):
        typer.testing.CliRunner().invoke(app, ["evaluate", str(mxd)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "x.json"), "Error: x.json: No space left on device."),
        (MemoryError(), "the memory is full"),
        (RuntimeError("Every layer failed."), "Error: Every layer failed."),
    ],
)
def test_errors_of_the_machine(error, said, mxd, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mxd_lens.models.load_model", fails)
    assert said in run("evaluate", mxd, code=1).output


def test_a_folder_with_another_run_is_kept(mxd, small):
    before = (mxd / "sae_weights.safetensors").read_bytes()
    assert "holds another run" in run("train", mxd, *small, "--hidden", 24, code=1).output
    assert "finished run" in run("train", mxd, *small, "--hidden", 24, "--resume", code=2).output
    assert (mxd / "sae_weights.safetensors").read_bytes() == before


# The other commands


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


def test_steer(mxd, tmp_path):
    texts = tmp_path / "texts.json"
    options = ["--prompt", "the big cat", "--samples", 2, "--new-tokens", 5, "--coefficient", 40]
    result = run("steer", mxd, "--expert", 3, *options, "--json", texts)
    assert "expert 3 + 40" in result.output
    known = json.loads(texts.read_text())
    assert len(known["steered"]) == len(known["unsteered"]) == 2
    assert (
        "there is no expert 40: the layer has 40, 0 to 39" in run("steer", mxd, "--expert", 40, code=2).output
    )


def test_probe(mxd, tmp_path, words, monkeypatch):
    from mxd_lens.evals.probing.tasks import TASKS, Passage, ProbingTask

    passages = [Passage("cat" if "cat" in text else "no cat", text, text) for text in words]
    monkeypatch.setitem(
        TASKS, "cats", ProbingTask("cats", "whether there is a cat", "given", lambda: passages)
    )
    scores, page = tmp_path / "probing.json", tmp_path / "probing.html"
    options = ["--tasks", "cats", "--seeds", "0,1", "--k", "1,3", "--candidates", 10, "--texts", 80]
    result = run("probe", mxd, *options, "--json", scores, "--html", page)
    assert "Probing llama-of-words" in result.output
    known = json.loads(scores.read_text())
    assert list(known["settings"]["layers"]) == ["mxd"]
    assert known["tasks"]["cats"]["balance"] == {"cat": 40, "no cat": 40}
    assert page.read_text().startswith("<!doctype html>")
    assert "mxd has only 40 experts" in run("probe", mxd, "--k", 50, code=2).output
    unknown = run("probe", mxd, "--tasks", "x", "--k", 1, "--candidates", 9, code=1)
    assert "no probing task 'x'" in unknown.output


def test_rows_that_are_held_out(small, text_file, tmp_path, monkeypatch):
    """train --hold-out leaves out the very rows that evaluate --held-out uses."""
    trained, evaluated = [], []

    class Runner(TranscoderTrainingRunner):
        def __init__(self, cfg, override_dataset=None, **others):
            trained.append(override_dataset)
            super().__init__(cfg, override_dataset=override_dataset, **others)

    def sequences(model, rows, *settings, **others):
        evaluated.append(rows)
        return token_sequences(model, rows, *settings, **others)

    monkeypatch.setattr("mxd_lens.training.runner.TranscoderTrainingRunner", Runner)
    monkeypatch.setattr("mxd_lens.text.token_sequences", sequences)
    out, text = tmp_path / "mxd", ["--text", text_file, "--sequences", 2]
    assert f"evaluate {out} --text {text_file} --held-out" in run("train", out, *small, "--hold-out").output
    assert "add --held-out" in run("evaluate", out, *text).output
    assert "add --held-out" not in run("evaluate", out, *text, "--held-out").output
    everything, held_out = (set(rows["text"]) for rows in evaluated)
    assert not held_out & set(trained[0]["text"])
    assert held_out | set(trained[0]["text"]) == everything
    run("train", tmp_path / "all", *small)
    assert trained[1] is None


def test_layers_are_named_alike_everywhere(mxd):
    source = LayerSource.parse(f"{mxd}")
    assert (source.name, source.folder, source.n_experts) == ("mxd", mxd, 40)
    assert type(source.load("cpu")) is MxD
    assert LayerSource.parse(f"mine={mxd}").name == "mine"
    source = LayerSource.parse("smollm2-135m-mxd:blocks.11.mlp")
    assert (source.name, source.n_experts) == ("smollm2-135m-mxd:blocks.11.mlp", 5888)
    assert source.load("cpu").cfg.d_sae == 5888
    assert source.origin == ("smollm2-135m-mxd", "blocks.11.mlp")
    with pytest.raises(ValueError, match=r"Write smollm2-135m-mxd:blocks\.11\.mlp"):
        LayerSource.parse("smollm2-135m-mxd")
    with pytest.raises(ValueError, match="Near: smollm2-135m-mxd"):
        LayerSource.parse("smollm2-135m-mdx:blocks.11.mlp")
    with pytest.raises(ValueError, match=r"Its subfolders with a layer: mxd"):
        LayerSource.parse(str(mxd.parent))


def test_integers():
    assert integers("1,4-6,2-2,0-9:3") == [1, 4, 5, 6, 2, 0, 3, 9]
    for bad in ("1,b", "3-", "5-2", "0-9999999999", "", "1-9:0"):
        with pytest.raises(ValueError, match=r"."):
            integers(bad)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command):
    for parameter in get_command(app).commands[command].params:
        assert parameter.name == "help" or parameter.help, f"{command} {parameter.name}"
    assert run(command, "-h").output == run(command, "--help").output


def test_what_reports_has_json():
    """Every command that prints a result can print it as JSON."""
    writes_only = {"train", "dashboard", "demo", "convert", "push"}
    for command in set(COMMANDS) - writes_only:
        assert "json" in {parameter.name for parameter in get_command(app).commands[command].params}, command


def test_version():
    assert run("--version").output.strip() == f"mxd_lens {__version__}"


def test_pretrained_as_json():
    known = json.loads(run("pretrained", "--json", "-").stdout)
    assert "smollm2-135m-mxd" in [layer["release"] for layer in known]


@pytest.mark.slow
def test_demo(tiny_folder, tmp_path):
    def demo(layer: int = 1):
        return run_demo(
            tmp_path,
            layer=layer,
            training_tokens=2000,
            text_tokens=1000,
            n_sequences=2,
            new_tokens=4,
            model_name=str(tiny_folder),
            k=8,
        )

    report = demo()
    mxd = MxD.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    # The report is of the layer that was saved: its own error on the same text, computed again.
    model = mxd_lens.load_model(tiny_folder)
    rows = mxd_lens.text.split_text(mxd_lens.text.load_text("embedded"))[1]
    tokens = token_sequences(model, rows, 2)
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK_IN, HOOK_OUT])
    kept = ~torch.isin(tokens, torch.tensor(get_special_token_ids(model.tokenizer)))
    x, y = cache[HOOK_IN][kept], cache[HOOK_OUT][kept]
    error = ((mxd(x) - y).norm(dim=-1) ** 2 / y.norm(dim=-1) ** 2).mean().item()
    assert report.normalized_mse == pytest.approx(error, rel=1e-3)
    assert "with the layer in place of the MLP" in (tmp_path / "index.html").read_text()
    assert demo().normalized_mse == report.normalized_mse  # nothing is trained again
    with pytest.raises(ValueError, match="hook_name"):
        demo(layer=2)


def test_a_dry_run_of_a_preset_loads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("mxd_lens.cli.sweeps.load_language_model", None)
    options = ["--preset", "paper-gpt2", "--k", "8,32", "--dry-run", "--json", tmp_path / "plan.json"]
    result = run("frontier", tmp_path / "sweep", *options)
    assert "480 M" in result.output or "479,997,952" in result.output
    known = json.loads((tmp_path / "plan.json").read_text())
    assert known["ks"] == [8, 32]  # said beside the preset
    assert known["layers"] == [8]
    assert {a["lr"] for a in known["architectures"]} == {4e-4}
    assert not (tmp_path / "sweep").exists()
