"""The records of a work dir, joined over the starts of each run.

A run that was stopped and resumed has several `scalars.json`, one per start. They are joined into one curve: a resume
replaces what earlier starts recorded after its checkpoint, since those iterations were repeated. `start.json` records
the checkpoint that a start resumed; for older versions, a start whose first iteration is later than that of the run
before it is treated as a resume.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xtuner.core.errors import CheckpointError
from xtuner.core.files import read_json
from xtuner.core.foreign_inputs import read_regular
from xtuner.core.log import logger

Record = dict[str, Any]

START = "start.json"
SCALARS = "vis_data/scalars.json"
CURVES = ("loss", "val_loss", "lr", "grad_norm", "tokens")
LARGEST = 2**53  # iterations: integers below are exact in a float


class Part(NamedTuple):
    """The records of one start that belong to a run: those up to `until`, all for None."""

    start: int
    until: int | None


def read_runs(work_dir: Path) -> list[list[Record]]:
    """All runs of a work dir, oldest first, each as a list of records; starts without records are skipped.

    Raises: CheckpointError if there are metrics and none of them can be read.
    """
    starts = find_starts(work_dir)
    damaged: list[str] = []
    records: list[list[Record]] = []
    for start in starts:
        found_here, damage = read_records(start / SCALARS)
        records.append(found_here)
        if damage:
            damaged.append(damage)
            logger.warning(damage)
    firsts = [min((r["iter"] for r in own), default=None) for own in records]
    runs = join_starts(firsts, [read_resumed_at(start) for start in starts])
    joined = [[r for p in run for r in records[p.start] if p.until is None or r["iter"] <= p.until] for run in runs]
    found = [run for run in joined if run]
    if damaged and not found:
        raise CheckpointError(
            "none of the metrics can be read",
            where=str(work_dir),
            why="; ".join(damaged[:3]),
            do="restore the files, or plot another work dir",
        )
    return found


def find_starts(work_dir: Path) -> list[Path]:
    """The folders of all starts of a work dir, oldest first."""
    return sorted(
        {p.parent for p in work_dir.glob(f"*/{START}")} | {p.parents[1] for p in work_dir.glob(f"*/{SCALARS}")}
    )


def join_starts(firsts: Sequence[int | None], resumed_at: Sequence[int | None]) -> list[list[Part]]:
    """Which starts form which run, and up to which iteration each of them counts.

    Args:
        firsts: the first recorded iteration of each start, None without records.
        resumed_at: see `read_resumed_at`.
    """
    runs: list[list[Part]] = []
    for number, (first, kept) in enumerate(zip(firsts, resumed_at, strict=True)):
        if kept is None:
            if first is None:
                continue
            begun = next((firsts[p.start] for p in runs[-1] if firsts[p.start] is not None), None) if runs else None
            kept = first - 1 if begun is not None and first > begun else 0  # later: probably a resume
        before = runs.pop() if kept and runs else []
        cut = [Part(p.start, kept if p.until is None else min(kept, p.until)) for p in before]
        runs.append([*cut, Part(number, None)])
    return runs


def read_records(file: Path) -> tuple[list[Record], str]:
    """The records of one start, and a warning about damaged lines, or "".

    An incomplete last line (still being written, or cut off by a kill) is ignored.
    """
    try:
        lines = read_regular(file).split(b"\n")[:-1]
    except FileNotFoundError:
        return [], ""
    except OSError as e:
        return [], f"{file} cannot be read: {e.strerror}"
    found = [parse_record(line) for line in lines if line.strip()]
    records = [{k: r[k] for k in ("iter", *CURVES) if k in r} for r in found if r is not None]
    damaged = len(found) - len(records)
    return records, f"{file}: {damaged} of {len(found)} lines are damaged and were skipped" if damaged else ""


def parse_record(line: bytes) -> Record | None:
    """The numbers of a record; None for a damaged one. Texts and lists are skipped."""
    try:
        record = json.loads(line.decode())
        if type(record["iter"]) is not int or not 0 <= record["iter"] < LARGEST:
            return None
        if any(type(record.get(key)) not in (int, float, type(None)) for key in CURVES):
            return None
        numbers = {key: float(value) for key, value in record.items() if type(value) in (int, float, bool)}
        return numbers | {"iter": record["iter"]}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def read_resumed_at(start: Path) -> int | None:
    """The iteration of the checkpoint that a start resumed, 0 for a new run; None if that is not recorded.

    A resume from another folder's checkpoint counts as a new run of this work dir.
    """
    try:
        facts = read_json(start / START)
        iteration, source = facts["iteration"], facts["resumed_from"]
    except (CheckpointError, KeyError, TypeError):
        return None  # written by an older version, or damaged
    if type(iteration) is not int or iteration < 0:
        return None
    return iteration if isinstance(source, str) and "/" not in source else 0
