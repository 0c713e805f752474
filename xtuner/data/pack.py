"""Packs: every file's documents in shuffled order, laid end to end and cut every `packed_length` tokens.

    documents of a file, shuffled     [ d4      ][ d0  ][ d2               ][d1][ d3    ]
    packs of packed_length tokens     |     pack 0     |     pack 1     |   (tail, dropped)
    cu_seqlens of pack 1               0  ^ the rest of d2 ^  d1  ^ the beginning of d3

A document cut by a border goes on in the next pack as a fragment of its own: positions start again at 0, attention
does not reach back. Every file starts from the same seed and loses its own tail. All numbers are equal to the
reference loader's (InternLM's XTuner 0.2).
"""

import bisect
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from xtuner.config.build import build
from xtuner.core.errors import ConfigError
from xtuner.data.format import BinFile, Int64s
from xtuner.data.index import TokenizedFolder

LabelRule = Literal["internevo", "xtuner"]
IGNORE = -100  # no loss at this position


class LongDocuments:
    """The last documents read that are longer than a pack: each pack they reach into would parse them again.

    `held` is replaced, never changed: threads need no lock, and at worst forget an entry. Bounded, since a corpus of
    books has a long document in every file.
    """

    MOST = 16
    MOST_BYTES = 2**28  # together; a single document may be larger

    def __init__(self) -> None:
        self.held: tuple[tuple[Any, Int64s], ...] = ()

    def find(self, key: Any) -> Int64s | None:
        return next((tokens for k, tokens in self.held if k == key), None)

    def keep(self, key: Any, tokens: Int64s) -> None:
        held, size = [(key, tokens)], tokens.nbytes
        for entry in self.held[: self.MOST - 1]:
            size += entry[1].nbytes
            if size <= self.MOST_BYTES:
                held.append(entry)
        self.held = tuple(held)


