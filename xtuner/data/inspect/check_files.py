"""Checks every file of a folder against its meta and the format, for `xtuner data check`.

All text is read, by several processes in byte ranges of some MB, whatever the size of files and lines.
"""

import contextlib
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import DataError
from xtuner.core.files import PendingFile
from xtuner.core.foreign_inputs import open_regular
from xtuner.core.log import progress
from xtuner.data import process_pool
from xtuner.data.format.file_order import no_files_error, require_folder, require_local, walk_files
from xtuner.data.format.meta import MetaView, meta_path
from xtuner.data.inspect.scan import MAX_PROBLEMS, ByteRange, Scanner, ScanResult, split_file

PROBLEM, NOTE, FIXED = "problem", "note", "fixed"
NPY_HEADER = 128  # bytes


@dataclass
class Finding:
    """One line of the report."""

    kind: str  # problem, note or fixed
    file: str
    what: str


@dataclass
class CheckReport:
    files: int = 0
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    zeros: int = 0  # tokens of id 0 that only `learn_zero` learns
    largest: int = -1
    rows: list[Finding] = field(default_factory=list)

    def add(self, kind: str, file: str, what: str) -> None:
        self.rows.append(Finding(kind, file, what))

    @property
    def problems(self) -> int:
        return sum(row.kind == PROBLEM for row in self.rows)


class _Job(NamedTuple):
    file: int
    part: ByteRange
    vocab_size: int | None
    keep_rows: bool


class _Result(NamedTuple):
    file: int
    found: ScanResult
    meta: str  # how the meta contradicts this range; empty if it does not
    failure: str  # error of the operating system


def check_folder(
    folder: str | Path,
    vocab_size: int | None = None,
    fix_meta: bool = False,
    workers: int | None = None,
    ending: str = ".bin",
) -> CheckReport:
    """Read all files of `folder`.

    Args:
        vocab_size: larger or equal ids are problems.
        fix_meta: write a new meta for each file whose text is valid and whose meta is absent or wrong.
        workers: processes; None for one per usable CPU.
    Raises: ConfigError, DataError for a folder without files to check.
    """
    folder = require_local(require_folder(folder), "xtuner data check")
    workers = process_pool.usable_workers(workers)
    everything = list(walk_files(folder, ""))
    names = [name for name in everything if name.endswith(ending)]
    if not names:
        raise no_files_error(folder, ending)
    report = CheckReport(files=len(names))
    sizes = _read_sizes(folder, names, report)
    jobs = [_Job(i, part, vocab_size, fix_meta) for i in sizes for part in split_file(folder / names[i], sizes[i])]
    results = progress(
        process_pool.map_ordered(_check_range, jobs, min(workers, max(len(jobs), 1))), "checking", total=len(jobs)
    )
    equal: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for i, group in groupby(results, key=lambda result: result.file):
        digest = _check_file(folder / names[i], names[i], group, report, fix_meta, vocab_size)
        if sizes[i] and digest:
            equal[sizes[i], digest].append(names[i])
    for first, *others in equal.values():
        for other in others:
            report.add(PROBLEM, other, f"has the same text as {first}: it would be trained on twice")
    texts = set(names)
    for name in everything:
        if name.endswith(f"{ending}.meta") and name.removesuffix(".meta") not in texts:
            report.add(NOTE, name, "is a meta without its text")
    report.rows.sort(key=lambda row: (row.kind != PROBLEM, row.kind, row.file))
    return report


def _read_sizes(folder: Path, names: list[str], report: CheckReport) -> dict[int, int]:
    """Size of each file that can be opened, by its number. Also reports links and files that have two names."""
    sizes: dict[int, int] = {}
    seen: dict[tuple[int, int], str] = {}
    for i, name in enumerate(names):
        path = folder / name
        if path.is_symlink():
            report.add(NOTE, name, f"is a link to {os.readlink(path)}")
        try:
            with open_regular(path) as f:
                stat = os.fstat(f.fileno())
        except OSError as e:
            report.add(PROBLEM, name, f"cannot be opened: {e.strerror}")
            continue
        same = seen.setdefault((stat.st_dev, stat.st_ino), name)
        if same != name:
            report.add(PROBLEM, name, f"is the same file as {same}: it would be trained on twice")
            continue
        sizes[i] = stat.st_size
    for link in _folder_links(folder):
        report.add(NOTE, link, f"is a link to the folder {os.readlink(folder / link)}")
    return sizes


def _folder_links(folder: Path) -> Iterator[str]:
    left = [str(folder)]
    while left:  # `os.walk` is recursive, and folders may nest deeper than Python's recursion limit
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                elif entry.is_dir():
                    yield Path(entry.path).relative_to(folder).as_posix()


def _check_range(job: _Job) -> _Result:
    """For a worker process."""
    try:
        found = Scanner(job.part, job.vocab_size).run()
    except OSError as e:
        return _Result(job.file, ScanResult(), "", f"cannot be read: {e.strerror}")
    meta = ""
    if not found.num_problems:
        with contextlib.suppress(DataError):  # reported once per file, by `_check_file`
            meta = compare_with_meta(MetaView(job.part.path), job.part, found.table())
    if not job.keep_rows:
        found.rows = []
    return _Result(job.file, found, meta, "")


