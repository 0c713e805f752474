"""Speed of the data path next to megatron-core: packs per second, the default loader, indexes of many documents.

    python benchmarks/data_path.py [--folder DIR] [--only packs|index] [--billion]      (`make bench-data`)

Data are written to DIR once (6 GB; the texts of the large indexes are sparse, their files linked). megatron-core's
IndexedDataset is measured if it can be imported, in this process, on the same documents in the same order.
"""

import argparse
import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchlib.data_files import LENGTH, forget, in_page_cache, make_large, make_text

from xtuner.core.system.malloc import keep_freed
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset, mixture
from xtuner.data.format.file_order import CACHE_FOLDER
from xtuner.data.format.text_reader import SpanReader
from xtuner.data.inspect.build_caches import build_caches
from xtuner.data.loading.batch import Batch
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.raw_pack import FilePacks, RawPack

PACKS = 400  # per measurement
ROUNDS = 3  # the best one counts: other work on the machine only adds time


def row(what: str, tokens: int, cpu: float, wall: float, note: str = "") -> None:
    print(f"{what:<58} {tokens / cpu / 1e6:>8.1f} {cpu:>8.2f} {wall:>8.2f}  {note}", flush=True)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(CPU s of all threads of this process, wall s)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def best(what: str, order: list[int], work: Callable[[int], Any], note: str = "") -> float:
    """Measure `work` on packs that it has not read before, as in an epoch. Prints and returns tokens per CPU second."""
    for pack in order[:50]:
        work(pack)
    found = []
    for i in range(ROUNDS):
        packs = order[50 + i * PACKS : 50 + (i + 1) * PACKS]
        found.append(timed(lambda packs=packs: [work(pack) for pack in packs] and None))
    cpu, wall = min(found)
    tokens = PACKS * LENGTH
    row(what, tokens, cpu, wall, note)
    return tokens / cpu


class FromText(PackedDataset):
    """Reads the text even if there are token caches."""

    def file_packs(self, file_number: int) -> FilePacks:
        found = super().file_packs(file_number)
        if not isinstance(found.reader, SpanReader):
            found = FilePacks(found.file, found.rows, found.ends, SpanReader(found.file, self._long))
            self._files[file_number] = found
        return found


def megatron(folder: Path, data: PackedDataset, cached: PackedDataset) -> Callable[[int], RawPack] | str:
    """A function that reads a pack through IndexedDataset, or a text that says why it is not measured."""
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    except Exception as e:
        return f"megatron-core cannot be imported ({type(e).__name__}: {e}): not measured"
    sets = []
    for i, file in enumerate(data.documents):
        prefix = folder / f"{i:02d}"
        if not prefix.with_suffix(".idx").exists():
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
            for document in range(file.num_documents):
                tokens = torch.from_numpy(file.read_document(document).astype(np.int32))
                builder.add_document(tokens, [len(tokens)])
            builder.finalize(f"{prefix}.idx")
        sets.append(IndexedDataset(str(prefix)))

    def read(pack: int) -> RawPack:
        number, start = cached.locate(pack)
        spans = cached.file_packs(number).spans(start, start + LENGTH)
        indexed = sets[number]
        parts = [indexed.get(s.row, s.start, s.stop - s.start) for s in spans]
        borders = np.cumsum([0, *(s.stop - s.start for s in spans)], dtype=np.int32)
        last = spans[-1]
        following = int(indexed.get(last.row, last.stop, 1)[0]) if last.stop < last.length else 0
        return RawPack(np.concatenate(parts), borders, following)

    return read


