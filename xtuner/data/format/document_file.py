"""One file of documents of any kind, with what is known of it. `BinFile` is the kind that xtuner writes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.remote.path import AnyPath, RemotePath, open_any, stat_any
from xtuner.core.remote.store import ChangedObjectError
from xtuner.data.format.parse_tokens import Int64s


class Signature(NamedTuple):
    """Sizes and modification times (ns; of objects, versions) of a file and its companions. Equal ones mean that
    nothing has changed."""

    size: int
    time: int
    meta_size: int  # of a .bin's meta; of several companions, the sum
    meta_time: int  # of several companions, the latest

    @classmethod
    def read(cls, parts: Sequence[AnyPath]) -> "Signature":
        """Of a file and its companions. Raises: OSError."""
        return cls._join([stat_any(part) for part in parts])

    @classmethod
    def of(cls, stats: Sequence[os.stat_result]) -> "Signature":
        return cls._join([(stat.st_size, stat.st_mtime_ns) for stat in stats])

    @classmethod
    def _join(cls, stats: Sequence[tuple[int, int]]) -> "Signature":
        first, *others = stats
        return cls(*first, sum(size for size, _ in others), max((time for _, time in others), default=0))


class Facts(NamedTuple):
    """Result of examining a file. `documents` and `tokens` count only the documents that are used."""

    signature: Signature
    documents: int
    tokens: int
    identity: bytes


@dataclass(frozen=True)
class DocumentFile:
    """A file and its documents of at least `min_length` tokens, the ones that are used.

    With `facts` it has been examined; if its signature differs from theirs, it has changed since.
    """

    path: Any  # Path; for a BinFile, also RemotePath
    name: str  # relative to the data folder, POSIX style; shown in logs and data orders
    min_length: int = 0
    facts: Facts | None = None

    @property
    def parts(self) -> tuple[Any, ...]:
        """The file and its companions."""
        return (self.path,)

    @property
    def all_lengths(self) -> Int64s:
        """Tokens of all documents, used or not, int64 [n]. Raises: DataError."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises: DataError for a faulty file, as far as this shows without reading all of it."""

    def identity(self) -> bytes:
        """sha256 that depends on the contents and `min_length`, not on names and times. Raises: DataError."""
        raise NotImplementedError

    def read(self, i: int, vocab_size: int | None = None) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """(ids, learned) of one document, both [length]. Raises: DataError."""
        raise NotImplementedError

    def examine(self) -> Self:
        """This file with its facts, without cached arrays. Raises: DataError for a faulty file."""
        try:
            signature = Signature.read(self.parts)
        except OSError:
            signature = None  # `check` raises the appropriate error
        fresh = replace(self, facts=None)
        fresh.check()
        if signature is None:
            raise DataError(f"{self.name} appeared while it was examined", where=str(self.path), do="start again")
        facts = Facts(signature, fresh.num_documents, fresh.num_tokens, fresh.identity())
        return replace(self, facts=facts)

    @cached_property
    def kept(self) -> npt.NDArray[np.int64] | None:
        """Numbers of the documents that are used; None for all."""
        keep = self.all_lengths >= self.min_length
        return None if keep.all() else np.flatnonzero(keep)

    @cached_property
    def lengths(self) -> Int64s:
        """Tokens of the documents that are used, int64 [n]."""
        return self.all_lengths if self.kept is None else self.all_lengths[self.kept]

    @property
    def num_documents(self) -> int:
        return self.facts.documents if self.facts else len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        return self.facts.tokens if self.facts else int(self.lengths.sum())

    def __len__(self) -> int:
        return self.num_documents

    def fingerprint(self) -> str:
        return self.identity().hex()

    def open(self) -> BinaryIO:
        """The file, unbuffered. Opened for each use, as a folder may have more files than a process may open.

        Raises: DataError for a dangling link, missing permission, or a file that changed since it was examined.
        """
        return self.open_part(self.path, self.facts and self.facts.signature[:2])

    def open_part(self, path: AnyPath, known: tuple[int, ...] | None) -> BinaryIO:
        """As `open`, for a companion. `known`: its size and time, if it has been examined."""
        try:
            f = open_any(path, known, buffering=0)
        except ChangedObjectError:
            raise self.changed_error(path, "the object is not the one that was listed") from None
        except OSError as e:
            raise DataError(f"{path.name} cannot be opened: {e.strerror}", where=str(path)) from None
        if known and not isinstance(path, RemotePath):
            stat = os.fstat(f.fileno())
            if (stat.st_size, stat.st_mtime_ns) != known:
                f.close()
                raise self.changed_error(path, f"it had {known[0]:,} bytes and now has {stat.st_size:,}")
        return f

    def check_unchanged(self) -> None:
        """Raises: DataError if the file changed since it was examined."""
        try:
            found = stat_any(self.path)
        except OSError as e:
            raise DataError(f"{self.name} cannot be read: {e.strerror}", where=str(self.path)) from None
        known = self.facts and self.facts.signature[:2]
        if known and found != known:
            raise self.changed_error(self.path, f"it had {known[0]:,} bytes and now has {found[0]:,}")

    def changed_error(self, path: AnyPath, how: str) -> DataError:
        return DataError(
            f"{path.name} has changed since it was indexed: {how}",
            where=str(path),
            why="documents would be read from wrong offsets, or would differ from those that the run has counted",
            do="restore the file, or start the command again to use the data as they are now",
        )

    def check_ids(self, tokens: npt.NDArray[Any], where: str, vocab_size: int | None) -> None:
        """Raises: DataError if the id of a signed token is not below `vocab_size`."""
        if vocab_size is not None and len(tokens) and (largest := int(np.abs(tokens).max())) >= vocab_size:
            raise DataError(
                f"token id {largest} is outside the vocabulary of {vocab_size}",
                where=where,
                why="the data were tokenized with a tokenizer other than the model's",
                do="tokenize the text again with the model's tokenizer, or use the model that belongs to the data",
            )


class FileKind(Protocol):
    """How files of one kind are found and read: what a `TokenizedFolder` needs to know."""

    @property
    def name(self) -> str: ...
    @property
    def tag(self) -> str:
        """Distinguishes caches of other kinds, and of other options that change what is read."""

    @property
    def options(self) -> str:
        """The options of `xtuner data` commands that choose this kind."""

    @property
    def examined(self) -> str:
        """The size in a signature that the time of an examination depends on: "size" or "meta_size"."""

    def file(self, path: Any, name: str, min_length: int, facts: Facts | None = None) -> DocumentFile: ...

    def reader(self, file: Any, long: Any) -> Any:
        """The `Reader` of a file; see packing/document_source.py. `long`: see `LongLines`."""
