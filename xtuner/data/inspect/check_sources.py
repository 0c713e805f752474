"""Checks token files of other kinds than `.bin`, for `xtuner data check`: every document is read once."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from xtuner.core.errors import DataError
from xtuner.core.log import progress
from xtuner.data import process_pool
from xtuner.data.inspect.check_files import PROBLEM, CheckReport
from xtuner.data.sources.document_blocks import Part, count_parts, is_large, read_part, split_file
from xtuner.data.sources.files import SourceFiles


@dataclass
class _Counted:
    """What one part of a file has."""

    name: str
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    largest: int = -1
    digest: bytes = b""
    problem: str = ""


_Job = tuple[Part | _Counted, int | None]  # a part and the size of the vocabulary; or the result of a faulty file


def check_sources(source: SourceFiles, vocab_size: int | None = None, workers: int | None = None) -> CheckReport:
    """Read all files. The first problem of each part of a file (a million tokens, or a block) is reported.

    Args:
        vocab_size: larger or equal ids are problems.
        workers: processes; None for one per usable CPU.
    """
    workers = process_pool.usable_workers(workers)
    report = CheckReport(files=len(source.names))
    faulty, total = _examine(source)
    equal: dict[bytes, list[str]] = defaultdict(list)
    results = progress(_count_all(source, faulty, vocab_size, workers), "checking", total=total)
    for name, parts in groupby(results, key=lambda part: part.name):
        digest, problems, tokens = hashlib.sha256(), 0, 0
        for part in parts:
            report.documents += part.documents
            report.learned += part.learned
            report.largest = max(report.largest, part.largest)
            tokens += part.tokens
            digest.update(part.digest)
            if part.problem:
                problems += 1
                report.add(PROBLEM, name, part.problem)
        report.tokens += tokens
        if tokens and not problems:
            equal[digest.digest()].append(name)
    for first, *others in equal.values():
        for other in others:
            report.add(PROBLEM, other, f"has the same documents as {first}: they would be trained on twice")
    report.rows.sort(key=lambda row: row.file)
    return report


def _examine(source: SourceFiles) -> tuple[dict[str, str], int]:
    """(problems of files that cannot be read at all, number of parts of the others)."""
    faulty: dict[str, str] = {}
    total = 0
    for file in source:
        try:
            total += count_parts(file) + is_large(file)
        except DataError as e:
            faulty[file.name] = _describe(e)
    return faulty, total + len(faulty)


def _describe(e: DataError) -> str:
    return f"{e.what} ({e.where})" if e.where else e.what


def _count_all(source: SourceFiles, faulty: dict[str, str], vocab_size: int | None, workers: int) -> Iterator[_Counted]:
    for large, group in groupby(source, key=lambda f: f.name not in faulty and is_large(f)):
        jobs = (
            job
            for file in group
            for job in (
                [(_Counted(file.name, problem=faulty[file.name]), None)]
                if file.name in faulty
                else ((part, vocab_size) for part in split_file(file, source.kind))
            )
        )
        yield from map(count_part, jobs) if large else process_pool.map_ordered(count_part, jobs, workers)


def count_part(job: _Job) -> _Counted:
    """For a worker process."""
    part, vocab_size = job
    if isinstance(part, _Counted):
        return part
    found, digest = _Counted(part.file.name), hashlib.sha256()
    try:
        for lengths, ids, learned in read_part(part, vocab_size):
            found.documents += len(lengths)
            found.tokens += len(ids)
            found.learned += int(np.count_nonzero(learned))
            found.largest = max(found.largest, int(ids.max(initial=-1)))
            for array in (lengths, ids, learned):
                digest.update(np.ascontiguousarray(array).data)
    except DataError as e:
        found.problem = _describe(e)
    found.digest = digest.digest()
    return found