def packs(folder: Path) -> None:
    text, peers = folder / "text", folder / "megatron"
    make_text(text)
    peers.mkdir(exist_ok=True)
    documents = load_intern_repo_tokenized_dataset(text)
    made = build_caches(documents, 1024)
    cached, parsed = PackedDataset(documents, LENGTH), FromText(documents, LENGTH)
    read = megatron(peers, parsed, cached)
    order = np.random.RandomState(1).permutation(len(cached)).tolist()

    def whole(raw: Callable[[int], RawPack]) -> Callable[[int], Batch]:
        return lambda i: Batch.from_raw(raw(i), "internevo", i)

    texts = sorted(text.glob("*.bin"))
    caches = sorted((made.index or text).parent.glob("tokens/*"))
    print(f"\n{documents.num_documents:,} documents, {documents.num_tokens:,} tokens, {len(documents)} files; ", end="")
    print(f"packs of {LENGTH:,} in random order, one process, each pack once, {PACKS} packs, best of {ROUNDS}")
    print(f"{'':<58} {'M tok/CPU s':>8} {'CPU s':>5} {'wall s':>8}")
    for what, files in (("text", texts), ("caches", caches)):
        forget(files)
        subprocess.run([sys.executable, __file__, "--folder", folder, "--cold", what], check=True)
    for path in (*texts, *caches, *peers.glob("*.bin")):
        path.read_bytes()  # into the page cache
    for i in order[-100:]:
        assert np.array_equal(parsed.raw(i).signed, cached.raw(i).signed)
        assert not callable(read) or all(map(np.array_equal, read(i), cached.raw(i)))
    best("from text", order, whole(parsed.raw))
    ours = best("from token caches", order, whole(cached.raw))
    if callable(read):
        theirs = best("megatron-core IndexedDataset.get, then as ours", order, whole(read))
        print(f"{'':<58} ours is {ours / theirs:.2f} × megatron-core {version('megatron-core')}")
        best("  of it, reading alone: token caches", order[::-1], cached.raw)
        best("  of it, reading alone: megatron-core", order[::-1], read)
    else:
        print(read)
    flat = np.memmap(caches[0], np.int32, "r", 4096)
    starts = np.random.RandomState(1).randint(len(flat) - LENGTH, size=50 + ROUNDS * PACKS).tolist()
    best("raw memmap, slice and copy to int64 (no pack is made)", starts, lambda start: _copy(flat, start))
    print(f"in the page cache: text {in_page_cache(texts):.0%}, token caches {in_page_cache(caches):.0%}\n")
    loaders(parsed, cached, PACKS * LENGTH)


def cold(folder: Path, what: str) -> None:
    """Read packs from the disk, in a process of its own: mapped files would stay in memory."""
    kind = FromText if what == "text" else PackedDataset
    data = kind(load_intern_repo_tokenized_dataset(folder / "text"), LENGTH)
    cache = Path(data.documents.cache_dirs.dirs[0])
    files = sorted((folder / "text").glob("*.bin") if what == "text" else cache.glob("tokens/*"))
    before = in_page_cache(files)
    order = np.random.RandomState(2).permutation(len(data))[:PACKS].tolist()
    cpu, wall = timed(lambda: [Batch.from_raw(data.raw(i), "internevo", i) for i in order] and None)
    tokens = PACKS * LENGTH
    note = f"{before:.0%} in the page cache before; {tokens / wall / 1e6:.1f} M tok/s of wall time"
    row(f"cold read: from {'text' if what == 'text' else 'token caches'}", tokens, cpu, wall, note)


def _copy(flat: Any, start: int) -> Any:
    return torch.from_numpy(np.array(flat[start : start + LENGTH], np.int64))


def loaders(parsed: PackedDataset, cached: PackedDataset, tokens: int) -> None:
    """Wall time of `PackLoader` with a consumer that reads every number of a batch."""
    print(f"{'through the loader, a consumer that sums all tensors':<58} {'M tok/s':>8} {'CPU s':>8} {'wall s':>8}")
    for what, data, workers in (
        ("from text, default (a thread)", parsed, 0),
        ("from token caches, default (a thread)", cached, 0),
        ("from text, 2 worker processes", parsed, 2),
        ("from token caches, 1 worker process", cached, 1),
    ):
        results = []
        for _ in range(ROUNDS):
            stream = PackLoader(data, InternRepoSampler(data, rank=0, world_size=1), workers).iterate_from(Position())
            for batch in islice(stream, 20):  # warm-up
                _touch(batch)
            results.append(timed(lambda stream=stream: [_touch(b) for b in islice(stream, PACKS)])[::-1])
            stream.close()  # type: ignore[attr-defined]
        wall, cpu = min(results)
        print(f"{what:<58} {tokens / wall / 1e6:>8.1f} {cpu:>8.2f} {wall:>8.2f}")


