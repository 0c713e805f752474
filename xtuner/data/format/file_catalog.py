"""What is known about the files of a folder: names, sizes and times, documents, tokens, identities. 0.1 kB per file.

The catalog is cached, so that a start only reads sizes and times from the file system: unchanged files need no second
examination. It is kept as arrays, because folders of a hundred thousand files are common and every rank holds one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.core.remote.path import AnyPath
from xtuner.data.format.cache_file import DAMAGED, HEADER_BYTES, CacheFormat
from xtuner.data.format.document_file import DocumentFile, Facts, FileKind, Signature

FORMAT = CacheFormat("version", 1, magic=b"xtuner data index\n")
SIGNATURE = np.dtype([(name, "<i8") for name in Signature._fields])
# One record a file. `order_begin` and `order_crc32` belong to the index of one seed, see packing/document_order.py.
RECORD = np.dtype([
    ("signature", SIGNATURE), ("documents", "<i8"), ("tokens", "<i8"), ("order_begin", "<i8"), ("order_crc32", "<i8"),
])  # fmt: skip
IDENTITY_BYTES = 32
Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class Catalog:
    """Files in order; entry i of each array belongs to file i."""

    names: list[str]
    records: Records  # RECORD [files]
    identities: npt.NDArray[np.uint8]  # [files, 32]

    @classmethod
    def empty(cls, names: list[str]) -> "Catalog":
        """Of files about which nothing is known yet."""
        return cls(names, np.zeros(len(names), RECORD), np.zeros((len(names), IDENTITY_BYTES), np.uint8))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def documents(self) -> npt.NDArray[np.int64]:
        return self.records["documents"]

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        return self.records["tokens"]

    def file(self, i: int, folder: AnyPath, min_length: int, kind: FileKind) -> DocumentFile:
        signature, documents, tokens, _, _ = self.records[i].item()
        facts = Facts(Signature(*signature), documents, tokens, self.identities[i].tobytes())
        return kind.file(folder / self.names[i], self.names[i], min_length, facts)

    def set_facts(self, i: int, facts: Facts) -> None:
        self.records[i] = (tuple(facts.signature), facts.documents, facts.tokens, 0, 0)
        self.identities[i] = np.frombuffer(facts.identity, np.uint8)

    def select(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> "Catalog":
        return Catalog([self.names[i] for i in rows], self.records[rows], self.identities[rows])

    def fingerprint(self) -> str:
        """Identity of the contents: size, meta, first and last bytes of each file in order. No names, no times."""
        return hashlib.sha256(self.identities.tobytes()).hexdigest()

    def body(self) -> bytes:
        names = "\0".join(self.names).encode(errors="surrogateescape")
        return self.records.tobytes() + self.identities.tobytes() + names

    def key(self, **more: Any) -> str:
        """Hash of everything in the catalog except the location and checksum of orders, and of `more`."""
        bare = Catalog(self.names, self.records.copy(), self.identities)
        bare.records["order_begin"] = bare.records["order_crc32"] = 0
        return hashlib.sha256(f"{FORMAT.version} {sorted(more.items())}".encode() + bare.body()).hexdigest()


def to_bytes(catalog: Catalog, **facts: Any) -> bytes:
    """A catalog as the beginning of a file; `facts` are small JSON values for its header."""
    body = catalog.body()
    sha256 = hashlib.sha256(body).hexdigest()
    return FORMAT.header(files=len(catalog), bytes=len(body), sha256=sha256, **facts) + body


def from_bytes(data: Any) -> tuple[Catalog, dict[str, Any]]:
    """The catalog at the beginning of a file (bytes, or a map of it), and the facts of its header.

    Raises: ValueError with a readable reason for anything else than a complete catalog of this version.
    """
    head = FORMAT.read_header(data)
    files, size = head.get("files"), head.get("bytes")
    if not (type(files) is int and type(size) is int and 0 <= files * (RECORD.itemsize + IDENTITY_BYTES) <= size):
        raise ValueError(DAMAGED)
    body = bytes(data[HEADER_BYTES : HEADER_BYTES + size])
    if len(body) != size or hashlib.sha256(body).hexdigest() != head.get("sha256"):
        raise ValueError(DAMAGED)
    end = files * RECORD.itemsize
    records = np.frombuffer(body, RECORD, files)
    identities = np.frombuffer(body, np.uint8, files * IDENTITY_BYTES, end).reshape(files, IDENTITY_BYTES)
    names = body[end + files * IDENTITY_BYTES :].decode(errors="surrogateescape").split("\0") if files else []
    if len(names) != files:
        raise ValueError(DAMAGED)
    return Catalog(names, records.copy(), identities.copy()), head
