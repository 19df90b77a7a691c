"""Saved layers: what was saved comes back bit for bit, and what cannot be read says why."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, SkipTranscoder, TopKSAE, TopKSAEConfig, TrainingSAE, Transcoder
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

import mxd_lens
from mxd_lens import MxD, MxDConfig, TrainingMxD, TrainingMxDConfig

WIDTHS = {"d_in": 4, "d_out": 5, "d_sae": 12, "d_hidden": 3, "k": 2}
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
DTYPES = ["float32", "bfloat16", "float16"]


def random_layer(training: bool = False, **changes: Any) -> Any:
    layer: Any = (
        TrainingMxD(TrainingMxDConfig(**(WIDTHS | changes)))
        if training
        else MxD(MxDConfig(**(WIDTHS | changes)))
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.fixture(params=[False, True], ids=["plain", "gated"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A saved MxD."""
    layer = random_layer(gated=request.param, metadata=SAEMetadata(hook_name="in", hook_name_out="out"))
    layer.save_model(tmp_path / "layer")
    return tmp_path / "layer"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The saved weights, in memory: what safetensors loads stays mapped to the file."""
    return {name: weight.clone() for name, weight in load_file(folder / WEIGHTS).items()}


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(kept))


# What was saved comes back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "load", [SAE.load_from_disk, MxD.load_from_disk, MxD.from_pretrained, Transcoder.load_from_disk]
)
def test_a_trained_layer_comes_back_bit_for_bit(tmp_path: Path, dtype: str, gated: bool, load: Any) -> None:
    trained = random_layer(training=True, dtype=dtype, gated=gated)
    trained.save_inference_model(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is MxD
    assert loaded.cfg == MxDConfig(**WIDTHS, dtype=dtype, gated=gated, metadata=loaded.cfg.metadata)
    for name, parameter in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name
    x = torch.randn(7, 4, dtype=getattr(torch, dtype))
    assert torch.equal(loaded(x), trained(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_layer_comes_back_to_be_trained(tmp_path: Path, dtype: str) -> None:
    trained = random_layer(training=True, dtype=dtype)
    trained.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is TrainingMxD
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_a_layer_is_loaded_in_the_dtype_asked_for(folder: Path, dtype: str | torch.dtype) -> None:
    loaded = MxD.from_pretrained(folder, dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in loaded.parameters()} == {loaded.dtype} == {expected}
    assert loaded(torch.zeros(2, 4)).dtype == expected


@pytest.mark.parametrize("path", [Path, str])
def test_a_folder_of_layers(folder: Path, path: type) -> None:
    loaded = MxD.from_pretrained(path(folder.parent), "layer")
    assert loaded.cfg.metadata.hook_name_out == "out"


def test_settings_of_later_versions_do_not_hinder(folder: Path) -> None:
    change_config(folder, not_yet_thought_of=3)
    assert MxD.load_from_disk(folder).cfg.k == 2


# What cannot be read


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        MxD.from_pretrained(tmp_path / "nothing-here")
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        MxD.load_from_disk(tmp_path / "nothing-here")


@pytest.mark.parametrize(("release", "sae_id"), [("nothing-here", "layer"), (".", "nothing-here")])
def test_a_layer_that_is_not_in_the_folder(folder: Path, release: str, sae_id: str) -> None:
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        MxD.from_pretrained(folder.parent / release, sae_id)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        MxD.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 0.5, -64, -1])
def test_truncated_weights(folder: Path, length: float) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    cut = int(length * len(whole)) if isinstance(length, float) else length
    (folder / WEIGHTS).write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is truncated or not a safetensors file"):
        MxD.from_pretrained(folder)


@pytest.mark.parametrize("n_bytes", [3, 8, 5000])
def test_foreign_weights(folder: Path, n_bytes: int) -> None:
    noise = torch.randint(256, (n_bytes,), generator=torch.Generator().manual_seed(n_bytes))
    (folder / WEIGHTS).write_bytes(bytes(noise.tolist()))
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        MxD.from_pretrained(folder)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    torch.save(weights_of(folder), folder / WEIGHTS)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        MxD.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "not JSON", "[]", "null", "3", '"mxd"', "{}"])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=rf"{CONFIG} is not the configuration of a layer"):
        MxD.from_pretrained(folder)


@pytest.mark.parametrize("name", ["architecture", "dtype", "d_in", "d_sae", "d_hidden", "k"])
def test_a_config_without(folder: Path, name: str) -> None:
    change_config(folder, **{name: ...})
    with pytest.raises(ValueError, match=rf"{CONFIG} is not the configuration of a layer.* {name}|'{name}'"):
        MxD.from_pretrained(folder)


def test_a_config_without_d_out(folder: Path) -> None:
    change_config(folder, d_out=...)
    with pytest.raises(ValueError, match=rf"{CONFIG} is not the configuration of a layer .*d_out"):
        MxD.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["no-such", None, 3, ["mxd"]])
def test_an_unknown_architecture(folder: Path, architecture: Any) -> None:
    change_config(folder, architecture=architecture)
    with pytest.raises(ValueError, match=rf"{CONFIG} is not the configuration of a layer"):
        MxD.from_pretrained(folder)


@pytest.mark.parametrize(
    "metadata",
    [[], None, "none"],
)
def test_metadata_that_is_none(folder: Path, metadata: Any) -> None:
    change_config(folder, metadata=metadata)
    with pytest.raises(ValueError, match=rf"{CONFIG} is not the configuration of a layer"):
        MxD.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be a positive integer"),
        ({"k": 13}, "k = 13 and d_sae = 12"),
        ({"k": "2"}, "k must be a positive integer"),
        ({"d_in": "4"}, "d_in must be a positive integer"),
        ({"d_hidden": -1}, "d_hidden must be a positive integer"),
        ({"hidden_activation": "swish"}, "hidden_activation must be one of"),
        ({"dtype": "float31"}, "its dtype is 'float31', not one of float32"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations must be 'none'"),
    ],
)
def test_a_config_that_makes_no_sense(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        MxD.from_pretrained(folder)


PARAMETERS = ["W_enc", "b_enc", "W_dec", "b_dec", "W_hidden", "b_hidden", "W_out"]


@pytest.mark.parametrize("load", [MxD.from_pretrained, SAE.load_from_disk])
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("how", ["missing", "longer", "transposed", "scalar"])
def test_weights_that_contradict_the_config(folder: Path, name: str, how: str, load: Any) -> None:
    weights = weights_of(folder)
    right = weights.pop(name)
    changed = {
        "longer": torch.cat([right, right[:1]]),
        "transposed": right.T.contiguous() if right.ndim == 2 else right[None],
        "scalar": torch.tensor(1.0),
    }
    if how != "missing":
        weights[name] = changed[how]
    save_file(weights, folder / WEIGHTS)
    got = "nothing" if how == "missing" else str(tuple(changed[how].shape))
    message = f"{name}: the config says {tuple(right.shape)}, the weights {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_in": 3}, ["W_enc", "W_hidden"]),
        ({"d_out": 6}, ["W_dec", "b_dec", "W_out"]),
        ({"d_sae": 13}, ["W_enc", "b_enc", "W_dec"]),
        ({"d_hidden": 4}, ["W_hidden", "b_hidden", "W_out"]),
    ],
)
def test_a_config_that_contradicts_the_weights(
    folder: Path, changes: dict[str, int], named: list[str]
) -> None:
    change_config(folder, **changes)
    with pytest.raises(ValueError, match="contradicts its weights") as e:
        MxD.from_pretrained(folder)
    assert all(f"{name}: the config says" in str(e.value) for name in named)


@pytest.mark.parametrize("gated", [False, True])
def test_gated_or_not(tmp_path: Path, gated: bool) -> None:
    random_layer(gated=gated).save_model(tmp_path)
    change_config(tmp_path, gated=not gated)
    with pytest.raises(ValueError, match="W_hidden_gate: the config says"):
        MxD.from_pretrained(tmp_path)


def test_weights_of_more_than_the_layer(folder: Path) -> None:
    save_file(weights_of(folder) | {"W_skip": torch.zeros(2, 3)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"W_skip: the config says nothing, the weights \(2, 3\)"):
        MxD.from_pretrained(folder)


@pytest.mark.parametrize("load", [MxD.load_from_disk, MxD.from_pretrained])
def test_a_layer_of_another_class(tmp_path: Path, load: Any) -> None:
    TopKSAE(TopKSAEConfig(d_in=4, d_sae=6, k=2)).save_model(tmp_path)
    with pytest.raises(ValueError, match="TopKSAE"):
        load(tmp_path)


def test_an_mxd_is_no_skip_transcoder(folder: Path) -> None:
    with pytest.raises(ValueError, match="MxD"):
        SkipTranscoder.load_from_disk(folder)


# Registration


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_reloading() -> None:
    before = mxd_lens.MxD
    importlib.reload(mxd_lens)
    importlib.reload(mxd_lens.architectures)
    importlib.import_module("mxd_lens")
    assert mxd_lens.MxD is before


def test_every_public_name_is_there() -> None:
    assert all(getattr(mxd_lens, name).__module__.startswith("mxd_lens.") for name in mxd_lens.__all__)
    assert set(mxd_lens.__all__) <= set(dir(mxd_lens))
    with pytest.raises(AttributeError, match="no_such_name"):
        mxd_lens.no_such_name  # noqa: B018


def test_importing_the_package_alone_is_cheap() -> None:
    heavy = "{'torch', 'sae_lens', 'transformers', 'transformer_lens', 'datasets'} & set(sys.modules)"
    assert python(f"import sys, mxd_lens; print({heavy})") == "set()"


@pytest.mark.parametrize("imports", ["import mxd_lens, sae_lens", "import sae_lens, mxd_lens"])
def test_both_import_orders_register(tmp_path: Path, imports: str) -> None:
    random_layer().save_model(tmp_path)
    load = f"print(type(sae_lens.SAE.load_from_disk({str(tmp_path)!r})).__name__)"
    assert python(f"{imports}; {load}") == "MxD"
