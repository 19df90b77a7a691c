"""Files of `torch.save` and of plain pickle, read as data: nothing that a file names is imported or run.

torch.load(weights_only=True) reads torch's formats, and an Unpickler with an allow-list reads plain pickle,
compressed or not. Before either, `check_pickle` walks through the opcodes without running any: a name
outside the allow-list, and a pickle whose objects are larger than it, written out, end in an
`UnreadableCheckpointError`. What is left is the risk of torch's own reader of checked zip archives.
"""

import gzip
import io
import pickle
import pickletools
import reprlib
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

DESCRIBED_MODULE = "sae_training.config"
"""The module of the paper's code whose classes are pickled in its checkpoints."""
MAX_OPCODES = 20_000
"""Of one pickle; a checkpoint of the paper's code has about 600."""
FREE_EXPANSION = 2**20
"""Of the objects in a pickle, beyond twice its size."""
MAX_COMPRESSION = 10
"""Of a compressed file, beyond `FREE_COMPRESSED` bytes; trained weights compress by less than 1.2."""
FREE_COMPRESSED = 2**24
GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
"""What torch's format before 1.6 begins with: five pickles, then the numbers."""
LEGACY_PICKLES = 5

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


class UnreadableCheckpointError(ValueError):
    """A checkpoint file is damaged, hostile, or of another format; nothing in it was run."""


def shown(value: Any) -> str:
    """A value from a file in an error message: short, escaped, and without looking into containers."""
    if value is None or isinstance(value, str | int | float):
        return _short.repr(value)
    return f"a {type(value).__name__}"


class Described:
    """Stands for an object of a class of the paper's code, which is not imported: its attributes are here."""

    args: tuple[Any, ...]
    """What it was made from."""

    def __init__(self, *args: Any) -> None:
        self.__dict__["args"] = args


def _path(*parts: Any) -> str:
    return str(PurePosixPath(*(part for part in parts if isinstance(part, str))))


def _device(*name: Any) -> str:
    return str(name[0]) if name and isinstance(name[0], str) else ""


def _rebuild_tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None
) -> Tensor:
    del requires_grad, hooks
    # torch would enlarge the storage, with whatever is in memory.
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.size() and 0 not in size:
        raise UnreadableCheckpointError("it holds a tensor that reaches beyond its numbers")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _load_from_bytes(data: Any) -> Any:
    if not isinstance(data, bytes) or not data.startswith(LEGACY_MAGIC):
        raise UnreadableCheckpointError("it holds a storage that is not torch's")
    return _load(data)


ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.device": _device,
    **{f"pathlib.{kind}{system}Path": _path for kind in ("", "Pure") for system in ("Posix", "Windows")},
}
"""What a pickle may name, and what the Unpickler takes for it."""
ALLOWED |= {str(t): t for t in vars(torch).values() if isinstance(t, torch.dtype)}
STORAGES = {f"torch.{name}" for name in dir(torch) if name.endswith("Storage")}
"""What torch's formats name beside."""


def read_checkpoint_file(path: str | Path) -> Any:
    """What a file of torch.save (its zip or its legacy format), pickle or gzipped pickle holds.

    Tensors of the zip format stay mapped to the file. Objects of classes of the paper's code come out as
    `Described`, devices and paths as strings.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableCheckpointError: it is damaged, hostile, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file at {path}.")
    try:
        return _read(path)
    except UnreadableCheckpointError as e:
        raise UnreadableCheckpointError(f"{path} was not read, and nothing was run: {e}.") from None
    # A damaged file may raise anything in the libraries that read it.
    except Exception as e:
        why = _short.repr(str(e)) if str(e) else "no more is known"
        raise UnreadableCheckpointError(
            f"{path} is truncated, damaged or not a checkpoint ({type(e).__name__}: {why})."
        ) from e


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(GZIP_MAGIC):
            return _unpickle(_decompressed(file))
        if not magic.startswith(ZIP_MAGIC):
            data = file.read()
            return _load(data) if data.startswith(LEGACY_MAGIC) else _unpickle(data)
        names, sizes = _check_archive(file)
    content = _torch_load(str(path), names, mmap=True)
    # torch cuts a storage out of the mapped file by the size that the pickle says.
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in _tensors_of(content))}
    if Counter(storages.values()) - sizes:
        raise UnreadableCheckpointError("it has a storage of another size than its pickle says")
    return content


def _tensors_of(content: Any) -> list[Tensor]:
    weights = content.get("state_dict") if isinstance(content, dict) else content
    values = weights.values() if isinstance(weights, dict) else [weights]
    return [value for value in values if isinstance(value, Tensor)]


def _decompressed(file: IO[bytes]) -> bytes:
    limit = FREE_COMPRESSED + MAX_COMPRESSION * file.seek(0, 2)
    file.seek(0)
    data = gzip.GzipFile(fileobj=file).read(limit + 1)
    if len(data) > limit:
        raise UnreadableCheckpointError(f"it expands to more than {MAX_COMPRESSION} times its size")
    return data


def _check_archive(file: IO[bytes]) -> tuple[set[str], Counter[int]]:
    """The names in the pickle of a zip archive of torch's, and the sizes of its storages."""
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or len({entry.filename for entry in entries}) < len(entries):
            raise UnreadableCheckpointError("its zip archive is not one of torch's")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UnreadableCheckpointError("its zip archive is compressed, torch's are not")
        ends = [entry.header_offset + entry.file_size for entry in entries]
        starts = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
        if any(end > start for end, start in zip(ends, starts, strict=True)):
            raise UnreadableCheckpointError("its zip archive has entries that overlap")
        for entry in entries:
            entry.CRC = entry.CRC or None  # type: ignore[assignment]  # torch may leave checksums out
            with archive.open(entry) as content:
                while content.read(2**20):
                    pass
        names = check_pickle(io.BytesIO(archive.read(pickles[0])), pickles[0].file_size)
    return names, Counter(entry.file_size for entry in entries if "/data/" in entry.filename)


