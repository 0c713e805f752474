"""The text of documents → tokens. Numpy parses the usual form, a JSON parser all others; both read the same numbers.

The usual form is `{"tokens": [1, -2, 3]}` (the spaces may be missing). Anything in a line that is not exactly that,
down to a sign, a space or a zero too many, goes to the JSON parser, which knows what to say of it.
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
_AGAIN = "write the file again with `xtuner data tokenize`"


def parse_line(line: bytes, where: str = "") -> Int64s:
    """Signed tokens of one line, int64 [n]. Raises: DataError."""
    body = plain_body(line)
    if body is not None:
        tokens = parse_list(body)
        if tokens is not None:
            return tokens
    return _parse_json(line.strip(), where)


def plain_body(line: bytes) -> bytes | None:
    """What stands between the brackets of a line in the usual form; None for any other line."""
    for head in HEADS:
        if line.startswith(head):
            tail = line[-4:].rstrip(b"\r\n")
            if tail.endswith(b"]}"):
                return line[len(head) : len(line) - (len(line[-4:]) - len(tail)) - 2]
    return None


def parse_lines(lines: Sequence[bytes]) -> tuple[Int64s, list[int]] | None:
    """Signed tokens of several lines, one after the other, and how many each has, when all are in the usual form.

    Returns None otherwise: each line has to be looked at by itself then.
    """
    bodies, borders, used, at = [], [], [], 0
    for line in lines:
        body = plain_body(line)
        if body is None:
            return None
        used.append(body != b"")
        if body:
            bodies.append(body)
            at += len(body)
            borders.append(at)
            at += 2
    if not bodies:
        return np.zeros(0, np.int64), [0] * len(lines)
    found = _parse(b", ".join(bodies))
    if found is None:
        return None
    tokens, ends = found
    counts = np.diff(np.searchsorted(ends, borders), prepend=-1).tolist()
    return tokens, counts if all(used) else [counts.pop(0) if u else 0 for u in used]


def parse_list(text: bytes) -> Int64s | None:
    """The integers of `1, -2,3`, int64 [n]; None if that is not exactly what stands between brackets in JSON, or a
    number has more than 8 digits."""
    found = _parse(text) if text else None
    return None if found is None else found[0]


def _parse(text: bytes) -> tuple[Int64s, Int64s] | None:
    """The integers of a list, and where each ends. A number's digits are taken as one 64-bit word; all words are turned
    into values at once, by pairs of digits, of pairs, of fours."""
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
    # Commas, the spaces behind them and signs are no digits. So if as many bytes are digits as stand in numbers, all
    # that stands in numbers is digits.
    if np.count_nonzero((body - _ZERO) < 10) != int(lengths.sum()):
        return None
    if ((body[starts] == _ZERO) & (lengths > 1)).any():  # 01 is no number in JSON
        return None
    # word i holds the 8 bytes before byte i of the body
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
_STEPS = [
    (np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(10 * 2**8 + 1), np.uint64(8)),
    (np.uint64(0x00FF00FF00FF00FF), np.uint64(100 * 2**16 + 1), np.uint64(16)),
    (np.uint64(0x0000FFFF0000FFFF), np.uint64(10000 * 2**32 + 1), np.uint64(32)),
]


def _parse_json(body: bytes, where: str) -> Int64s:
    try:
        record = json.loads(body)
    except ValueError as e:  # not JSON, not UTF-8, or a number with thousands of digits
        shown = body[:80].decode("utf-8", "replace")
        raise DataError(f"a line is not JSON: {e}; it begins {shown!r}", where=where, do=_AGAIN) from None
    except RecursionError:
        raise DataError("a line is nested too deeply to be read", where=where, do=_AGAIN) from None
    if not isinstance(record, dict) or "tokens" not in record:
        raise DataError('a line is not an object with the key "tokens"', where=where, do=_AGAIN)
    values = record["tokens"]
    if not isinstance(values, list):
        raise DataError('"tokens" is not a list', where=where, do=_AGAIN)
    wrong = [v for v in values if type(v) is not int]  # bool is an int to isinstance
    if wrong:
        raise DataError(f"a token is {short_repr(wrong[0])}, not an integer", where=where, do=_AGAIN)
    if values and max(max(values), -min(values)) > LARGEST_ID:
        raise DataError("a token id is beyond 2^31 - 1", where=where, why="no vocabulary is that large")
    return np.array(values, dtype=np.int64)
