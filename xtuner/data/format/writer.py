"""Writes `.bin` and `.bin.meta` files: both or neither. The meta comes last: a `.bin` without it is incomplete."""

import contextlib
import hashlib
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner.core.files import PendingFile, atomic_file, file_entry
from xtuner.data.format.meta import meta_path

_DAY_S = 86400.0


def format_line(tokens: Sequence[int]) -> bytes:
    """A document of signed tokens as a line of a `.bin`."""
    return b'{"tokens": [' + ", ".join(map(str, tokens)).encode() + b"]}\n"


def write_bin(path: str | Path, documents: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Write documents of signed tokens (a negative token is not learned). Returns (documents, tokens)."""
    with PairWriter(Path(path)) as writer:
        for tokens in documents:
            block = Block()
            block.add(format_line(tokens), len(tokens))
            writer.write(block)
        writer.commit()
    return writer.documents, writer.tokens


@dataclass
class Block:
    """Consecutive lines of a `.bin`, with the number of bytes and of tokens of each."""

    data: bytearray = field(default_factory=bytearray)
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    counts: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, line: bytes, count: int) -> None:
        self.data += line
        self.sizes.append(len(line))
        self.counts.append(count)


class PairWriter:
    """`with PairWriter(path) as w: w.write(block); …; w.commit()`. Without `commit`, no file remains.

    A pair without documents is not written; an older pair of the same name is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: PendingFile | None = None
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._rows = array("q")  # offset, count, offset, count, …

    def __enter__(self) -> "PairWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending is not None:  # not committed
            self._pending.drop()

    @property
    def documents(self) -> int:
        return len(self._rows) // 2

    @property
    def tokens(self) -> int:
        return sum(self._rows[1::2])

    def write(self, block: Block) -> None:
        if not block.sizes:
            return
        if self._pending is None:
            self._pending = PendingFile(self.path, "wb")
        self._pending.file.write(block.data)
        self._digest.update(block.data)
        for size, count in zip(block.sizes, block.counts, strict=True):
            self._rows.extend((self._bytes, count))
            self._bytes += size

    def commit(self) -> dict[str, dict[str, Any]]:
        """Give the files their names, the meta last. An older pair is replaced.

        Returns size and sha256 of each written file by name.
        """
        import numpy as np

        meta = meta_path(self.path)
        meta.unlink(missing_ok=True)
        if self._pending is None:
            self.path.unlink(missing_ok=True)
            return {}
        pending, self._pending = self._pending, None
        pending.commit()
        with atomic_file(meta, "wb") as f:
            np.save(f, np.array(self._rows, dtype=np.int64).reshape(-1, 2))
        entry = {"bytes": self._bytes, "sha256": self._digest.hexdigest()}
        return {self.path.name: entry, meta.name: file_entry(meta)}


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes: those not written to for a day."""
    if not os.path.isdir(folder):
        return
    for file in folder.iterdir():
        if file.name.startswith(".") and any(f"{ending}.tmp-" in file.name for ending in (".bin", ".meta", ".json")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _DAY_S:
                    file.unlink()
