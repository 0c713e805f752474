"""Documents from any source: a class of the user's instead of a folder of `.bin` files.

    class Rows(DocumentSource):                  # deriving from it is optional
        def __init__(self, path): ...
        def __len__(self): ...                   # number of documents
        lengths = ...                            # int [documents], tokens of each
        def read(self, i): return ids, learned   # int [tokens] from 0; bool [tokens], whether the token is learned
        def fingerprint(self): ...               # identity of all contents

    dataset=dict(type=build_packed_dataset, dataset_cfg=dict(type=RowNumbers, path=…), packed_length=…, seed=…)

All documents of a source are shuffled and packed together, as those of one `.bin` file are; of a list of sources each
is packed separately. A `TokenizedFolder` is such a list, of `BinFile`s, with faster access: mapped orders, and readers
of many documents at once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.remote.path import AnyPath
from xtuner.data.format.cache_dirs import CacheDirs
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import LongLines, SpanArrays
from xtuner.data.packing.document_order import DocumentOrders, RowNumbers, shuffle_documents

Integers = npt.NDArray[np.integer[Any]]
Document = tuple[Integers, npt.NDArray[np.bool_]]  # ids [tokens] from 0, and whether each is learned
_NEEDED = ("__len__", "lengths", "read", "fingerprint")
_MAX_ID = 2**31 - 2  # id + 1 fits into 32 bits with a sign


class DocumentSource(Protocol):
    """Documents of token ids, numbered from 0. Any class with these members is a source. An optional `name` is used in
    messages.

    `read` is called by two threads at once, and in forked worker processes (`num_workers`): it must be thread-safe, and
    must not share the position of an open file between calls.
    """

    lengths: Integers  # tokens of each document

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[Any, Any]:
        """(ids, learned) of one document, see `Document`. For long documents return views of mapped arrays: only the
        part that a pack needs is accessed. An OSError is reported as an error of the data."""

    def fingerprint(self) -> str:
        """A text that depends on the contents only, not on their location. A resume compares it."""


class Reader(Protocol):
    """Reads parts of documents. It returns id n as n + id_offset where it is learned, else as -(n + id_offset)."""

    id_offset: int

    def read(
        self, span_arrays: SpanArrays, vocab_size: int | None = None
    ) -> tuple[npt.NDArray[np.signedinteger[Any]], int | None]:
        """(tokens of all spans end to end, the token after the last one in its document or None)."""


class SourceFile(Protocol):
    """Documents that are shuffled and packed together: those of a `BinFile`, or of one checked source."""

    @property
    def name(self) -> str: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def lengths(self) -> Int64s: ...
    @property
    def kept(self) -> npt.NDArray[np.int64] | None:
        """Document numbers that readers use; None for 0, 1, 2, …"""

    def read(self, i: int, vocab_size: int | None = None) -> Document: ...
    def fingerprint(self) -> str: ...


class Documents(Protocol):
    """The input of a `PackedDataset`, packed file by file: a `TokenizedFolder` or a `SourceList`."""

    @property
    def folder(self) -> AnyPath | None:
        """The folder of `.bin` files, for hints to the tools of `xtuner data`; None for other sources."""

    @property
    def location(self) -> str:
        """Where the documents are, for messages."""

    @property
    def cache_dirs(self) -> CacheDirs | None:
        """Where caches are kept; None if there are none."""

    @property
    def orders(self) -> DocumentOrders | None:
        """The result of the last `load_orders`."""

    @property
    def request(self) -> list[str] | None:
        """The arguments it was opened with, if ranks can open what rank 0 has found; see open_on_ranks.py."""

    @property
    def min_length(self) -> int:
        """Documents with fewer tokens are left out."""

    @property
    def names(self) -> list[str]: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_repeated(self) -> int: ...
    @property
    def tokens_per_file(self) -> Int64s: ...
    def __len__(self) -> int: ...
    def file(self, i: int) -> SourceFile: ...
    def fingerprint(self) -> str: ...
    def identities(self) -> Iterator[str]:
        """A short hash of the contents of each file."""

    def load_orders(self, seed: int) -> DocumentOrders | None:
        """The mapped orders of all files' documents; None if there are none."""

    def order(self, i: int, seed: int) -> tuple[RowNumbers, Int64s]:
        """The order of one file; see `document_order.shuffle_documents`."""

    def reader(self, i: int, long: LongLines) -> Reader: ...


