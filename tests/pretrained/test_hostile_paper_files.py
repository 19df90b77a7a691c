"""Damaged and hostile checkpoint files: one clear error each, quickly, and nothing in them runs."""

import codecs
import contextlib
import encodings.latin_1  # noqa: F401  # zipfile imports it for some names
import faulthandler
import functools
import gzip
import io
import os
import pickle
import re
import signal
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_files import D_SAE, FORMATS, SETTINGS, checkpoint, file_bytes, random_weights, write

from mxd_lens import MxD, load_reference_checkpoint
from mxd_lens.pretrained.formats.checkpoint_file import UnreadableCheckpointError
from mxd_lens.pretrained.formats.paper import convert

TIMEOUT_S = 20
PICKLES = [name for name in FORMATS if name != "file.pkl.gz"]

# Whoever runs, imports or writes something raises one of these events of sys.audit.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "exec",
    "compile",
    "import",
)
FORBIDDEN += ("pickle.find_class", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
FORBIDDEN += ("socket.connect", "marshal.loads", "ctypes.dlopen", "webbrowser.open", "builtins.input")
events: list[str] | None = None


def record_event(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if events is not None and (event in FORBIDDEN or writes):
        events.append(f"{event} {args!r}"[:200])


sys.addaudithook(record_event)


@contextlib.contextmanager
def nothing_happens(folder: Path) -> Iterator[None]:
    """Fails if something runs, is imported or written, or takes too long."""
    global events

    def too_long(*_: Any) -> None:
        raise AssertionError(f"took more than {TIMEOUT_S} s")

    before = sorted(folder.rglob("*"))
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(TIMEOUT_S)
    # No signal handler ends what hangs inside one operation, as the hash of a nested tuple.
    faulthandler.dump_traceback_later(3 * TIMEOUT_S, exit=True)
    events = []
    try:
        yield
    finally:
        seen, events = events, None
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    assert seen == []
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What good files import is imported before anything is watched."""
    codecs.lookup("cp437")  # of names in zip archives
    for file_format in FORMATS:
        load_reference_checkpoint(write(tmp_path_factory.mktemp("warm"), file_format=file_format))


def refused(path: Path) -> str:
    """The message of the one error that loading and converting the file end in."""
    with nothing_happens(path.parent):
        with pytest.raises(UnreadableCheckpointError) as e:
            load_reference_checkpoint(path)
        with pytest.raises(UnreadableCheckpointError):
            convert(path, path.parent / "layer")
    message = str(e.value)
    assert message.startswith(str(path))
    assert len(message) < len(str(path)) + 2000
    message.encode()
    return message


def refused_bytes(data: bytes, folder: Path, name: str = "file.pt") -> str:
    (folder / name).write_bytes(data)
    return refused(folder / name)


# Pickles that call something


class Call:
    """Pickled as the call of a function, which a plain pickle.load makes."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def global_opcodes(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


CANARY = str(Path(tempfile.gettempdir()) / "mxd-lens-canary")
TOUCH = f"touch {CANARY}"
OPEN = f"open({CANARY!r}, 'w')"
CALLS: dict[str, tuple[str, ...]] = {
    "os.system": (TOUCH,),
    "posix.system": (TOUCH,),
    "nt.system": (TOUCH,),
    "os.popen": (TOUCH,),
    "os.remove": (CANARY,),
    "os.execv": (TOUCH,),
    "subprocess.Popen": (TOUCH,),
    "subprocess.check_output": (TOUCH,),
    "subprocess.getoutput": (TOUCH,),
    "builtins.eval": (OPEN,),
    "builtins.exec": (OPEN,),
    "builtins.compile": (OPEN, "x", "exec"),
    "builtins.open": (CANARY, "w"),
    "builtins.__import__": ("antigravity",),
    "builtins.getattr": ("", "upper"),
    "builtins.setattr": (TOUCH, "upper", ""),
    "builtins.print": (TOUCH,),
    "builtins.bytearray": (TOUCH,),
    "builtins.map": (TOUCH, ""),
    "__builtin__.eval": (OPEN,),
    "copyreg._reconstructor": (TOUCH,),
    "copy_reg._reconstructor": (TOUCH,),
    "functools.partial": (TOUCH,),
    "functools.reduce": (TOUCH, ""),
    "operator.attrgetter": ("system",),
    "operator.methodcaller": ("system", TOUCH),
    "importlib.import_module": ("antigravity",),
    "importlib.reload": ("os",),
    "codecs.encode": (TOUCH, "rot13"),
    "_codecs.encode": (TOUCH, "latin1"),
    "pickle.loads": (TOUCH,),
    "_pickle.loads": (TOUCH,),
    "marshal.loads": (TOUCH,),
    "types.FunctionType": (TOUCH,),
    "types.CodeType": (TOUCH,),
    "timeit.timeit": (OPEN,),
    "runpy.run_path": (CANARY,),
    "runpy._run_code": (OPEN,),
    "pty.spawn": (TOUCH,),
    "pdb.run": (OPEN,),
    "cProfile.run": (OPEN,),
    "code.interact": (OPEN,),
    "webbrowser.open": (CANARY,),
    "ctypes.CDLL": (CANARY,),
    "shutil.rmtree": (CANARY,),
    "tempfile.mkstemp": (),
    "pathlib.Path": (CANARY,),
    "pathlib.Path.touch": (CANARY,),
    "logging.FileHandler": (CANARY,),
    "multiprocessing.Process": (TOUCH,),
    "collections.Counter": (TOUCH,),
    "collections.defaultdict": (TOUCH,),
    "torch.load": (CANARY,),
    "torch.serialization.load": (CANARY,),
    "torch.hub.load": (CANARY, "x"),
    "torch.jit.load": (CANARY,),
    "torch.save": (TOUCH, CANARY),
    "torch.Tensor": (TOUCH,),
    "torch._utils._rebuild_tensor": (TOUCH,),
    "torch._utils._rebuild_qtensor": (TOUCH,),
    "torch._utils._rebuild_sparse_tensor": (TOUCH,),
    "torch._utils._rebuild_wrapper_subclass": (TOUCH,),
    "torch._utils._rebuild_device_tensor_from_numpy": (TOUCH,),
    "torch._tensor._rebuild_from_type_v2": (TOUCH,),
    "torch.storage.UntypedStorage": (TOUCH,),
    "torch.UntypedStorage.from_file": (CANARY,),
    "torch.nn.modules.linear.Linear": (TOUCH,),
    "torch.utils.cpp_extension.load_inline": (TOUCH,),
    "numpy.core.multiarray._reconstruct": (TOUCH,),
    "numpy._core.multiarray.scalar": (TOUCH,),
    "numpy.load": (CANARY,),
    "numpy.testing._private.utils.runstring": (OPEN,),
    "sae_training.config.__loader__.exec_module": (TOUCH,),
    "sae_training.config.os.system": (TOUCH,),
    "sae_training.utils.run": (TOUCH,),
    "mxd_lens.cli.application.main": (),
}


def call_opcodes(name: str, args: tuple[str, ...]) -> bytes:
    module, _, function = name.rpartition(".")
    return global_opcodes(module, function) + b"(" + b"".join(map(text, args)) + b"tR"


def in_container(opcodes: bytes, file_format: str) -> bytes:
    """A pickle of one value, which is what the opcodes leave, in a file of this format."""
    data = b"\x80\x02" + opcodes + b"."
    if file_format == "zip.pt":
        return zip_file({"data.pkl": data, "version": b"3\n", "byteorder": b"little"})
    if file_format == "legacy.pt":
        return legacy_start() + data + pickle.dumps([], 2)
    return gzip.compress(data) if file_format.endswith("gz") else data


def legacy_start(version: int = 1001, little_endian: bool = True) -> bytes:
    machine = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
    parts = (0x1950A86A20F9469CFC6C, version, machine)
    return b"".join(pickle.dumps(part, 2) for part in parts)


def legacy(contents: bytes = b"\x80\x02N.", keys: Any = (), rest: bytes = b"", **start: Any) -> bytes:
    pickled_keys = keys if isinstance(keys, bytes) else pickle.dumps(list(keys), 2)
    return legacy_start(**start) + contents + pickled_keys + rest


def zip_file(entries: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    pairs = list(entries.items()) if isinstance(entries, dict) else entries
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in pairs:
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", list(CALLS))
def test_a_call(name: str, file_format: str, tmp_path: Path) -> None:
    message = refused_bytes(in_container(call_opcodes(name, CALLS[name]), file_format), tmp_path, file_format)
    assert f"names {name!r}" in message
    assert "nothing was run" in message
    assert not Path(CANARY).exists()


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("where", ["cfg", "setting", "state_dict", "weight", "beside"])
def test_a_call_inside_a_good_checkpoint(where: str, file_format: str, tmp_path: Path) -> None:
    call, weights, changes = Call(os.system, TOUCH), random_weights(SETTINGS), {}
    if where == "weight":
        weights["gate"] = call
    if where == "setting":
        changes = {"run_name": call}
    with checkpoint(SETTINGS | changes, call if where == "state_dict" else weights) as contents:
        contents |= {"cfg": {"cfg": call}, "beside": {"optimizer": call}}.get(where, {})
        data = file_bytes(contents, file_format)
    assert f"names '{os.system.__module__}.system'" in refused_bytes(data, tmp_path)
    assert not Path(CANARY).exists()


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_canary_can_sing(file_format: str, tmp_path: Path) -> None:
    """Read as pickles usually are, such a file does run its command, and the watch sees it."""
    canary = tmp_path / "canary"
    path = tmp_path / file_format
    path.write_bytes(file_bytes(Call(os.system, f"touch {canary}"), file_format))
    opened = {"file.pkl": open, "file.pkl.gz": gzip.open}.get(file_format, open)
    load = functools.partial(torch.load, weights_only=False) if file_format.endswith("pt") else pickle.load
    with (
        pytest.raises(AssertionError, match="system"),
        opened(path, "rb") as file,
        nothing_happens(tmp_path),
    ):
        load(file)
    assert canary.exists()


# Pickles inside pickles


def load_from_bytes(data: bytes) -> bytes:
    argument = b"B" + struct.pack("<I", len(data)) + data
    return global_opcodes("torch.storage", "_load_from_bytes") + argument + b"\x85R"


NESTED = {
    "a call": b"\x80\x02" + call_opcodes("os.system", (TOUCH,)) + b".",
    "a call after the magic number": legacy_start()
    + b"\x80\x02"
    + call_opcodes("os.system", (TOUCH,))
    + b".",
    "a call as the version": legacy_start()[:15] + b"\x80\x02" + call_opcodes("os.system", (TOUCH,)) + b".",
    "a zip archive": file_bytes(torch.zeros(2), "zip.pt"),
    "a legacy file of a call": file_bytes(Call(os.system, TOUCH), "legacy.pt"),
    "a storage in a storage": legacy_start() + b"\x80\x02" + load_from_bytes(legacy_start()) + b".",
    "nothing": b"",
    "noise": bytes(range(256)),
}


@pytest.mark.parametrize("inner", list(NESTED))
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_pickle_in_a_pickle(inner: str, file_format: str, tmp_path: Path) -> None:
    refused_bytes(in_container(load_from_bytes(NESTED[inner]), file_format), tmp_path)
    assert not Path(CANARY).exists()


def test_storages_all_the_way_down(tmp_path: Path) -> None:
    data = b"\x80\x02N."
    for _ in range(3000):
        data = b"\x80\x02" + load_from_bytes(data) + b"."
    refused_bytes(data, tmp_path)


def test_one_nested_pickle_called_a_thousand_times(tmp_path: Path) -> None:
    inner = legacy_start() + b"\x80\x02(" + b"N" * 50_000 + b"t."
    call = b"h\x00h\x01\x85R0"
    start = global_opcodes("torch.storage", "_load_from_bytes") + b"q\x00"
    argument = b"B" + struct.pack("<I", len(inner)) + inner + b"q\x01"
    refused_bytes(b"\x80\x02" + start + argument + call * 1000 + b".", tmp_path)


# Programs for the stack machine


def doubled(levels: int) -> bytes:
    """A tuple that holds another twice, and so on: 2 ** levels values once somebody walks through it."""
    return b")" + b"q\x00h\x00\x86" * levels


# Without protocol and stop.
PROGRAMS: dict[str, bytes] = {
    "an unknown opcode": b"\xff",
    "another protocol": b"\x80\xff\xfe",
    "a huge memo index": b"Nr\xff\xff\xff\x7f",
    "a memo index that is not there": b"h\x07",
    "a huge frame": b"\x95" + b"\xff" * 7 + b"\x7f}",
    "huge bytes": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "4 GiB of bytes": b"B\xff\xff\xff\xff",
    "a huge bytearray": b"\x96" + struct.pack("<Q", 2**40),
    "a huge string": b"\x8d" + struct.pack("<Q", 2**62),
    "a huge integer": b"\x8b\xff\xff\xff\x7f",
    "an integer of negative length": b"\x8b\xff\xff\xff\xff",
    "a long decimal integer": b"L" + b"9" * 10_000_000 + b"L\n",
    "a text integer": b"I" + b"7" * 5000 + b"\n",
    "a string that is no UTF-8": b"X\x02\x00\x00\x00\xff\xfe",
    "a quoted string": b"S'abc'\n",
    "a global without a name": b"cos\n",
    "a global without an end": b"c" + b"o" * 10_000_000,
    "a global that is not ASCII": b"c\xff\xfe\nsystem\n",
    "an empty global": b"c\n\n",
    "a huge global": text("a" * 1_000_000) + text("b" * 1_000_000) + b"\x93",
    "a global of surrogates": b"X\x03\x00\x00\x00\xed\xa0\x80" + text("b") + b"\x93",
    "a global of numbers": b"K\x01K\x02\x93",
    "a global of the class's attributes": text("sae_training.config")
    + text("LanguageModelSAERunnerConfig.__init__.__globals__")
    + b"\x93",
    "a call of a string": text("os.system") + b")R",
    "a call of an allowed name as a string": text("torch.device") + b")R",
    "a call of a dtype": global_opcodes("torch", "float32") + b")R",
    "a call of what a call returned": global_opcodes("collections", "OrderedDict") + b")R)R",
    "a call without arguments": global_opcodes("torch", "device") + b")R",
    "a call with a list": global_opcodes("torch", "device") + b"]R",
    "a device of numbers": global_opcodes("torch", "device") + b"K\x01\x85R",
    "a path of numbers": global_opcodes("pathlib", "PosixPath") + b"K\x01\x85R",
    "a dictionary from pairs": global_opcodes("collections", "OrderedDict")
    + b"]("
    + doubled(60)
    + b"K\x01\x86e\x85R",
    "an object of no class": b"K\x01)\x81",
    "an object with keywords": global_opcodes("torch", "device") + b")}\x92",
    "an instance": b"(ios\nsystem\n",
    "an old object": b"(" + global_opcodes("os", "system") + b"o",
    "an extension": b"\x82\x01",
    "a big extension": b"\x84\xff\xff\xff\x7f",
    "a persistent id of text": b"P../../etc/passwd\n",
    "a persistent id": text("../../etc/passwd") + b"Q",
    "a persistent module": b"(" + text("module") + b"NNNtQ",
    "a buffer from outside": b"\x97",
    "the state of a name": global_opcodes("torch", "device") + b"}(" + text("a") + b"NubN",
    "the state of a number": b"K\x01}b",
    "a state that is no dictionary": b"" + global_opcodes("sae_training.config", "A") + b")\x81K\x01b",
    "the state of slots": global_opcodes("sae_training.config", "A") + b")\x81N}\x86b",
    "an empty stack": b"",
    "a call on an empty stack": b"R",
    "a pop of an empty stack": b"0",
    "a tuple of nothing": b"\x87t",
    "items without a mark": b"]e",
    "items of a number": b"K\x01K\x02a",
    "items of a dictionary in a list": b"]K\x01K\x02s",
    "an odd number of items": b"}(K\x01u",
    "a key that cannot be one": b"}]K\x01s",
    "a key that takes for ever to hash": b"}" + doubled(60) + b"Ns",
    "a set that takes for ever to hash": b"\x8f(" + doubled(60) + b"\x90",
    "a list in itself": b"]q\x00h\x00a",
    "a config that is a number": b"}(" + text("cfg") + b"K\x01" + text("state_dict") + b"}u",
    "a deep tuple": b")" + b"\x85" * 15_000,
    "a deep list": b"]" * 15_000 + b"a" * 1_500,
    "too many opcodes": b"]" * 200_000,
    "too many duplicates": b"]" + b"2" * 200_000,
    "too many marks": b"(" * 200_000,
}

FILES: dict[str, bytes] = {
    "nothing": b"",
    "no stop": b"\x80\x02}",
    "only stop": b".",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "JSON": b'{"cfg": {}, "state_dict": {}}',
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "zeros": bytes(100_000),
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_a_program(name: str, file_format: str, tmp_path: Path) -> None:
    refused_bytes(in_container(PROGRAMS[name], file_format), tmp_path, file_format)


@pytest.mark.parametrize("name", list(FILES))
def test_another_file(name: str, tmp_path: Path) -> None:
    refused_bytes(FILES[name], tmp_path, "file.pt")
    refused_bytes(gzip.compress(FILES[name]), tmp_path, "file.pkl.gz")


def nested_lists(levels: int) -> list[Any]:
    return [nested_lists(levels - 1)] if levels else []


def endless(kind: str) -> Any:
    value: Any = ()
    match kind:
        case "doubled":
            for _ in range(60):
                value = (value, value)
        case "in itself":
            value = []
            value.append(value)
        case "a dictionary in itself":
            value = {}
            value["a"] = value
        case "deep":
            value = nested_lists(100)
        case "long":
            value = [0] * 15_000
    return value


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("kind", ["doubled", "in itself", "a dictionary in itself", "deep", "long"])
def test_a_config_without_end(kind: str, file_format: str, tmp_path: Path) -> None:
    path = write(tmp_path, SETTINGS | {"run_name": endless(kind)}, random_weights(SETTINGS), file_format)
    refused(path)
    path = write(tmp_path, SETTINGS | {"topk": endless(kind)}, random_weights(SETTINGS), file_format)
    refused(path)
    path = write(tmp_path, SETTINGS, {"W_enc": endless(kind)}, file_format)
    refused(path)


# Tensors that cannot be


class Persistent:
    """Pickled as a persistent id, as torch pickles a storage."""

    def __init__(self, key: str, numel: int, *view: Any) -> None:
        self.id = ("storage", torch.FloatStorage, key, "cpu", numel, *view)


class TorchPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, Persistent) else None


def torch_pickle(contents: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    TorchPickler(buffer, protocol).dump(contents)
    return buffer.getvalue()


def storage_of(file_format: str, numbers: bytes, key: str) -> Any:
    numel = len(numbers) // 4
    if file_format == "zip.pt":
        return Persistent(key, numel)
    if file_format == "legacy.pt":
        return Persistent(key, numel, None)
    storage = legacy(torch_pickle(Persistent(key, numel, None)), [key], struct.pack("<q", numel) + numbers)
    return Call(torch.storage._load_from_bytes, storage)


def raw_file(
    file_format: str,
    storage: Any = None,
    tensor: Any = (0, (D_SAE,), (1,), False, OrderedDict()),
    numbers: bytes = bytes(4 * D_SAE),
    numel: int | None = None,
) -> bytes:
    """A checkpoint put together by hand, so that all about one tensor, b_enc, can be wrong.

    Args:
        storage: what its storage is pickled as. None: as it should be.
        tensor: offset, shape, stride, and what follows.
        numbers: the bytes in the file.
        numel: how many numbers the legacy format says they are.
    """
    weights, data = {}, {}
    for name, weight in random_weights(SETTINGS).items():
        is_b_enc = name == "b_enc"
        data[name] = numbers if is_b_enc else weight.contiguous().numpy().tobytes()
        stored = storage_of(file_format, bytes(4 * D_SAE) if is_b_enc else data[name], name)
        view = (0, tuple(weight.shape), weight.contiguous().stride(), False, OrderedDict())
        if is_b_enc:
            stored, view = stored if storage is None else storage, tensor
        weights[name] = Call(torch._utils._rebuild_tensor_v2, stored, *view)
    with checkpoint(SETTINGS, weights) as contents:
        # torch writes protocol 2, pickle.dump a later one, which has bytes.
        pickled = torch_pickle(contents, 4 if file_format == "file.pkl" else 2)
    if file_format == "zip.pt":
        records = {f"data/{name}": record for name, record in data.items()}
        return zip_file({"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **records})
    if file_format == "legacy.pt":
        sizes = {name: len(record) // 4 for name, record in data.items()} | {
            "b_enc": numel or len(numbers) // 4
        }
        records = [struct.pack("<q", sizes[name]) + record for name, record in data.items()]
        return legacy(pickled, list(data), b"".join(records))
    return pickled


TENSORS: dict[str, tuple[Any, ...]] = {
    "10^18 numbers in 40 bytes": (0, (10**9, 10**9), (0, 0)),
    "10^18 numbers with strides": (0, (10**9, 10**9), (10**9, 1)),
    "repeated numbers": (0, (D_SAE,), (0,)),
    "numbers with gaps": (0, (D_SAE,), (2,)),
    "the end of its storage and more": (1, (D_SAE,), (1,)),
    "more than its storage": (0, (D_SAE + 1,), (1,)),
    "a huge offset": (2**62, (D_SAE,), (1,)),
    "a negative offset": (-1, (D_SAE,), (1,)),
    "a negative size": (0, (-D_SAE,), (1,)),
    "a negative stride": (0, (D_SAE,), (-1,)),
    "a size beyond 64 bits": (0, (2**64,), (1,)),
    "a size of 2000 bits": (0, (2**2000,), (2**2000,)),
    "no numbers": (0, (0,), (1,)),
    "no dimensions": (0, (), ()),
    "two sizes and one stride": (0, (D_SAE, 1), (1,)),
    "a thousand dimensions": (0, (2**60,) * 1000, (1,) * 1000),
    "a fractional size": (0, (10.0,), (1,)),
    "a size that is a truth": (0, (True,), (1,)),
    "a size that is a string": (0, "10", (1,)),
    "a size that is None": (0, None, (1,)),
    "an offset that is None": (None, (D_SAE,), (1,)),
}


@pytest.mark.parametrize("file_format", PICKLES)
def test_a_file_by_hand(file_format: str, tmp_path: Path) -> None:
    """What the tests below change is what is wrong with their files."""
    path = tmp_path / "file.pt"
    path.write_bytes(raw_file(file_format))
    assert torch.equal(load_reference_checkpoint(path).b_hidden, torch.zeros(D_SAE))


@pytest.mark.parametrize("file_format", PICKLES)
@pytest.mark.parametrize("name", list(TENSORS))
def test_a_tensor(name: str, file_format: str, tmp_path: Path) -> None:
    data = raw_file(file_format, tensor=(*TENSORS[name], False, OrderedDict()))
    refused_bytes(data, tmp_path)


@pytest.mark.parametrize("file_format", PICKLES)
@pytest.mark.parametrize(
    "tensor", [(), (0,), (0, (D_SAE,)), (0, (D_SAE,), (1,), False, OrderedDict(), {"conj": True})]
)
def test_a_tensor_of_other_arguments(tensor: tuple[Any, ...], file_format: str, tmp_path: Path) -> None:
    refused_bytes(raw_file(file_format, tensor=tensor), tmp_path)


@pytest.mark.parametrize("file_format", PICKLES)
@pytest.mark.parametrize("storage", [3, "b_enc", b"1234", (), {}, torch.FloatStorage, torch.float32])
def test_a_storage_that_is_none(storage: Any, file_format: str, tmp_path: Path) -> None:
    refused_bytes(raw_file(file_format, storage), tmp_path)


@pytest.mark.parametrize("file_format", ["zip.pt", "legacy.pt"])
@pytest.mark.parametrize(
    "key", ["b_en", "../b_enc", "../../../../etc/passwd", "/etc/passwd", "b_enc\x00", ""]
)
def test_a_storage_of_another_name(key: str, file_format: str, tmp_path: Path) -> None:
    if key == "b_enc\x00" and file_format == "zip.pt":
        pytest.skip("torch reads a record's name up to its first NUL: it is the storage of b_enc")
    view = [] if file_format == "zip.pt" else [None]
    refused_bytes(raw_file(file_format, Persistent(key, D_SAE, *view)), tmp_path)


@pytest.mark.parametrize("file_format", ["zip.pt", "legacy.pt"])
@pytest.mark.parametrize("numel", [-1, 0, D_SAE - 1, D_SAE + 1, 2**40, 2**70, None, "10", 10.0])
def test_a_storage_that_says_another_size(numel: Any, file_format: str, tmp_path: Path) -> None:
    if file_format == "legacy.pt" and numel in (0, D_SAE - 1):
        pytest.skip("the size beside the numbers counts, and it is right")
    view = [] if file_format == "zip.pt" else [None]
    refused_bytes(raw_file(file_format, Persistent("b_enc", numel, *view)), tmp_path)


@pytest.mark.parametrize("file_format", ["zip.pt", "legacy.pt"])
@pytest.mark.parametrize("n_bytes", [0, 4, 4 * D_SAE - 4, 4 * D_SAE + 4, 10_000])
def test_a_storage_of_another_size(n_bytes: int, file_format: str, tmp_path: Path) -> None:
    refused_bytes(raw_file(file_format, numbers=bytes(n_bytes)), tmp_path)


@pytest.mark.parametrize("numel", [-1, -(2**63), D_SAE + 1, 2**60, 2**63 - 1])
def test_a_legacy_storage_of_another_size(numel: int, tmp_path: Path) -> None:
    refused_bytes(raw_file("legacy.pt", numel=numel), tmp_path)


@pytest.mark.parametrize("view", [("b_enc",), (None, None), (3,)])
def test_a_storage_that_is_a_view(view: tuple[Any, ...], tmp_path: Path) -> None:
    refused_bytes(raw_file("legacy.pt", Persistent("b_enc", D_SAE, *view)), tmp_path)


# Zip archives


def good(file_format: str) -> bytes:
    with checkpoint(SETTINGS, random_weights(SETTINGS)) as contents:
        return file_bytes(contents, file_format)


def entries_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def changed(**changes: bytes | None) -> bytes:
    entries = {
        **entries_of(good("zip.pt")),
        **{name.replace("__", "/"): data for name, data in changes.items()},
    }
    return zip_file({name: data for name, data in entries.items() if data is not None})


def with_directory_field(offset: int, value: bytes) -> bytes:
    """A good archive whose directory says something else of its last entry, a storage."""
    data = bytearray(good("zip.pt"))
    start = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/7", 0, data.rindex(b"PK\x05\x06")))
    data[start + offset : start + offset + len(value)] = value
    return bytes(data)


def overlapping() -> bytes:
    """The directory's entry of gate, data/5, pointing at that of W_cond, data/7, of the same size."""
    data = bytearray(good("zip.pt"))
    directory = data.rindex(b"archive/data/0")
    names = (data.index(b"archive/data/" + key, directory) for key in (b"5", b"7"))
    gate, W_cond = (data.rindex(b"PK\x01\x02", 0, name) for name in names)
    for start, end in ((16, 28), (42, 46)):  # checksum and sizes, place
        data[gate + start : gate + end] = data[W_cond + start : W_cond + end]
    return bytes(data)


def test_overlapping_entries(tmp_path: Path) -> None:
    assert "entries that overlap" in refused_bytes(overlapping(), tmp_path)


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), buffer)
    return buffer.getvalue()


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "an empty archive": lambda: zip_file({}),
    "no pickle": lambda: changed(**{"data.pkl": None}),
    "two pickles": lambda: changed(**{"more/data.pkl": b"N."}),
    "an entry twice": lambda: zip_file([*entries_of(good("zip.pt")).items(), ("data/0", b"")]),
    "a missing storage": lambda: changed(data__3=None),
    "a storage that is too short": lambda: changed(data__3=b"123"),
    "a storage that is too long": lambda: changed(data__3=bytes(10_000)),
    "a compressed archive": lambda: zip_file(entries_of(good("zip.pt")), zipfile.ZIP_DEFLATED),
    "a bomb as the pickle": lambda: zip_file({"data.pkl": bytes(2**27)}, zipfile.ZIP_DEFLATED),
    "a bomb in another compression": lambda: zip_file({"data.pkl": bytes(2**24)}, zipfile.ZIP_BZIP2),
    "a pickle of zeros": lambda: changed(**{"data.pkl": bytes(2**24)}),
    "a lie about the size": lambda: with_directory_field(24, struct.pack("<I", 2**31)),
    "a lie about both sizes": lambda: with_directory_field(20, struct.pack("<II", 2**31, 2**31)),
    "a lie about the place": lambda: with_directory_field(42, struct.pack("<I", 2**31)),
    "a place in the middle": lambda: with_directory_field(42, struct.pack("<I", 17)),
    "an unknown compression": lambda: with_directory_field(10, struct.pack("<H", 77)),
    "encryption": lambda: with_directory_field(8, struct.pack("<H", 1)),
    "another checksum": lambda: with_directory_field(16, b"abcd"),
    "TorchScript": torchscript,
    "paths that lead outside": lambda: zip_file({"../../data.pkl": b"N.", "/etc/passwd": b"x"}),
    "an archive after something": lambda: b"PK\x03\x04" + bytes(100) + good("zip.pt")[50:],
    "only the magic number": lambda: b"PK\x03\x04",
    "only an end": lambda: b"PK\x03\x04" + b"PK\x05\x06" + b"\xff" * 18,
}


@pytest.mark.parametrize("name", list(ARCHIVES))
def test_an_archive(name: str, tmp_path: Path) -> None:
    refused_bytes(ARCHIVES[name](), tmp_path)


def test_checksums_left_out(tmp_path: Path) -> None:
    """torch can be told to leave them out; they are then zero, and not missed."""
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert isinstance(load_reference_checkpoint(path), MxD)


# gzip


GZIPS: dict[str, Callable[[], bytes]] = {
    "a bomb": lambda: gzip.compress(bytes(2**27), 1),
    "a bomb of one string": lambda: gzip.compress(
        b"\x80\x04\x8d" + struct.pack("<Q", 2**27) + b"a" * 2**27 + b"."
    ),
    "a bomb of many members": lambda: gzip.compress(bytes(2**20)) * 100,
    "a bomb in a good file": lambda: gzip.compress(good("file.pkl") + bytes(2**27), 1),
    "gzip in gzip": lambda: gzip.compress(good("file.pkl.gz")),
    "a zip archive in gzip": lambda: gzip.compress(good("zip.pt")),
    "another checksum": lambda: good("file.pkl.gz")[:-8] + bytes(8),
    "no end": lambda: good("file.pkl.gz")[:-8],
    "something after it": lambda: good("file.pkl.gz") + b"abc",
    "only the magic number": lambda: b"\x1f\x8b",
    "an unknown method": lambda: b"\x1f\x8b\x07" + bytes(100),
}


@pytest.mark.parametrize("name", list(GZIPS))
def test_gzip(name: str, tmp_path: Path) -> None:
    refused_bytes(GZIPS[name](), tmp_path, "file.pkl.gz")


# The legacy format


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("storages", "../../tensors", "pickle"):
            info = tarfile.TarInfo(name)
            data = pickle.dumps(Call(os.system, TOUCH))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LEGACY: dict[str, Callable[[], bytes]] = {
    "another version": lambda: legacy(version=1002),
    "another byte order": lambda: legacy(little_endian=False),
    "no machine": lambda: (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps(3, 2)
    ),
    "only the magic number": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    "the magic number as a float": lambda: pickle.dumps(float(0x1950A86A20F9469CFC6C), 2),
    "keys that are none": lambda: legacy(keys=[3, None]),
    "keys nobody uses": lambda: legacy(keys=["7"], rest=bytes(8)),
    "keys that take for ever to hash": lambda: legacy(keys=b"\x80\x02](" + doubled(60) + b"e."),
    "keys that are a number": lambda: legacy(keys=b"\x80\x02K\x01."),
    "a million keys": lambda: legacy(keys=["0"] * 1_000_000),
    "a storage without data": lambda: legacy(torch_pickle(Persistent("0", 3, None)), [], bytes(20)),
    "a tar archive": tar_file,
}


@pytest.mark.parametrize("name", list(LEGACY))
def test_the_legacy_format(name: str, tmp_path: Path) -> None:
    refused_bytes(LEGACY[name](), tmp_path)
    assert not Path(CANARY).exists()


# Damage


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("twentieths", range(20))
def test_a_truncated_file(twentieths: int, file_format: str, tmp_path: Path) -> None:
    data = good(file_format)
    refused_bytes(data[: len(data) * twentieths // 20], tmp_path, file_format)
    if twentieths:
        refused_bytes(data[:-twentieths], tmp_path, file_format)
        refused_bytes(data[:twentieths], tmp_path, file_format)


def test_a_file_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "nowhere.pt")
    for name in ("pipe.pt", "link.pt"):
        with nothing_happens(tmp_path), pytest.raises(FileNotFoundError, match=name):
            load_reference_checkpoint(tmp_path / name)


DAMAGED = {file_format: good(file_format) for file_format in FORMATS}


def survives(data: bytes, folder: Path) -> None:
    """The file is refused, or becomes a layer of finite weights."""
    path = folder / "damaged.pt"
    path.write_bytes(data)
    with nothing_happens(folder), contextlib.suppress(UnreadableCheckpointError):
        layer = load_reference_checkpoint(path)
        assert all(parameter.isfinite().all() for parameter in layer.parameters())


HYPOTHESIS = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("file_format", FORMATS)
@HYPOTHESIS
@given(data=st.data())
def test_changed_bytes(file_format: str, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(DAMAGED[file_format])
    positions = st.integers(0, len(damaged) - 1)
    for position in data.draw(st.lists(positions, min_size=1, max_size=4)):
        damaged[position] = data.draw(st.integers(0, 255))
    survives(bytes(damaged), tmp_path)


@pytest.mark.parametrize("file_format", FORMATS)
@HYPOTHESIS
@given(data=st.data())
def test_moved_bytes(file_format: str, tmp_path: Path, data: st.DataObject) -> None:
    damaged = DAMAGED[file_format]
    positions = st.integers(0, len(damaged))
    start, end, to = (data.draw(positions) for _ in range(3))
    survives(damaged[:to] + damaged[min(start, end) : max(start, end)] + damaged[to:], tmp_path)
    survives(damaged[:start] + damaged[to:], tmp_path)


FRAGMENTS = [
    *(bytes([opcode]) for opcode in b"().0]}NQRabelostu2\x81\x85\x86\x87\x88\x89\x90\x91\x92\x93\x94"),
    *(b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"K\x03", b"J\xff\xff\xff\xff", b"\x8a\x01\x05", b"C\x02ab"),
    *(text(word) for word in ("storage", "0", "cpu", "cfg", "state_dict", "torch", "float32", "W_enc")),
    *(
        global_opcodes(*name.rsplit(".", 1))
        for name in (
            "torch.FloatStorage",
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_parameter",
            "torch.storage._load_from_bytes",
            "torch.device",
            "collections.OrderedDict",
            "pathlib.PosixPath",
            "sae_training.config.LanguageModelSAERunnerConfig",
        )
    ),
    torch_pickle(Persistent("0", 4))[2:-1],
    torch_pickle(Persistent("0", 4, None))[2:-1],
    torch_pickle((2, 2))[2:-1],
]


@HYPOTHESIS
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=40))
def test_any_program(fragments: list[bytes], tmp_path: Path) -> None:
    for file_format in PICKLES:
        survives(in_container(b"".join(fragments), file_format), tmp_path)


# Memory


def resident(field: str) -> int:
    """Bytes: VmRSS of now, VmHWM at the most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", status)[1])  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of memory")
def test_bombs_stay_small(tmp_path: Path) -> None:
    """No bomb takes more than 96 MB at any time."""
    bombs = {name: data for name, data in PROGRAMS.items() if re.search("huge|many|GiB", name)}
    bombs |= {
        name: raw_file("zip.pt", tensor=(*TENSORS[name], False, {})) for name in TENSORS if "10^" in name
    }
    bombs |= {f"gzip, {name}": make() for name, make in GZIPS.items() if "bomb" in name}
    bombs |= {f"zip, {name}": make() for name, make in ARCHIVES.items() if re.search("bomb|lie", name)}
    assert len(bombs) > 15
    for name, data in bombs.items():
        (tmp_path / "file.pt").write_bytes(data)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        with pytest.raises(UnreadableCheckpointError) as e:
            load_reference_checkpoint(tmp_path / "file.pt")
        assert not isinstance(e.value.__cause__, MemoryError), name
        assert resident("VmHWM") - before < 96 * 2**20, name
