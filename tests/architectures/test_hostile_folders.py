"""Folders that are no saved layer, by accident or on purpose: one error that names the folder."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from test_loading import CONFIG, WEIGHTS, change_config, random_layer, weights_of

from mxd_lens import MxD, SkipMxD, SkipMxDConfig, TopKTranscoder
from mxd_lens.architectures.base import PairedTranscoder

FUZZ = settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "layer"
    random_layer().save_model(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved MxD of one's own: d_in 4, d_out 5, d_sae 12, d_hidden 3, k 2."""
    return Path(shutil.copytree(saved, tmp_path / "layer"))


def error_of(load: Callable[[Path], Any], folder: Path) -> str:
    """The message with which `load` refuses the folder; no other error will do, nor success."""
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        load(folder)
    assert type(e.value) in (ValueError, FileNotFoundError), repr(e.value)
    message = str(e.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 1000 + len(str(folder))
    return message


def refused(folder: Path) -> str:
    """How the class and its base refuse the folder: both the same."""
    by_class, by_base, by_release = (
        error_of(load, folder)
        for load in (MxD.load_from_disk, PairedTranscoder.load_from_disk, MxD.from_pretrained)
    )
    assert by_class == by_base == by_release
    return by_class


# The weights' file


def header_of(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / WEIGHTS
    header, data = header_of(file.read_bytes())
    changed = change(header)
    file.write_bytes(with_header(header if changed is None else changed, data))


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "petabytes": lambda h: h["W_enc"].update(data_offsets=[0, 10**15], shape=[10**7, 25 * 10**6]),
    "a shape of petabytes": lambda h: h["W_enc"].update(shape=[2**40, 2**40]),
    "a shape that overflows": lambda h: h["W_enc"].update(shape=[2**63, 2**63]),
    "a negative shape": lambda h: h["W_enc"].update(shape=[-4, -12]),
    "a shape of fractions": lambda h: h["W_enc"].update(shape=[4.5, 12]),
    "offsets backwards": lambda h: h["W_enc"].update(data_offsets=h["W_enc"]["data_offsets"][::-1]),
    "offsets beyond the file": lambda h: h["W_enc"].update(data_offsets=[10**6, 10**6 + 192]),
    "offsets that overlap": lambda h: h["W_enc"].update(data_offsets=h["W_out"]["data_offsets"]),
    "no offsets": lambda h: h["W_enc"].pop("data_offsets") and None,
    "no dtype": lambda h: h["W_enc"].pop("dtype") and None,
    "an unknown dtype": lambda h: h["W_enc"].update(dtype="F31"),
    "a swapped shape": lambda h: h["W_enc"].update(shape=h["W_enc"]["shape"][::-1]),
    "a flat shape": lambda h: h["W_enc"].update(shape=[48]),
    "no shape": lambda h: h["W_enc"].update(shape=[]),
    "a tensor that is none": lambda h: h.update(W_enc=[]),
    "a list": lambda h: [h],
    "null": lambda h: b"null",
    "nothing": lambda h: b"",
    "not JSON": lambda h: b"{" + b"\x00" * 30,
    "not UTF-8": lambda h: json.dumps(h).replace("W_enc", "W\xff\xfe").encode("latin-1"),
    "deeply nested": lambda h: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "metadata that is a list": lambda h: h.update(__metadata__=[1]),
    "a name with line breaks": lambda h: h.update({"W_enc\n" * 50: h.pop("W_enc")}),
    "all names gone": lambda h: {f"x{i}": v for i, v in enumerate(h.values())},
    "integers": lambda h: h["W_enc"].update(dtype="I32"),
    "unsigned integers": lambda h: h["W_enc"].update(dtype="U32"),
}


@pytest.mark.parametrize("how", HEADERS)
def test_headers(folder: Path, how: str) -> None:
    change_header(folder, HEADERS[how])
    refused(folder)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length(folder: Path, length: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + whole[8:])
    assert "truncated or not a safetensors file" in refused(folder)


DTYPES = [
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("all_of_them", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_no_floats(folder: Path, dtype: torch.dtype, all_of_them: bool) -> None:
    weights = weights_of(folder)
    for name in weights if all_of_them else ["b_enc"]:
        weights[name] = weights[name].to(dtype)
    save_file(weights, folder / WEIGHTS)
    message = refused(folder)
    assert "no floating-point numbers" in message
    assert "b_enc is" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "W_hidden", "b_hidden", "W_out"])
def test_weights_that_are_not_finite(folder: Path, name: str, value: float) -> None:
    weights = weights_of(folder)
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / WEIGHTS)
    assert f"{name} holds values that are not finite" in refused(folder)
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        SAE.load_from_disk(folder)


