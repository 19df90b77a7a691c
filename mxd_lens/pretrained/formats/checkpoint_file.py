"""Files of `torch.save` and of plain pickle, read as data: nothing in a file runs, whatever it holds.

A pickle is a program for a stack machine, and Python's own machine calls whatever the program names. The
one here knows only the opcodes that a checkpoint needs, imports nothing, and takes a global for a name: the
names in `VALUES` and `REBUILT` stand for what is said there, the classes of `DESCRIBED_MODULE` become
inert descriptions of their objects, and any other name ends in an `UnreadableCheckpointError`. Tensors come
out as `StoredTensor`s, whose bytes are looked at when they are asked for; those of a file that is not
compressed stay mapped to it.
"""

import gzip
import math
import mmap
import pickletools
import reprlib
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, cast

import torch
from torch import Tensor

DESCRIBED_MODULE = "sae_training.config"
"""The module of the paper's code whose classes are pickled in its checkpoints."""
MAX_OPCODES = 20_000
"""Of one file; a checkpoint of the paper's code has about 600."""
MAX_EXPANSION = 10
"""Of a compressed file, beyond `FREE_EXPANSION` bytes; trained weights expand by less than 1.2."""
FREE_EXPANSION = 2**24
GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


class UnreadableCheckpointError(ValueError):
    """A checkpoint file is damaged, hostile, or of another format; nothing in it was run."""


def shown(value: Any) -> str:
    """A value from a file in an error message: short, escaped, and without looking into containers."""
    if value is None or isinstance(value, str | int | float):
        return _short.repr(value)
    return f"a {type(value).__name__}"


@dataclass
class Described:
    """An object of a class that was not imported: what it was made from, and its attributes."""

    name: str
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class Storage:
    """A run of numbers in a file."""

    dtype: torch.dtype
    numel: int
    data: memoryview | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def check(self, dtype: torch.dtype, numel: int) -> None:
        """Raises UnreadableCheckpointError unless it holds that many numbers of that dtype."""
        holds = self.nbytes if self.data is None else len(self.data)
        if self.dtype != dtype or not holds == self.nbytes == numel * dtype.itemsize:
            raise UnreadableCheckpointError(
                f"a storage of {shown(numel)} numbers of {dtype} holds {holds} bytes of {self.dtype}"
            )


def forget_pages(data: memoryview | None) -> None:
    """Gives the memory back that holds what was read of a mapped file; it is read again when needed."""
    mapped = data.obj if data is not None else None
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


