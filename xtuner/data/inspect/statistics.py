"""Statistics of a folder of tokenized data: documents, lengths, packs, and the imbalance of the packs' attention cost.

Lengths and packs follow from the metas; the learned share needs the tokens, from caches or from the text. Files are
processed in blocks; memory grows only with the number of packs (4 bytes each).
"""

from collections.abc import Sequence
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
from xtuner.data.packing.dropped_tokens import DroppedTokens
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
    tail: int  # tokens that do not fill a pack
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
        return DroppedTokens(self.packed_length, self.tokens, self.tail, len(self.files), without_pack)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _Job(NamedTuple):
    number: int
    file: DocumentFile
    seed: int
    packed_length: int
    orders: DocumentOrders | None


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
    data: TokenizedFolder,
    packed_length: int,
    seed: int = 1024,
    ranks: Sequence[int] = (8, 64, 512),
    with_text: bool = True,
    workers: int | None = None,
) -> Stats:
    """Compute all statistics.

    Args:
        ranks: numbers of ranks for which to report the imbalance, one pack per rank and step in the order of epoch 0.
        with_text: count learned tokens, which reads all tokens.
    Raises: DataError for a text that contradicts the format.
    """
    workers = process_pool.usable_workers(workers)
    found = Stats(data.location, packed_length, seed, data.min_length, data.num_documents, data.num_tokens)
    c = data.catalog
    for name, documents, count in zip(c.names, c.documents.tolist(), c.tokens.tolist(), strict=True):
        found.files.append(FileStats(name, documents, count, count // packed_length, count % packed_length))
    found.repeated = data.num_repeated
    found.packs, found.tail = sum(f.packs for f in found.files), sum(f.tail for f in found.files)
    orders = data.load_orders(seed)
    jobs = [_Job(i, file, seed, packed_length, orders) for i, file in enumerate(data)]
    documents, counts = np.zeros(BUCKETS, np.int64), np.zeros(BUCKETS, np.int64)
    costs = []
    done = process_pool.map_ordered(_count, jobs, _workers(workers, found.documents // BLOCK, len(jobs)))
    for result in progress(done, "reading metas", total=len(jobs)):
        documents += result.documents
        counts += result.tokens
        costs.append(result.costs)
        found.longest = max(found.longest, result.longest)
        found.longer += result.longer
        found.longer_tokens += result.longer_tokens
    found.lengths = _lengths(documents, counts)
    _balance(found, np.concatenate(costs) if costs else np.zeros(0, np.float32), ranks)
    if with_text:
        _learned(found, data, workers)
    found.types = _types(found.files)
    return found


def _workers(workers: int, work: int, jobs: int) -> int:
    """Few processes for little work, because starting one takes time."""
    return max(1, min(workers, work + 1, jobs))


def _count(job: _Job) -> _Counted:
    """For a worker process: document lengths and pack costs of one file."""
    known = MetaView(job.file.path).lengths if isinstance(job.file, BinFile) else job.file.all_lengths
    documents, counts = np.zeros(BUCKETS, np.int64), np.zeros(BUCKETS, np.int64)
    steps = 2 ** np.arange(BUCKETS - 1, dtype=np.int64)
    longest = longer = longer_tokens = 0
    for i in range(0, len(known), BLOCK):
        lengths = known[i : i + BLOCK].astype(np.int64)
        lengths = lengths[lengths >= job.file.min_length]
        bucket = np.searchsorted(steps, lengths, side="right")
        documents += np.bincount(bucket, minlength=BUCKETS)
        counts += np.bincount(bucket, lengths, minlength=BUCKETS).astype(np.int64)
        long = lengths[lengths > job.packed_length]
        longest = max(longest, int(lengths.max(initial=0)))
        longer, longer_tokens = longer + len(long), longer_tokens + int(long.sum())
    table = job.orders.order(job.number) if job.orders else None
    ends = (table or shuffle_file(job.file, job.seed))[1]
    return _Counted(documents, counts, pack_costs(ends, job.packed_length), longest, longer, longer_tokens)


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
        file_stats.learned, file_stats.zeros = learned, unlearned
    found.learned, found.zeros = sum(sums), sum(zeros)


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


SHOWN = 40  # files in the text; JSON contains all


def format_statistics(found: Stats) -> str:
    """The statistics as text for a terminal."""
    dropped = found.dropped()
    repeated = f" ({found.repeated:,} named more than once)" if found.repeated else ""
    lines = [
        f"{found.folder}: {len(found.files):,} files{repeated}, {found.documents:,} documents, {found.tokens:,} tokens"
        + _share(found.learned, found.tokens),
        f"packs of {found.packed_length:,}: {found.packs:,}; dropped tails: {found.tail:,} tokens ({dropped.share})",
    ]
    if warning := dropped.warning():
        lines.append(warning)
    if found.longer:
        lines.append(
            f"documents longer than a pack: {found.longer:,} with {found.longer_tokens:,} tokens, the longest with "
            f"{found.longest:,}; they are cut at the ends of packs"
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
