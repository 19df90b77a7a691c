"""Checkpoint files of the paper's code: they become the layer they describe, or say what is wrong."""

import enum
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_files import (
    D_IN,
    FORMATS,
    HOOK,
    HOOK_OUT,
    N_EXPERTS,
    SETTINGS,
    TOPK,
    checkpoint,
    config_class,
    file_bytes,
    formula,
    random_weights,
    write,
)
from sae_lens import SAE, StandardSAE, TopKSAE
from safetensors.torch import load_file
from typer.testing import CliRunner

import mxd_lens
from mxd_lens import MxD, SkipMxD, TopKSkipTranscoder, TopKTranscoder, load_reference_checkpoint
from mxd_lens.cli import app
from mxd_lens.pretrained.formats.checkpoint_file import UnreadableCheckpointError
from mxd_lens.pretrained.formats.paper import convert, load_reference_checkpoint_with_sparsity

X = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
FLAGS = ("use_conditional", "use_glu", "use_skip", "is_transcoder")
COMBINATIONS = [dict(zip(FLAGS, flags, strict=True)) for flags in itertools.product([True, False], repeat=4)]


def class_of(flags: dict[str, bool], topk: int) -> type | None:
    """Which class a combination is, by hand."""
    match tuple(flags.values()):
        case (True, _, False, True):
            return MxD
        case (True, _, True, True):
            return SkipMxD
        case (False, False, False, True):
            return TopKTranscoder
        case (False, False, True, True):
            return TopKSkipTranscoder
        case (False, False, False, False):
            return StandardSAE if topk < 0 else TopKSAE
    return None


def settings_of(flags: dict[str, bool], topk: int = TOPK) -> dict[str, Any]:
    activation = "gelu" if flags["use_conditional"] else "relu"
    return SETTINGS | flags | {"topk": topk, "mlp_activation_fn": activation}


# Outputs


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("topk", [TOPK, -1])
@pytest.mark.parametrize(
    "flags", COMBINATIONS, ids=lambda flags: "".join(str(int(f)) for f in flags.values())
)
def test_every_combination(flags: dict[str, bool], topk: int, file_format: str, tmp_path: Path) -> None:
    settings = settings_of(flags, topk)
    path = write(tmp_path, settings, file_format=file_format)
    expected = class_of(flags, topk)
    if expected is None:
        with pytest.raises(UnreadableCheckpointError, match="no class here computes: use_") as e:
            load_reference_checkpoint(path)
        assert str(path) in str(e.value)
        return
    weights = random_weights(settings)
    layer = load_reference_checkpoint(path)
    assert type(layer) is expected
    assert_as_computed(layer, settings, weights)
    wide = load_reference_checkpoint(path, dtype="float64")
    torch.testing.assert_close(wide(X.double()), formula(settings, weights, X), rtol=1e-12, atol=1e-12)
    convert(path, tmp_path / "layer")
    saved = SAE.load_from_disk(tmp_path / "layer")
    assert type(saved) is expected
    assert torch.equal(saved(X), layer(X))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "sigmoid"])
