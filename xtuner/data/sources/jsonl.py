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
from xtuner.data.format.parse_tokens import LARGEST_ID, parse_list
from xtuner.data.sources.columns import PADDING, Role, padding_error, to_signed
from xtuner.data.sources.decoded import Decoded, DecodedFile

BLOCK = 2**24  # bytes
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
        lengths, parts = [], [np.zeros(0, np.int32)]
        try:
            with open_regular(self.path) as f:
                at = block
                if block:
                    f.seek(block - 1)
                    at = block - 1 + len(f.readline())  # the end of a line that begins before
                while at < block + BLOCK and (line := f.readline()):
                    if line.strip():
                        parts.append(self._parse(line, at))
                        lengths.append(len(parts[-1]))
                    at += len(line)
        except OSError as e:
            raise DataError(f"{self.name} cannot be read: {e.strerror or e}", where=str(self.path)) from None
        yield Decoded(np.array(lengths, np.int64), np.concatenate(parts))

    def block_bytes(self, block: int) -> int:
        return BLOCK

    def describe(self, block: int, i: int) -> str:
        return f"{self.path}:{block}, document {i} from there on"

    def _parse(self, line: bytes, at: int) -> npt.NDArray[np.int32]:
        """Signed tokens of a line. Raises: DataError."""
        where = f"{self.path}:{at}"
        ids, learned, role = self._usual(line, where) or self._json(line, where)
        if learned is not None and len(learned) != len(ids):
            raise DataError(f"a line has {len(ids)} ids and {len(learned)} {role}", where=where, do=_REMEDY)
        return to_signed(ids, learned, role, lambda i: f"{where}, token {i}")

    def _usual(self, line: bytes, where: str) -> Document | None:
        """A line with nothing but lists of short integers; None for any other."""
        if (found := _USUAL.fullmatch(line)) is None:
            return None
        names = [name.decode() for name in (found[1], found[3]) if name is not None]
        if PADDING in names:
            return None
        chosen = self.columns.choose(names, where)
        values: list[npt.NDArray[Any]] = []
        for name in (chosen.ids, chosen.learned):
            if name is not None:
                text = found[2] if name == names[0] else found[4]
                part = parse_list(text) if text.strip() else np.zeros(0, np.int64)
                if part is None:
                    return None
                values.append(part)
        return values[0], values[1] if chosen.learned else None, chosen.role

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
