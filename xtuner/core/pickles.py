"""Reads pickles that other programs wrote with `torch.save`, without running anything that they name.

A pickle is a program for a stack machine. Python's machine looks up and calls any global that a file names, and its BUILD
opcode sets attributes or calls `__setstate__` of whatever lies on the stack, tensors included. So this is a machine of our
own: `pickletools` splits the bytes into opcodes, and those below can only make plain values, tensors and inert
placeholders. A global is a key into `_GLOBALS`, our own builders; nothing is imported or looked up.

Formats: pickletools documents the opcodes. Since torch 1.6 `torch.save` writes an uncompressed zip: `NAME/data.pkl`,
`NAME/data/KEY` (a storage each), `NAME/byteorder`. In the pickle a tensor is a call of
`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, and a storage is the persistent id
`('storage', its type, KEY, device, number of elements)`.
"""

import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import ACCESS_COPY
from mmap import mmap as Mapping
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import torch

from xtuner.core.errors import CheckpointError

_RUNS_CODE = "a pickle can run any program of whoever wrote it, so only tensors and plain values are read"
_CONVERT = "if you trust whoever wrote it, load it where that is safe and save the weights as .safetensors"
_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # the integer 0x1950a86a20f9469cfc6c, pickled


@dataclass(slots=True, eq=False)
class Opaque:
    """Stands for an object of a class that we do not know: keeps what the file gave it, does nothing."""

    name: str  # of the class or function, as 'module.name'
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)  # appended values, or keys and values in turn

    def __repr__(self) -> str:
        return f"<opaque {self.name}>"


@dataclass(frozen=True, slots=True)
class _Builder:
    make: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Storage:
    data: torch.UntypedStorage
    dtype: torch.dtype
    length: int  # elements of dtype


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, grad: Any = False, *rest: Any) -> torch.Tensor:
    """A view of the storage. Raises: ValueError where it would reach outside."""
    hooks_dtype_bits = [value for value in rest if value]  # hooks are always empty
    dtype = storage.dtype  # `_rebuild_tensor_v3` brings the dtype (float8, uint16, …), its storage counts bytes
    if hooks_dtype_bits and isinstance(hooks_dtype_bits[0], torch.dtype):
        dtype = hooks_dtype_bits.pop(0)
    if hooks_dtype_bits:
        raise ValueError("a tensor with hooks, or a conjugated or negated view")
    length = storage.length * storage.dtype.itemsize // dtype.itemsize
    if len(size) != len(stride) or any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError(f"a tensor of size {tuple(size)}, strides {tuple(stride)}, offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (offset > length) if 0 in size else (last >= length):
        raise ValueError(f"a tensor that reaches element {max(offset, last)} of a storage of {length}")
    return torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride).requires_grad_(grad is True)


def _parameter(data: torch.Tensor, grad: Any, *hooks_and_attributes: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(data.detach(), grad is True)


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    # Before protocol 3 bytes were written as `_codecs.encode(text, 'latin1')`, empty ones as `bytes()`.
    return text.encode({"latin1": "latin1"}[encoding])


def _key(value: Any) -> Any:
    # Flat keys only: hashing a tuple nested a million deep overflows the C stack, which kills the process.
    plain = (str, bytes, int, float, NoneType, torch.dtype, frozenset, Opaque)
    if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value)):
        return value
    raise ValueError(f"a {type(value).__name__} as a key")


_STORAGES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
_STORAGES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}
_STORAGES |= {"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
_STORAGES |= {"Untyped": torch.uint8}

_GLOBALS: dict[str, _Builder | torch.dtype] = {
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
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
}
# Opcodes whose argument is the value itself.
_VALUES = set("INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING".split())
_VALUES |= set("UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split())
_MAKES: dict[str, Callable[[], Any]] = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_MAKES |= {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}


class _Machine:
    def __init__(self, storage: Callable[[Any], _Storage], opaque: bool) -> None:
        self.storage, self.opaque = storage, opaque
        self.at = 0  # byte of the pickle, for messages

    def run(self, code: bytes) -> Any:
        stack: list[Any] = []
        marks: list[int] = []  # heights of the stack
        memo: dict[int, Any] = {}

        def pop(count: int | None = None) -> list[Any]:
            """The last `count` values, or those above the last mark."""
            height = marks.pop() if count is None else len(stack) - count
            values = stack[height:]
            del stack[height:]
            return values

        for op, arg, at in pickletools.genops(code):
            self.at = at or 0
            if op.name in _VALUES:
                stack.append(arg)
                continue
            if op.name in _MAKES:
                stack.append(_MAKES[op.name]())
                continue
            match op.name:
                case "PROTO" | "FRAME":
                    pass
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(pop()))