@pytest.mark.parametrize("glu", [False, True])
def test_every_activation(activation: str, glu: bool, tmp_path: Path) -> None:
    settings = SETTINGS | {"mlp_activation_fn": activation, "use_glu": glu}
    layer = load_reference_checkpoint(write(tmp_path, settings), dtype=torch.float64)
    expected = formula(settings, random_weights(settings), X)
    torch.testing.assert_close(layer(X.double()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_dec", [True, False])
@pytest.mark.parametrize("conditional", [True, False])
def test_rows_of_any_norm(norm_dec: bool, conditional: bool, tmp_path: Path) -> None:
    """Nothing is normalised when a file is read: the paper's code does that in training only."""
    flags = {"use_conditional": conditional, "norm_dec": norm_dec, "mlp_activation_fn": "relu"}
    layer = load_reference_checkpoint(write(tmp_path, SETTINGS | flags))
    weights = random_weights(SETTINGS | flags)
    theirs = weights["W_cond"].T if conditional else weights["W_dec"]
    assert torch.equal(layer.W_dec, theirs)
    assert layer.cfg.metadata.reference_config["norm_dec"] is norm_dec


def test_an_output_of_another_width(tmp_path: Path) -> None:
    settings = SETTINGS | {"d_out": 4}
    layer = load_reference_checkpoint(write(tmp_path, settings), dtype="float64")
    assert layer.cfg.d_out == 4
    torch.testing.assert_close(layer(X.double()), formula(settings, random_weights(settings), X))
    with pytest.raises(UnreadableCheckpointError, match=r"W_skip.weight': the config says \(4, 6\)"):
        load_reference_checkpoint(write(tmp_path, settings | {"use_skip": True}))


def test_no_output_width(tmp_path: Path) -> None:
    settings = SETTINGS | {"d_out": None}
    weights = random_weights(SETTINGS)
    assert load_reference_checkpoint(write(tmp_path, settings, weights)).cfg.d_out == D_IN


def assert_as_computed(layer, settings: dict, weights: dict[str, torch.Tensor]) -> None:
    """A float32 layer gives the formula's outputs to 1e-6 of their size, token by token."""
    expected = formula(settings, weights, X)
    error = (layer(X).double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 1e-6


@pytest.mark.parametrize("pair", [("gate", "W_cond"), ("W_enc", "W_dec")])
@pytest.mark.parametrize("file_format", FORMATS)
def test_weights_that_were_tied_at_the_start(pair: tuple[str, str], file_format: str, tmp_path: Path) -> None:
    settings = settings_of(dict(zip(FLAGS, (pair[0] == "gate", False, False, True), strict=True)))
    weights = random_weights(settings)
    weights[pair[1]] = weights[pair[0]].T
    path = write(tmp_path, settings, weights, file_format)
    layer = load_reference_checkpoint(path)
    assert_as_computed(layer, settings, weights)
    before = layer.W_dec.detach().clone()
    layer.W_enc.data.zero_()
    assert torch.equal(layer.W_dec, before)
    convert(path, tmp_path / "layer")


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file_format", FORMATS)
def test_the_dtype_of_the_file(dtype: torch.dtype, file_format: str, tmp_path: Path) -> None:
    weights = random_weights(SETTINGS, dtype)
    layer = load_reference_checkpoint(write(tmp_path, weights=weights, file_format=file_format))
    assert {p.dtype for p in layer.parameters()} == {layer.dtype} == {dtype}
    assert torch.equal(layer.W_dec, weights["W_cond"].T)


def test_the_dtype_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path)
    for dtype in ("bfloat16", torch.bfloat16):
        layer = load_reference_checkpoint(path, dtype=dtype)
        assert layer.cfg.dtype == "bfloat16"
        assert torch.equal(layer.W_enc, random_weights(SETTINGS)["gate"].T.bfloat16())
    with pytest.raises(ValueError, match=r"must be a floating point one.*int32"):
        load_reference_checkpoint(path, dtype=torch.int32)
    with pytest.raises(ValueError, match="Invalid dtype: float31"):
        load_reference_checkpoint(path, dtype="float31")
    weights = random_weights(SETTINGS)
    weights["gate"][1, 1] = 1e6
    with pytest.raises(UnreadableCheckpointError, match=r"'gate' has values up to 1e\+06, too large for"):
        load_reference_checkpoint(write(tmp_path, weights=weights), dtype="float16")


def test_weights_of_two_dtypes(tmp_path: Path) -> None:
    """Some of the paper's weights are float32 whatever its config says."""
    weights = random_weights(SETTINGS)
    weights["b_enc"] = weights["b_enc"].half()
    assert load_reference_checkpoint(write(tmp_path, weights=weights)).cfg.dtype == "float32"


# Metadata


def test_metadata(tmp_path: Path) -> None:
    layer = load_reference_checkpoint(write(tmp_path))
    metadata = layer.cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.hook_name_out) == ("gpt2-small", HOOK, HOOK_OUT)
    assert (metadata.context_size, metadata.dataset_path) == (128, "Skylion007/openwebtext")
    assert metadata.prepend_bos is True
    assert metadata.weight_processing == ["fold_ln", "center_writing_weights"]
    rest = metadata.reference_config
    assert rest == json.loads(json.dumps(rest))
    assert (rest["dtype"], rest["device"], rest["checkpoint_path"]) == ("float32", "cuda:1", "/data/gpt2")
    assert rest["use_ghost_grads"] == [False]
    assert rest["nested"] == [[1, [2.5, "a"]], [None, {"b": True}]]
    assert rest["topk"] == TOPK
    assert "model_name" not in rest


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_enum_and_what_json_cannot_hold(file_format: str, tmp_path: Path) -> None:
    method = enum.Enum("Method", {"ZEROS": "zeros"}, module="sae_training.config")
    more = {"method": method.ZEROS, "loss": float("nan"), "mask": torch.ones(3), "both": (1, torch.ones(3))}
    with checkpoint(SETTINGS | more, random_weights(SETTINGS)) as contents:
        sys.modules["sae_training.config"].Method = method  # type: ignore[attr-defined]
        (tmp_path / file_format).write_bytes(file_bytes(contents, file_format))
    rest = load_reference_checkpoint(tmp_path / file_format).cfg.metadata.reference_config
    assert rest["method"] in ("zeros", "ZEROS")  # some Pythons write the value, some the name
    assert not {"loss", "mask", "both"} & rest.keys()


def test_an_sae_has_one_hook(tmp_path: Path) -> None:
    settings = settings_of(dict(zip(FLAGS, (False,) * 4, strict=True)))
    metadata = load_reference_checkpoint(write(tmp_path, settings)).cfg.metadata
    assert metadata.hook_name == HOOK
    assert "hook_name_out" not in metadata
    assert metadata.reference_config["out_hook_point"] == HOOK_OUT


def test_the_paper_code_is_not_there_and_not_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert not [name for name in sys.modules if name.startswith("sae_training")]
    load_reference_checkpoint(path)
    assert not [name for name in sys.modules if name.startswith("sae_training")]


# Sparsity and conversion


def test_sparsity(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert load_reference_checkpoint_with_sparsity(path)[1] is None
    sparsity = torch.linspace(-10, 0, N_EXPERTS)
    torch.save(sparsity, tmp_path / "zip_log_feature_sparsity.pt")
    layer, loaded = load_reference_checkpoint_with_sparsity(path)
    assert isinstance(layer, MxD)
    assert torch.equal(loaded, sparsity)
    convert(path, tmp_path / "layer")
    saved = load_file(tmp_path / "layer" / "sparsity.safetensors")
    assert list(saved) == ["sparsity"]
    assert torch.equal(saved["sparsity"], sparsity)
    assert torch.equal(MxD.load_from_disk(tmp_path / "layer")(X), layer(X))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (torch.zeros(N_EXPERTS + 1), r"a tensor of shape \(14,\), got \(15,\)"),
        (torch.zeros(N_EXPERTS, 1), r"a tensor of shape \(14,\), got \(14, 1\)"),
        ({"sparsity": 1}, r"a tensor of shape \(14,\), got a dict"),
        (torch.zeros(N_EXPERTS, dtype=torch.int64), "of torch.int64"),
        (torch.full((N_EXPERTS,), float("nan")), "not finite"),
    ],
)
def test_a_sparsity_file_of_something_else(contents: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    torch.save(contents, tmp_path / "zip_log_feature_sparsity.pt")
    with pytest.raises(UnreadableCheckpointError, match=message):
        load_reference_checkpoint_with_sparsity(path)
    load_reference_checkpoint(path)


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    path, folder = write(tmp_path), tmp_path / "layer"
    folder.mkdir()
    convert(path, folder)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert(path, folder)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert(path, path)
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
            convert(path, tmp_path / "layer")
    assert not (tmp_path / "layer").exists()


def test_the_command(tmp_path: Path) -> None:
    path, folder = write(tmp_path), tmp_path / "layer"
    result = CliRunner().invoke(app, ["convert", str(path), "-o", str(folder), "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert f"Saved in {folder}: MxD of 'gpt2-small'" in result.output
    assert MxD.from_pretrained(folder).cfg.dtype == "bfloat16"
    result = CliRunner().invoke(app, ["convert", str(path), "-o", str(folder)])
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "Traceback" not in result.output
    assert mxd_lens.load_reference_checkpoint is load_reference_checkpoint


# The file can be gone, and the layer trained on


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_layer_outlives_its_file_and_never_changes_it(file_format: str, tmp_path: Path) -> None:
    path = write(tmp_path, file_format=file_format)
    before = path.read_bytes()
    layer = load_reference_checkpoint(path)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    path.unlink()
    assert torch.equal(layer.W_enc, random_weights(SETTINGS)["gate"].T + 1)
    assert all(p.requires_grad for p in layer.parameters())


# What contradicts itself


@pytest.mark.parametrize("name", list(random_weights(SETTINGS | {"use_glu": True, "use_skip": True})))
@pytest.mark.parametrize("how", ["missing", "longer", "transposed", "nan", "inf", "integer", "complex"])
def test_weights_that_cannot_be(name: str, how: str, tmp_path: Path) -> None:
    settings = SETTINGS | {"use_glu": True, "use_skip": True}
    weights = random_weights(settings)
    right = weights.pop(name)
    if how != "missing":
        weights[name] = {
            "longer": torch.cat([right, right[:1]]),
            "transposed": right.T.contiguous() if right.ndim == 2 else right[None],
            "nan": right.clone().index_fill_(0, torch.tensor(0), float("nan")),
            "inf": right.clone().index_fill_(0, torch.tensor(0), float("-inf")),
            "integer": right.long(),
            "complex": right.cfloat(),
        }[how]
    path = write(tmp_path, settings, weights)
    if how == "transposed" and name == "W_skip.weight":
        assert torch.equal(load_reference_checkpoint(path).W_skip, right.T)
        return
    with pytest.raises(UnreadableCheckpointError, match=f"'{name}'") as e:
        load_reference_checkpoint(path)
    assert str(path) in str(e.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    weights = random_weights(SETTINGS)
    del weights["gate"], weights["b_enc"]
    weights["W_more"] = torch.zeros(2)
    weights["W_cond"] = weights["W_cond"].T
    weights["gate_bias"][0] = float("inf")
    with pytest.raises(UnreadableCheckpointError) as e:
        load_reference_checkpoint(write(tmp_path, weights=weights))
    for said in (
        "'gate': the config says (14, 6), the weights nothing",
        "'b_enc': the config says (10,), the weights nothing",
        "'W_more': the config says nothing, the weights (2,)",
        "'W_cond': the config says (6, 14), the weights (14, 6)",
        "'gate_bias' has values that are not finite",
    ):
        assert said in str(e.value)
    weights = random_weights(SETTINGS)
    weights["gate"][0, 0] = float("nan")
    weights["b_dec"] = weights["b_dec"].int()
    with pytest.raises(UnreadableCheckpointError, match=r"'b_dec' is of torch.int32.*; 'gate' has values"):
        load_reference_checkpoint(write(tmp_path, weights=weights))


def test_five_hundred_weights_too_many(tmp_path: Path) -> None:
    weights = random_weights(SETTINGS) | {f"more{i}": torch.zeros(2) for i in range(500)}
    with pytest.raises(UnreadableCheckpointError, match="and 470 more") as e:
        load_reference_checkpoint(write(tmp_path, weights=weights))
    assert len(str(e.value)) < 3000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_glu": 1}, "use_glu should be True or False, got 1"),
        ({"use_conditional": "yes"}, "use_conditional should be True or False, got 'yes'"),
        ({"is_transcoder": None}, "is_transcoder should be True or False, got None"),
        ({"d_in": 6.0}, "d_in should be a positive integer, got 6.0"),
        ({"d_sae": 0}, "d_sae should be a positive integer, got 0"),
        ({"d_out": -1}, "d_out should be a positive integer, got -1"),
        ({"n_experts": True}, "n_experts should be a positive integer, got True"),
        ({"topk": 0}, "topk should be negative, for none, or from 1 .* 14, got 0"),
        ({"topk": 15}, "topk should be negative, for none, or from 1 .* 14, got 15"),
        ({"topk": [3]}, "topk should be .* got a list"),
        ({"mlp_activation_fn": "swish"}, "mlp_activation_fn should be one of .*, got 'swish'"),
        ({"mlp_activation_fn": ["relu"]}, "mlp_activation_fn should be one of .*, got a list"),
        ({"hook_point": None}, "hook_point should be a name, got None"),
        ({"out_hook_point": 3}, "out_hook_point should be a name, got 3"),
        ({"d_in": 7}, r"'W_enc': the config says \(7, 10\), the weights \(6, 10\)"),
        ({"d_sae": 11}, r"'b_enc': the config says \(11,\), the weights \(10,\)"),
        ({"d_sae": 10**15}, r"'b_enc': the config says \(1000000000000000,\)"),
        ({"n_experts": 15}, r"'gate': the config says \(15, 6\), the weights \(14, 6\)"),
        ({"use_glu": True}, r"'W_glu.weight': the config says \(10, 6\), the weights nothing"),
        ({"use_conditional": False, "mlp_activation_fn": "relu"}, "'gate': the config says nothing"),
        ({"use_conditional": False}, "mlp_activation_fn = 'gelu' without use_conditional"),
        ({"is_transcoder": False}, "use_conditional without is_transcoder"),
        ({"use_glu": 1, "d_in": None, "topk": 0}, "use_glu should .*; d_in should .*; topk should"),
    ],
)
@pytest.mark.parametrize("file_format", ["zip.pt", "file.pkl"])
def test_settings_that_cannot_be(
    changes: dict[str, Any], message: str, file_format: str, tmp_path: Path
) -> None:
    path = write(tmp_path, SETTINGS | changes, random_weights(SETTINGS), file_format)
    with pytest.raises(UnreadableCheckpointError, match=message):
        load_reference_checkpoint(path)


@pytest.mark.parametrize("name", ["use_conditional", "topk", "n_experts", "d_in", "hook_point", "model_name"])
def test_a_setting_that_is_missing(name: str, tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != name}
    with pytest.raises(UnreadableCheckpointError, match=f"{name} should be .*, got None"):
        load_reference_checkpoint(write(tmp_path, settings, random_weights(SETTINGS)))


@pytest.mark.parametrize("contents", [3, None, [], {}, {"cfg": {}, "state_dict": {}}, torch.zeros(3), "text"])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_of_something_else(contents: Any, file_format: str, tmp_path: Path) -> None:
    path = tmp_path / file_format
    path.write_bytes(file_bytes(contents, file_format))
    with pytest.raises(UnreadableCheckpointError, match="no checkpoint of the paper's code"):
        load_reference_checkpoint(path)


def test_another_class_of_config(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with config_class("RunnerConfig") as config:
        torch.save({"cfg": config("gpt2"), "state_dict": random_weights(SETTINGS)}, path)
    with pytest.raises(UnreadableCheckpointError, match=r"not a sae_training\.config\.LanguageModel"):
        load_reference_checkpoint(path)


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's VmHWM")
def test_peak_memory(tmp_path: Path) -> None:
    """A file of 200 MB: what loading adds to the process's peak, in a process of its own.

    Not getrusage's peak, which begins with that of the process that started it.
    """
    sizes = {"d_in": 768, "d_out": 768, "d_sae": 3072, "n_experts": 29_000, "topk": 32}
    settings = SETTINGS | sizes
    path = write(tmp_path, settings)
    weights = sum(weight.nbytes for weight in random_weights(settings).values())
    code = f"""
import re, torch
from pathlib import Path
from mxd_lens import load_reference_checkpoint
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
layer = load_reference_checkpoint({str(path)!r})
loaded = peak()
layer(torch.zeros(2, 768))
print(loaded - before, peak() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    loaded, used = (int(number) / weights for number in run.stdout.split())
    print(f"peak over the weights' size: {loaded:.2f} loading, {used:.2f} used")  # noqa: T201
    # The pages of the mapped file count too, though the system may take them back.
    assert 0.4 < loaded < 2
    assert used < 2


@pytest.mark.parametrize(
    ("model_name", "processing"),
    [("pythia-410m", ["fold_ln", "center_writing_weights"]), ("meta-llama/Llama-3.2-3B", ["fold_ln"])],
)
def test_how_the_model_was_processed(model_name: str, processing: list[str], tmp_path: Path) -> None:
    layer = load_reference_checkpoint(write(tmp_path, SETTINGS | {"model_name": model_name}))
    assert layer.cfg.metadata.weight_processing == processing


@pytest.mark.parametrize("processed", [False, True])
def test_the_papers_input_is_the_norm_before_its_gain(processed: bool) -> None:
    """The table of docs/coming-from/paper.md, on a model with a LayerNorm that has a gain and a bias."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=5, d_head=4, d_vocab=11, act_fn="gelu", normalization_type="LN", seed=0
    )
    model = HookedSAETransformer(cfg)
    torch.nn.init.normal_(model.blocks[0].ln2.w)
    torch.nn.init.normal_(model.blocks[0].ln2.b)
    gain, bias = model.blocks[0].ln2.w.detach().clone(), model.blocks[0].ln2.b.detach().clone()
    tokens = torch.arange(5)[None]
    _, before = model.run_with_cache(tokens)
    if processed:
        model.process_weights_(fold_ln=True, center_writing_weights=True)
    _, cache = model.run_with_cache(tokens)
    x = before["blocks.0.ln2.hook_normalized"]
    torch.testing.assert_close(cache["blocks.0.ln2.hook_normalized"], x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        cache["blocks.0.mlp.hook_in"], x if processed else x * gain + bias, rtol=1e-4, atol=1e-4
    )
