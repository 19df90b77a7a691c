"""Damaged and hostile files of every format: a clear error, nothing executed, nothing written outside."""

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import (
    D_MODEL,
    N,
    circuit_tracer_set,
    gemma_scope_2_folder,
    gemma_scope_folder,
    llamascopium_folder,
    sparsify_folder,
    transcoder_circuits_file,
    weights,
)
from safetensors.torch import load_file, save_file

from mxd_lens import load_layer
from mxd_lens.pretrained.released import inspect_source


class Trap:
    """What a pickle would call when it is opened as one."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("sprung"),)


@pytest.fixture(autouse=True)
def nothing_is_executed_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert list(here.iterdir()) == []


def set_of_one(folder: Path) -> tuple[Path, str, str]:
    return circuit_tracer_set(folder, [weights()], activation="relu"), "layer_0", "layer_0.safetensors"


def sparsify_one(folder: Path) -> tuple[Path, str, str]:
    return sparsify_folder(folder / "layers.1.mlp", weights()).parent, "layers.1.mlp", "sae.safetensors"


def gemma_2_one(folder: Path) -> tuple[Path, str, str]:
    gemma_scope_2_folder(folder / "layer_1", weights(threshold=True))
    return folder, "layer_1", "params.safetensors"


def llama_one(folder: Path) -> tuple[Path, str, str]:
    return llamascopium_folder(folder / "layer_1", weights()).parent, "layer_1", "sae_weights.safetensors"


SAFETENSORS = [set_of_one, sparsify_one, gemma_2_one, llama_one]


def edited(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        tensors = {name: t.clone() for name, t in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return edit


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if "dec" in name.lower() or name == "W_D")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated or not a safetensors"),
    "a pickle": (lambda f: f.write_bytes(pickle.dumps(Trap())), "not a safetensors|no layer|does not hold"),
    "empty": (lambda f: f.write_bytes(b""), "not a safetensors|no layer"),
    "a header of terabytes": (lambda f: f.write_bytes(b"\xff" * 8 + b"{}"), "not a safetensors|no layer"),
    "a missing weight": (edited(lambda t: t.pop(first(t))), "missing|Unexpected|does not hold"),
    "another weight": (edited(lambda t: t.update({"x" * 300: torch.ones(1)})), "was not expected"),
    "another shape": (edited(lambda t: t.update({first(t): torch.ones(3, 3)})), "shape"),
    "integers": (edited(lambda t: t.update({first(t): t[first(t)].long()})), "holds torch.int64"),
    "not finite": (edited(lambda t: t[first(t)].view(-1)[:1].fill_(float("nan"))), "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("made", SAFETENSORS, ids=lambda made: made.__name__)
def test_damaged_weights(made: Any, damage: str, tmp_path: Path) -> None:
    release, layer, name = made(tmp_path / "release")
    folder = release if made is set_of_one else release / layer
    change, message = DAMAGE[damage]
    change(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        load_layer(release, layer)
    assert len(str(e.value)) < 1500
    assert "\n" not in str(e.value)


NOT_A_CONFIG = {
    "broken": "{",
    "a list": "[1, 2]",
    "nested too deep": "[" * 100_000,
    "not UTF-8": b"\xff\xfe",
    "empty": "",
}


@pytest.mark.parametrize("content", NOT_A_CONFIG)
@pytest.mark.parametrize("made", SAFETENSORS, ids=lambda made: made.__name__)
def test_damaged_configurations(made: Any, content: str, tmp_path: Path) -> None:
    release, layer, _ = made(tmp_path / "release")
    names = {set_of_one: "config.yaml", sparsify_one: "cfg.json"}
    file = (release if made is set_of_one else release / layer) / names.get(made, "config.json")
    written = NOT_A_CONFIG[content]
    file.write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        load_layer(release, layer)
    assert len(str(e.value)) < 1500


@pytest.mark.parametrize(
    "yaml",
    [
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [sprung]]",
        "a: &a [x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)),
        "model_kind: &x {y: *x}",
    ],
    ids=["a call", "a bomb of references", "a circle"],
)
def test_a_hostile_yaml(yaml: str, tmp_path: Path) -> None:
    release, layer, _ = set_of_one(tmp_path)
    (release / "config.yaml").write_text(yaml)
    with pytest.raises(ValueError, match=r"is not a configuration|describes a"):
        load_layer(release, layer)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../outside.safetensors", "a/../../outside.safetensors"])
def test_a_set_reads_no_file_outside_its_folder(path: str, tmp_path: Path) -> None:
    save_file({"W_enc": torch.ones(1)}, tmp_path / "outside.safetensors")
    circuit_tracer_set(tmp_path / "a" / "set", [], transcoders=[path])
    with pytest.raises(ValueError, match="lies outside the release"):
        load_layer(tmp_path / "a" / "set", "layer_0")


@pytest.mark.parametrize(
    ("made", "config", "message"),
    [
        (circuit_tracer_set, {"model_kind": "cross_layer_transcoder"}, "cross-layer transcoder"),
        (circuit_tracer_set, {"feature_input_hook": "attn.hook_z"}, "feature_input_hook should be one of"),
        (circuit_tracer_set, {"activation": "gelu"}, "activation gelu"),
        (circuit_tracer_set, {"activation": "topk"}, "with a k from 1"),
        (circuit_tracer_set, {"activation": "topk", "k": True}, "with a k from 1"),
        (circuit_tracer_set, {"activation": "topk", "k": N + 1}, "with a k from 1"),
        (circuit_tracer_set, {"model_name": [1]}, "model_name should be a name"),
        (sparsify_folder, {"d_in": -1}, "d_in should be a positive integer"),
        (sparsify_folder, {"d_in": 2**70}, "d_in should be a positive integer"),
        (sparsify_folder, {"k": "5"}, "k should be a positive integer"),
        (sparsify_folder, {"num_latents": N + 1}, "has the shape"),
        (sparsify_folder, {"transcode": 1}, "true or false"),
        (llamascopium_folder, {"hook_point_in": 3}, "hook_point_in should be a hook point"),
        (gemma_scope_2_folder, {"hf_hook_point_in": "lm_head"}, "should name a module of a block"),
        (gemma_scope_2_folder, {"hf_hook_point_out": "model.layers.1.self_attn.output"}, "no layer here"),
    ],
)
def test_configurations_that_cannot_be(
    made: Any, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if made is circuit_tracer_set:
        release, layer = circuit_tracer_set(tmp_path, [weights()], **config), "layer_0"
    else:
        w = weights(threshold=made is gemma_scope_2_folder)
        release, layer = made(tmp_path / "layers.1.mlp", w, **config).parent, "layers.1.mlp"
    with pytest.raises(ValueError, match=message):
        load_layer(release, layer)


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    np.savez_compressed(folder / "params.npz", **arrays)
    return folder


def test_hostile_archives_of_gemma_scope(tmp_path: Path) -> None:
    root = tmp_path / "transcoders"
    w = {name: t.numpy() for name, t in weights(threshold=True).items()}
    cases = {
        "objects": w | {"W_enc": np.array([Trap()], dtype=object)},
        "bomb": w | {"W_enc": np.zeros((2**14, 2**13), dtype=np.float32)},
        "missing": {name: t for name, t in w.items() if name != "threshold"},
        "integers": w | {"b_enc": np.zeros(N, dtype=np.int64)},
        "infinite": w | {"b_dec": np.full(D_MODEL, np.inf, dtype=np.float32)},
        "text": w | {"b_dec": np.array(["x"] * D_MODEL)},
    }
    for name, arrays in cases.items():
        with pytest.raises(ValueError, match=r"params\.npz"):
            load_layer(npz(root / f"layer_1_{name}", **arrays))
    for i, content in enumerate((b"", b"PK\x03\x04", pickle.dumps(Trap()), b"\x93NUMPY")):
        folder = gemma_scope_folder(root / f"layer_1_bytes{i}", weights(threshold=True))
        (folder / "params.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"params\.npz"):
            load_layer(folder)
    folder = gemma_scope_folder(root / "layer_1_flipped", weights(threshold=True))
    content = bytearray((folder / "params.npz").read_bytes())
    content[200] ^= 0xFF
    (folder / "params.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"params\.npz"):
        load_layer(folder)


def test_hostile_checkpoints_of_transcoder_circuits(tmp_path: Path) -> None:
    good = transcoder_circuits_file(tmp_path / "good.pt", weights(), torch.ones(D_MODEL))
    buffer = io.BytesIO()
    pickle.dump({"cfg": Trap(), "state_dict": {}}, buffer)
    cases = {
        "trap.pkl": buffer.getvalue(),
        "trap.pt": pickle.dumps(Trap()),
        "short.pt": good.read_bytes()[:500],
        "empty.pt": b"",
        "number.pkl": pickle.dumps(3),
        "state.pkl": pickle.dumps({"cfg": {}, "state_dict": {}}),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_layer(tmp_path / name)
    for i, (config, message) in enumerate(
        [({"is_transcoder": False}, "is not a transcoder"), ({"hook_point": None}, "is not a transcoder")]
    ):
        file = transcoder_circuits_file(tmp_path / f"config{i}.pt", weights(), torch.ones(D_MODEL), **config)
        with pytest.raises(ValueError, match=message):
            load_layer(file)
    wrong = transcoder_circuits_file(tmp_path / "wrong.pt", weights(), torch.ones(D_MODEL + 1))
    with pytest.raises(ValueError, match="b_dec has the shape"):
        load_layer(wrong)
    with zipfile.ZipFile(good) as archive:
        assert archive.testzip() is None
    assert "sae_training" not in sys.modules


def test_nothing_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert inspect_source(tmp_path).format is None
    with pytest.raises(FileNotFoundError, match=r"holds no cfg\.json"):
        load_layer(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "x"}))
    with pytest.raises(FileNotFoundError, match="sae_weights"):
        load_layer(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder, a file or user/repo"):
        inspect_source(tmp_path / "nowhere")
