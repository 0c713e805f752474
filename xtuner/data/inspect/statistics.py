"""Statistics of tokenized data: documents, lengths, packs, and the imbalance of the packs' attention cost.

Lengths and packs follow from the metas; the learned share needs the tokens, from caches or from the text. Files are
processed in blocks; memory grows only with the number of packs (4 bytes each).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.log import human, progress
from xtuner.data import process_pool
from xtuner.data.format import token_cache
from xtuner.data.format.bin_file import BinFile, data_type
from xtuner.data.format.document_file import DocumentFile
from xtuner.data.format.file_order import require_local
from xtuner.data.format.folder import TokenizedFolder
from xtuner.data.format.meta import MetaView
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.zeros import count_unlearned
from xtuner.data.inspect.check_files import describe_zeros
from xtuner.data.inspect.scan import ByteRange, Scanner, split_file
from xtuner.data.loading.balance import attention_costs
from xtuner.data.loading.sampler import load_permutation
from xtuner.data.packing.document_order import DocumentOrders, shuffle_file
from xtuner.data.packing.document_source import Documents
from xtuner.data.packing.dropped_tokens import DroppedTokens
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.whole_documents import LongDocuments, Packing
from xtuner.data.sources.document_blocks import DocumentRange, read_documents, split_documents

BUCKETS = 33  # of lengths: 0, 1, 2–3, 4–7, …
BLOCK = 2**20  # rows or tokens per block
COST_BARS = 24  # of the histogram of costs
SAMPLER_SEED = 1024


@dataclass
class FileStats:
    name: str
    documents: int
    tokens: int
    packs: int
    tail: int  # tokens that are dropped: they do not fill a pack
    learned: int | None = None
    zeros: int | None = None  # tokens of id 0 that only `learn_zero` learns

    @property
    def kind(self) -> str:
        return data_type(self.name)


@dataclass
class Lengths:
    """Documents of `least` to `most` tokens."""

    least: int
    most: int
    documents: int
    tokens: int


@dataclass
class Stats:
    """Costs are Σ len² over the fragments of a pack, to which attention cost is proportional."""

    folder: str
    packed_length: int
    seed: int
    min_length: int
    documents: int = 0
    tokens: int = 0
    packs: int = 0
    tail: int = 0
    packing: Packing = "cut"
    long: LongDocuments = "cut"
    padding: int = 0  # tokens in packs of whole documents that are none of the data's
    learned: int | None = None
    zeros: int | None = None  # tokens of id 0 that only `learn_zero` learns
    longest: int = 0  # tokens of the longest document
    longer: int = 0  # documents that are longer than a pack
    longer_tokens: int = 0
    types: list[FileStats] = field(default_factory=list)
    files: list[FileStats] = field(default_factory=list)
    lengths: list[Lengths] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)  # mean, least, median, p95, most
    cost_bars: list[tuple[float, float, int]] = field(default_factory=list)  # from, to, packs
    imbalance: list[dict[str, float]] = field(default_factory=list)  # ranks; mean and p95 of slowest rank / mean rank
    repeated: int = 0  # files that the data order names more than once

    def dropped(self) -> DroppedTokens:
        without_pack = sum(not file.packs for file in self.files)
        whole = self.packing == "whole"
        return DroppedTokens(
            self.packed_length, self.tokens, self.tail, len(self.files), without_pack, self.padding, whole
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _Job(NamedTuple):
    number: int
    file: DocumentFile
    seed: int
    packed_length: int
    orders: DocumentOrders | None
    with_costs: bool


class _Counted(NamedTuple):
    documents: Int64s  # [BUCKETS]
    tokens: Int64s
    costs: npt.NDArray[np.float32]  # [packs]
    longest: int
    longer: int
    longer_tokens: int


class _Learn(NamedTuple):
    number: int
    part: ByteRange | DocumentRange  # the latter for files of other kinds
    cache: token_cache.TokenCache | None  # instead of the text


def compute_statistics(
    data: Documents,
    packed_length: int,
    seed: int = 1024,
    ranks: Sequence[int] = (8, 64, 512),
    with_text: bool = True,
    workers: int | None = None,
    packing: Packing = "cut",
    long: LongDocuments = "cut",
) -> Stats:
    """Compute all statistics.

    Args:
        data: of a folder; other sources are read by this process alone.
        ranks: numbers of ranks for which to report the imbalance, one pack per rank and step in the order of epoch 0.
        with_text: count learned tokens, which reads all tokens.
    Raises: DataError for a text that contradicts the format.
    """
    workers = process_pool.usable_workers(workers)
    found = Stats(data.location, packed_length, seed, data.min_length, data.num_documents, data.num_tokens)
    packed = PackedDataset(data, packed_length, seed, packing=packing, long=long)
    for i, (packs, tail) in enumerate(zip(packed.packs_per_file, packed.tail_tokens_per_file, strict=True)):
        file = data.file(i)
        found.files.append(FileStats(file.name, file.num_documents, file.num_tokens, packs, tail))
    found.repeated = data.num_repeated
    found.packs, found.tail = sum(f.packs for f in found.files), sum(f.tail for f in found.files)
    found.packing, found.long, found.padding = packing, long, packed.dropped().padding
    documents, counts = np.zeros(BUCKETS, np.int64), np.zeros(BUCKETS, np.int64)
    costs = []
    for result in progress(_count_files(packed, workers), "reading metas", total=len(found.files)):
        documents += result.documents
        counts += result.tokens
        costs.append(result.costs)
        found.longest = max(found.longest, result.longest)
        found.longer += result.longer
        found.longer_tokens += result.longer_tokens
    found.lengths = _lengths(documents, counts)
    if packing == "whole":
        costs = [packed.costs(np.arange(len(packed))).astype(np.float32)]
    _balance(found, np.concatenate(costs) if costs else np.zeros(0, np.float32), ranks)
    if with_text and isinstance(data, TokenizedFolder):
        _learned(found, data, workers)
    elif with_text:
        _learned_of_sources(found, data)
    found.types = _types(found.files)
    return found


def _workers(workers: int, work: int, jobs: int) -> int:
    """Few processes for little work, because starting one takes time."""
    return max(1, min(workers, work + 1, jobs))


def _count_files(packed: PackedDataset, workers: int) -> Iterator[_Counted]:
    """Document lengths and pack costs of each file; without costs for packs of whole documents."""
    data, with_costs = packed.documents, packed.packing == "cut"
    if isinstance(data, TokenizedFolder):
        orders = data.load_orders(packed.seed)
        jobs = [
            _Job(i, file, packed.seed, packed.packed_length, orders, with_costs)
            for i, file in enumerate(data)
        ]  # fmt: skip
        yield from process_pool.map_ordered(_count, jobs, _workers(workers, data.num_documents // BLOCK, len(jobs)))
        return
    for i in range(len(data)):
        ends = data.order(i, packed.seed)[1] if with_costs else None
        yield _count_lengths(data.file(i).lengths, 0, packed.packed_length, ends)


def _count(job: _Job) -> _Counted:
    """For a worker process: document lengths and pack costs of one file."""
    lengths = MetaView(job.file.path).lengths if isinstance(job.file, BinFile) else job.file.all_lengths
    ends = None
    if job.with_costs:
        table = job.orders.order(job.number) if job.orders else None
        ends = (table or shuffle_file(job.file, job.seed))[1]
    return _count_lengths(lengths, job.file.min_length, job.packed_length, ends)


def _count_lengths(
    all_lengths: npt.NDArray[np.integer[Any]], min_length: int, packed_length: int, ends: Int64s | None
) -> _Counted:
    """`ends`: of the documents in packing order."""
    documents, counts = np.zeros(BUCKETS, np.int64), np.zeros(BUCKETS, np.int64)
    steps = 2 ** np.arange(BUCKETS - 1, dtype=np.int64)
    longest = longer = longer_tokens = 0
    for i in range(0, len(all_lengths), BLOCK):
        lengths = all_lengths[i : i + BLOCK].astype(np.int64)
        lengths = lengths[lengths >= min_length]
        bucket = np.searchsorted(steps, lengths, side="right")
        documents += np.bincount(bucket, minlength=BUCKETS)
        counts += np.bincount(bucket, lengths, minlength=BUCKETS).astype(np.int64)
        long = lengths[lengths > packed_length]
        longest = max(longest, int(lengths.max(initial=0)))
        longer, longer_tokens = longer + len(long), longer_tokens + int(long.sum())
    costs = np.zeros(0, np.float32) if ends is None else pack_costs(ends, packed_length)
    return _Counted(documents, counts, costs, longest, longer, longer_tokens)


def pack_costs(ends: Int64s, packed_length: int) -> npt.NDArray[np.float32]:
    """Σ len² over the fragments of each pack of a file whose documents end at `ends`."""
    packs = int(ends[-1]) // packed_length if len(ends) else 0
    return attention_costs(ends, np.arange(packs) * packed_length, packed_length).astype(np.float32)


def _lengths(documents: Int64s, counts: Int64s) -> list[Lengths]:
    used = np.flatnonzero(documents)
    if not len(used):
        return []
    return [
        Lengths(2 ** (i - 1) if i else 0, 2**i - 1 if i else 0, int(documents[i]), int(counts[i]))
        for i in range(int(used[0]), int(used[-1]) + 1)
    ]


def _balance(found: Stats, costs: npt.NDArray[np.float32], ranks: Sequence[int]) -> None:
    if not len(costs):
        return
    least, median, p95, most = np.quantile(costs, (0, 0.5, 0.95, 1)).tolist()
    found.cost = {"mean": float(costs.mean()), "least": least, "median": median, "p95": p95, "most": most}
    bars, edges = np.histogram(costs, COST_BARS if most > least else [least, most], (least, most))
    found.cost_bars = list(zip(edges[:-1].tolist(), edges[1:].tolist(), bars.tolist(), strict=True))
    order = load_permutation(SAMPLER_SEED, len(costs))
    for size in ranks:
        steps = len(costs) // size
        if steps:
            shares = costs[order[: steps * size]].reshape(steps, size).astype(np.float64)
            slowest = shares.max(axis=1) / shares.mean(axis=1)
            found.imbalance.append(
                {"ranks": size, "mean": float(slowest.mean()), "p95": float(np.quantile(slowest, 0.95))}
            )


def _learned(found: Stats, data: TokenizedFolder, workers: int) -> None:
    require_local(data.folder, "counting learned tokens", "give --no-text, or copy the folder to a disk first")
    jobs = []
    for i, file in enumerate(data):
        if not isinstance(file, BinFile):
            jobs += [_Learn(i, documents, None) for documents in split_documents(file, data.kind)]
            continue
        cache = token_cache.find_token_cache(file, data.cache_dirs)
        assert file.facts is not None
        if cache:
            jobs.append(_Learn(i, ByteRange(cache.path, 0, cache.tokens), cache))
        else:
            jobs += [_Learn(i, part, None) for part in split_file(file.path, file.facts.signature.size)]
    sums, zeros = [0] * len(data), [0] * len(data)
    size = sum(job.part.end - job.part.begin if isinstance(job.part, ByteRange) else job.part.size for job in jobs)
    results = process_pool.map_ordered(_learned_part, jobs, _workers(workers, size // 2**25, len(jobs)))
    for i, learned, unlearned in progress(results, "reading tokens", total=len(jobs)):
        sums[i] += learned
        zeros[i] += unlearned
    for file_stats, learned, unlearned in zip(found.files, sums, zeros, strict=True):
        with_zeros = learned + unlearned * data.learn_zero
        file_stats.learned, file_stats.zeros = with_zeros, 0 if data.learn_zero else unlearned
    found.learned = sum(f.learned or 0 for f in found.files)
    found.zeros = sum(f.zeros or 0 for f in found.files)


def _learned_of_sources(found: Stats, data: Documents) -> None:
    for i, file_stats in enumerate(progress(found.files, "reading tokens")):
        file = data.file(i)
        file_stats.learned = sum(int(np.count_nonzero(file.read(n)[1])) for n in range(file.num_documents))
    found.learned = sum(f.learned or 0 for f in found.files)


def _learned_part(job: _Learn) -> tuple[int, int, int]:
    """For a worker process: (file number, learned tokens, zeros that only `learn_zero` learns) of one byte range or
    cache."""
    if isinstance(job.part, DocumentRange):
        return job.number, int(np.count_nonzero(read_documents(job.part).learned)), 0
    if job.cache:
        begins, cached = job.cache.mapped()
        learned = zeros = 0
        for i in range(0, len(cached), BLOCK):
            tokens = cached[i : i + BLOCK]
            learned += int(np.count_nonzero(tokens > 0))
            zeros += count_unlearned(tokens, np.unique(np.clip(begins - i, 0, len(tokens))))
        return job.number, learned, zeros
    found = Scanner(job.part).run()
    if found.problems:
        byte, what = found.problems[0]
        raise DataError(what, where=f"{job.part.path}:{byte}", do="list all problems: xtuner data check FOLDER")
    return job.number, found.learned, found.zeros


def _types(files: list[FileStats]) -> list[FileStats]:
    types: dict[str, FileStats] = {}
    for file in files:
        kind = types.setdefault(file.kind, FileStats(f"{file.kind}/", 0, 0, 0, 0))
        kind.documents += file.documents
        kind.tokens += file.tokens
        kind.packs += file.packs
        kind.tail += file.tail
        if file.learned is not None:
            kind.learned = (kind.learned or 0) + file.learned
            kind.zeros = (kind.zeros or 0) + (file.zeros or 0)
    return list(types.values())


LONG = {"cut": "cut at the ends of packs", "drop": "dropped", "own": "cut, and alone in their last packs"}
SHOWN = 40  # files in the text; JSON contains all


def format_statistics(found: Stats) -> str:
    """The statistics as text for a terminal."""
    dropped = found.dropped()
    repeated = f" ({found.repeated:,} named more than once)" if found.repeated else ""
    lines = [
        f"{found.folder}: {len(found.files):,} files{repeated}, {found.documents:,} documents, {found.tokens:,} tokens"
        + _share(found.learned, found.tokens),
        f"packs of {found.packed_length:,}: {found.packs:,}; "
        + (dropped.describe() if dropped.whole else f"dropped tails: {found.tail:,} tokens ({dropped.share})"),
    ]
    if warning := dropped.warning():
        lines.append(warning)
    if found.longer:
        lines.append(
            f"documents longer than a pack: {found.longer:,} with {found.longer_tokens:,} tokens, the longest with "
            f"{found.longest:,}; they are {LONG[found.long]}"
        )
    if found.learned == 0 and found.tokens:
        lines.append(
            "there is nothing to learn: no token is above 0, and negative ones are context only. Training on "
            "these data would end with exit code 65"
        )
    if found.zeros:
        lines.append(describe_zeros(found.zeros))
    lines += ["", f"{'documents of':>22} {'documents':>14} {'tokens':>18}"]
    most = max((x.documents for x in found.lengths), default=1)
    for x in found.lengths:
        bar = "█" * max(round(30 * x.documents / most), 1 if x.documents else 0)
        lines.append(f"{f'{x.least:,}–{x.most:,} tokens':>22} {x.documents:>14,} {x.tokens:>18,}  {bar}")
    width = max(10, *(len(f.name) for f in (*found.types, *found.files[:SHOWN])))
    lines += ["", f"{'':<{width}} {'documents':>14} {'tokens':>18} {'learned':>8} {'packs':>10} {'tail':>12}"]
    for rows in (found.types, found.files[:SHOWN]):
        for f in rows:
            learned = f"{f.learned / f.tokens:.1%}" if f.learned is not None and f.tokens else "–"
            lines.append(
                f"{f.name:<{width}} {f.documents:>14,} {f.tokens:>18,} {learned:>8} {f.packs:>10,} {f.tail:>12,}"
            )
    if len(found.files) > SHOWN:
        lines.append(f"… and {len(found.files) - SHOWN:,} more files (all with --json)")
    if found.cost:
        c = found.cost
        lines += [
            "",
            "attention of a pack, Σ len² of its fragments: "
            + ", ".join(f"{k} {human(c[k])}" for k in ("least", "median", "mean", "p95", "most")),
        ]
        for row in found.imbalance:
            text = f"the slowest has {row['mean']:.2f} × the mean of a step (p95 {row['p95']:.2f})"
            lines.append(f"{row['ranks']:>6.0f} ranks: {text}")
    return "\n".join(lines)


def _share(learned: int | None, of: int) -> str:
    return f", {learned / of:.1%} learned" if learned is not None and of else ""
