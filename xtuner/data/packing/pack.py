"""Packs: the documents of each file in shuffled order, concatenated and cut every `packed_length` tokens.

    documents of a file, shuffled     [  d4  ][ d0 ][     d2    ][d1][      d3      ]
    packs of packed_length tokens     |      pack 0      |      pack 1      | tail, dropped
    cu_seqlens of pack 1                                 0       8   12     19

A document that is cut by a border continues in the next pack as a separate fragment: positions start again at 0, and
attention does not reach back. Every file is shuffled with the same seed and drops its own tail. All values equal those
of the reference loader (InternLM's XTuner 0.2).
"""

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from xtuner.config.build import build
from xtuner.config.settings import SCHEMA
from xtuner.data.format.bin_file import Int64s
from xtuner.data.format.text_reader import LongLines, Span, SpanArrays
from xtuner.data.loading.balance import attention_costs
from xtuner.data.packing import document_order
from xtuner.data.packing.document_source import Documents, DocumentSource, Reader, SourceFile, as_documents
from xtuner.data.packing.dropped_tokens import DroppedTokens
from xtuner.data.packing.mixture import Mixture, list_parts
from xtuner.data.packing.mixture_plan import MixturePlan
from xtuner.families.network import ALL_PAIRS, AttentionPairs

LabelRule = Literal["internevo", "xtuner"]
IGNORE = -100  # no loss at this position
SHOWN = 10  # documents in a message
MAX_EXAMINED = 10_000_000  # documents whose lengths are examined at a start; 0.2 s
Int32s = npt.NDArray[np.int32]


class RawPack(NamedTuple):
    """A pack of T tokens with n fragments in compact form; its methods compute the tensors that the model needs."""

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


