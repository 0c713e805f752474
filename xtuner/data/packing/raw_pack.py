"""One pack in compact form, and the tokens of one file from which packs are taken."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.data.format.bin_file import Int64s
from xtuner.data.format.text_reader import Span, SpanArrays
from xtuner.data.packing.document_source import Reader, SourceFile

LabelRule = Literal["internevo", "xtuner"]
IGNORE = -100  # no loss at this position
Int32s = npt.NDArray[np.int32]


class RawPack(NamedTuple):
    """A pack of T tokens with n fragments in compact form; its methods compute the tensors that the model needs.

    Padding is a last fragment of id 0, not learned.
    """

    signed: Int32s  # [T]
    borders: Int32s  # [n + 1] from 0 to T
    following: int  # the next signed token of the last fragment's document; 0 if the document ends here
    id_offset: int = 0  # id n is stored as ±(n + id_offset), see `Reader`

    def buffer(self) -> Int32s:
        """The pack as one array, for transfer from worker processes."""
        head = np.array([len(self.borders), self.following, self.id_offset], np.int32)
        return np.concatenate((head, self.borders, self.signed))

    @classmethod
    def from_buffer(cls, buffer: Int32s) -> "RawPack":
        borders, following, id_offset = buffer[:3].tolist()
        return cls(buffer[3 + borders :], buffer[3 : 3 + borders], following, id_offset)

    def padded(self, length: int) -> "RawPack":
        missing = length - len(self.signed)
        if not missing:
            return self
        signed = np.concatenate((self.signed, np.full(missing, -self.id_offset, np.int32)))
        return RawPack(signed, np.append(self.borders, np.int32(length)), 0, self.id_offset)

    def input_ids(self, out: Int64s) -> None:
        np.abs(self.signed, out=out)
        if self.id_offset:
            out -= self.id_offset

    def labels(self, out: Int64s) -> None:
        """Not shifted."""
        np.subtract(self.signed, self.id_offset, out=out)
        out[self.signed <= 0] = IGNORE

    def targets(self, rule: LabelRule, out: Int64s) -> int:
        """Next-token targets. Returns the number of positions that have one.

        "internevo": targets never cross documents. The last token of a document has no target; the last position of a
        pack has the true next token as its target if the document continues.
        "xtuner": shifted over the complete pack, so that the target of a document's last token is the first token of
        the next document.
        """
        following = np.empty_like(self.signed)
        following[:-1] = self.signed[1:]
        following[-1] = 0
        if rule == "internevo":
            ends = self.borders[1:]
            following[ends[ends > 0] - 1] = 0
            following[-1] = self.following
        learned = following > 0
        following -= IGNORE + self.id_offset
        following *= learned  # masked targets become 0 here and IGNORE after the add; faster than np.where
        np.add(following, IGNORE, out=out)
        return int(np.count_nonzero(learned))

    def position_ids(self, out: Int64s) -> None:
        """Positions from 0 in each fragment."""
        np.subtract(_counting(len(out)), np.repeat(self.borders[:-1], np.diff(self.borders)), out=out)


@functools.lru_cache(2)
def _counting(n: int) -> Int32s:
    return np.arange(n, dtype=np.int32)


@dataclass(frozen=True)
class FilePacks:
    """The packs of one file: its documents in packing order, and where each ends in the file's token stream."""

    file: SourceFile
    rows: npt.NDArray[np.uint32]  # document numbers that the reader uses: rows of the meta
    ends: Int64s  # [documents] tokens up to and including each document
    reader: Reader

    @property
    def order(self) -> npt.NDArray[np.integer[Any]]:
        """Numbers of the documents among the used ones, in packing order."""
        return self.rows if self.file.kept is None else np.searchsorted(self.file.kept, self.rows)

    def read(self, start: int, stop: int, vocab_size: int | None = None) -> RawPack:
        """Tokens `start` to `stop` of the file's token stream."""
        spans = self.span_arrays(start, stop)
        borders = np.zeros(len(spans.rows) + 1, np.int32)
        np.cumsum(spans.stops - spans.starts, out=borders[1:])
        signed, following = self.reader.read(spans, vocab_size)
        return RawPack(signed.astype(np.int32, copy=False), borders, following or 0, self.reader.id_offset)

    def spans(self, start: int, stop: int) -> list[Span]:
        return self.span_arrays(start, stop).as_list()

    def span_arrays(self, start: int, stop: int) -> SpanArrays:
        """The parts of documents between tokens `start` and `stop` of the file's token stream.

        An empty document belongs to the pack that contains its position; at a border, to the next pack.
        """
        first, last = np.searchsorted(self.ends, (start, stop)).tolist()
        if self.ends[first] == start and self._begin(first) < start:
            first += 1  # it ends at `start`
        ends = self.ends[first : last + 1]
        begins = np.empty_like(ends)
        begins[0], begins[1:] = self._begin(first), ends[:-1]
        starts, stops = np.maximum(start - begins, 0), np.minimum(stop, ends) - begins
        return SpanArrays(self.rows[first : last + 1], starts, stops, ends - begins)

    def _begin(self, i: int) -> int:
        return int(self.ends[i - 1]) if i else 0
