"""The text of documents → tokens. Numpy parses the usual form, a JSON parser all others; both read the same numbers.

The usual form is `{"tokens": [1, -2, 3]}` (the spaces may be missing). Numpy alone would read an empty element as 0,
ignore a comma at the end, read `01`, and saturate; so the text's grammar is proved first, by counting and comparing
its bytes, and everything that is not exactly JSON's goes to the JSON parser, which knows what to say of it.
"""

import json
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError

Int64s = npt.NDArray[np.int64]
HEADS = (b'{"tokens": [', b'{"tokens":[')
LARGEST_ID = 2**31 - 1
_KEPT = 2**22  # bytes of text up to which buffers are kept for the next one
_AGAIN = "write the file again with `xtuner data tokenize`"


def parse_line(line: bytes, where: str = "") -> Int64s:
    """Signed tokens of one line, int64 [n]. Raises: DataError."""
    body = plain_body(line)
    if body is not None:
        tokens = parse_list(body)
        if tokens is not None:
            return in_range(tokens, where)
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
    bodies, counts = [], []
    for line in lines:
        body = plain_body(line)
        if body is None:
            return None
        counts.append(int(np.count_nonzero(np.frombuffer(body, np.uint8) == _COMMA)) + 1 if body else 0)
        if body:
            bodies.append(body)
    tokens = parse_list(b", ".join(bodies)) if bodies else np.zeros(0, np.int64)
    if tokens is None or (len(tokens) and max(int(tokens.max()), -int(tokens.min())) > LARGEST_ID):
        return None
    return tokens, counts


_ZERO, _MINUS, _SPACE, _COMMA = (np.uint8(ord(c)) for c in "0- ,")


def parse_list(text: bytes) -> Int64s | None:
    """The integers of `1, -2,3`, int64 [n]; None if that is not exactly what stands between brackets in JSON."""
    if not text or not is_list(np.frombuffer(text, np.uint8)):
        return None
    return np.fromstring(text, dtype=np.int64, sep=",")  # saturates: the caller looks at the range


def is_list(text: npt.NDArray[np.uint8]) -> bool:
    """Whether bytes are JSON integers separated by `,` or `, `, by counting and comparing neighbours."""
    n = len(text)
    digit, comma, space, minus, scratch = _buffers(n)
    np.less(np.subtract(text, _ZERO, out=scratch.view(np.uint8)), 10, out=digit)
    for mark, where in ((_COMMA, comma), (_SPACE, space), (_MINUS, minus)):
        np.equal(text, mark, out=where)
    commas, spaces, minuses = map(np.count_nonzero, (comma, space, minus))
    if np.count_nonzero(digit) + commas + spaces + minuses != n or not digit[-1] or comma[0] or space[0]:
        return False
    before, after, pair = digit[:-1], digit[1:], scratch[1:]  # whether the neighbour is a digit

    def both(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(np.logical_and(a, b, out=pair)))

    if both(comma[1:], before) != commas or both(space[1:], comma[:-1]) != spaces:
        return False  # a comma that follows no digit, a space that follows no comma
    if minuses and (both(minus[1:], before) or both(minus[:-1], after) != minuses):
        return False  # a sign inside a number, or of none
    zero = np.equal(text, _ZERO, out=comma)[:-1]  # 01 is a number to numpy alone
    np.logical_and(zero, after, out=pair)
    np.greater(pair[1:], before[:-1], out=pair[1:])
    return not pair.any()


_own = threading.local()


def _buffers(n: int) -> npt.NDArray[np.bool_]:
    """Five arrays of n, this thread's. New ones for each pack would cost more than the work: the system zeroes them."""
    held: npt.NDArray[np.bool_] | None = getattr(_own, "held", None)
    if n > _KEPT:
        return np.empty((5, n), np.bool_)
    if held is None or held.shape[1] < n:
        held = _own.held = np.empty((5, n + n // 4), np.bool_)
    return held[:, :n]


def _parse_json(body: bytes, where: str) -> Int64s:
    try:
        record = json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
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
        raise DataError(f"a token is {wrong[0]!r}, not an integer", where=where, do=_AGAIN)
    try:
        tokens = np.array(values, dtype=np.int64)
    except OverflowError:
        raise DataError("a token does not fit into 64 bits", where=where, do=_AGAIN) from None
    return in_range(tokens, where)


def in_range(tokens: Int64s, where: str) -> Int64s:
    if len(tokens) and max(int(tokens.max()), -int(tokens.min())) > LARGEST_ID:
        raise DataError("a token id is beyond 2^31 - 1", where=where, why="no vocabulary is that large")
    return tokens
