"""Layers by name: releases of folders, SAELens' own functions, SAELens' own skip transcoders."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attached import close, expected_logits, random_mxd
from rich.console import Console
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from sae_lens.saes import transcoder as saelens
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file
from tiny import D_MODEL, HOOK_IN, HOOK_OUT

from mxd_lens import (
    JumpReLUSkipTranscoder,
    MxD,
    SkipTranscoder,
    TopKTranscoder,
    TopKTranscoderConfig,
    evaluate,
    list_pretrained,
    register_release,
    replacement_hooks,
)
from mxd_lens.pretrained import registry


@pytest.fixture(autouse=True)
def no_names_left_behind():
    yield
    registry._registered.clear()
    registry.directory.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three layers, one of them beside its sparsity, and a file that is none."""
    mxd = random_mxd(D_MODEL).to(torch.bfloat16)
    mxd.cfg.dtype = "bfloat16"
    mxd.cfg.metadata.model_name = "llama-of-words"
    mxd.save_model(tmp_path / "blocks.1.mlp" / "mxd")
    save_file({"sparsity": torch.arange(40.0)}, tmp_path / "blocks.1.mlp" / "mxd" / "sparsity.safetensors")
    metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    TopKTranscoder(
        TopKTranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=24, k=3, metadata=metadata)
    ).save_model(tmp_path / "transcoder")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cfg.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("not a layer")
    return tmp_path


IDS = ["blocks.1.mlp/mxd", "broken", "transcoder"]


def test_a_registered_folder(folder: Path) -> None:
    register_release("mine", folder)
    local = MxD.load_from_disk(folder / IDS[0], dtype="float32")
    for sae in (MxD.from_pretrained("mine", IDS[0]), SAE.from_pretrained("mine", IDS[0])):
        assert isinstance(sae, MxD)
        assert sae.cfg.to_dict() == local.cfg.to_dict()
        for name, weight in sae.state_dict().items():
            assert torch.equal(weight, local.state_dict()[name]), name
    assert MxD.from_pretrained("mine", IDS[0], dtype="bfloat16").W_dec.dtype == torch.bfloat16


def test_with_cfg_and_sparsity(folder: Path) -> None:
    register_release("mine", folder)
    sae, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity("mine", IDS[0])
    assert isinstance(sae, MxD)
    assert cfg["architecture"] == "mxd"
    assert torch.equal(sparsity, torch.arange(40.0))
    assert SAE.from_pretrained_with_cfg_and_sparsity("mine", "transcoder")[2] is None
    assert load_sae_config_from_huggingface("mine", IDS[0])["d_hidden"] == 32


def test_names_for_the_layers(folder: Path) -> None:
    register_release("mine", str(folder), saes={"the-mxd": IDS[0]})
    assert isinstance(SAE.from_pretrained("mine", "the-mxd"), MxD)
    register_release("mine", folder, saes=["transcoder"])
    assert isinstance(SAE.from_pretrained("mine", "transcoder"), TopKTranscoder)
    with pytest.raises(ValueError, match=r"the-mxd not found in release mine.*transcoder"):
        SAE.from_pretrained("mine", "the-mxd")


def test_the_class_to_use_is_said(folder: Path) -> None:
    register_release("mine", folder)
    with pytest.raises(ValueError, match="Use TopKTranscoder instead"):
        MxD.from_pretrained("mine", "transcoder")
    with pytest.raises(ValueError, match="Use MxD instead"):
        TopKTranscoder.from_pretrained(folder, IDS[0])