def _load(data: bytes) -> Any:
    """The content of a file in torch's legacy format."""
    stream, names = io.BytesIO(data), set()
    for _ in range(LEGACY_PICKLES):
        names |= check_pickle(stream, len(data))
    return _torch_load(io.BytesIO(data), names)


def _torch_load(file: Any, names: set[str], **options: Any) -> Any:
    classes = {name for name in names if name.rpartition(".")[0] == DESCRIBED_MODULE}
    for name in sorted(names - classes - ALLOWED.keys() - STORAGES):
        raise UnreadableCheckpointError(f"it names {shown(name)}, which no checkpoint needs")
    described = [(_subclass(name), name) for name in classes]
    paths = [(ALLOWED[name], name) for name in names if name.startswith("pathlib.")]
    with torch.serialization.safe_globals([*described, *paths]):
        return torch.load(file, "cpu", weights_only=True, **options)


def _subclass(name: str) -> type[Described]:
    return type(name.rpartition(".")[2], (Described,), {"__module__": DESCRIBED_MODULE})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == DESCRIBED_MODULE and name.isidentifier():
            return _subclass(full)
        if full == "torch.storage._load_from_bytes":
            return lambda data: _load_from_bytes(data)
        if full not in ALLOWED:
            raise UnreadableCheckpointError(f"it names {shown(full)}, which no checkpoint needs")
        found = ALLOWED[full]
        # A new function each time: a pickle may write to the attributes of what it is given.
        return found if isinstance(found, type | torch.dtype) else (lambda *args: found(*args))


def _unpickle(data: bytes) -> Any:
    stream = io.BytesIO(data)
    check_pickle(stream, len(data))
    if stream.tell() != len(data):
        raise UnreadableCheckpointError("its pickle ends before the file does")
    return _Unpickler(io.BytesIO(data)).load()


def check_pickle(stream: IO[bytes], size: int) -> set[str]:
    """The names of a pickle's globals, which is read to its end and not run.

    Args:
        stream: where the pickle begins.
        size: how large its file is.

    Raises:
        UnreadableCheckpointError: it has more opcodes than a checkpoint needs, or its objects, with all
            that they refer to more than once written out, are larger than `FREE_EXPANSION` and twice
            its file.
        ValueError, IndexError, KeyError: it is damaged.
    """
    names: set[str] = set()
    # Of each object on the stack and in the memo its size, and whether something refers to it; None: a mark.
    stack: list[list[Any] | None] = []
    memo: dict[int, list[Any] | None] = {}
    written, limit = 0, FREE_EXPANSION + 2 * size
    for n, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if n == MAX_OPCODES:
            raise UnreadableCheckpointError(f"its pickle has more than {MAX_OPCODES} opcodes")
        name = opcode.name
        if name == "GLOBAL":
            names.add(str(argument).replace(" ", "."))
        if name.endswith("PUT") or name == "MEMOIZE":
            index = len(memo) if argument is None else int(argument)
            if index > MAX_OPCODES:
                raise UnreadableCheckpointError("its pickle numbers its objects in an impossible way")
            memo[index] = stack[-1]
            continue
        if name.endswith("GET") or name == "DUP":
            again = stack[-1] if argument is None else memo[int(argument)]
            if again is None:
                raise UnreadableCheckpointError("its pickle refers to something that is not an object")
            again[1] = True
            written += again[0]
            stack.append(again)
        else:
            before = list(opcode.stack_before)
            grows = name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
            taken = 0
            if pickletools.markobject in before:
                while (top := stack.pop()) is not None:
                    taken += top[0]
                before = before[: before.index(pickletools.markobject)]
            for _ in before[grows:]:
                top = stack.pop()
                taken += 0 if top is None else top[0]
            if grows:
                grown = stack[-1]
                if grown is None or grown[1]:
                    raise UnreadableCheckpointError("its pickle changes an object that is used already")
                grown[0] += taken
            else:
                length = len(argument) if isinstance(argument, str | bytes | bytearray) else 0
                for after in opcode.stack_after:
                    stack.append(None if after is pickletools.markobject else [1 + taken + length, False])
        if written > limit or (stack and stack[-1] is not None and stack[-1][0] > limit):
            raise UnreadableCheckpointError("its pickle expands to far more than its size")
    return names