@dataclass
class StoredTensor:
    """A tensor in a file: a view of a storage, not looked at yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def numbers(self) -> Tensor:
        """The tensor's numbers in the order of the file, [numel], without a copy where memory allows.

        Raises:
            UnreadableCheckpointError: the tensor is empty, has gaps or overlaps, or is not inside its
                storage.
        """
        numel = math.prod(self.shape)
        data = self.storage.data
        if data is None or numel == 0 or self.offset + numel > self.storage.numel:
            raise UnreadableCheckpointError(
                f"a tensor of shape {self.shape} at {self.offset} is not inside its storage of "
                f"{self.storage.numel} numbers"
            )
        if not (self.is_row_major or self.is_column_major):
            raise UnreadableCheckpointError(
                f"a tensor of shape {self.shape} and strides {self.stride} has gaps or overlaps"
            )
        size = self.dtype.itemsize
        raw = torch.frombuffer(data, dtype=torch.uint8, offset=self.offset * size, count=numel * size)
        if raw.data_ptr() % size:
            raw = raw.clone()
        return raw.view(self.dtype)

    def read(self) -> Tensor:
        """The tensor, as `numbers`."""
        numbers = self.numbers()
        if self.is_row_major:
            return numbers.view(self.shape)
        return numbers.view(self.shape[::-1]).T

    @property
    def is_row_major(self) -> bool:
        return _is_row_major(self.shape, self.stride)

    @property
    def is_column_major(self) -> bool:
        return len(self.shape) == 2 and _is_row_major(self.shape[::-1], self.stride[::-1])


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether each number follows the one before; the stride of a dimension of size 1 does not matter."""
    right = (math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return all(n == 1 or step == steps for n, step, steps in zip(shape, stride, right, strict=True))


def read_checkpoint_file(path: str | Path) -> Any:
    """What a file holds: `.pt` (torch's zip or its legacy format), `.pkl` or `.pkl.gz`, told by its content.

    Dictionaries, lists, tuples, strings and numbers are themselves, a torch.dtype is one, a device or a
    path a string, a tensor a `StoredTensor`, and an object of `DESCRIBED_MODULE` a `Described`.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableCheckpointError: it is damaged, hostile, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file at {path}.")
    with path.open("rb") as file:
        try:
            return _read(file)
        except UnreadableCheckpointError as e:
            raise UnreadableCheckpointError(f"{path} was not read: {e}.") from None
        except Exception as e:  # whatever damage makes of zlib, zipfile, struct and the stack machine
            why = shown(str(e)) if str(e) else type(e).__name__
            raise UnreadableCheckpointError(
                f"{path} is truncated, damaged or not a checkpoint ({type(e).__name__}: {why})."
            ) from e


def _read(file: IO[bytes]) -> Any:
    magic = file.read(4)
    file.seek(0)
    if magic[:2] == GZIP_MAGIC:
        return _read_stream(Reader(_decompressed(file)))
    # A private copy, page by page: what is never written stays the file's.
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    if magic == ZIP_MAGIC:
        return _read_zip(file, data)
    return _read_stream(Reader(data))


def _decompressed(file: IO[bytes]) -> memoryview:
    limit = FREE_EXPANSION + MAX_EXPANSION * file.seek(0, 2)
    file.seek(0)
    data = bytearray()
    with gzip.GzipFile(fileobj=file) as stream:
        while chunk := stream.read(2**20):
            data += chunk
            if len(data) > limit:
                raise UnreadableCheckpointError(
                    f"it expands to more than {MAX_EXPANSION} times its size, which weights do not"
                )
    return memoryview(data)


# torch's zip format


def _read_zip(file: IO[bytes], data: memoryview) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise UnreadableCheckpointError("its zip archive has two entries of one name")
    folders = [name[: -len("data.pkl")] for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(folders) != 1:
        raise UnreadableCheckpointError(f"its zip archive has {len(folders)} entries data.pkl instead of 1")
    folder = folders[0]
    storages: dict[str, Storage] = {}
    used: list[tuple[int, int]] = []

    def record(name: str) -> memoryview:
        if folder + name not in entries:
            raise UnreadableCheckpointError(f"its zip archive has no entry {shown(folder + name)}")
        start, content = _stored_entry(data, entries[folder + name])
        used.append((start, len(content)))
        return content

    def storage_of(key: str, dtype: torch.dtype, numel: int) -> Storage:
        if key not in storages:
            storages[key] = Storage(dtype, numel, record(f"data/{key}"))
        storages[key].check(dtype, numel)
        return storages[key]

    if folder + "byteorder" in entries and bytes(record("byteorder")) != sys.byteorder.encode():
        raise UnreadableCheckpointError("it was written on a machine of another byte order")
    contents = PickleMachine().run(Reader(record("data.pkl")), storage_of)
    ends = 0
    for start, size in sorted(used):
        if start < ends:
            raise UnreadableCheckpointError("its zip archive has entries that overlap")
        ends = start + size
    return contents


def _stored_entry(data: memoryview, entry: zipfile.ZipInfo) -> tuple[int, memoryview]:
    """Where an entry is, and its bytes; it is stored as it is, as torch stores all of them."""
    name = shown(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise UnreadableCheckpointError(f"its entry {name} is compressed or encrypted, torch's are not")
    signature, name_length, extra_length = struct.unpack_from("<4s22xHH", data, entry.header_offset)
    start = entry.header_offset + 30 + name_length + extra_length
    content = data[start : start + entry.file_size]
    if signature != ZIP_MAGIC or not len(content) == entry.file_size == entry.compress_size:
        raise UnreadableCheckpointError(f"its entry {name} is not where the archive says")
    if entry.CRC not in (0, zlib.crc32(content)):  # 0: torch was told to leave checksums out
        raise UnreadableCheckpointError(f"its entry {name} is damaged: the checksum is another")
    return start, content


# Pickles in a row: torch's legacy format, and plain pickle


class Reader:
    """A position in bytes, as `pickletools.genops` wants it; large reads are views."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    def read(self, n: int) -> bytes | memoryview:
        part = self.data[self.position : self.position + n]
        self.position += len(part)
        return part if len(part) > 2**16 else bytes(part)

    def readline(self) -> bytes:
        line, newline, _ = bytes(self.data[self.position : self.position + 2**10]).partition(b"\n")
        self.position += len(line + newline)
        return line + newline

    def last(self, n: int) -> memoryview:
        """The n bytes before this position."""
        return self.data[self.position - n : self.position]

    def take(self, n: int) -> memoryview:
        """The next n bytes."""
        if n > len(self.data) - self.position:
            raise UnreadableCheckpointError("it ends in the middle of its data")
        self.position += n
        return self.last(n)


def _read_stream(reader: Reader) -> Any:
    machine = PickleMachine()
    first = machine.run(reader)
    if type(first) is int and first == LEGACY_MAGIC:
        return machine.run_legacy(reader)
    return first


StorageOf = Callable[[str, torch.dtype, int], Storage]


class PickleMachine:
    """Runs the pickles of one file as data."""

    def __init__(self) -> None:
        self.opcodes_left = MAX_OPCODES

    def run(self, reader: Reader, storage_of: StorageOf | None = None, nested: bool = False) -> Any:
        """The object of the next pickle.

        Args:
            reader: where the pickle is.
            storage_of: the storage of a key, dtype and number of elements, where the format has them.
            nested: whether the pickle is inside another, where there is none inside it.
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def pop_to_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], reader)):
            self.opcodes_left -= 1
            if self.opcodes_left < 0:
                raise UnreadableCheckpointError(f"its pickle has more than {MAX_OPCODES} opcodes")
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                    stack.append(argument)
                case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                    stack.append(reader.last(len(cast(bytes, argument))))
                case "MARK":
                    marks.append(len(stack))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(opcode.name[-1])
                    stack[-n:] = [tuple(stack[-n:])]
                case "TUPLE":
                    stack.append(tuple(pop_to_mark()))
                case "EMPTY_LIST":
                    stack.append([])
                case "APPEND":
                    item = stack.pop()
                    _add_items(stack[-1], [item])
                case "APPENDS":
                    items = pop_to_mark()
                    _add_items(stack[-1], items)
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                case "SETITEMS":
                    items = pop_to_mark()
                    _set_items(stack[-1], items)
                case "BINPUT" | "LONG_BINPUT":
                    memo[cast(int, argument)] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[cast(int, argument)])
                case "GLOBAL":
                    module, _, name = cast(str, argument).partition(" ")
                    stack.append(named(module, name))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(named(module, name))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self.rebuilt(function, args, nested))
                case "BUILD":
                    state = stack.pop()
                    _set_state(stack[-1], state)
                case "BINPERSID":
                    stack.append(_stored(stack.pop(), storage_of))
                case name:
                    raise UnreadableCheckpointError(f"its pickle has the opcode {name}, a checkpoint has not")
        raise UnreadableCheckpointError("its pickle has no end")

    def rebuilt(self, function: Any, args: Any, nested: bool) -> Any:
        """What the pickle calls a function for, made here."""
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise UnreadableCheckpointError(f"its pickle calls {shown(function)}")
        if function == LOAD_FROM_BYTES and not nested:
            (data,) = args
            reader = Reader(memoryview(data))
            if self.run(reader, nested=True) != LEGACY_MAGIC:
                raise UnreadableCheckpointError("it holds a storage of another format than torch's")
            return self.run_legacy(reader, nested=True)
        if function in REBUILT:
            return REBUILT[function](*args)
        if is_described(function):
            return Described(function, args)
        raise UnreadableCheckpointError(f"its pickle calls {shown(function)}")

    def run_legacy(self, reader: Reader, nested: bool = False) -> Any:
        """The object of torch's legacy format, after its magic number.

        Version, machine, the object, a list of storage keys, and then each storage: its number of
        elements in 8 bytes, and these.
        """
        version = self.run(reader, nested=nested)
        machine = self.run(reader, nested=nested)
        if version != LEGACY_VERSION or machine.get("little_endian") != (sys.byteorder == "little"):
            raise UnreadableCheckpointError("it is of another version of torch's format, or byte order")
        storages: dict[str, Storage] = {}

        def storage_of(key: str, dtype: torch.dtype, numel: int) -> Storage:
            storage = storages.setdefault(key, Storage(dtype, numel))
            storage.check(dtype, numel)
            return storage

        contents = self.run(reader, storage_of, nested)
        for key in self.run(reader, nested=nested):
            if type(key) is not str or key not in storages:
                raise UnreadableCheckpointError(f"it has data for a storage {shown(key)} it has not")
            (numel,) = struct.unpack("=q", reader.take(8))
            storage = storages[key]
            storage.check(storage.dtype, numel)
            storage.data = reader.take(storage.nbytes)
        return contents


def _add_items(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise UnreadableCheckpointError(f"its pickle appends to {shown(target)}")
    target.extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    # Other keys are not needed, and one nested tuple can take for ever to hash.
    if type(target) is not dict or not all(type(key) in (str, int) for key in items[::2]):
        raise UnreadableCheckpointError(f"its pickle sets items of {shown(target)}, or unusual ones")
    target.update(zip(items[::2], items[1::2], strict=True))


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, Described) and type(state) is dict:
        target.state.update(state)
    elif type(target) is not dict:  # a state_dict brings its versions as an attribute: not needed
        raise UnreadableCheckpointError(f"its pickle sets the state of {shown(target)}")


def _stored(persistent_id: Any, storage_of: StorageOf | None) -> Storage:
    match persistent_id:
        case ("storage", torch.dtype() as dtype, str() as key, str(), int() as numel, *view) if (
            storage_of is not None and numel >= 0 and view in ([], [None])
        ):
            return storage_of(key, dtype, numel)
    raise UnreadableCheckpointError("its pickle refers to something that is no storage of torch's")


# What a global stands for


class Name(str):
    """The name of something that a pickle calls."""


def named(module: Any, name: Any) -> Any:
    """What a global of a pickle stands for; it is never imported."""
    if type(module) is str and type(name) is str:
        full = Name(f"{module}.{name}")
        if full in VALUES:
            return VALUES[full]
        if full in REBUILT or full == LOAD_FROM_BYTES or is_described(full):
            return full
        name = full
    raise UnreadableCheckpointError(
        f"its pickle names {shown(name)}, which no checkpoint of the paper's code needs; nothing was run"
    )


def is_described(name: str) -> bool:
    module, _, class_name = name.rpartition(".")
    return module == DESCRIBED_MODULE and class_name.isidentifier()


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    possible = (
        isinstance(storage, Storage)
        and isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride) < 8
        and all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *stride))
    )
    if not possible or any(rest[2:]):
        raise UnreadableCheckpointError("its pickle describes a tensor that cannot be")
    return StoredTensor(storage, offset, shape, stride)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise UnreadableCheckpointError("its pickle describes a parameter that is no tensor")
    return data


def _dictionary() -> dict[str, Any]:
    return {}


def _device(kind: str, *index: int) -> str:
    return ":".join([kind, *map(str, index)])


def _member(of: Any, name: Any) -> Described:
    """A member of an Enum, by its name."""
    if not isinstance(of, Name) or not is_described(of) or type(name) is not str:
        raise UnreadableCheckpointError(f"its pickle asks for an attribute of {shown(of)}; nothing was run")
    return Described(of, (name,))


LOAD_FROM_BYTES = "torch.storage._load_from_bytes"

REBUILT: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.device": _device,
    "collections.OrderedDict": _dictionary,
    # What Python 3.11.0 to 3.11.3 writes for a member of an Enum; the others write Class(value).
    "builtins.getattr": _member,
    "__builtin__.getattr": _member,
    **{
        f"{module}.{name}": (lambda *parts, flavour=flavour: str(flavour(*parts)))
        for module in ("pathlib", "pathlib._local")
        for name, flavour in {
            "PosixPath": PurePosixPath,
            "PurePosixPath": PurePosixPath,
            "WindowsPath": PureWindowsPath,
            "PureWindowsPath": PureWindowsPath,
        }.items()
    },
}
"""What a pickle may call, and what is made instead of calling it."""

_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}

VALUES: dict[str, torch.dtype] = {
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _STORAGES.values()},
}
"""The dtypes, by their own names and by those of torch's storage classes."""
