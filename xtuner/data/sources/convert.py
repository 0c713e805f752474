"""`xtuner data convert`: rewrites token files of one kind as files of another.

A worker process reads some documents and encodes them; the main process writes them, in order. The folder of the
results appears when all of it is complete.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import CheckpointError, ConfigError, DataError
from xtuner.core.files import PendingFile, publish, remove_leftovers, remove_tree, temporary_sibling
from xtuner.core.log import progress
from xtuner.data import process_pool
from xtuner.data.format.document_file import DocumentFile
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.format.writer import Block, PairWriter, format_line
from xtuner.data.format.zeros import find_learned
from xtuner.data.sources.document_blocks import Documents, Part, count_parts, is_large, read_part, split_file
from xtuner.data.sources.files import SourceFiles
from xtuner.data.sources.kinds import INTERNEVO
from xtuner.data.sources.megatron_writer import IGNORED, UINT16_IDS, MegatronWriter

TARGETS = {INTERNEVO: ".bin", "megatron": ".bin", "jsonl": ".jsonl"}


@dataclass
class Converted:
    """What has been converted, and the labels that a `.bin` cannot hold."""

    files: int = 0
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    zeros: int = 0  # learned tokens of id 0, which a `.bin` never learns
    unlike: int = 0  # tokens of id 0 for which `learn_zero` says otherwise than their labels
    first: str = ""  # where the first learned 0 is
    label_pairs: list[str] = field(default_factory=list)

    def add(self, part: "_Encoded") -> None:
        self.documents += len(part.lengths)
        self.tokens += int(part.lengths.sum())
        self.learned += part.learned
        if part.zeros and not self.first:
            self.first = part.first
        self.zeros += part.zeros
        self.unlike += part.unlike

    @property
    def is_lossy(self) -> bool:
        """Whether a `.bin` of these has wrong labels with and without `learn_zero`."""
        return bool(self.zeros and self.unlike)


class _Job(NamedTuple):
    part: Part
    target: str
    vocab_size: int | None


class _Encoded(NamedTuple):
    """Documents in the form of the target."""

    name: str
    lengths: Int64s
    learned: int
    zeros: int
    unlike: int
    first: str
    block: Block | None  # lines of text
    arrays: tuple[Int64s, npt.NDArray[np.bool_]] | None  # (ids, learned), for Megatron


def convert(
    source: SourceFiles,
    target: Path,
    to: str,
    vocab_size: int | None = None,
    lossy: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
) -> Converted:
    """Convert all files of a source into the folder `target`, which appears when it is complete.

    Args:
        to: internevo, megatron or jsonl.
        vocab_size: larger or equal ids are rejected; a small one is stored in 16 bits by Megatron's format.
        lossy: accept labels that a `.bin` cannot hold.
        overwrite: replace an existing folder.

    Raises: ConfigError; DataError for faulty files, and for labels that a `.bin` cannot hold; CheckpointError if it
        cannot be written.
    """
    _check_target(source, target, to, overwrite)
    workers = process_pool.usable_workers(workers)
    names = _target_names(source, to)
    remove_leftovers(target)
    temporary = temporary_sibling(target, "tmp")
    found = Converted()
    try:
        temporary.mkdir(parents=True)
        done = _encode(source, to, vocab_size, workers)
        total = sum(map(count_parts, source))  # examines all files first
        for name, parts in groupby(progress(done, "converting", total=total), key=lambda part: part.name):
            _write_file(temporary / names[name], parts, to, vocab_size, found, lossy)
        if not found.documents:
            raise DataError("there are no documents", where=source.location)
        publish(temporary, target)
    except OSError as e:
        raise CheckpointError(
            f"the converted data cannot be written: {e.strerror or e}", where=str(e.filename or target)
        ) from None
    finally:
        remove_tree(temporary)
    return found


def _check_target(source: SourceFiles, target: Path, to: str, overwrite: bool) -> None:
    """Raises: ConfigError."""
    if to == source.kind.name:
        raise ConfigError(f"the data are {to} already", where=source.location, do="give another kind: --to")
    here, there = source.root.resolve(), target.resolve()
    if there == here or there in here.parents:
        raise ConfigError(
            "the results would replace the data that are converted", where=str(target), do="give another folder"
        )
    if here in there.parents and Path(source.location).is_dir():
        raise ConfigError(
            "the target lies in the folder that is converted",
            where=str(target),
            why="it would have files of two kinds",
            do="give another folder",
        )
    if target.exists() and not target.is_dir():
        raise ConfigError("the target is a file", where=str(target), do="give a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(
            "the target folder is not empty", where=str(target), do="give another one, or --overwrite to replace it"
        )


def _target_names(source: SourceFiles, to: str) -> dict[str, str]:
    """The name of each file's result. Raises: ConfigError if two are the same."""
    found: dict[str, str] = {}
    for name in source.names:
        stem = name[: name.rfind(".")] if "." in name.rpartition("/")[2] else name
        other = next((n for n, result in found.items() if result == stem + TARGETS[to]), None)
        if other is not None:
            raise ConfigError(f"{other} and {name} would both become {found[other]}", where=source.location)
        found[name] = stem + TARGETS[to]
    return found