class CheckedSource:
    """A `DocumentSource` as a `SourceFile`. All values that the source returns are checked."""

    kept = None

    def __init__(self, source: DocumentSource) -> None:
        """Raises: ConfigError if it is not a source; DataError for invalid lengths."""
        self.source = source
        if missing := [member for member in _NEEDED if not _has(source, member)]:
            raise ConfigError(
                f"{type(source).__name__} is not a source of documents: it has no {', '.join(missing)}",
                why="packs are built from the documents that it reads",
                do=f"see {__name__}.DocumentSource for the members of a source",
            )
        self.name = str(getattr(source, "name", None) or type(source).__name__)
        self.num_documents = len(source)
        lengths = np.asarray(source.lengths)
        if lengths.shape != (self.num_documents,) or (lengths.size and lengths.dtype.kind not in "iu"):
            found = f"{lengths.dtype} {list(lengths.shape)}"
            raise self._wrong(f"its lengths are {found} instead of integers [{self.num_documents}]")
        self.lengths = lengths.astype(np.int64)
        if self.num_documents and self.lengths.min() < 0:
            raise self._wrong(f"the length of document {self.lengths.argmin()} is {self.lengths.min()}")
        self.num_tokens = int(self.lengths.sum())

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        found: Any = self.source.fingerprint()
        if not isinstance(found, str) or not found:
            raise self._wrong(f"its fingerprint is {found!r} instead of a text")
        return hashlib.sha256(found.encode()).hexdigest()

    def read(self, i: int, vocab_size: int | None = None) -> Document:
        """Raises: DataError."""
        ids, learned = self._document(i)
        self._check_ids(ids, i, vocab_size)
        return ids.astype(np.int64), learned

    def read_part(self, i: int, start: int, stop: int, vocab_size: int | None) -> Document:
        """Tokens `start` to `stop`. Raises: DataError."""
        ids, learned = self._document(i)
        self._check_ids(ids[start:stop], i, vocab_size)
        return ids[start:stop], learned[start:stop]

    def _document(self, i: int) -> Document:
        try:
            found: Any = self.source.read(i)
        except OSError as e:
            raise DataError(f"document {i} cannot be read: {e}", where=self.name) from None
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise self._wrong(f"document {i} is a {type(found).__name__} instead of (ids, learned)")
        ids, learned = map(np.asarray, found)
        shape = (int(self.lengths[i]),)
        types_fit = not ids.size or (ids.dtype.kind in "iu" and learned.dtype == np.bool_)
        if not types_fit or not ids.shape == learned.shape == shape:
            shown = f"ids {ids.dtype} {list(ids.shape)} and learned {learned.dtype} {list(learned.shape)}"
            raise self._wrong(f"document {i} has {shown} instead of integers and bools {list(shape)}")
        return ids, learned

    def _check_ids(self, ids: Integers, i: int, vocab_size: int | None) -> None:
        if not ids.size:
            return
        least, largest = int(ids.min()), int(ids.max())
        if least < 0 or largest > _MAX_ID:
            raise self._wrong(f"document {i} contains {least if least < 0 else largest}, which is not a token id")
        if vocab_size is not None and largest >= vocab_size:
            raise DataError(
                f"token id {largest} is outside the vocabulary of {vocab_size}",
                where=f"{self.name}, document {i}",
                why="the data were tokenized with a tokenizer other than the model's",
                do="tokenize the text again with the model's tokenizer, or use the model that belongs to the data",
            )

    def _wrong(self, how: str) -> DataError:
        name = type(self.source).__name__
        return DataError(
            f"{name} cannot be packed: {how}", where=self.name, do=f"see {__name__}.DocumentSource, and fix {name}"
        )


def _has(source: object, member: str) -> bool:
    """Whether the class defines the member itself; `DocumentSource` only declares it."""
    return hasattr(source, member) and getattr(type(source), member, None) is not vars(DocumentSource).get(member, ...)


class SourceReader:
    """Reads parts of a source's documents; see `Reader`."""

    id_offset = 1  # id 0 may be learned, unlike in `.bin` files

    def __init__(self, source: CheckedSource) -> None:
        self.source = source

    def read(self, span_arrays: SpanArrays, vocab_size: int | None = None) -> tuple[npt.NDArray[np.int32], int | None]:
        """See `Reader.read`."""
        parts, following = [], None
        for span in span_arrays.as_list():
            if span.start == span.stop:
                continue
            ids, learned = self.source.read_part(span.row, span.start, span.stop + 1, vocab_size)
            value = ids.astype(np.int32) + np.int32(self.id_offset)
            signed, size = np.where(learned, value, -value), span.stop - span.start
            parts.append(signed[:size])
            following = int(signed[size]) if len(signed) > size else None
        return np.concatenate(parts), following


class SourceList:
    """Sources, each packed separately. Lengths and orders are in the memory of each rank: 20 bytes per document."""

    folder = cache_dirs = orders = request = None
    min_length = 0

    def __init__(self, sources: Sequence[DocumentSource]) -> None:
        """Raises: ConfigError, DataError."""
        self._files = [CheckedSource(source) for source in sources]

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[CheckedSource]:
        return iter(self._files)

    def file(self, i: int) -> CheckedSource:
        return self._files[i]

    @property
    def location(self) -> str:
        more = f" and {len(self) - 1} more" if len(self) > 1 else ""
        return f"{self._files[0].name}{more}" if self._files else "no source"

    @property
    def names(self) -> list[str]:
        return [file.name for file in self]

    @property
    def num_documents(self) -> int:
        return sum(file.num_documents for file in self)

    @property
    def num_tokens(self) -> int:
        return sum(file.num_tokens for file in self)

    @property
    def num_repeated(self) -> int:
        return 0

    @property
    def tokens_per_file(self) -> Int64s:
        return np.array([file.num_tokens for file in self], np.int64)

    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(file.fingerprint() for file in self).encode()).hexdigest()

    def identities(self) -> Iterator[str]:
        return (file.fingerprint()[:16] for file in self)

    def load_orders(self, seed: int) -> None:
        return None

    def order(self, i: int, seed: int) -> tuple[RowNumbers, Int64s]:
        return shuffle_documents(self.file(i).lengths, seed)

    def reader(self, i: int, long: LongLines) -> SourceReader:
        return SourceReader(self.file(i))


def as_documents(built: Any) -> Documents:
    """The object that a dataset_cfg or val_dataset describes, as `Documents`. Raises: ConfigError, DataError."""
    if hasattr(built, "load_orders"):  # a TokenizedFolder, or another list of many files
        found: Documents = built
        return found
    return SourceList(built if isinstance(built, list | tuple) else [built])
