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
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xtuner.config.build import build
from xtuner.config.settings import MIXTURE_KEYS, SCHEMA
from xtuner.core.errors import ConfigError, DataError, XTunerError
from xtuner.data.format.bin_file import BinFile
from xtuner.data.format.cache_dirs import log_once
from xtuner.data.format.made_from import find_record, read_tokenizer
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.text_reader import LongLines
from xtuner.data.packing.document_order import RowNumbers
from xtuner.data.packing.document_source import Documents, Reader, SourceFile, as_documents
from xtuner.data.packing.mixture_plan import KEY, EpochEnd, MixturePlan, Phase, SourcePacks, plan_epoch
from xtuner.data.packing.mixture_schedule import Change, read_schedule

RECORDS_READ = 16  # of each source, to compare tokenizers
Unit = Literal["tokens", "documents", "packs"]


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


class Mixture:
    """The files of all sources as one list; see `Documents`."""

    folder = cache_dirs = request = orders = None

    def __init__(
        self, sources: Sequence[MixedSource], by: Unit, epoch: EpochEnd, schedule: Sequence[Change] = ()
    ) -> None:
        self.sources, self.by, self.epoch, self.schedule = tuple(sources), by, epoch, tuple(schedule)
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
        """Of a single source that an epoch visits once, its own: the run is the same."""
        if len(self.sources) == 1 and (self.epoch == "all" or self.sources[0].max_repeats in (None, 1)):
            return self.parts[0].fingerprint()
        facts = [(s.documents.fingerprint(), s.weight, s.max_repeats) for s in self.sources]
        changes = [(change.iteration, change.weights) for change in self.schedule]
        more = f" {changes}" if changes else ""
        return hashlib.sha256(f"{facts} {self.by} {self.epoch}{more}".encode()).hexdigest()

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

    def plan(self, packs_per_file: Int64s, packs_per_iteration: int) -> MixturePlan | None:
        """The epoch, from the packs of all files; None if there are no packs at all.

        Args:
            packs_per_iteration: converts the iterations of the schedule.

        Raises: DataError for a source without packs; ConfigError for weights that are too small.
        """
        packs = [int(packs_per_file[a:b].sum()) for a, b in pairwise(self._first)]
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
        changes = [Change(0, tuple(s.weight for s in self.sources), f"{KEY}.sources"), *self.schedule]
        if len(changes) > 1 and changes[1].iteration == 0:
            del changes[0]
        phases = [Phase(c.iteration, self._shares(c.weights, packs), c.key) for c in changes]
        parts = [SourcePacks(s.name, n, s.max_repeats) for s, n in zip(self.sources, packs, strict=True)]
        return plan_epoch(parts, phases, packs_per_iteration, self.epoch)

    def _shares(self, weights: Sequence[float], packs: Sequence[int]) -> tuple[Fraction, ...]:
        """Of the packs."""
        shares = [Fraction(str(w)) for w in weights]
        if self.by == "documents":
            each = (Fraction(n, s.documents.num_documents) for n, s in zip(packs, self.sources, strict=True))
            shares = [share * of_one for share, of_one in zip(shares, each, strict=True)]
        return tuple(share / sum(shares) for share in shares)


def list_parts(documents: Any) -> list[Any]:
    """The sources of a mixture; other documents as they are."""
    return list(documents.parts) if isinstance(documents, Mixture) else [documents]


def mixture(
    sources: list[dict[str, Any]],
    by: Unit = "tokens",
    epoch: EpochEnd = "first",
    schedule: list[dict[str, Any]] | None = None,
) -> Mixture:
    """Mix sources of documents.

    Args:
        sources: `dict(type=…, …, weight=1, name=None, max_repeats=None)` each: what a `dataset_cfg` describes, and
            `weight`, its share relative to the others; `name`, for logs and metrics (None: the last part of its
            folder); `max_repeats`, how often an epoch may visit its documents (None: once; any number of times with
            epoch="all").
        by: what weights count. Packs are full, so that shares of tokens are shares of packs; "documents": of the
            documents in these packs.
        epoch: it ends when the "first" source has been visited as often as it may be, or when "all" have been visited.
        schedule: `dict(iteration=N, weights=dict(NAME=WEIGHT, …))` each: the weights after the first N iterations of an
            epoch. A source that is not named keeps its weight; 0 leaves it out from there on.

    Raises: ConfigError; what the sources raise.
    """
    _check(sources, by, epoch)
    found = []
    for i, spec in enumerate(sources):
        own = {k: v for k, v in spec.items() if k not in MIXTURE_KEYS}
        built = _open_source(own, f"{KEY}.sources.{i}")
        if isinstance(built, Mixture):
            raise ConfigError(
                "a mixture is not a source of another one", where=f"{KEY}.sources.{i}", do="list its sources"
            )
        name = spec.get("name") or (built.folder.name if built.folder else built.location)
        found.append(MixedSource(name, built, float(spec.get("weight", 1.0)), spec.get("max_repeats")))
    _require_distinct(found)
    _compare_tokenizers(found)
    return Mixture(found, by, epoch, read_schedule(schedule or (), [(s.name, s.weight) for s in found]))


def _open_source(spec: Mapping[str, Any], key: str) -> Documents:
    """Raises: what the source raises; an error that names an argument, or nothing, is located by the source's key."""
    try:
        return as_documents(build(spec, key))
    except XTunerError as e:
        where = f"{key}.{e.where}" if e.where in spec else e.where or key
        raise type(e)(e.what, where=where, why=e.why, do=e.do) from None


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


def _compare_tokenizers(sources: Sequence[MixedSource]) -> None:
    """Log a warning if files were written with different tokenizers, as far as their records say. The same tokenizer
    in another form (tokenizer.model, tokenizer.json) has another identity: it is not an error."""
    first: tuple[str, str, Path] | None = None
    for source in sources:
        documents = source.documents
        step = -(-len(documents) // RECORDS_READ)
        files = [documents.file(i) for i in range(0, len(documents), step)] if step else []
        for file in files:
            record = find_record(file.path) if isinstance(file, BinFile) else None
            identity = read_tokenizer(record) if record else None
            if record is None or identity is None:
                continue
            first = first or (identity, source.name, record)
            if identity != first[0]:
                log_once(
                    f"{file.name} of source {source.name!r} was written with another tokenizer than the data of source "
                    f"{first[1]!r} ({record} and {first[2]}): unless both give the same ids to the same text, the "
                    "model would learn from wrong texts. Tokenize one of them again with the model's tokenizer"
                )
                return
