"""What is known of the files of a folder: names, sizes and times, documents, tokens, identities. 0.1 kB a file.

It is kept so that a start only asks the file system for sizes and times: files that have not changed are known to be
right. Kept as arrays: folders of a hundred thousand files are common, and every rank holds this.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.core.foreign_inputs import short_repr
from xtuner.data.format.bin_file import BinFile, Facts, Signature

VERSION = 1
MAGIC = b"xtuner data index\n"
HEADER = 4096
FILE_BYTES = 8 * 8 + 32  # of a file's numbers and identity
COLUMNS = 8  # size, time, meta size, meta time, documents, tokens, where the file's table begins, its checksum


@dataclass(frozen=True)
class Catalog:
    """Files in order; row i of each array is of file i."""

    names: list[str]
    numbers: npt.NDArray[np.int64]  # [files, COLUMNS]
    identities: npt.NDArray[np.uint8]  # [files, 32]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def documents(self) -> npt.NDArray[np.int64]:
        return self.numbers[:, 4]

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        return self.numbers[:, 5]

    def file(self, i: int, folder: Path, min_length: int) -> BinFile:
        row = self.numbers[i].tolist()
        facts = Facts(Signature(*row[:4]), row[4], row[5], self.identities[i].tobytes())
        return BinFile(folder / self.names[i], self.names[i], min_length, facts)

    def select(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> "Catalog":
        return Catalog([self.names[i] for i in rows], self.numbers[rows], self.identities[rows])

    def fingerprint(self) -> str:
        """Identity of the contents: size, meta, first and last bytes of each file in order. No names, no times."""
        return hashlib.sha256(self.identities.tobytes()).hexdigest()

    def body(self) -> bytes:
        names = "\0".join(self.names).encode(errors="surrogateescape")
        return self.numbers.tobytes() + self.identities.tobytes() + names

    def key(self, **more: Any) -> str:
        """Changes with anything in it (but tables' places) and with `more`."""
        bare = Catalog(self.names, self.numbers.copy(), self.identities)
        bare.numbers[:, 6:] = 0
        return hashlib.sha256(f"{VERSION} {sorted(more.items())}".encode() + bare.body()).hexdigest()


def pack(catalog: Catalog, **facts: Any) -> bytes:
    """A catalog as the beginning of a file; `facts` are small JSON values."""
    body = catalog.body()
    head = {
        "version": VERSION,
        "files": len(catalog),
        "bytes": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        **facts,
    }
    return (MAGIC + json.dumps(head).encode()).ljust(HEADER - 1) + b"\n" + body


def unpack(data: Any) -> tuple[Catalog, dict[str, Any]]:
    """The catalog that a file (bytes, or a map of it) begins with, and its facts.

    Raises: ValueError, told in words, for anything that is no whole catalog of this version.
    """
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise ValueError("torn or no index")
    try:
        head: dict[str, Any] = json.loads(bytes(data[len(MAGIC) : HEADER]))
        version, files, size = head["version"], head["files"], head["bytes"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError("torn") from None
    if version != VERSION:
        raise ValueError(f"of version {short_repr(version)}, not {VERSION}")
    if not (type(files) is int and type(size) is int and 0 <= files * FILE_BYTES <= size):
        raise ValueError("torn")
    body = bytes(data[HEADER : HEADER + size])
    if len(body) != size or hashlib.sha256(body).hexdigest() != head.get("sha256"):
        raise ValueError("torn")
    table = files * COLUMNS * 8
    numbers = np.frombuffer(body, np.int64, files * COLUMNS).reshape(files, COLUMNS)
    identities = np.frombuffer(body, np.uint8, files * 32, table).reshape(files, 32)
    names = body[table + files * 32 :].decode(errors="surrogateescape").split("\0") if files else []
    if len(names) != files:
        raise ValueError("torn")
    return Catalog(names, numbers.copy(), identities.copy()), head