def test_a_list_of_what_there_is(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    register_release("mine", folder)
    register_release("on-the-hub", "someone/mxds", saes=["a", "b"])
    layers = [layer for layer in list_pretrained() if layer.source != "bundled"]
    assert [(layer.release, layer.sae_id) for layer in layers] == [
        *(("mine", sae_id) for sae_id in IDS),
        ("on-the-hub", "a"),
        ("on-the-hub", "b"),
    ]
    mxd = layers[0]
    n_parameters = sum(p.numel() for p in random_mxd(D_MODEL).parameters())
    assert (mxd.architecture, mxd.d_sae, mxd.k, mxd.n_parameters) == ("mxd", 40, 4, n_parameters)
    assert (mxd.model_name, mxd.hook_name, mxd.source) == ("llama-of-words", HOOK_IN, str(folder))
    assert layers[1].architecture is None
    assert "broken is not a layer that can be read" in caplog.text
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(list_pretrained())
    printed = console.export_text()
    assert "llama-of-words" in printed
    assert "someone/mxds" in printed


BAD_REPORTS = {
    "a list": "[]",
    "nothing": "",
    "text": "not JSON",
    "deep": "[" * 100_000,
    "no numbers": '{"fraction_of_variance_unexplained": "x", "l0": null}',
    "other fields": '{"a": 1}',
    "numbers in lists": '{"fraction_of_variance_unexplained": [1], "l0": {}}',
    "twice": '{"l0": 1, "l0": 2}',
}


@pytest.mark.parametrize("report", BAD_REPORTS.values(), ids=list(BAD_REPORTS))
def test_a_bad_report_leaves_every_layer_usable(folder: Path, report: str) -> None:
    (folder / "transcoder" / "report.json").write_text(report)
    register_release("mine", folder)
    assert isinstance(SAE.from_pretrained("mine", "transcoder"), TopKTranscoder)
    assert isinstance(SAE.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp"), MxD)
    (listed,) = [layer for layer in list_pretrained() if layer.sae_id == "transcoder"]
    assert listed.d_sae == 24
    assert not listed.report or listed.report == {"a": 1}


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "[" * 100_000,
        '{"architecture": ["mxd"], "d_sae": 3}',
        '{"architecture": "mxd", "d_sae": "many"}',
        '{"architecture": "mxd", "d_sae": 3, "metadata": {"model_name": ["gpt2"]}}',
        '{"architecture": "mxd", "d_sae": 3, "metadata": []}',
    ],
)
def test_a_bad_config_disables_its_own_folder(
    folder: Path, config: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "transcoder" / "cfg.json").write_text(config)
    register_release("mine", folder)
    (listed,) = [layer for layer in list_pretrained() if layer.sae_id == "transcoder"]
    assert listed.architecture is None
    assert "is not a layer that can be read" in caplog.text
    assert isinstance(SAE.from_pretrained("mine", "blocks.1.mlp/mxd"), MxD)
    with pytest.raises(ValueError, match="cfg"):
        MxD.from_pretrained("mine", "transcoder")


@pytest.mark.parametrize(
    ("release", "source", "saes", "error", "message"),
    [
        ("gpt2-small-res-jb", "", None, ValueError, "exists already"),
        ("a/b", "", None, ValueError, "no '/'"),
        ("", "", None, ValueError, "not empty"),
        ("mine", "", ["nothing"], FileNotFoundError, "holds no layer nothing"),
        ("mine", "blocks.1.mlp/nowhere", None, FileNotFoundError, "is not a folder"),
        ("mine", "../user/repo", ["a"], FileNotFoundError, "is not a folder"),
    ],
)
def test_names_that_are_refused(folder: Path, release, source, saes, error, message) -> None:
    source = str(folder / source) if source != "../user/repo" else source
    with pytest.raises(error, match=message):
        register_release(release, source, saes)
    assert registry._registered == {}


def test_a_folder_without_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no layers"):
        register_release("mine", tmp_path)


def test_saelens_own_releases_are_still_there() -> None:
    assert "gemma-scope-2b-pt-transcoders" in registry.directory()
    with pytest.raises(ValueError, match="not found in pretrained SAEs directory"):
        SAE.from_pretrained("no-such-release", "x")