def _encode(source: SourceFiles, to: str, vocab_size: int | None, workers: int) -> Iterator[_Encoded]:
    """All documents, in order. Large blocks are encoded in this process, part by part."""
    for large, group in groupby(source, key=is_large):
        jobs = (_Job(part, to, vocab_size) for file in group for part in split_file(file, source.kind))
        if large:
            yield from chain.from_iterable(map(_encode_part, jobs))
        else:
            yield from chain.from_iterable(process_pool.map_ordered(encode_part, jobs, workers))


def encode_part(job: _Job) -> list[_Encoded]:
    """For a worker process."""
    return list(_encode_part(job))


def _encode_part(job: _Job) -> Iterator[_Encoded]:
    file: DocumentFile = job.part.file
    for documents in read_part(job.part, job.vocab_size):
        zeros, unlike, first = _find_zeros(documents, file) if job.target == INTERNEVO else (0, 0, "")
        block = None if job.target == "megatron" else _to_lines(documents, job.target)
        arrays = (documents.ids, documents.learned) if job.target == "megatron" else None
        learned = int(np.count_nonzero(documents.learned))
        yield _Encoded(file.name, documents.lengths, learned, zeros, unlike, first, block, arrays)


def _find_zeros(documents: Documents, file: DocumentFile) -> tuple[int, int, str]:
    """(learned zeros, zeros that `learn_zero` labels otherwise, where the first learned one is)."""
    lengths, ids, learned = documents
    is_zero = ids == 0
    if not is_zero.any():
        return 0, 0, ""
    borders = np.concatenate(([0], np.cumsum(lengths)))
    by_rule = find_learned(np.where(learned, ids, -ids), borders)
    unlike = int(np.count_nonzero(is_zero & (by_rule != learned)))
    at = np.flatnonzero(is_zero & learned)
    if not len(at):
        return 0, unlike, ""
    i = int(np.searchsorted(borders, at[0], side="right")) - 1
    shown = ", ".join(map(str, ids[borders[i] : borders[i] + 8].tolist()))
    more = ", …" if lengths[i] > 8 else ""
    return len(at), unlike, f"{file.path}, token {at[0] - borders[i]} of the document [{shown}{more}]"


def _to_lines(documents: Documents, to: str) -> Block:
    block, at = Block(), 0
    for count in documents.lengths.tolist():
        ids, learned = documents.ids[at : at + count], documents.learned[at : at + count]
        if to == INTERNEVO:
            line = format_line(np.where(learned, ids, -ids).tolist())
        else:
            labels = "" if learned.all() else f', "labels": {np.where(learned, ids, IGNORED).tolist()}'
            line = f'{{"input_ids": {ids.tolist()}{labels}}}\n'.encode()
        block.add(line, count)
        at += count
    return block


def _write_file(
    path: Path, parts: Iterable[_Encoded], to: str, vocab_size: int | None, found: Converted, lossy: bool
) -> None:
    """Write one file. Raises: DataError as soon as a label is lost, unless `lossy`; OSError."""
    small = vocab_size is not None and vocab_size < UINT16_IDS
    found.files += 1
    with _make_writer(path, to, "<u2" if small else "<i4") as writer:
        for part in parts:
            found.add(part)
            if found.is_lossy and not lossy:
                raise _lost_error(found)
            if part.arrays:
                writer.write(part.lengths, *part.arrays)
            else:
                writer.write(part.block)
        writer.commit()
        if getattr(writer, "has_labels", False):
            found.label_pairs.append(path.name)


def _make_writer(path: Path, to: str, dtype: str) -> Any:
    if to == "megatron":
        return MegatronWriter(path, dtype)
    return PairWriter(path) if to == INTERNEVO else _LineWriter(path)


class _LineWriter:
    """Writes lines of text, in the manner of `PairWriter`."""

    def __init__(self, path: Path) -> None:
        self._pending: PendingFile | None = PendingFile(path, "wb")

    def __enter__(self) -> "_LineWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending is not None:
            self._pending.drop()

    def write(self, block: Block) -> None:
        assert self._pending is not None
        self._pending.file.write(block.data)

    def commit(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        pending.commit()


def _lost_error(found: Converted) -> DataError:
    return DataError(
        "a token of id 0 is learned, and a .bin cannot say so: 0 has no sign",
        where=found.first,
        why="learn_zero=True would learn it, but also other zeros that are not learned here (or the reverse)",
        do="train on the files as they are (load_token_files), convert to jsonl or megatron, or accept it: --lossy",
    )
