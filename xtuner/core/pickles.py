"""Read files of `torch.save` that other programs wrote, without running any code that they name.

A pickle is a program for a stack machine. Python's machine looks up and calls any global that a file names, and its
BUILD opcode sets attributes or calls `__setstate__` of any object on the stack, tensors included. This module therefore
has its own machine: `pickletools` splits the bytes into opcodes, and the opcodes implemented here can only build plain
values, tensors and inert placeholders. A global is a key of `_GLOBALS`, our own builders; nothing is imported.

A small file can describe a very large value by using one part many times. Therefore members of the zip must not share
bytes, elements built from memoised lists are counted, a tensor is at most as large as its file, and messages show only
the beginning of a value.

Formats: pickletools documents the opcodes. Since torch 1.6 a file is an uncompressed zip: `NAME/data.pkl`,
`NAME/data/KEY` (a storage each), `NAME/byteorder`. In the pickle a tensor is a call of `_rebuild_tensor_v2(storage,
offset, size, stride, requires_grad, hooks)`, a storage is the id `('storage', type, KEY, device, elements)`. One
with attributes (as in DeepSpeed's ZeRO-3) is `_rebuild_from_type_v2(function, class, arguments, attributes)`.
"""

import bisect
import contextlib
import math
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import MAP_PRIVATE, PROT_READ, PROT_WRITE
from mmap import mmap as Mapping
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import torch

from xtuner.core.errors import CheckpointError
from xtuner.core.foreign_inputs import open_regular, short, short_repr

_RUNS_CODE = "a pickle can run arbitrary code, so only tensors and plain values are read"
_CONVERT = "if you trust its author, load it in a safe environment and save the weights as .safetensors"
_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which Python names from 3.13 on
_MOST_DIMENSIONS = 64  # of a tensor, as in torch
_LONGEST_NAME = 1000  # of a module, or of a class in it
_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # the integer 0x1950a86a20f9469cfc6c, pickled


@dataclass(slots=True, eq=False)
class Opaque:
    """Placeholder for an object of an unknown class: keeps its arguments and state, does nothing."""

    name: str  # of the class or function, as 'module.name'
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)  # appended values, or keys and values alternating

    def __repr__(self) -> str:
        return f"<opaque {self.name}>"


@dataclass(frozen=True, slots=True)
class _Builder:
    make: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Class:
    """Placeholder for a class that a file may name, but not call."""

    name: str


_TENSOR = _Class("torch.Tensor")


@dataclass(frozen=True, slots=True)
class _Storage:
    data: torch.UntypedStorage
    dtype: torch.dtype
    length: int  # elements of dtype
    file_size: int  # bytes; the limit of a tensor, as strides of 0 repeat a byte any number of times


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, grad: Any = False, *rest: Any) -> torch.Tensor:
    """A view of the storage. Raises: ValueError if it exceeds the storage."""
    # rest: hooks (always empty); in `_rebuild_tensor_v3` the dtype (float8, uint16, …; the storage counts bytes); bits.
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
    if len(rest) > 4 or any(not isinstance(value, torch.dtype) and value for value in rest):
        raise ValueError("a tensor with hooks, or a conjugated or negated view")
    length = storage.length * storage.dtype.itemsize // dtype.itemsize
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)):
        raise ValueError("a tensor whose size and strides do not match")
    if len(size) > _MOST_DIMENSIONS or any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        shown = map(short_repr, (size, stride, offset))
        raise ValueError("a tensor of size {}, strides {}, offset {}".format(*shown))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (offset > length) if 0 in size else (last >= length):
        raise ValueError(f"a tensor that reaches element {max(offset, last)} of a storage of {length}")
    if math.prod(size) * dtype.itemsize > storage.file_size:
        raise ValueError(f"a tensor of size {short_repr(size)} in a file of {storage.file_size:,} bytes")
    return torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride).requires_grad_(grad is True)


