"""Writing one `.bin` and its `.bin.meta`, whole or not at all."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from xtuner.core.files import atomic_file
from xtuner.data.format import meta_path


def write_bin(path: str | Path, documents: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Write documents of signed tokens (a negative one is not learned); the meta is int64.

    The meta takes its name after the text: a `.bin` without a meta is one that was not finished. An older pair of the
    name is replaced. Returns (documents, tokens).
    """
    path = Path(path)
    rows: list[tuple[int, int]] = []
    offset = 0
    meta_path(path).unlink(missing_ok=True)
    with atomic_file(path, "wb") as f:
        for tokens in documents:
            line = b'{"tokens": [' + ", ".join(map(str, tokens)).encode() + b"]}\n"
            f.write(line)
            rows.append((offset, len(tokens)))
            offset += len(line)
    with atomic_file(meta_path(path), "wb") as f:
        np.save(f, np.array(rows, dtype=np.int64).reshape(-1, 2))
    return len(rows), sum(n for _, n in rows)
