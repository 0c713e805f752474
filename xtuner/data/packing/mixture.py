"""A mixture: several sources of documents, each with a share of the packs.

    dataset_cfg=dict(
        type=mixture,
        sources=[
            dict(type=load_intern_repo_tokenized_dataset, folder="web", weight=0.6),
            dict(type=load_intern_repo_tokenized_dataset, folder="code", weight=0.4, max_repeats=4),
        ],
    )

Each pack is filled by one source: its documents are shuffled and packed as if it were alone, and source_shares.py
decides which source fills the n-th pack. A `Mixture` is one list of the files of all sources, so that packs are
numbered source by source. The order in which a run visits them is in loading/mixture_order.py.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from xtuner.config.build import build
from xtuner.config.settings import MIXTURE_KEYS, SCHEMA
from xtuner.core.errors import ConfigError, DataError
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import LongLines
from xtuner.data.packing.document_order import RowNumbers
from xtuner.data.packing.document_source import Documents, Reader, SourceFile, as_documents
from xtuner.data.packing.source_shares import MOST, SourceSequence, arrange, divide_period

Unit = Literal["tokens", "documents", "packs"]
KEY = "train_dataloader.dataset.dataset_cfg"


@dataclass(frozen=True)
class MixedSource:
    """One source of a mixture.

    Args:
        max_repeats: how often an epoch of the mixture may visit each of its packs; None: see `mixture`.
    """

    name: str
    documents: Documents
    weight: float
    max_repeats: int | None = None


@dataclass(frozen=True)
class MixturePlan:
    """The packs of a mixture's epoch.

    Args:
        names: of the sources.
        first_pack: number of each source's first pack, and the number of all packs, [sources + 1].
        last: the source whose end is the end of the epoch; passes: how often the epoch visits it.
        packs: of an epoch, before they are divided over ranks.
    """

    names: tuple[str, ...]
    first_pack: tuple[int, ...]
    sequence: SourceSequence
    last: int
    passes: int
    packs: int

    def packs_of(self, source: int) -> int:
        return self.first_pack[source + 1] - self.first_pack[source]

    def source_of(self, pack: int) -> int:
        return bisect_right(self.first_pack, pack) - 1


class Mixture:
    """The files of all sources as one list; see `Documents`."""

    folder = cache_dirs = request = orders = None

    def __init__(self, sources: Sequence[MixedSource], by: Unit, epoch: Literal["first", "all"]) -> None:
        self.sources, self.by, self.epoch = tuple(sources), by, epoch
        self._first = [0, *accumulate(len(s.documents) for s in self.sources)]

    @property
    def parts(self) -> list[Documents]:
        return [s.documents for s in self.sources]

    @property
    def location(self) -> str:
        return ", ".join(f"{s.name}: {s.documents.location}" for s in self.sources)

    @property
    def min_length(self) -> int:
        return max(part.min_length for part in self.parts)

    @property
    def names(self) -> list[str]:
        return [f"{s.name}/{name}" for s in self.sources for name in s.documents.names]

    @property
    def num_documents(self) -> int:
        return sum(part.num_documents for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_repeated(self) -> int:
        return sum(part.num_repeated for part in self.parts)

    @property
    def tokens_per_file(self) -> Int64s:
        return np.concatenate([part.tokens_per_file for part in self.parts])

    def __len__(self) -> int:
        return self._first[-1]

    def locate_file(self, i: int) -> tuple[int, int]:
        """(source, number of the file in it)."""
        source = bisect_right(self._first, i) - 1
        return source, i - self._first[source]

    def file(self, i: int) -> SourceFile:
        source, file = self.locate_file(i)
        return self.parts[source].file(file)

    def fingerprint(self) -> str:
        facts = [(s.documents.fingerprint(), s.weight, s.max_repeats) for s in self.sources]
        return hashlib.sha256(f"{facts} {self.by} {self.epoch}".encode()).hexdigest()

    def identities(self) -> Iterator[str]:
        return (identity for part in self.parts for identity in part.identities())

    def load_orders(self, seed: int) -> None:
        for part in self.parts:
            part.load_orders(seed)

    def order(self, i: int, seed: int) -> tuple[RowNumbers, Int64s]:
        source, file = self.locate_file(i)
        part = self.parts[source]
        mapped = part.load_orders(seed)
        return (mapped.order(file) if mapped else None) or part.order(file, seed)

    def reader(self, i: int, long: LongLines) -> Reader:
        source, file = self.locate_file(i)
        return self.parts[source].reader(file, long)

    def plan(self, packs_per_file: Int64s) -> MixturePlan | None:
        """The epoch, from the packs of all files; None if there are no packs at all.

        Raises: DataError for a source without packs; ConfigError for shares or repeats that are impossible.
        """
        packs = [int(packs_per_file[a:b].sum()) for a, b in zip(self._first, self._first[1:], strict=False)]
        if not any(packs):
            return None
        for source, count in zip(self.sources, packs, strict=True):
            if not count:
                raise DataError(
                    f"the source {source.name!r} of the mixture has no pack: {source.documents.num_tokens:,} tokens in "
                    f"{len(source.documents):,} files, none of which fills one",
                    where=source.documents.location,
                    do="lower max_length, join its files, or leave it out",
                )
        sequence = arrange(self._slots(packs))
        limits = [s.max_repeats or 1 for s in self.sources]
        if self.epoch == "first":
            ends = [sequence.position(s, n * limits[s]) for s, n in enumerate(packs)]
            last = ends.index(min(ends))
            passes, length = limits[last], ends[last]
        else:
            ends = [sequence.position(s, n - 1) + 1 for s, n in enumerate(packs)]
            last = ends.index(max(ends))
            passes, length = 1, ends[last]
            for s, count in enumerate(sequence.counts(length).tolist()):
                most = self.sources[s].max_repeats
                if most is not None and count > most * packs[s]:
                    raise ConfigError(
                        f"an epoch that visits all of {self.sources[last].name!r} repeats {self.sources[s].name!r} "
                        f"{count / packs[s]:.2f} times, and its max_repeats is {most}",
                        where=f"{KEY}.sources.{s}.max_repeats",
                        do='raise it, lower the weight of this source, or set epoch = "first"',
                    )
        names = tuple(s.name for s in self.sources)
        return MixturePlan(names, (0, *accumulate(packs)), sequence, last, passes, length)

    def _slots(self, packs: list[int]) -> list[int]:
        """Packs of each source in a period."""
        shares = [Fraction(str(s.weight)) for s in self.sources]
        if self.by == "documents":  # packs for one document
            shares = [
                w * Fraction(n, s.documents.num_documents) for w, n, s in zip(shares, packs, self.sources, strict=True)
            ]
        slots = divide_period(shares)
        if 0 in slots:
            i = slots.index(0)
            raise ConfigError(
                f"the weight of {self.sources[i].name!r}, {self.sources[i].weight!r}, is less than 1 of {MOST:,} packs",
                where=f"{KEY}.sources.{i}.weight",
                do="raise it, or leave the source out",
            )
        return slots


def mixture(
    sources: list[dict[str, Any]], by: Unit = "tokens", epoch: Literal["first", "all"] = "first"
) -> Mixture:  # fmt: skip
    """Mix sources of documents.

    Args:
        sources: `dict(type=…, …, weight=1, name=None, max_repeats=None)` each: what a `dataset_cfg` describes, and
            `weight`, its share relative to the others; `name`, for logs and metrics (None: the last part of its
            folder); `max_repeats`, how often an epoch may visit its documents (None: once; any number of times with
            epoch="all").
        by: what weights count. Packs are full, so that shares of tokens are shares of packs; "documents": of the
            documents in these packs.
        epoch: it ends when the "first" source has been visited as often as it may be, or when "all" have been visited.

    Raises: ConfigError; what the sources raise.
    """
    _check(sources, by, epoch)
    found = []
    for i, spec in enumerate(sources):
        own = {k: v for k, v in spec.items() if k not in MIXTURE_KEYS}
        built = as_documents(build(own, f"{KEY}.sources.{i}"))
        if isinstance(built, Mixture):
            raise ConfigError(
                "a mixture is not a source of another one", where=f"{KEY}.sources.{i}", do="list its sources"
            )
        name = spec.get("name") or (built.folder.name if built.folder else built.location)
        found.append(MixedSource(name, built, float(spec.get("weight", 1.0)), spec.get("max_repeats")))
    _require_distinct(found)
    return Mixture(found, by, epoch)


def _check(sources: Any, by: Any, epoch: Any) -> None:
    """Raises: ConfigError."""
    SCHEMA.require(KEY, by=by, epoch=epoch)
    if not isinstance(sources, list | tuple) or not sources or not all(isinstance(s, Mapping) for s in sources):
        raise ConfigError(
            "a mixture needs a list of sources: sources=[dict(type=…, weight=…), …]", where=f"{KEY}.sources"
        )
    for i, spec in enumerate(sources):
        weight = spec.get("weight", 1.0)
        if type(weight) not in (int, float) or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"weight = {weight!r} is not a number above 0",
                where=f"{KEY}.sources.{i}.weight",
                do="leave out a source that no pack should come from",
            )
        SCHEMA.require(f"{KEY}.sources.{i}", **{k: spec[k] for k in ("name", "max_repeats") if k in spec})


def _require_distinct(sources: list[MixedSource]) -> None:
    """Raises: ConfigError for two sources of one name, DataError for two with the same file."""
    names: dict[str, int] = {}
    files: dict[str, str] = {}
    contents: dict[str, tuple[str, str]] = {}
    for i, source in enumerate(sources):
        if source.name in names:
            raise ConfigError(
                f"sources {names[source.name]} and {i} of the mixture have one name, {source.name!r}",
                where=f"{KEY}.sources.{i}.name",
                why="logs and metrics are reported by it",
                do='give each a name: dict(…, name="…")',
            )
        names[source.name] = i
        root = source.documents.folder and source.documents.folder.resolve()
        own: dict[str, tuple[str, str]] = {}
        for file, identity in zip(source.documents.names, source.documents.identities(), strict=True):
            path = f"{root}/{file}" if root else None
            other = (files.get(path) if path else None) or (contents[identity][0] if identity in contents else None)
            if other is not None and other != source.name:
                raise DataError(
                    f"the sources {other!r} and {source.name!r} of the mixture share a file: {file}",
                    where=str(path or source.documents.location),
                    why="its documents would be visited more often than the weights say",
                    do="move it to a folder of its own, or raise the weight of one source",
                )
            own[identity] = source.name, file
            if path:
                files[path] = source.name
        contents |= own