def _touch(batch: Batch) -> int:
    return sum(int(t.sum()) for t in (batch.input_ids, batch.targets, batch.position_ids, batch.cu_seqlens))


PROBE = """
import resource, sys, time
import torch
from xtuner.data import load_intern_repo_tokenized_dataset
from xtuner.data.packing.pack import PackedDataset
def private():
    lines = open('/proc/self/smaps_rollup').read().splitlines()[1:]
    return sum(int(v.split()[0]) for k, v in (x.split(':') for x in lines) if k == 'Private_Dirty') / 1024
load_intern_repo_tokenized_dataset  # imported
before, wall, cpu = private(), time.perf_counter(), time.process_time()
data = PackedDataset(load_intern_repo_tokenized_dataset(sys.argv[1]), 32768)
data.fingerprint()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
packs = [int(i * (len(data) - 1) / 2999) for i in range(3000)]
for i in packs:
    number, start = data.locate(i)
    data.file_packs(number).spans(start, start + 32768)
begin = time.process_time()
for i in packs:
    number, start = data.locate(i)
    data.file_packs(number).span_arrays(start, start + 32768)
lookup = (time.process_time() - begin) / len(packs) * 1e6
print(f'{wall:.2f} s wall, {cpu:.2f} s CPU; 3,000 lookups: {lookup:.1f} us each, {private() - before:.1f} MiB private')
"""