def _parameter(data: torch.Tensor, grad: Any, *hooks_and_attributes: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(data.detach(), grad is True)


def _typed(make: Any, cls: Any, args: Any, attributes: Any) -> torch.Tensor:
    """A tensor that was saved with attributes, without them."""
    if not (isinstance(make, _Builder) and make.make is _tensor and isinstance(args, tuple)):
        raise ValueError("a tensor with an unknown constructor")
    if cls != _TENSOR:
        raise ValueError(f"a tensor of the class {short_repr(getattr(cls, 'name', cls))}")
    return _tensor(*args)


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    # Before protocol 3 bytes were written as `_codecs.encode(text, 'latin1')`, empty ones as `bytes()`.
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {short_repr(encoding)}")
    return text.encode(encoding)


def _key(value: Any) -> Any:
    # Flat keys only: hashing a tuple nested a million deep overflows the C stack and kills the process; comparing
    # two equal nested frozensets takes twice as long for each level. Integers beyond 2^61 can be chosen to have equal
    # hashes, and a dict of n of them takes n² steps.
    for part in value if isinstance(value, tuple) else (value,):
        if not isinstance(part, _FLAT) or (isinstance(part, int) and part.bit_length() > 60):
            raise ValueError(f"{short_repr(part)} as a key")
    return value


_FLAT = (str, bytes, int, float, NoneType, torch.dtype, Opaque)

_STORAGES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
_STORAGES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}
_STORAGES |= {"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
_STORAGES |= {"Untyped": torch.uint8}

_GLOBALS: dict[str, _Builder | _Class | torch.dtype] = {
    "collections.OrderedDict": _Builder(lambda pairs=(): OrderedDict((_key(k), v) for k, v in pairs)),
    "builtins.set": _Builder(lambda items=(): {_key(v) for v in items}),
    "builtins.frozenset": _Builder(lambda items=(): frozenset(_key(v) for v in items)),
    "builtins.bytes": _Builder(_bytes),
    "_codecs.encode": _Builder(_bytes),
    "torch.Size": _Builder(lambda sizes=(): torch.Size(sizes)),
    "torch._utils._rebuild_tensor": _Builder(_tensor),
    "torch._utils._rebuild_tensor_v2": _Builder(_tensor),
    "torch._utils._rebuild_tensor_v3": _Builder(_tensor),
    "torch._utils._rebuild_parameter": _Builder(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Builder(_parameter),
    "torch._tensor._rebuild_from_type_v2": _Builder(_typed),
    "torch.Tensor": _TENSOR,
    # Without the quantized ones (quint8, …): their tensors need more than a storage.
    **{f"torch.{k}": v for k, v in vars(torch).items() if isinstance(v, torch.dtype) and not k.startswith("q")},
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
}
# Opcodes whose argument is the value.
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_VALUES |= {"BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_MAKES: dict[str, Callable[[], Any]] = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_MAKES |= {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}


class _Machine:
    """Runs the opcodes that build values. `storage` turns a persistent id into a storage."""

    def __init__(self, path: str | Path, storage: Callable[[Any], _Storage], opaque: bool) -> None:
        self.path, self.storage, self.opaque = path, storage, opaque
        self.at = 0  # byte of the pickle, for messages
        self.budget = 0  # elements that may still be built from lists and strings

    def run(self, code: bytes) -> Any:
        self.budget = len(code)  # an honest file has at least a byte for each element
        stack: list[Any] = []
        marks: list[int] = []  # heights of the stack
        memo: dict[Any, Any] = {}

        def above_mark() -> list[Any]:
            height = marks.pop()
            values = stack[height:]
            del stack[height:]
            return values

        for op, arg, at in pickletools.genops(code):
            self.at = at or 0
            match op.name:
                case name if name in _VALUES:
                    stack.append(arg)
                case name if name in _MAKES:
                    stack.append(_MAKES[name]())
                case "PROTO" | "FRAME":
                    pass
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(above_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack[-int(op.name[-1]) :] = [tuple(stack[-int(op.name[-1]) :])]
                case "FROZENSET":
                    stack.append(frozenset(map(_key, above_mark())))
                case "APPENDS" | "SETITEMS" | "ADDITEMS":
                    values = above_mark()
                    self.fill(stack[-1], op.name, values)
                case "APPEND":
                    self.fill(stack[-2], "APPENDS", [stack.pop()])
                case "SETITEM":
                    self.fill(stack[-3], "SETITEMS", stack[-2:])
                    del stack[-2:]
                case "GLOBAL":
                    stack.append(self.look_up(str(arg).replace(" ", ".")))
                case "STACK_GLOBAL":
                    module, name = stack[-2:]
                    stack[-2:] = [self.look_up(f"{module[:_LONGEST_NAME]}.{name[:_LONGEST_NAME]}")]
                case "BINPERSID":
                    stack[-1] = self.storage(stack[-1])
                case "REDUCE" | "NEWOBJ":
                    stack[-2:] = [self.call(*stack[-2:])]
                case "NEWOBJ_EX":
                    stack[-3:] = [self.call(*stack[-3:])]
                case "BUILD":
                    self.build(stack[-2], stack.pop())
                case "STOP":
                    return stack.pop()
                case _:  # the extension registry, text ids, classes of Python 2, buffers outside of the file, …
                    raise ValueError(f"opcode {op.name}, which torch.save does not use")

    def look_up(self, name: str) -> Any:
        name = name.replace("__builtin__.", "builtins.", 1) if name.startswith("__builtin__.") else name
        if name in _GLOBALS:
            return _GLOBALS[name]
        if self.opaque:
            return Opaque(name)
        where = f"{self.path}, byte {self.at} of its data.pkl"
        raise CheckpointError(f"the pickle refers to {short_repr(name)}", where=where, why=_RUNS_CODE, do=_CONVERT)

    def call(self, function: Any, args: Any, keywords: Any = None) -> Any:
        if not isinstance(args, tuple):
            raise TypeError("arguments that are not a tuple")
        if isinstance(function, Opaque):
            return Opaque(function.name, (*args, keywords) if keywords else args)
        if isinstance(function, _Builder) and not keywords:
            sized = (v for v in args if isinstance(v, str | bytes | list | tuple | dict | set))
            self.budget -= len(args) + sum(map(len, sized))
            if self.budget < 0:
                raise ValueError("one value is built too many times")
            return function.make(*args)
        raise TypeError(f"a call of a {type(function).__name__}")

    @staticmethod
    def build(target: Any, state: Any) -> None:
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, OrderedDict):  # its attributes (`_metadata` of a state dict) are left out
            raise TypeError(f"a state for a {type(target).__name__}")

    @staticmethod
    def fill(target: Any, how: str, values: list[Any]) -> None:
        if isinstance(target, Opaque):
            target.items.extend(values)
        elif isinstance(target, list) and how == "APPENDS":
            target.extend(values)
        elif isinstance(target, dict) and how == "SETITEMS":
            for key, value in zip(values[::2], values[1::2], strict=True):
                target[_key(key)] = value
        elif isinstance(target, set) and how == "ADDITEMS":
            target.update(map(_key, values))
        else:
            raise TypeError(f"{how} on a {type(target).__name__}")


class _Archive:
    """The zip file around the pickle. `zipfile` finds the members; their bytes are mapped or read directly."""

    def __init__(self, file: BinaryIO, mapped: bool) -> None:
        self.file = file
        self.zip = zipfile.ZipFile(file)
        self.length = file.seek(0, 2)
        # A member must end before the next one begins: members must not share bytes.
        self.begins = sorted(info.header_offset for info in self.zip.infolist())
        if len(set(self.begins)) < len(self.begins):
            raise zipfile.BadZipFile("two members begin at the same byte")
        roots = [name[: -len("/data.pkl")] for name in self.zip.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise zipfile.BadZipFile(f"{len(roots)} members named data.pkl instead of one")
        self.root = roots[0]
        # Copy on write: tensors may be changed in memory, the file stays as it is. Tensors keep the map alive. One map
        # for the whole file, as each map uses a file descriptor. No memory is reserved for changed pages: otherwise
        # Linux refuses files larger than the machine's memory.
        self.map: Mapping | None = None
        with contextlib.suppress(OSError):
            flags, protection = MAP_PRIVATE | _NORESERVE, PROT_READ | PROT_WRITE
            self.map = Mapping(file.fileno(), 0, flags=flags, prot=protection) if mapped else None
        self.storages: dict[str, torch.UntypedStorage] = {}

    def __contains__(self, name: str) -> bool:
        return f"{self.root}/{name}" in self.zip.namelist()

    def span(self, name: str) -> tuple[int, int]:
        """(offset in the file, length) of a member's bytes."""
        info = self.zip.getinfo(f"{self.root}/{name}")
        self.file.seek(info.header_offset)
        header = self.file.read(30)
        if header[:4] != b"PK\3\4" or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise zipfile.BadZipFile(f"{short_repr(info.filename)} is compressed, encrypted or damaged")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))  # the name and extra fields
        if begin + info.file_size > self.length:
            raise zipfile.BadZipFile(f"{short_repr(info.filename)} reaches beyond the end of the file")
        after = bisect.bisect(self.begins, info.header_offset)
        if after < len(self.begins) and begin + info.file_size > self.begins[after]:
            raise zipfile.BadZipFile(f"{short_repr(info.filename)} shares bytes with another member")
        return begin, info.file_size

    def read(self, name: str) -> bytearray:
        begin, size = self.span(name)
        self.file.seek(begin)
        return bytearray(self.file.read(size))

    def storage(self, persistent_id: Any) -> _Storage:
        match persistent_id:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as length):
                pass
            case _:
                raise ValueError("a persistent id that is not a storage")
        if key not in self.storages:
            self.storages[key] = self.bytes_of(f"data/{key}")
        data = self.storages[key]
        if not 0 <= length * dtype.itemsize <= data.nbytes():
            raise ValueError(f"a storage of {length} elements of {dtype} in {data.nbytes()} bytes")
        return _Storage(data, dtype, length, self.length)

    def bytes_of(self, name: str) -> torch.UntypedStorage:
        begin, size = self.span(name)
        if size == 0:
            return torch.UntypedStorage(0)  # frombuffer rejects an empty buffer
        if self.map is not None and begin % 16 == 0:  # torch aligns to 64; other writers may not
            return torch.frombuffer(self.map, dtype=torch.uint8, count=size, offset=begin).untyped_storage()
        return torch.frombuffer(self.read(name), dtype=torch.uint8).untyped_storage()


def _check_start(start: bytes, path: str | Path) -> None:
    if start.startswith(b"PK\3\4"):
        return
    if _MAGIC in start:
        what, do = "the file is in torch's format of before 1.6", _CONVERT
    elif start.startswith(b"\x80"):
        what, do = "the file is a bare pickle, not a file of torch.save", _CONVERT
    elif start.startswith(b"version https://git-lfs"):
        what, do = "the file is a pointer of git-lfs, not the weights", "git lfs pull"
    else:
        what, do = f"the file was not written by torch.save: it begins with {start[:8]!r}", "give the checkpoint's file"
    raise CheckpointError(what, where=str(path), why="only the zip format of torch 1.6 and later is read", do=do)


def load_tensors(path: str | Path, mmap: bool = True, opaque: bool = False) -> Any:
    """What `torch.load` returns for a file of `torch.save`, limited to tensors and plain values.

    Args:
        mmap: leave tensors on disk until they are used. The file must not change while they exist.
        opaque: objects of unknown classes become inert `Opaque` placeholders instead of an error.

    Returns: tensors on the CPU, without attributes of dicts (`_metadata`) and of tensors. Contents are not compared
        with the checksums of the zip.
    Raises: CheckpointError for a file that is missing, damaged, of another format, or contains anything else.
    """
    machine = None
    try:
        with open_regular(path) as file:
            _check_start(file.read(64), path)
            archive = _Archive(file, mmap)
            order = archive.read("byteorder").decode() if "byteorder" in archive else "little"
            if order != sys.byteorder:
                raise CheckpointError(
                    f"the tensors are {short_repr(order)}-endian, this machine is {sys.byteorder}-endian",
                    where=str(path),
                    why="all numbers would be wrong",
                    do="load it with torch on any machine and save it there as .safetensors",
                )
            machine = _Machine(path, archive.storage, opaque)
            return machine.run(bytes(archive.read("data.pkl")))
    except OSError as e:
        raise CheckpointError(f"{Path(path).name} cannot be read: {e.strerror or e}", where=str(path)) from None
    except (CheckpointError, MemoryError):
        raise
    except Exception as e:  # a damaged or crafted zip or pickle fails in many ways
        raise CheckpointError(
            f"{Path(path).name} is cut short, damaged or crafted: {short(str(e))}",
            where=f"{path}, byte {machine.at} of its data.pkl" if machine else str(path),
            why="its tensors may be missing or wrong",
            do="compare its size and sha256 with the original, and copy it again",
        ) from e