def compare_with_meta(meta: MetaView, part: ByteRange, rows: npt.NDArray[np.int64]) -> str:
    """How the meta contradicts the documents that begin in a byte range; empty if it does not. For metas in order."""
    stored = meta.between(part.begin, part.end)
    n = min(len(stored), len(rows))
    differ = np.flatnonzero((stored[:n] != rows[:n]).any(axis=1))
    i = int(differ[0]) if len(differ) else n
    if i == len(stored) == len(rows):
        return ""
    here, there = (found[i].tolist() if i < len(found) else (math.inf, 0) for found in (rows, stored))
    if here[0] == there[0]:
        return f"byte {here[0]}: a document of {here[1]} tokens, {there[1]} in the meta"
    if here[0] < there[0]:
        return f"byte {here[0]}: a document that is not in the meta"
    return f"byte {there[0]}: the meta has a document there, the text does not"


def _check_file(
    path: Path, name: str, results: Iterable[_Result], report: CheckReport, fix: bool, vocab_size: int | None
) -> bytes:
    """Add the results of one file to the report, and fix its meta. Returns a hash of its text."""
    digest = hashlib.sha256()
    messages: list[str] = []
    wrong, note = _structure(path)
    failures, problems = 0, 0
    large: tuple[int, int] | None = None
    with _NewMeta(path) if fix else contextlib.nullcontext() as new:
        for _, found, meta, failure in results:
            if failure:
                failures += 1
                messages.append(failure)
                continue
            digest.update(found.digest)
            problems += found.num_problems
            messages += [f"byte {byte}: {what}" for byte, what in found.problems]
            wrong = wrong or (meta if not note else "")
            large = large or found.too_large
            if new:
                new.add(found.table())
            report.documents += found.documents
            report.tokens += found.tokens
            report.learned += found.learned
            report.zeros += found.zeros
            report.largest = max(report.largest, found.largest)
        if note:
            report.add(NOTE, name, note)
        for what in messages[:MAX_PROBLEMS]:
            report.add(PROBLEM, name, what)
        if problems > MAX_PROBLEMS:
            report.add(PROBLEM, name, f"… and {problems - MAX_PROBLEMS} more lines")
        if large:
            report.add(PROBLEM, name, f"byte {large[0]}: token id {large[1]} is outside the vocabulary of {vocab_size}")
        if wrong and new and not problems and not failures:
            try:
                new.commit()
                report.add(FIXED, name, f"a new meta was written from the text; {wrong}")
            except OSError as e:
                report.add(PROBLEM, name, f"{wrong}; a new meta cannot be written: {e.strerror}")
        elif wrong:
            report.add(PROBLEM, name, wrong)
    return b"" if failures else digest.digest()


def _structure(path: Path) -> tuple[str, str]:
    """(problem, note) of a meta, as far as they show without the text; empty strings for none."""
    try:
        meta = MetaView(path)
        meta.check()
    except DataError as e:
        return e.what, ""
    return "", "" if meta.in_order else "the rows of the meta are not in the order of the text: not compared with it"


class _NewMeta:
    """Collects rows in a temporary file; `commit` makes it the meta. Without it, no file remains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._pending: PendingFile | None = None

    def __enter__(self) -> "_NewMeta":
        with contextlib.suppress(OSError):  # reported by `commit`
            self._pending = PendingFile(meta_path(self.path), "wb")
            self._pending.file.write(b"\0" * NPY_HEADER)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending is not None:
            self._pending.drop()

    def add(self, rows: npt.NDArray[np.int64]) -> None:
        if self._pending is None:
            return
        self.rows += len(rows)
        try:
            self._pending.file.write(np.ascontiguousarray(rows).data)
        except OSError:
            self._pending.drop()
            self._pending = None

    def commit(self) -> None:
        """Raises: OSError."""
        if self._pending is None:
            raise OSError(0, "no file can be written to the folder")
        text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({self.rows}, 2), }}"
        file = self._pending.file
        file.seek(0)
        file.write(b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little"))
        file.write(text.encode().ljust(NPY_HEADER - 11) + b"\n")
        pending, self._pending = self._pending, None
        pending.commit()


def describe_zeros(zeros: int) -> str:
    """A line for data with tokens of id 0 that are not learned."""
    return (
        f"{zeros:,} tokens of id 0 are not learned although their neighbours are, because 0 has no sign: "
        "learn_zero=True in dataset_cfg learns them (id 0 is '!' in the vocabularies of Llama 3 and Qwen)"
    )


def format_findings(report: CheckReport, colour: Callable[[str, str], str] = lambda kind, text: text) -> Iterator[str]:
    """The report as lines of text."""
    width = max((len(row.file) for row in report.rows), default=0)
    for row in report.rows:
        yield f"{colour(row.kind, f'{row.kind:<7}')}  {row.file:<{min(width, 60)}}  {row.what}"
