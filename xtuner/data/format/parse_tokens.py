"""Parses the text of documents to tokens: the usual form with numpy, any other line with a JSON parser.

The usual form is `{"tokens": [1, -2, 3]}` (the spaces may be missing). A line that deviates from it, even by one sign,
space or leading zero too many, goes to the JSON parser, which reads the same numbers or reports what is wrong.

The numpy parser (`_parse`) handles all numbers of a list at once. The bytes before each number's end are taken as one
64-bit word (little-endian: the first byte is the least significant):

    text          1 2 3 4 , _ - 5 0 7 ,                     ("_": a space)
    ends                  ^           ^                     the position of each comma, and the end of the text
    word of 507   "3"  "4"  ","  " "  "-"  "5"  "0"  "7"    the 8 bytes before the end
    shifts         0    0    0    0    0   "5"  "0"  "7"    >> then << by the bits of the other bytes: they become 0
    & 0x0F…        0    0    0    0    0    5    0    7     digits as numbers; 8 fields of 8 bits
    step 1           0         0         5        7         4 fields of 16 bits: 10 · left + right
    step 2                0                  507            2 fields of 32 bits: 100 · left + right
    step 3                       507                        1 field of 64 bits: 10000 · left + right

Each step is a mask, which clears what lies between the fields; a multiplication by (base · 2^width + 1), which adds
base · (left field) to the right field; and a shift by the width of a field, which drops the left one.
"""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.foreign_inputs import short_repr

Int64s = npt.NDArray[np.int64]
HEADS = (b'{"tokens": [', b'{"tokens":[')
LARGEST_ID = 2**31 - 1
_REMEDY = "write the file again with `xtuner data tokenize`"


def parse_line(line: bytes, where: str = "") -> Int64s:
    """Signed tokens of one line, int64 [n]. Raises: DataError."""
    body = plain_body(line)
    if body is not None:
        tokens = parse_list(body)
        if tokens is not None:
            return tokens
    return _parse_json(line.strip(), where)


def plain_body(line: bytes) -> bytes | None:
    """The text between the brackets of a line in the usual form; None for any other line."""
    for head in HEADS:
        if line.startswith(head):
            tail = line[-4:].rstrip(b"\r\n")
            if tail.endswith(b"]}"):
                return line[len(head) : len(line) - (len(line[-4:]) - len(tail)) - 2]
    return None


def parse_lines(lines: Sequence[bytes]) -> tuple[Int64s, list[int]] | None:
    """(signed tokens of several lines end to end, number of tokens per line); None unless all are in the usual form."""
    bodies = [plain_body(line) for line in lines]
    return None if None in bodies else parse_bodies(bodies)  # type: ignore[arg-type]


def parse_bodies(texts: Sequence[bytes]) -> tuple[Int64s, list[int]] | None:
    """As `parse_lines`, of the text between the brackets of each list."""
    bodies, borders, used, at = [], [], [], 0
    for body in texts:
        used.append(body != b"")
        if body:
            bodies.append(body)
            at += len(body)
            borders.append(at)
            at += 2
    if not bodies:
        return np.zeros(0, np.int64), [0] * len(texts)
    found = _parse(b", ".join(bodies))
    if found is None:
        return None
    tokens, ends = found
    counts = np.diff(np.searchsorted(ends, borders), prepend=-1).tolist()
    return tokens, counts if all(used) else [counts.pop(0) if u else 0 for u in used]


def parse_list(text: bytes) -> Int64s | None:
    """The integers of `1, -2,3`, int64 [n]; None if the text is not exactly the inside of a JSON list of integers, or a
    number has more than 8 digits."""
    found = _parse(text) if text else None
    return None if found is None else found[0]


def _parse(text: bytes) -> tuple[Int64s, Int64s] | None:
    """(integers, positions of their ends), int64 [n] each; None as for `parse_list`. See the drawing above."""
    padded = np.frombuffer(b"00000000" + text, np.uint8)
    body = padded[8:]
    commas = np.flatnonzero(body == _COMMA)
    ends = np.append(commas, len(body))
    starts = np.empty_like(ends)
    starts[0] = 0
    np.add(commas, 1, out=starts[1:])
    if body[-1] == _COMMA:
        return None
    starts[1:] += body[starts[1:]] == _SPACE
    first = body[np.minimum(starts, ends - 1)]
    negative = first == _MINUS
    starts += negative
    lengths = ends - starts
    if lengths.min() < 1 or lengths.max() > 8:
        return None
    # Commas, the spaces after them and signs are not digits. If the text has as many digits as the numbers have bytes,
    # all bytes of the numbers are digits.
    if np.count_nonzero((body - _ZERO) < 10) != int(lengths.sum()):
        return None
    if ((body[starts] == _ZERO) & (lengths > 1)).any():  # 01 is not valid in JSON
        return None
    # [len(body) + 1] words at a stride of one byte: word i contains the 8 bytes before byte i of the body
    words = np.ndarray(len(body) + 1, "<u8", padded, 0, (1,))[ends]
    unused = ((8 - lengths) << 3).view(np.uint64)
    words >>= unused
    words <<= unused
    for mask, factor, shift in _STEPS:
        words &= mask
        words *= factor
        words >>= shift
    values = words.view(np.int64)
    values *= 1 - 2 * negative.view(np.int8)
    return values, ends


_ZERO, _MINUS, _SPACE, _COMMA = (np.uint8(ord(c)) for c in "0- ,")
_STEPS = [  # (mask of the fields that count, factor, shift): see the drawing
    (np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(10 * 2**8 + 1), np.uint64(8)),
    (np.uint64(0x00FF00FF00FF00FF), np.uint64(100 * 2**16 + 1), np.uint64(16)),
    (np.uint64(0x0000FFFF0000FFFF), np.uint64(10000 * 2**32 + 1), np.uint64(32)),
]


def _parse_json(body: bytes, where: str) -> Int64s:
    try:
        record = json.loads(body)
    except ValueError as e:  # not JSON, not UTF-8, or a number with thousands of digits
        shown = body[:80].decode("utf-8", "replace")
        raise DataError(f"a line is not JSON: {e}; it begins {shown!r}", where=where, do=_REMEDY) from None
    except RecursionError:
        raise DataError("a line is nested too deeply to be read", where=where, do=_REMEDY) from None
    if not isinstance(record, dict) or "tokens" not in record:
        raise DataError('a line is not an object with the key "tokens"', where=where, do=_REMEDY)
    values = record["tokens"]
    if not isinstance(values, list):
        raise DataError('"tokens" is not a list', where=where, do=_REMEDY)
    wrong = [v for v in values if type(v) is not int]  # bool is an int to isinstance
    if wrong:
        raise DataError(f"a token is {short_repr(wrong[0])}, not an integer", where=where, do=_REMEDY)
    if values and max(max(values), -min(values)) > LARGEST_ID:
        raise DataError("a token id is beyond 2^31 - 1", where=where, why="no vocabulary is that large")
    return np.array(values, dtype=np.int64)