@dataclass(frozen=True)
class FilePacks:
    """The pack table of one file: documents in packing order and where each ends on the file's token line."""

    file: BinFile
    order: npt.NDArray[np.uint32]  # document numbers
    ends: Int64s  # [documents] tokens up to and with each document
    long: LongDocuments

    @classmethod
    def of(cls, file: BinFile, seed: int, long: LongDocuments) -> "FilePacks":
        order = np.arange(file.num_documents, dtype=np.uint32)  # the draws do not depend on the item type
        np.random.RandomState(seed).shuffle(order)
        return cls(file, order, np.cumsum(file.lengths[order]), long)

    def read(
        self, start: int, stop: int, vocab_size: int | None = None
    ) -> tuple[Int64s, npt.NDArray[np.int32], int | None]:
        """Tokens `start` to `stop` of the file's token line.

        Returns: signed tokens [stop - start], fragment borders [n + 1] from 0, and the signed token that follows
        `stop` in the same document (None when a document ends there).
        """
        parts, borders, following = [], [0], None
        with self.file.open() as text:
            for span in self.spans(start, stop):
                borders.append(borders[-1] + span.stop - span.start)
                if span.start == span.stop:
                    continue
                key = (self.file, span.document, vocab_size)
                tokens = self.long.find(key)
                if tokens is None:
                    tokens = self.file.read_document(span.document, vocab_size, text)
                    if len(tokens) >= stop - start:
                        self.long.keep(key, tokens)
                parts.append(tokens[span.start : span.stop])
                following = int(tokens[span.stop]) if span.stop < len(tokens) else None
        return np.concatenate(parts), np.array(borders, dtype=np.int32), following

    def spans(self, start: int, stop: int) -> list["Span"]:
        """The parts of documents that lie between tokens `start` and `stop` of the file's token line.

        Empty documents count to the pack in which they stand; those at its very end open the next one.
        """
        first = int(np.searchsorted(self.ends, start, side="left"))
        if self.ends[first] == start and self._begin(first) < start:
            first += 1  # it ends where we begin
        last = int(np.searchsorted(self.ends, stop, side="left"))
        spans = []
        for i in range(first, last + 1):
            begin, end = self._begin(i), int(self.ends[i])
            spans.append(Span(int(self.order[i]), max(start - begin, 0), min(stop, end) - begin))
        return spans

    def _begin(self, i: int) -> int:
        return int(self.ends[i - 1]) if i else 0


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of a document (by its number in the file)."""

    document: int
    start: int
    stop: int


class PackedDataset:
    """All packs of a folder. `dataset[i]` is a dict of tensors; see `__getitem__`."""

    def __init__(
        self, documents: TokenizedFolder, packed_length: int, seed: int = 1024, label_rule: LabelRule = "internevo"
    ) -> None:
        if packed_length < 1:
            raise ConfigError(f"packed_length is {packed_length}", where="train_dataset.packed_length")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed is {seed}, not in 0 … 2^32 - 1", where="train_dataset.seed")
        if label_rule not in get_args(LabelRule):
            raise ConfigError(f"label_rule is {label_rule!r}, not one of {get_args(LabelRule)}", where="train_dataset")
        self.documents = documents
        self.packed_length = packed_length
        self.seed = seed
        self.label_rule = label_rule
        self.vocab_size: int | None = None  # set by who knows the model: larger ids are refused
        self.packs_per_file = [file.num_tokens // packed_length for file in documents]
        self._first_pack = np.concatenate(([0], np.cumsum(self.packs_per_file, dtype=np.int64)))
        self._tables: dict[int, FilePacks] = {}
        self._long = LongDocuments()

    def __len__(self) -> int:
        return int(self._first_pack[-1])

    @property
    def tail_tokens_per_file(self) -> list[int]:
        """Tokens dropped at each file's end because they fill no pack."""
        return [file.num_tokens % self.packed_length for file in self.documents]

    def fingerprint(self) -> str:
        """Identity of what pack `i` holds, for all `i`: contents, order of files, packed_length, seed."""
        facts = f"{self.documents.fingerprint()} {self.packed_length} {self.seed}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def file_packs(self, file_number: int) -> FilePacks:
        """Pack table of one file; made when first asked for, since its shuffle takes time."""
        if file_number not in self._tables:
            self._tables[file_number] = FilePacks.of(self.documents[file_number], self.seed, self._long)
        return self._tables[file_number]

    def locate(self, pack: int) -> tuple[int, int]:
        """(file number, token at which the pack begins on that file's token line)."""
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        file_number = bisect.bisect_right(self._first_pack, pack) - 1
        return file_number, (pack - int(self._first_pack[file_number])) * self.packed_length

    def __getitem__(self, pack: int) -> dict[str, torch.Tensor]:
        """One pack of T = packed_length tokens with n document fragments.

        Returns int64 tensors `input_ids` [T], `labels` [T] (unshifted), `targets` [T] (shifted by the label rule),
        `position_ids` [T], and int32 `cumulative_len` [n + 1]. -100 marks no loss.
        """
        file_number, start = self.locate(pack)
        table = self.file_packs(file_number)
        signed, borders, following = table.read(start, start + self.packed_length, self.vocab_size)
        labels = np.where(signed > 0, signed, IGNORE)
        lengths = np.diff(borders)
        positions = np.arange(len(signed)) - np.repeat(borders[:-1], lengths)
        if self.label_rule == "internevo":
            targets = internevo_targets(labels, borders, following)
        else:
            targets = plain_shift(labels)
        arrays = dict(input_ids=np.abs(signed), labels=labels, targets=targets, position_ids=positions)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {**tensors, "cumulative_len": torch.from_numpy(borders)}


def internevo_targets(labels: Int64s, borders: npt.NDArray[np.int32], following: int | None) -> Int64s:
    """Next-token targets that stay inside documents.

    The last token of a document predicts nothing. The last position of a pack predicts its true next token when its
    document goes on: `following` is that signed token, or None.
    """
    targets = plain_shift(labels)
    ends = borders[1:]
    targets[ends[ends > 0] - 1] = IGNORE
    if following is not None and following > 0:
        targets[-1] = following
    return targets


def plain_shift(labels: Int64s) -> Int64s:
    """XTuner's own rule: shift over the whole pack, so that a document's last token predicts the next one's first."""
    return np.append(labels[1:], IGNORE)


def build_packed_dataset(
    dataset_cfg: Mapping[str, Any], packed_length: int, seed: int = 1024, label_rule: LabelRule = "internevo"
) -> PackedDataset:
    """Index the folder that `dataset_cfg` (`dict(type=load_intern_repo_tokenized_dataset, …)`) describes, and pack it.

    Args:
        dataset_cfg: builds a `TokenizedFolder`.
        packed_length: tokens a pack.
        seed: of the documents' order inside each file, 0 … 2^32 - 1.
        label_rule: "internevo" (targets never cross documents) or "xtuner" (plain shift, to reproduce old runs).
    """
    return PackedDataset(build(dataset_cfg), packed_length, seed, label_rule)
