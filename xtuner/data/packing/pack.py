"""Packs: the documents of each file in shuffled order, concatenated and cut every `packed_length` tokens.

    documents of a file, shuffled     [  d4  ][ d0 ][     d2    ][d1][      d3      ]
    packs of packed_length tokens     |      pack 0      |      pack 1      | tail, dropped
    cu_seqlens of pack 1                                 0       8   12     19

A document that is cut by a border continues in the next pack as a separate fragment: positions start again at 0, and
attention does not reach back. Every file is shuffled with the same seed and drops its own tail. All values equal those
of the reference loader (InternLM's XTuner 0.2). How documents are packed that are not cut: whole_documents.py.
"""

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xtuner.config.build import build
from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError
from xtuner.data.format.bin_file import Int64s
from xtuner.data.format.text_reader import LongLines
from xtuner.data.loading.balance import attention_costs
from xtuner.data.packing import document_order
from xtuner.data.packing.document_source import Documents, DocumentSource, as_documents
from xtuner.data.packing.dropped_tokens import DroppedTokens
from xtuner.data.packing.mixture import Mixture, list_parts
from xtuner.data.packing.mixture_plan import MixturePlan
from xtuner.data.packing.raw_pack import FilePacks, LabelRule, RawPack
from xtuner.data.packing.whole_documents import LongDocuments, Packing
from xtuner.data.packing.whole_index import WholePacks
from xtuner.families.network import ALL_PAIRS, AttentionPairs

SHOWN = 10  # documents in a message
MAX_EXAMINED = 10_000_000  # documents whose lengths are examined at a start; 0.2 s