@pytest.mark.parametrize("order", ["sae_lens, mxd_lens", "mxd_lens, sae_lens"])
def test_whichever_is_imported_first(folder: Path, order: str) -> None:
    code = f"""
import {order}
mxd_lens.register_release("mine", {str(folder)!r})
print(type(sae_lens.SAE.from_pretrained("mine", {IDS[0]!r})).__name__)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().endswith("MxD")


# SAELens' own skip transcoders

SKIPS = {
    SkipTranscoder: (saelens.SkipTranscoder, saelens.SkipTranscoderConfig),
    JumpReLUSkipTranscoder: (saelens.JumpReLUSkipTranscoder, saelens.JumpReLUSkipTranscoderConfig),
}


@pytest.fixture(params=SKIPS, ids=lambda made: made.__name__)
def skip_pair(request, tmp_path: Path):
    """One of SAELens' skip transcoders, and what ours reads from its folder."""
    theirs, config = SKIPS[request.param]
    sae = theirs(
        config(
            d_in=D_MODEL,
            d_out=D_MODEL,
            d_sae=24,
            apply_b_dec_to_input=False,
            metadata=SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT),
        )
    ).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.normal_(generator=generator)
    sae.save_model(tmp_path / "skip")
    register_release("skips", tmp_path)
    return sae, request.param.from_pretrained("skips", "skip").requires_grad_(False)


def test_the_same_layer_as_saelens_loads(skip_pair, tmp_path: Path) -> None:
    theirs, ours = skip_pair
    assert type(SAE.from_pretrained("skips", "skip")) is type(ours)
    x = torch.randn(2, 5, D_MODEL)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.decode(ours.encode(x)), theirs(x))
    assert torch.equal(ours.decode(theirs.encode(x), x), theirs(x))
    assert torch.equal(ours.forward_with_activations(x)[0], theirs(x))
    ours.save_model(tmp_path / "again")
    again = SAE.load_from_disk(tmp_path / "again")
    assert type(again) is type(ours)
    assert torch.equal(again(x), theirs(x))
    assert type(type(ours).load_from_disk(tmp_path / "again")) is type(ours)


def test_attached_it_keeps_its_skip(skip_pair, sae_model) -> None:
    theirs, ours = skip_pair
    tokens = sae_model.to_tokens("the big cat sat on the red mat")
    expected = expected_logits(sae_model, theirs, tokens)
    assert (sae_model.run_with_saes(tokens, saes=[theirs]) - expected).abs().max() > 0.1
    close(sae_model.run_with_saes(tokens, saes=[ours]), expected)
    close(sae_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(ours)), expected)
    error_term = sae_model.run_with_saes(tokens, saes=[ours], use_error_term=True)
    close(error_term, sae_model(tokens))


def test_it_is_judged_as_it_runs(skip_pair, tiny_model) -> None:
    theirs, ours = skip_pair
    tokens = torch.randint(3, 20, (4, 12))
    judged, expected = (evaluate(tiny_model, sae, tokens).to_dict() for sae in (ours, theirs))
    for name, value in expected.items():
        if isinstance(value, float):
            assert judged[name] == pytest.approx(value, rel=1e-5), name


def test_which_input_is_never_guessed(skip_pair) -> None:
    _, ours = skip_pair
    x, other = torch.randn(3, D_MODEL), torch.randn(4, D_MODEL)
    a = ours.encode(x)
    b = ours.encode(other)
    assert torch.equal(ours.decode(a), ours(x))
    assert torch.equal(ours.decode(b), ours(other))
    with pytest.raises(ValueError, match="do not belong to an input"):
        ours.decode(a, other)
    with pytest.raises(ValueError, match="no encode is waiting"):
        ours.decode(a.clone())


def test_the_other_kind_is_named(skip_pair) -> None:
    _, ours = skip_pair
    (other,) = SKIPS.keys() - {type(ours)}
    with pytest.raises(ValueError, match=f"Use {type(ours).__name__} instead"):
        other.from_pretrained("skips", "skip")
