"""Packs of complete documents: `packing="whole"`. No document is cut; what documents do not fill is padding.

    documents of a file, shuffled     [  d4  ][ d0 ][     d2    ][d1][      d3      ] …
    packs of packed_length tokens     |[  d4  ][ d0 ][d7]·|[     d2    ][d1][  d5  ]| …

A pack takes documents in their shuffled order until one does not fit; then, of the next WINDOW documents, the longest
that still fits, again and again (best fit). The next pack begins with the document that did not fit, so that none waits
for long. A function of lengths, packed_length and the rule for longer documents alone.

The documents of a file in this order are its token stream, without padding; `borders` are the tokens of it at which
packs begin. Documents that are longer than a pack begin one: "cut" continues them in the next packs, the last of which
others fill up; "own" leaves the rest of that pack empty; "drop" leaves them out.
"""

from array import array
from bisect import bisect_left, bisect_right, insort
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.data.format.bin_file import Int64s

Packing = Literal["cut", "whole"]
LongDocuments = Literal["cut", "drop", "own"]
WINDOW = 1024  # documents among which the best fit is looked for
NUMBER = 2**32 - 1  # mask of a document's number


class FileTable(NamedTuple):
    """The packs of one file."""

    rows: npt.NDArray[np.uint32]  # document numbers that the reader uses, in packing order
    ends: Int64s  # [documents] tokens up to and including each
    borders: Int64s  # [packs + 1] tokens at which packs begin, and the end of the last one

    @classmethod
    def fill(cls, rows: npt.NDArray[np.uint32], ends: Int64s, packed_length: int, long: LongDocuments) -> "FileTable":
        """From the shuffled documents of a file, see `document_order.shuffle_documents`."""
        lengths = np.diff(ends, prepend=0)
        order, borders = fill_packs(lengths, packed_length, long)
        return cls(rows[order].astype(np.uint32), np.cumsum(lengths[order]), borders)


def fill_packs(
    lengths: Int64s, packed_length: int, long: LongDocuments, window: int = WINDOW
) -> tuple[npt.NDArray[np.uint32], Int64s]:
    """(documents in packing order, borders of the packs), see above. Documents without tokens are left out."""
    used = lengths > 0
    if long == "drop":
        used &= lengths <= packed_length
    numbers = np.flatnonzero(used)
    order, borders = _Filler(lengths[numbers], packed_length, long == "own", window).run()
    return numbers[np.frombuffer(order, np.uint32)].astype(np.uint32), np.frombuffer(borders, np.int64)


class _Filler:
    """Fills packs from the front of the documents and from the window behind it. 1 to 2 us a document."""

    def __init__(self, lengths: Int64s, packed_length: int, own: bool, window: int) -> None:
        self.lengths = np.ascontiguousarray(lengths, np.int64).data
        self.packed_length, self.own, self.window = packed_length, own, window
        self.taken = bytearray(len(lengths))
        self.front = 0  # the first document that is in no pack yet
        self.entered = 0  # documents that are, or have been, in the window
        self.waiting: list[int] = []  # those of the window, without long ones: length << 32 | number, ascending
        self.order, self.borders = array("I"), array("q", [0])

    def run(self) -> "tuple[array[int], array[int]]":
        """(documents in packing order, borders of the packs)."""
        while self._find_front():
            room, full = self.packed_length, self.borders[-1]
            if self.lengths[self.front] > room:
                room = self._begin_with_long()
                full = self.borders[-1]
            while room and self._find_front() and self.lengths[self.front] <= room:
                room -= self._take(self.front)
            while room and (best := bisect_right(self.waiting, room << 32 | NUMBER)):
                room -= self._take(self.waiting[best - 1] & NUMBER)
            if room < self.packed_length:
                self.borders.append(full + self.packed_length - room)
        return self.order, self.borders

    def _find_front(self) -> bool:
        self.front = self.taken.find(0, self.front)
        if self.front < 0:
            self.front = len(self.taken)
        return self.front < len(self.taken)

    def _begin_with_long(self) -> int:
        """Append packs that the document at the front fills. Returns the room that the rest of it leaves in the next
        pack."""
        length = self._take(self.front)
        for _ in range(length // self.packed_length):
            self.borders.append(self.borders[-1] + self.packed_length)
        rest = length % self.packed_length
        if rest and self.own:
            self.borders.append(self.borders[-1] + rest)
            rest = 0
        return self.packed_length - rest

    def _take(self, number: int) -> int:
        """Put a document into the current pack, and let the next one into the window. Returns its length."""
        length = self.lengths[number]
        self.taken[number] = 1
        self.order.append(number)
        if number >= self.entered:  # only the front may be: the window is empty, or it is a long document
            self.entered = number + 1
        elif length <= self.packed_length:
            del self.waiting[bisect_left(self.waiting, length << 32 | number)]
        while len(self.waiting) < self.window and self.entered < len(self.lengths):
            if self.lengths[self.entered] <= self.packed_length:
                insort(self.waiting, self.lengths[self.entered] << 32 | self.entered)
            self.entered += 1
        return int(length)