class PackedDataset:
    """All packs of a folder or of another source of documents. `dataset[i]` is a dict of tensors; see `__getitem__`."""

    def __init__(
        self,
        documents: Documents | DocumentSource | Sequence[DocumentSource],
        packed_length: int,
        seed: int = 1024,
        label_rule: LabelRule = "internevo",
    ) -> None:
        SCHEMA.require("train_dataloader.dataset", packed_length=packed_length, seed=seed, label_rule=label_rule)
        self.documents = documents = as_documents(documents)
        self.packed_length = packed_length
        self.seed = seed
        self.label_rule = label_rule
        self.vocab_size: int | None = None
        self._tokens = documents.tokens_per_file
        self._packs = self._tokens // packed_length
        self._first_pack = np.concatenate(([0], np.cumsum(self._packs)))
        self._files: dict[int, FilePacks] = {}
        self._long = LongLines()
        self._orders = documents.load_orders(seed)
        self.packs_per_iteration = 1
        if not self.is_scheduled:
            _ = self.mixture  # raises if it is impossible

    @property
    def is_scheduled(self) -> bool:
        """Whether shares of a mixture change at given iterations, so that packs depend on `packs_per_iteration`."""
        return isinstance(self.documents, Mixture) and bool(self.documents.schedule)

    @functools.cached_property
    def mixture(self) -> MixturePlan | None:
        """The epoch of a mixture. Raises: ConfigError, DataError if it is impossible."""
        mixed = self.documents
        return mixed.plan(self._packs, self.packs_per_iteration) if isinstance(mixed, Mixture) else None

    def with_packs_per_iteration(self, packs: int) -> "PackedDataset":
        """The same packs for a run whose iterations take `packs`: a schedule of shares counts iterations."""
        if not self.is_scheduled:
            return self
        other = copy.copy(self)
        other.__dict__.pop("mixture", None)
        other.packs_per_iteration = packs
        return other

    def with_vocab_size(self, size: int) -> "PackedDataset":
        """The same packs; reading rejects ids from `size` on."""
        other = copy.copy(self)
        other.vocab_size = size
        return other

    def __len__(self) -> int:
        return int(self._first_pack[-1])

    @property
    def packs_per_file(self) -> list[int]:
        return self._packs.tolist()

    @property
    def tail_tokens_per_file(self) -> list[int]:
        """Tokens dropped at the end of each file because they do not fill a pack."""
        return (self._tokens % self.packed_length).tolist()

    def dropped(self) -> DroppedTokens:
        used, total = int(self._packs.sum()) * self.packed_length, int(self._tokens.sum())
        return DroppedTokens(self.packed_length, total, total - used, len(self._tokens), int((self._packs == 0).sum()))

    def fingerprint(self) -> str:
        """Identity of the contents of all packs: contents and order of files, packed_length, seed."""
        facts = f"{self.documents.fingerprint()} {self.packed_length} {self.seed}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def file_packs(self, file_number: int) -> FilePacks:
        """The packs of one file, with its order from the index or computed now."""
        if file_number not in self._files:
            table = self._orders.order(file_number) if self._orders else None
            rows, ends = table or self.documents.order(file_number, self.seed)
            reader = self.documents.reader(file_number, self._long)
            self._files[file_number] = FilePacks(self.documents.file(file_number), rows, ends, reader)
        return self._files[file_number]

    @property
    def indexed(self) -> bool:
        """Whether document lengths are available without reading metas: they are mapped, or few."""
        parts = list_parts(self.documents)
        return all(part.orders is not None or part.num_documents < document_order.SMALL for part in parts)

    def costs(self, packs: npt.NDArray[np.integer[Any]], pairs: AttentionPairs = ALL_PAIRS) -> Int64s:
        """Σ len² over the fragments of each of these packs, or what sliding windows leave of it: proportional to their
        attention cost. Reads no tokens."""
        file_numbers = np.searchsorted(self._first_pack, packs, side="right") - 1
        starts = (packs - self._first_pack[file_numbers]) * self.packed_length
        found = np.empty(len(packs), np.int64)
        by_file = np.argsort(file_numbers, kind="stable")
        for part in np.split(by_file, np.flatnonzero(np.diff(file_numbers[by_file])) + 1):
            ends = self._ends(int(file_numbers[part[0]]))
            found[part] = attention_costs(ends, starts[part], self.packed_length, pairs)
        return found

    def longest_fragment(self, pack: int) -> int:
        """Tokens of the longest document fragment of a pack. Reads no tokens."""
        file_number, start = self.locate(pack)
        ends, stop = self._ends(file_number), start + self.packed_length
        inside = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "left")]
        return int(np.diff(inside, prepend=start, append=stop).max())

    def longest_document(self) -> int | None:
        """Tokens of the longest document; None if there are too many to look at. Reads no tokens."""
        if self.documents.num_documents > MAX_EXAMINED:
            return None
        ends = map(self._ends, range(len(self._tokens)))
        return max((int(np.diff(e, prepend=0).max(initial=0)) for e in ends), default=0)

    def _ends(self, file_number: int) -> Int64s:
        """Mapped where there is an index, so that files that only other ranks read are not opened."""
        table = self._orders.order(file_number) if self._orders and file_number not in self._files else None
        return table[1] if table else self.file_packs(file_number).ends

    def locate(self, pack: int) -> tuple[int, int]:
        """(file number, token of that file's token stream at which the pack begins)."""
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        file_number = int(np.searchsorted(self._first_pack, pack, side="right")) - 1
        return file_number, (pack - int(self._first_pack[file_number])) * self.packed_length

    def show_command(self, pack: int, more: str = "") -> str:
        """The command that shows a pack; for a source without a folder, the documents in it. Reads no tokens."""
        documents, number = self.documents, pack
        if isinstance(documents, Mixture) and self.mixture:
            source = self.mixture.source_of(pack)
            documents, number = documents.parts[source], pack - self.mixture.first_pack[source]
        if documents.folder:
            options = f"--pack {number} --max-length {self.packed_length} --seed {self.seed}"
            options += f" {chosen}" if (chosen := getattr(documents, "kind_options", "")) else ""
            return f"xtuner data show {documents.location} {options} {more}".rstrip()
        file_number, start = self.locate(pack)
        file = self.file_packs(file_number)
        rows = list(map(str, file.span_arrays(start, start + self.packed_length).rows.tolist()))
        others = f", … and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        return f"documents {', '.join(rows[:SHOWN])}{others} of {file.file.name}"

    def raw(self, pack: int) -> RawPack:
        """One pack in compact form. Raises: DataError for data that contradict the format or the index."""
        file_number, start = self.locate(pack)
        return self.file_packs(file_number).read(start, start + self.packed_length, self.vocab_size)

    def __getitem__(self, pack: int) -> dict[str, torch.Tensor]:
        """One pack of T = packed_length tokens with n document fragments.

        Returns int64 tensors `input_ids` [T], `labels` [T] (unshifted), `targets` [T] (shifted, by the label rule),
        `position_ids` [T], and int32 `cumulative_len` [n + 1]. -100 marks positions without loss.
        """
        raw = self.raw(pack)
        names = ("input_ids", "labels", "targets", "position_ids")
        block = torch.empty((len(names), len(raw.signed)), dtype=torch.int64)
        input_ids, labels, targets, position_ids = block.numpy()
        raw.input_ids(input_ids)
        raw.labels(labels)
        raw.targets(self.label_rule, targets)
        raw.position_ids(position_ids)
        return {**dict(zip(names, block, strict=True)), "cumulative_len": torch.from_numpy(raw.borders)}


def build_packed_dataset(
    dataset_cfg: Mapping[str, Any], packed_length: int, seed: int = 1024, label_rule: LabelRule = "internevo"
) -> PackedDataset:
    """Pack the documents that `dataset_cfg` (`dict(type=load_intern_repo_tokenized_dataset, …)`) describes.

    Args:
        dataset_cfg: describes a `TokenizedFolder`, a `DocumentSource` of the user's (document_source.py), or a list
            of these.
        packed_length: tokens per pack.
        seed: of the shuffle of documents inside each file, 0 … 2^32 - 1.
        label_rule: "internevo" (targets never cross documents) or "xtuner" (plain shift, to reproduce old runs).
    """
    return PackedDataset(build(dataset_cfg), packed_length, seed, label_rule)