class PackedDataset:
    """All packs of a folder or of another source of documents. `dataset[i]` is a dict of tensors; see `__getitem__`."""

    def __init__(
        self,
        documents: Documents | DocumentSource | Sequence[DocumentSource],
        packed_length: int,
        seed: int = 1024,
        label_rule: LabelRule = "internevo",
        packing: Packing = "cut",
        long: LongDocuments = "cut",
    ) -> None:
        SCHEMA.require("train_dataloader.dataset", packed_length=packed_length, seed=seed, label_rule=label_rule,
                       packing=packing, long=long)  # fmt: skip
        if packing == "cut" and long != "cut":
            raise ConfigError(
                f'long = "{long}" has no effect with packing = "cut"',
                where="train_dataloader.dataset.long",
                why="all documents are cut at the ends of packs",
                do='set packing = "whole", or leave `long` out',
            )
        self.documents = documents = as_documents(documents)
        self.packed_length = packed_length
        self.seed = seed
        self.label_rule = label_rule
        self.vocab_size: int | None = None
        self._tokens = documents.tokens_per_file
        self.packing, self.long = packing, long
        self._whole = WholePacks(list_parts(documents), packed_length, seed, long) if packing == "whole" else None
        self._packs = self._whole.packs if self._whole else self._tokens // packed_length
        self._first_pack = np.concatenate(([0], np.cumsum(self._packs)))
        self._files: dict[int, FilePacks] = {}
        self._long = LongLines()
        self._orders = documents.load_orders(seed)
        self.packs_per_iteration = 1
        if not self.is_scheduled and self.mixture:
            self.mixture.require_possible()

    @property
    def is_scheduled(self) -> bool:
        """Whether shares of a mixture change at given iterations, so that packs depend on `packs_per_iteration`."""
        return isinstance(self.documents, Mixture) and bool(self.documents.schedule)

    @functools.cached_property
    def mixture(self) -> MixturePlan | None:
        """The epoch of a mixture; see `MixturePlan.require_possible`. Raises: ConfigError, DataError."""
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
        """Tokens of each file that are dropped: those at its end that do not fill a pack. Of packs of whole documents,
        those of documents that are longer than a pack."""
        return (self._tokens - self._used).tolist()

    @property
    def _used(self) -> Int64s:
        """Tokens of each file that are in packs."""
        return self._whole.tokens if self._whole else self._packs * self.packed_length

    def dropped(self) -> DroppedTokens:
        used, total, packs = int(self._used.sum()), int(self._tokens.sum()), int(self._packs.sum())
        without = int((self._packs == 0).sum())
        padding = packs * self.packed_length - used
        return DroppedTokens(self.packed_length, total, total - used, len(self._tokens), without, padding,
                             self.packing == "whole")  # fmt: skip

    def fingerprint(self) -> str:
        """Identity of the contents of all packs: contents and order of files, packed_length, seed, how it is packed."""
        facts = f"{self.documents.fingerprint()} {self.packed_length} {self.seed}"
        facts += f" whole {self.long}" if self.packing == "whole" else ""
        return hashlib.sha256(facts.encode()).hexdigest()

    def file_packs(self, file_number: int) -> FilePacks:
        """The packs of one file, with its order from the index or computed now."""
        if file_number not in self._files:
            if self._whole:
                rows, ends, _ = self._whole.table(file_number)
            else:
                table = self._orders.order(file_number) if self._orders else None
                rows, ends = table or self.documents.order(file_number, self.seed)
            reader = self.documents.reader(file_number, self._long)
            self._files[file_number] = FilePacks(self.documents.file(file_number), rows, ends, reader)
        return self._files[file_number]

    @property
    def indexed(self) -> bool:
        """Whether document lengths are available without reading metas: they are mapped, or few."""
        if self._whole:
            return True
        parts = list_parts(self.documents)
        return all(part.orders is not None or part.num_documents < document_order.SMALL for part in parts)

    def costs(self, packs: npt.NDArray[np.integer[Any]], pairs: AttentionPairs = ALL_PAIRS) -> Int64s:
        """Σ len² over the fragments of each of these packs, or what sliding windows leave of it: proportional to their
        attention cost. Reads no tokens."""
        file_numbers = np.searchsorted(self._first_pack, packs, side="right") - 1
        inside = packs - self._first_pack[file_numbers]
        found = np.empty(len(packs), np.int64)
        by_file = np.argsort(file_numbers, kind="stable")
        for part in np.split(by_file, np.flatnonzero(np.diff(file_numbers[by_file])) + 1):
            file_number = int(file_numbers[part[0]])
            starts, stops = self._bounds(file_number, inside[part])
            found[part] = attention_costs(self._ends(file_number), starts, self.packed_length, pairs, stops)
        return found

    def _bounds(self, file_number: int, packs: npt.NDArray[np.integer[Any]]) -> tuple[Int64s, Int64s]:
        """(first tokens, tokens after the last) of these packs of a file, in its token stream."""
        if self._whole:
            borders = self._whole.table(file_number).borders
            return borders[packs], borders[packs + 1]
        starts = packs.astype(np.int64) * self.packed_length
        return starts, starts + self.packed_length

    def longest_fragment(self, pack: int) -> int:
        """Tokens of the longest document fragment of a pack. Reads no tokens."""
        file_number, start, stop = self.find_tokens(pack)
        ends = self._ends(file_number)
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
        if self._whole:
            return self._whole.table(file_number).ends
        table = self._orders.order(file_number) if self._orders and file_number not in self._files else None
        return table[1] if table else self.file_packs(file_number).ends

    def locate(self, pack: int) -> tuple[int, int]:
        """(file number, token of that file's token stream at which the pack begins)."""
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        return self.find_tokens(pack)[:2]

    def find_tokens(self, pack: int) -> tuple[int, int, int]:
        """(file number, first token of a pack in that file's token stream, token after its last one)."""
        file_number = int(np.searchsorted(self._first_pack, pack, side="right")) - 1
        starts, stops = self._bounds(file_number, np.array([pack - int(self._first_pack[file_number])]))
        return file_number, int(starts[0]), int(stops[0])

    def show_command(self, pack: int, more: str = "") -> str:
        """The command that shows a pack; for a source without a folder, the documents in it. Reads no tokens."""
        documents, number = self.documents, pack
        if isinstance(documents, Mixture) and self.mixture:
            source = self.mixture.source_of(pack)
            documents, number = documents.parts[source], pack - self.mixture.first_pack[source]
        if documents.folder:
            options = f"--pack {number} --max-length {self.packed_length} --seed {self.seed}"
            options += f" {chosen}" if (chosen := getattr(documents, "kind_options", "")) else ""
            options += f" --packing whole --long {self.long}" if self.packing == "whole" else ""
            return f"xtuner data show {documents.location} {options} {more}".rstrip()
        file_number, start, stop = self.find_tokens(pack)
        file = self.file_packs(file_number)
        rows = list(map(str, file.span_arrays(start, stop).rows.tolist()))
        others = f", … and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        return f"documents {', '.join(rows[:SHOWN])}{others} of {file.file.name}"

    def raw(self, pack: int) -> RawPack:
        """One pack in compact form. Raises: DataError for data that contradict the format or the index."""
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        file_number, start, stop = self.find_tokens(pack)
        return self.file_packs(file_number).read(start, stop, self.vocab_size).padded(self.packed_length)

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
    dataset_cfg: Mapping[str, Any],
    packed_length: int,
    seed: int = 1024,
    label_rule: LabelRule = "internevo",
    packing: Packing = "cut",
    long: LongDocuments = "cut",
) -> PackedDataset:
    """Pack the documents that `dataset_cfg` (`dict(type=load_intern_repo_tokenized_dataset, …)`) describes.

    Args:
        dataset_cfg: describes a `TokenizedFolder`, a `DocumentSource` of the user's (document_source.py), or a list
            of these.
        packed_length: tokens per pack.
        seed: of the shuffle of documents inside each file, 0 … 2^32 - 1.
        label_rule: "internevo" (targets never cross documents) or "xtuner" (plain shift, to reproduce old runs).
        packing: "cut": documents are cut at the ends of packs, which are full; "whole": they are not, and packs may end
            with padding.
        long: what packing="whole" does about documents that are longer than a pack: "cut", "drop", or "own", which cuts
            them and adds no others to their last pack.
    """
    return PackedDataset(build(dataset_cfg), packed_length, seed, label_rule, packing, long)