def test_weights_too_large_for_the_dtype_asked_for(folder: Path) -> None:
    weights = weights_of(folder)
    weights["b_dec"][0] = 1e6
    save_file(weights, folder / WEIGHTS)
    assert MxD.load_from_disk(folder, dtype="float32").b_dec[0] == 1e6
    with pytest.raises(ValueError, match=r"b_dec holds values that are not finite in torch\.float16"):
        MxD.load_from_disk(folder, dtype="float16")


def test_weights_of_a_thousand_layers(folder: Path) -> None:
    save_file({f"{i}": torch.zeros(1) for i in range(1000)}, folder / WEIGHTS)
    assert "and 995 more" in refused(folder)


def test_a_scaling_factor_is_not_swallowed(folder: Path) -> None:
    """SAELens' own loader drops one that is all ones, and would let it stand for a missing weight."""
    save_file(weights_of(folder) | {"scaling_factor": torch.ones(12)}, folder / WEIGHTS)
    assert "scaling_factor: the config says nothing" in refused(folder)


class Bomb:
    """What unpickling would leave a trace of."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("how", ["pickle", "torch", "torch, old", "numpy"])
def test_a_pickle_is_never_executed(folder: Path, tmp_path: Path, how: str, name: str) -> None:
    trace, file = tmp_path / "executed", folder / name
    if how == "pickle":
        file.write_bytes(pickle.dumps(Bomb(trace)))
    elif how == "numpy":
        with file.open("wb") as f:
            np.save(f, np.array([Bomb(trace)]), allow_pickle=True)
    else:
        torch.save(Bomb(trace), file, _use_new_zipfile_serialization=how == "torch")
    refused(folder)
    with pytest.raises(Exception):  # noqa: B017, PT011
        SAE.load_from_disk(folder)
    assert not trace.exists()


# The configuration

TEXTS: dict[str, bytes] = {
    "not UTF-8": b'{"d_in": "\xff\xfe"}',
    "UTF-16": '{"d_in": 4}'.encode("utf-16"),
    "zeros": b"\x00" * 100,
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested and closed": b"[" * 50_000 + b"]" * 50_000,
    "two objects": b"{}{}",
    "a comma too many": b'{"d_in": 4,}',
    "a comment": b'{"d_in": 4} // four',
    "a lone quote": b'"',
    "five thousand digits": b'{"d_in": ' + b"9" * 5000 + b"}",
    "YAML": b"d_in: 4\n",
}


@pytest.mark.parametrize("how", TEXTS)
def test_texts_that_are_no_configuration(folder: Path, how: str) -> None:
    (folder / CONFIG).write_bytes(TEXTS[how])
    assert f"{CONFIG} is not the configuration of a layer" in refused(folder)


@pytest.mark.parametrize("name", ["d_in", "architecture", "metadata", "k"])
def test_what_is_said_twice(folder: Path, name: str) -> None:
    text = (folder / CONFIG).read_text()
    value = json.dumps(json.loads(text)[name])
    (folder / CONFIG).write_text(text[:-1] + f', "{name}": {value}}}')
    assert f"named twice: {name}" in refused(folder)


def test_tens_of_thousands_of_settings(folder: Path) -> None:
    many = ", ".join(f'"a{i % 30_000}": 1' for i in range(40_000))
    (folder / CONFIG).write_text(f"{{{many}}}")
    assert "named twice: a0; a1" in refused(folder)


def test_what_is_said_twice_in_the_metadata(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"metadata": {', '"metadata": {"a": 1, "a": 2, '))
    assert "named twice: a" in refused(folder)


VERSION = {"sae_lens_version": "6.54.12"}
VALUES: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, f"{name} must be a positive integer") for name in ("d_in", "d_out", "d_sae", "d_hidden")
      for value in (0, -1, 4.0, 1e308, True, "4", None, [4], {}, float("nan"), 10**30, 10**4000)),
    *(({"k": value}, "k must be a") for value in (0, -2, 2.0, True, "2", [2], 13, 10**30, 2**62)),
    *(({"dtype": value}, "its dtype is") for value in (None, 32, "int8", "float8_e4m3fn", ["float32"], {})),
    *(({"architecture": value}, "its architecture is") for value in (None, 3, "", "../mxd", ["mxd"], {})),
    *(({"hidden_activation": value}, "hidden_activation must be one of") for value in (None, 3, "", [], {})),
    *(({"gated": value}, "gated must be true or false") for value in (None, 0, 1, "false", [], {})),
    *(({"metadata": value}, "is not the configuration") for value in (None, [], "none", 3, [[]])),
    ({"metadata": VERSION | {"hook_name": 3}}, "metadata.hook_name must be a name, got 3"),
    ({"metadata": VERSION | {"hook_name_out": ["out"]}}, "metadata.hook_name_out must be a name"),
    ({"metadata": VERSION | {"model_name": {"a": "b"}}}, "metadata.model_name must be a name"),
    ({"metadata": VERSION | {"to_dict": "x"}}, "must not have settings named to_dict"),
    ({"metadata": VERSION | {"__class__": "x"}}, "is not the configuration"),
    ({"metadata": VERSION | {"__getattr__": 1, "items": 2}}, "must not have settings named __get"),
    ({"metadata": VERSION | {"self": 1}}, "is not the configuration"),
    ({"metadata": {"sae_lens_version": "six"}}, "six"),
    ({"metadata": {"sae_lens_version": 6}}, "6"),
    ({"normalize_activations": "expected_average_only_in"}, "normalize_activations must be 'none'"),
    ({"normalize_activations": ["none"]}, "normalize_activations must be"),
    ({"reshape_activations": "hook_z"}, "reshape_activations must be 'none'"),
    ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
    ({"architecture": "standard"}, "not of type"),
    ({"architecture": "topk"}, ""),
    ({"architecture": "transcoder"}, "not of type"),
    ({"architecture": "topk_transcoder"}, ""),
    ({"architecture": "skip_mxd"}, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"), VALUES, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(VALUES)]
)
def test_values_that_cannot_be(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    assert message in error_of(MxD.load_from_disk, folder)


def test_the_classes_say_it_to_saelens_too(folder: Path) -> None:
    """`SAE.load_from_disk` reads the file itself: the configuration's and the weights' checks are ours."""
    for changes, message in (
        ({"d_in": 10**30}, "d_in must be a positive integer"),
        ({"d_sae": 2**29, "d_in": 2**29, "d_hidden": 2**29}, "contradicts its weights"),
        ({"gated": "no"}, "gated must be true or false"),
        ({"hidden_activation": []}, "hidden_activation must be one of"),
        ({"metadata": VERSION | {"hook_name": 3}}, "metadata.hook_name must be a name"),
        ({"architecture": "skip_mxd"}, "W_skip: the config says"),
        ({"architecture": "topk_transcoder"}, "W_out: the config says nothing"),
    ):
        before = (folder / CONFIG).read_text()
        change_config(folder, **changes)
        with pytest.raises(ValueError, match=message):
            SAE.load_from_disk(folder)
        (folder / CONFIG).write_text(before)


def test_another_class_than_was_saved(tmp_path: Path) -> None:
    SkipMxD(SkipMxDConfig(d_in=4, d_out=5, d_sae=12, d_hidden=3, k=2)).save_model(tmp_path)
    assert isinstance(MxD.load_from_disk(tmp_path), SkipMxD)  # a SkipMxD is an MxD
    assert "SkipMxD" in error_of(TopKTranscoder.load_from_disk, tmp_path)


# What lies where a file should


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("what", ["folder", "loop", "dangling", "fifo", "device"])
def test_no_file(folder: Path, name: str, what: str) -> None:
    file = folder / name
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "loop":
        (folder / "other").symlink_to(file)
        file.symlink_to(folder / "other")
    elif what == "dangling":
        file.symlink_to(folder / "gone")
    elif what == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    assert f"holds no {name}" in error_of(MxD.load_from_disk, folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_an_empty_file(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    assert name in refused(folder)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read, even by root")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_cannot_be_read(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/mem")
    assert name in refused(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_one_may_not_read(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    assert name in refused(folder)


def test_a_folder_that_is_a_loop(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for load in (MxD.load_from_disk, MxD.from_pretrained):
        error_of(load, tmp_path / "a")


# Any bytes at all


def unharmed(folder: Path) -> None:
    """The folder is refused as it should be, or is a layer with finite weights that runs."""
    try:
        layer = MxD.load_from_disk(folder)
    except Exception:
        error_of(MxD.load_from_disk, folder)
    else:
        assert all(p.isfinite().all() and p.dtype == layer.dtype for p in layer.parameters())
        assert layer(torch.zeros(2, layer.cfg.d_in, dtype=layer.dtype)).shape == (2, layer.cfg.d_out)


@FUZZ
@given(data=st.data())
def test_bytes_exchanged(folder: Path, saved: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    whole = bytearray((saved / name).read_bytes())
    header = len(whole) if name == CONFIG else 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(bytes(whole))
    unharmed(folder)


@FUZZ
@given(data=st.data())
def test_bytes_cut_out_or_put_in(folder: Path, saved: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    whole = (saved / name).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:])
    unharmed(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_any_json_in_any_place(folder: Path, saved: Path, data: st.DataObject) -> None:
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    config = json.loads((saved / CONFIG).read_text())
    place = config["metadata"] if data.draw(st.booleans()) else config
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    (folder / CONFIG).write_text(json.dumps(config))
    unharmed(folder)


def test_what_is_whole_is_still_loaded(folder: Path) -> None:
    unharmed(folder)
    assert load_file(folder / WEIGHTS).keys() == dict(MxD.load_from_disk(folder).named_parameters()).keys()