def index(folder: Path, files: int, documents: int) -> None:
    """Cold and warm start in new processes on one core, so that wall time includes all work."""
    make_large(folder, files, documents // files)
    print(f"\nindex of {documents:,} documents in {files:,} files (one pair, linked), in the page cache", flush=True)
    shutil.rmtree(folder / CACHE_FOLDER, ignore_errors=True)
    core = min(os.sched_getaffinity(0))
    for what in ("cold", "warm", "warm"):
        words = ["taskset", "-c", str(core), sys.executable, "-c", PROBE, str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        print(f"  {what}: {done.stdout.strip() or done.stderr.strip()}", flush=True)
    size = sum(p.stat().st_size for p in (folder / CACHE_FOLDER).iterdir())
    print(f"  {size / documents:.2f} bytes a document on the disk")


SOURCES = 8


def mixtures(folder: Path) -> None:
    """The same files as one source and as a mixture of 8: packs a second, the time to find a position, a warm start."""
    make_text(folder / "text")
    files = sorted((folder / "text").glob("*.bin"))[: 2 * SOURCES]
    for i, path in enumerate(files):
        for part in ("all", f"source{i % SOURCES}"):
            to = folder / "mixed" / part
            to.mkdir(parents=True, exist_ok=True)
            for name in (path.name, f"{path.name}.meta"):
                if not (to / name).exists():
                    os.link(path.with_name(name), to / name)

    def source(name: str) -> dict[str, Any]:
        return dict(type=load_intern_repo_tokenized_dataset, folder=folder / "mixed" / name)

    weights = [0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02]
    for name in ("all", *(f"source{i}" for i in range(SOURCES))):
        build_caches(load_intern_repo_tokenized_dataset(folder / "mixed" / name), 1024)
    found = {}
    print(f"\n{'mixtures: the order and packs of one process':<58} {'M tok/CPU s':>8} {'CPU s':>5} {'wall s':>8}")
    for what, sources in (
        ("one source", [source("all")]),
        (
            f"{SOURCES} sources",
            [source(f"source{i}") | {"weight": w, "max_repeats": 50} for i, w in enumerate(weights)],
        ),
    ):
        begin = time.perf_counter()
        data = PackedDataset(mixture(sources), LENGTH)
        data.fingerprint()
        start = time.perf_counter() - begin
        loader = PackLoader(data, InternRepoSampler(data, rank=0, world_size=1), reshuffle=True)
        numbers = list(islice(loader.numbers_from(Position()), 50 + ROUNDS * PACKS))
        found[what] = best(what, numbers, lambda i, data=data: Batch.from_raw(data.raw(i), "internevo", i))
        order = loader.sampler.mixture
        assert order
        epoch = loader.packs_per_epoch
        places = np.random.RandomState(0).randint(epoch, size=(3000, 1))
        order.numbers(0, np.arange(epoch), epoch)  # the permutations are drawn
        cpu, _ = timed(lambda args=(order, epoch, places): [args[0].numbers(0, n, args[1]) for n in args[2]] and None)
        print(f"  warm start {start:.2f} s; a position {cpu / len(places) * 1e6:.0f} us")
    one, many = found.values()
    print(f"  {SOURCES} sources: {many / one:.2f} of one source's packs a second")


MIXED_PROBE = """
import sys, time
import numpy as np
import torch
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset as load, mixture
from xtuner.data.loading.loader import PackLoader
from xtuner.data.packing.pack import PackedDataset
def private():
    lines = open('/proc/self/smaps_rollup').read().splitlines()[1:]
    return sum(int(v.split()[0]) for k, v in (x.split(':') for x in lines) if k == 'Private_Dirty') / 1024
load, count = load, int(sys.argv[2])
weights = [0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02]
before, wall, cpu = private(), time.perf_counter(), time.process_time()
sources = [dict(type=load, folder=f'{sys.argv[1]}/{s}', weight=w) for s, w in enumerate(weights)]
data = PackedDataset(mixture(sources), 32768, packing=sys.argv[3])
data.fingerprint()
loader = PackLoader(data, InternRepoSampler(data, rank=0, world_size=1), reshuffle=True)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
order, epoch = loader.sampler.mixture, loader.packs_per_epoch
places = np.random.RandomState(0).randint(epoch, size=(count, 1))
def seek():
    begin = time.process_time()
    for place in places:
        pack = int(order.numbers(0, place, epoch)[0])
        file, start, stop = data.find_tokens(pack)
        data.file_packs(file).span_arrays(start, stop)
    return (time.process_time() - begin) / count * 1e6
seek()
print(f'{len(data):,} packs; {wall:.2f} s wall, {cpu:.2f} s CPU; a position anywhere, with the documents of its pack: '
      f'{seek():.1f} us; {private() - before:.1f} MiB private')
"""


def mixture_index(folder: Path, files: int, documents: int, packing: str = "cut") -> None:
    """`index` of a mixture: each source has links to a pair of its own."""
    for s in range(SOURCES):
        make_large(folder / str(s), files // SOURCES, documents // files, s)
        shutil.rmtree(folder / str(s) / CACHE_FOLDER, ignore_errors=True)
    print(f"\n{documents:,} documents in {files:,} files and {SOURCES} sources, packing = {packing}", flush=True)
    core = min(os.sched_getaffinity(0))
    for what in ("cold", "warm", "warm"):
        words = ["taskset", "-c", str(core), sys.executable, "-c", MIXED_PROBE, str(folder), "3000", packing]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        print(f"  {what}: {done.stdout.strip() or done.stderr.strip()}", flush=True)


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    folder = given or Path(os.environ.get("TMPDIR", "/tmp")) / "xtuner-bench-data"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    if given is None:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the data there (default: a temporary folder)")
    parser.add_argument("--only", choices=("packs", "mixtures", "index"), help="only this part")
    parser.add_argument("--billion", action="store_true", help="also a billion documents (12 GB of disk, 2 minutes)")
    parser.add_argument("--cold", choices=("text", "caches"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed()  # as the loader does; also for the peers
    if a.cold:
        return cold(a.folder, a.cold)
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} CPU cores, {versions}")
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    if not torch.cuda.is_available():
        print("no GPU: copies from pinned memory are not measured")
    print("other work runs on this machine: all speeds are lower bounds" * (os.getloadavg()[0] > 1))
    with work_folder(a.folder) as folder:
        if a.only in (None, "packs"):
            packs(folder)
        if a.only in (None, "mixtures"):
            mixtures(folder)
            mixture_index(folder / "large_mixture", 1000, 10_000_000)
            mixture_index(folder / "large_mixture", 1000, 10_000_000, "whole")
            if a.billion:
                mixture_index(folder / "billion_mixture", 10_000, 1_000_000_000)
        if a.only in (None, "index"):
            index(folder / "large", 1000, 100_000_000)
            index(folder / "deep", 4, 20_000_000)
            if a.billion:
                index(folder / "billion", 10_000, 1_000_000_000)
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
