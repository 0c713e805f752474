"""Tokenizes files: the entry point for the command and for scripts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from xtuner.core.errors import CheckpointError, DataError
from xtuner.core.log import logger, progress
from xtuner.data.format.writer import PairWriter, remove_leftovers
from xtuner.data.process_pool import map_ordered, usable_workers
from xtuner.data.tokenize.encode_chunk import MAX_MISTAKES, Result, encode_chunk
from xtuner.data.tokenize.encode_record import clear_caches, get_encoder
from xtuner.data.tokenize.plan_jobs import SHOWN, SPLITS, Job, is_done, plan_jobs
from xtuner.data.tokenize.read_chunks import CHUNK, Chunk, read_chunks
from xtuner.data.tokenize.tokenize_settings import TokenizeSettings
from xtuner.data.tokenizer import load_tokenizer


@dataclass
class TokenizeReport:
    files: int = 0
    skipped: int = 0
    documents: int = 0
    tokens: int = 0


def tokenize(
    inputs: list[str],
    output: str,
    settings: TokenizeSettings,
    kind: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    suffixes: Sequence[str] = (),
) -> TokenizeReport:
    """Write `output`/{train,valid}/TYPE/NAME.bin and .bin.meta for each input file.

    Args:
        inputs: files, or folders that are walked in sorted order.
        kind: TYPE; None for `en` (ftdp data: `cn`).
        workers: processes; None for one per usable CPU. The output does not depend on it.
        overwrite: replace existing outputs. Otherwise outputs of the same input and settings are kept, and others are
            an error.
        suffixes: endings of the files selected in a folder; empty for those of the format.
    Raises: ConfigError; DataError with file and line of up to 20 mistakes. Files without mistakes are written, files
        with mistakes are not.
    """
    settings.check()
    workers = usable_workers(workers)
    clear_caches()
    tokenizer = load_tokenizer(settings.tokenizer)
    identity = tokenizer.identity()
    todo, report = [], TokenizeReport()
    refused: list[DataError] = []
    jobs = plan_jobs(inputs, output, settings.for_tokenizer(tokenizer), kind, suffixes)
    settings.require_effect([job.settings for job in jobs])
    for job in jobs:
        get_encoder(job.settings)  # a tokenizer that lacks something is found before anything is written
        try:
            if not overwrite and is_done(job, job.settings.recipe(identity)):
                logger.info(f"{job.name}: complete, made from the same input and settings: skipped")
                report.skipped += 1
                continue
        except DataError as e:
            refused.append(e)
        todo.append(job)
    if refused:
        raise _refusal(refused)
    for folder in {path.parent for job in todo for path in (job.record, *map(job.output, SPLITS))}:
        remove_leftovers(folder)
    try:
        _run(todo, identity, workers, report)
    except OSError as e:
        raise CheckpointError(
            f"the output cannot be written: {e.strerror or e}",
            where=str(e.filename or output),
            do="make room or give another --output, and run the same command again",
        ) from None
    logger.info(
        f"{report.files} files tokenized, {report.skipped} skipped: {report.documents:,} documents, "
        f"{report.tokens:,} tokens"
    )
    return report


def _refusal(refused: list[DataError]) -> DataError:
    if len(refused) == 1:
        return refused[0]
    first = refused[0]
    listed = "".join(f"\n  {e.where}: {e.what.partition(', and ')[2]}" for e in refused[:SHOWN])
    return DataError(f"{len(refused)} outputs exist already:{listed}", why=first.why, do=first.do)


def _run(todo: list[Job], identity: str, workers: int, report: TokenizeReport) -> None:
    sizes = [-(-job.source.stat().st_size // CHUNK) + 1 for job in todo]
    if sum(sizes) - len(sizes) <= 1:
        workers = 1  # starting a worker would take longer than the work
    results = progress(map_ordered(encode_chunk, _chunks(todo), workers), "tokenizing (MiB)", total=sum(sizes))
    mistakes: list[str] = []
    for number, group in groupby(results, key=lambda result: result.job):
        job = todo[number]
        found = _write(job, group, identity, report)
        mistakes += [
            f"{job.source}:{line}: {message}" if line else f"{job.source}: {message}" for line, message in found
        ]
        if len(mistakes) >= MAX_MISTAKES:
            break
    if mistakes:
        shown = mistakes[:MAX_MISTAKES]
        more = ", possibly more" if len(mistakes) >= MAX_MISTAKES else ""
        raise DataError(
            f"{len(shown)} mistake{'s' * (len(shown) > 1)} in the input{more}:\n  " + "\n  ".join(shown),
            why="a file with a mistake is not written",
            do="correct them and run the same command again; finished files are skipped",
        )


def _chunks(todo: list[Job]) -> Iterator[Chunk]:
    for number, job in enumerate(todo):

        def done(sha256: str, job: Job = job) -> None:
            job.sha256 = sha256

        try:
            yield from read_chunks(job.source, number, job.settings, done)
        except OSError as e:
            raise DataError(f"the input cannot be read: {e.strerror}", where=str(job.source)) from None


def _write(job: Job, results: Iterator[Result], identity: str, report: TokenizeReport) -> list[tuple[int, str]]:
    """Write the train and valid output of one file, or neither. Returns its mistakes."""
    mistakes: list[tuple[int, str]] = []
    stats: Counter[str] = Counter()
    with PairWriter(job.output("train")) as train, PairWriter(job.output("valid")) as valid:
        for result in results:
            mistakes += result.mistakes
            stats += result.stats
            if len(mistakes) >= MAX_MISTAKES:
                return mistakes
            if not mistakes:
                train.write(result.train)
                valid.write(result.valid)
        documents = train.documents + valid.documents
        if not documents and not mistakes:
            mistakes = [(0, "no document in it: " + ("it is empty" if not stats["records"] else "all texts are empty"))]
        if mistakes:
            return mistakes
        recipe = job.settings.recipe(identity)
        job.write_record(recipe, done=False)  # until the next record, old and new output files may be mixed
        outputs: dict[str, Any] = {}
        for writer in (train, valid):
            folder = writer.path.parent.relative_to(job.folder)
            outputs |= {(folder / name).as_posix(): entry for name, entry in writer.commit().items()}
        facts = {"bytes": job.source.stat().st_size, "sha256": job.sha256, "outputs": outputs}
        job.write_record(recipe, done=True, **facts, documents=documents, tokens=train.tokens + valid.tokens)
    _log_result(job, stats, train, valid)
    report.files += 1
    report.documents += documents
    report.tokens += train.tokens + valid.tokens
    return []


def _log_result(job: Job, stats: Counter[str], train: PairWriter, valid: PairWriter) -> None:
    parts = f"{train.documents:,} documents, {train.tokens:,} tokens"
    if job.settings.valid_fraction:
        parts += f"; valid: {valid.documents:,} documents, {valid.tokens:,} tokens"
    logger.info(f"{job.name}.bin: {job.settings.format}, {parts}")
    for key, text in (
        ("empty", "records have no text: skipped"),
        ("cut", f"documents were longer than {job.settings.max_length} tokens: cut there"),
        ("unlearned", "documents have no learned token"),
        ("zeros", "tokens of id 0, which has no sign, are only learned with learn_zero=True in dataset_cfg"),
    ):
        if stats[key]:
            logger.warning(f"{job.name}.bin: {stats[key]:,} {text}")
