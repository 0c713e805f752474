"""Right inputs, changed a little."""

import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# Values that are nowhere right: of another type, far too large, not a number, nested, odd as a text.
ABSURD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**40, 2**63, -(2**63), 10**9, 10**30, 0.5, -0.0, 1e308, 6.05e234,
    float("inf"), float("nan"), "", "x", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "~nobody/x", "é" * 300,
    "y" * 300,
    "1", "<|im_end|>", [], [[]], [None], {}, {"": {}}, {"type": "x"}, [1, 2], ["a"], {"a": 1},
]  # fmt: skip
DEEP = [("[" * n + "]" * n) for n in (60, 900, 1200, 100_000)] + ['{"a":' * 3000 + "1" + "}" * 3000, "9" * 5000]
BYTES = [b"", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\x85", b"-", b"0", b"9" * 30, b"[", b"]"]
BYTES += [b"{", b"}", b'"', b",", b"e999", b"\0" * 64, b"A" * 3000, struct.pack("<q", 2**40), struct.pack("<q", -1)]


def mutated(seed: bytes) -> SearchStrategy[bytes]:
    """The seed with up to six places cut, doubled, overwritten or given other bytes."""
    place = st.floats(0, 1, allow_nan=False)
    piece = st.one_of(st.sampled_from(BYTES), st.binary(max_size=4))
    edit = st.tuples(st.sampled_from(["cut", "insert", "over", "flip", "double"]), place, st.integers(0, 24), piece)

    def apply(edits: list[tuple[str, float, int, bytes]]) -> bytes:
        data = bytearray(seed)
        for how, where, size, new in edits:
            at = int(where * len(data))
            if how == "cut":
                del data[at : at + size]
            elif how == "insert":
                data[at:at] = new
            elif how == "over":
                data[at : at + len(new)] = new
            elif how == "flip" and data:
                data[min(at, len(data) - 1)] ^= 1 << size % 8
            elif how == "double":
                data[at:at] = data[at : at + 8 * size]
        return bytes(data)

    return st.lists(edit, max_size=6).map(apply)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, part in inner for p in _places(part, (*path, key)))]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((k, _copy(v)) for k, v in value.items())
    return [_copy(v) for v in value] if isinstance(value, list) else value


def changed(seed: Any, values: list[Any] = ABSURD) -> SearchStrategy[Any]:
    """A structure of dicts and lists with up to four of its parts replaced, taken out, renamed or doubled."""
    edit = st.tuples(
        st.sampled_from(["set", "set", "set", "remove", "rename", "double"]),
        st.integers(0, 10**6),
        st.sampled_from(values),
    )

    def apply(edits: list[tuple[str, int, Any]]) -> Any:
        root = {"": _copy(seed)}
        for how, number, new in edits:
            places = _places(root)[1:]
            if not places:
                break
            *above, key = places[number % len(places)]
            at: Any = root
            for part in above:
                at = at[part]
            if at is root or how == "set":
                at[key] = _copy(new)
            elif how == "remove":
                del at[key]
            elif how == "double" and isinstance(at, list):
                at.append(at[key])
            elif isinstance(at, dict):
                at[new if isinstance(new, str) else "renamed"] = at[key]
        return root[""]

    return st.lists(edit, max_size=4).map(apply)


def json_bytes(seed: Any) -> SearchStrategy[bytes]:
    """JSON of a changed structure, with changed bytes, or of another kind altogether."""
    text = changed(seed).map(lambda value: json.dumps(value).encode())
    return st.one_of(text, text, text, mutated(json.dumps(seed).encode()), st.sampled_from([d.encode() for d in DEEP]))


# ---- pickles ------------------------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


_NAMES = "collections OrderedDict,builtins set,builtins frozenset,_codecs encode,torch Size,torch Tensor,os system"
_NAMES += ",torch._utils _rebuild_tensor_v2,torch._utils _rebuild_parameter,torch._tensor _rebuild_from_type_v2"
_NAMES += ",torch FloatStorage,torch uint8,torch.storage UntypedStorage,builtins bytes,builtins eval"
OPCODES: list[bytes] = [
    *(b"c" + name.replace(" ", "\n").encode() + b"\n" for name in _NAMES.split(",")),
    *(_text(t) for t in ("storage", "0", "cpu", "latin1", "a", "b" * 200, "state_dict", "os", "eval")),
    *(bytes([n]) for n in b"NK)]}\x8f\x88\x89(tedulsaR\x81\x93\x85\x86\x87\x90\x91\x92\x94bQ."),
    *(b"K" + bytes([n]) for n in (0, 1, 2, 3, 6, 255)),
    b"J" + struct.pack("<i", -1), b"\x8a\x09" + (2**64).to_bytes(9, "little"), b"G" + b"\x7f\xf8" + b"\0" * 6,
    *(b"q" + bytes([n]) for n in range(4)), *(b"h" + bytes([n]) for n in range(4)), b"\x80\x02", b"\x80\x04",
    b"\x95" + b"\xff" * 8,
]  # fmt: skip
# Whole values that a random walk would seldom make.
STORAGE = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x06tQ"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x06\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
WIDE = b"(" + b"K\x02" * 99 + b"t"
BOMB = b"]q\x00" + b"".join(b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))


def pickles(seeds: list[Any]) -> SearchStrategy[bytes]:
    """Code for a pickle machine: changed code of real values, and random opcodes."""
    parts = st.sampled_from([*OPCODES, *OPCODES, STORAGE, TENSOR, WIDE, BOMB])
    walk = st.lists(parts, max_size=24).map(lambda ops: b"\x80\x02" + b"".join(ops) + b".")
    repeated = st.tuples(parts, parts, parts, st.integers(1, 400)).map(
        lambda p: b"\x80\x02" + p[0] + (p[1] + p[2]) * p[3] + b"."
    )
    real = [mutated(pickle.dumps(seed, protocol=protocol)) for seed in seeds for protocol in (2, 4)]
    return st.one_of(walk, walk, repeated, *real)


def one_changed(
    files: dict[str, Callable[[], SearchStrategy[Any]] | SearchStrategy[Any]], right: dict[str, Any]
) -> Any:
    """All the files of a folder, of which one or two are changed."""
    names = st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({n: files[n] for n in chosen})).map(
        lambda new: right | new
    )
