"""JSON lines of ids: {"input_ids": [1, 320, 15], "labels": [-100, 320, 15]}, one document a line.

Labels or a mask may be missing in some lines: every token of these is learned. Other keys are ignored.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.foreign_inputs import open_regular, short_repr
from xtuner.data.format.parse_tokens import LARGEST_ID, parse_bodies
from xtuner.data.sources.columns import PADDING, Role, padding_error, to_signed
from xtuner.data.sources.decoded import Decoded, DecodedFile

BLOCK = 2**24  # bytes
TOGETHER = 2**20  # bytes of lines that are parsed at once
_USUAL = re.compile(rb'\{"(\w+)": ?\[([-\d, ]*)\](?:, ?"(\w+)": ?\[([-\d, ]*)\])?\}\s*')
_REMEDY = "write the line again"
Document = tuple[npt.NDArray[Any], npt.NDArray[Any] | None, Role]  # ids; labels or mask; which of these


@dataclass(frozen=True)
class JsonlFile(DecodedFile):
    def blocks(self) -> list[int]:
        """Bytes; the lines that begin in the `BLOCK` bytes from there on belong to a block."""
        with self.open() as f:
            return list(range(0, os.fstat(f.fileno()).st_size, BLOCK))

    def decode(self, block: int) -> Iterator[Decoded]:
        try:
            with open_regular(self.path) as f:
                at = block
                if block:
                    f.seek(block - 1)
                    at = block - 1 + len(f.readline())  # the end of a line that begins before
                lines: list[tuple[int, bytes]] = []
                size = 0
                while at < block + BLOCK and (line := f.readline()):
                    if line.strip():
                        lines.append((at, line))
                    at, size = at + len(line), size + len(line)
                    if size >= TOGETHER:
                        yield self._parse_lines(lines)
                        lines, size = [], 0
        except OSError as e:
            raise DataError(f"{self.name} cannot be read: {e.strerror or e}", where=str(self.path)) from None
        yield self._parse_lines(lines)

    def _parse_lines(self, lines: list[tuple[int, bytes]]) -> Decoded:
        """The documents of (byte, line)s. Raises: DataError."""
        if (found := self._parse_together(lines)) is not None:
            return found
        parts = [self._parse(line, at) for at, line in lines]
        return Decoded(np.array(list(map(len, parts)), np.int64), np.concatenate([np.zeros(0, np.int32), *parts]))

    def _parse_together(self, lines: list[tuple[int, bytes]]) -> Decoded | None:
        """Lines that have nothing but the same one or two lists; None for any others, and for wrong ones."""
        found = [_USUAL.fullmatch(line) for _, line in lines]
        if not found or not all(found):
            return None
        texts = [m.groups() for m in found if m]
        first, _, second, _ = texts[0]
        if first == second or PADDING.encode() in (first, second):
            return None
        if any((text[0], text[2]) != (first, second) for text in texts):
            return None
        names = [name.decode() for name in (first, second) if name is not None]
        chosen = self.columns.choose(names, f"{self.path}:{lines[0][0]}")
        ids = parse_bodies([t[1 if chosen.ids == names[0] else 3] for t in texts])
        learned = chosen.learned and parse_bodies([t[1 if chosen.learned == names[0] else 3] for t in texts])
        if ids is None or (chosen.learned and (not learned or learned[1] != ids[1])):
            return None
        try:
            signed = to_signed(ids[0], learned[0] if learned else None, chosen.role, str)
        except DataError:
            return None  # the position is found line by line
        return Decoded(np.array(ids[1], np.int64), signed)

    def block_bytes(self, block: int) -> int:
        return BLOCK

    def describe(self, block: int, i: int) -> str:
        return f"{self.path}:{block}, document {i} from there on"

    def _parse(self, line: bytes, at: int) -> npt.NDArray[np.int32]:
        """Signed tokens of a line. Raises: DataError."""
        where = f"{self.path}:{at}"
        ids, learned, role = self._json(line, where)
        if learned is not None and len(learned) != len(ids):
            raise DataError(f"a line has {len(ids)} ids and {len(learned)} {role}", where=where, do=_REMEDY)
        return to_signed(ids, learned, role, lambda i: f"{where}, token {i}")

    def _json(self, line: bytes, where: str) -> Document:
        try:
            record = json.loads(line)
        except ValueError as e:
            shown = line[:80].decode("utf-8", "replace").rstrip()
            raise DataError(f"a line is not JSON: {e}; it begins {shown!r}", where=where, do=_REMEDY) from None
        except RecursionError:
            raise DataError("a line is nested too deeply to be read", where=where, do=_REMEDY) from None
        if not isinstance(record, dict):
            raise DataError("a line is not an object with a list of ids", where=where, do=_REMEDY)
        chosen = self.columns.choose(record, where)
        learned = None if chosen.learned is None else _numbers(record[chosen.learned], chosen.learned, where)
        ids = _numbers(record[chosen.ids], chosen.ids, where)
        if not (chosen.role or self.columns.learns_all) and 0 in _numbers(record.get(PADDING, []), PADDING, where):
            raise padding_error(where)
        return ids, learned, chosen.role


def _numbers(values: Any, name: str, where: str) -> npt.NDArray[Any]:
    """Raises: DataError."""
    if not isinstance(values, list):
        raise DataError(f"{name!r} is not a list", where=where, do=_REMEDY)
    kinds = set(map(type, values))
    if kinds - {int} and kinds != {bool}:
        wrong = next(v for v in values if type(v) is not int)
        raise DataError(f"{name!r} contains {short_repr(wrong)}, not an integer", where=where, do=_REMEDY)
    if values and max(max(values), -min(values)) > LARGEST_ID:
        raise DataError(f"{name!r} contains a number beyond 2^31 - 1", where=where, why="no vocabulary is that large")
    return np.array(values, bool if kinds == {bool} else np.int64)
