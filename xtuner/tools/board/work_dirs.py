"""Finds runs below folders and follows their files as they grow. Checkpoints are never opened."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError
from xtuner.core.files import read_json
from xtuner.core.foreign_inputs import open_regular
from xtuner.tools.run_metrics import SCALARS, Part, find_starts, join_starts, parse_record, read_resumed_at
from xtuner.tools.run_status import EVENTS, parse_event

DEPTH = 3  # folders below a given one in which work dirs are looked for
MOST = 500  # work dirs of a board
CHUNK = 16 * 2**20  # bytes read of a file at once

Series = tuple["array[int]", "array[float]"]  # iterations, values


@dataclass
class Lines:
    """A file of lines that grows: `read_new` returns the complete lines since the last call."""

    file: Path
    offset: int = 0

    def read_new(self) -> list[bytes]:
        try:
            with open_regular(self.file) as f:
                f.seek(self.offset)
                new = f.read(CHUNK)
        except OSError:  # not there yet, or on a file system that does not answer: tried again
            return []
        end = new.rfind(b"\n") + 1
        self.offset += end
        return [line for line in new[:end].split(b"\n") if line.strip()]


@dataclass
class Start:
    """One start of a run, as far as it has been read."""

    folder: Path
    curves: dict[str, Series] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0  # lines
    first: int | None = None

    def __post_init__(self) -> None:
        self._scalars, self._events = Lines(self.folder / SCALARS), Lines(self.folder / EVENTS)
        self.resumed_at: int | None = None

    def read_new(self) -> bool:
        """Read what was written since the last call; whether there was anything."""
        if self.resumed_at is None:
            self.resumed_at = read_resumed_at(self.folder)
        changed = False
        while lines := self._scalars.read_new():
            changed = True
            for line in lines:
                self._add(line)
        while lines := self._events.read_new():
            changed = True
            self.events += [event for line in lines if (event := parse_event(line))]
        return changed

    def _add(self, line: bytes) -> None:
        record = parse_record(line)
        if record is None:
            self.damaged += 1
            return
        iteration = record.pop("iter")
        self.first = iteration if self.first is None else min(self.first, iteration)
        for key, value in record.items():
            if key not in self.curves:
                self.curves[key] = array("q"), array("d")
            iterations, values = self.curves[key]
            iterations.append(iteration)
            values.append(value)

    def config(self) -> dict[str, Any]:
        """The settings by dotted path; secrets were masked when the file was written."""
        try:
            found = read_json(self.folder / "config.json")
        except CheckpointError:
            return {}
        return flatten(found) if isinstance(found, dict) else {}


@dataclass
class RunFiles:
    """A run: one or more starts of a work dir."""

    id: str
    work_dir: Path
    name: str
    parts: list[tuple[Start, int | None]]  # a start, and the last iteration of it that counts
    current: bool  # the newest of its work dir

    @property
    def newest(self) -> Start:
        return self.parts[-1][0]


class WorkDir:
    """The runs of one work dir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._starts: dict[Path, Start] = {}
        self.version = 0

    def read_new(self) -> None:
        for folder in find_starts(self.folder):
            if folder not in self._starts:
                self._starts[folder] = Start(folder)
                self.version += 1
        newest = list(self._starts.values())
        self.version += sum([start.read_new() for start in newest])

    def runs(self) -> list[list[tuple[Start, int | None]]]:
        """The starts of each run that has records or events, oldest first."""
        starts = [self._starts[folder] for folder in sorted(self._starts)]
        joined: list[list[Part]] = join_starts([s.first for s in starts], [s.resumed_at for s in starts])
        runs = [[(starts[p.start], p.until) for p in run] for run in joined]
        return [run for run in runs if any(s.curves or s.events for s, _ in run)]


class Board:
    """All runs below some folders.

    Args:
        folders: work dirs, or folders that contain work dirs.
        describe: the state of a work dir: see `tools/run_status`.
    """

    def __init__(self, folders: Sequence[Path], describe: Callable[[Path], dict[str, Any]]) -> None:
        self.folders, self.describe = list(folders), describe
        self._work_dirs: dict[Path, WorkDir] = {}

    def read_new(self) -> None:
        for folder in self.folders:
            for work_dir in find_work_dirs(folder):
                if work_dir not in self._work_dirs and len(self._work_dirs) < MOST:
                    self._work_dirs[work_dir] = WorkDir(work_dir)
        for found in self._work_dirs.values():
            found.read_new()

    @property
    def version(self) -> int:
        """Grows with every new line."""
        return sum(w.version for w in self._work_dirs.values())

    def runs(self) -> list[RunFiles]:
        names = short_names(list(self._work_dirs))
        found = []
        for number, work_dir in enumerate(self._work_dirs.values()):
            runs = work_dir.runs()
            for place, parts in enumerate(runs):
                name = names[number] + (f" #{place + 1}" if len(runs) > 1 else "")
                identity = f"{number}.{place}"
                found.append(RunFiles(identity, work_dir.folder, name, parts, current=parts is runs[-1]))
        return found


def find_work_dirs(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The folder itself if it has starts, else the work dirs below it, sorted."""
    if find_starts(folder):
        return [folder.resolve()]
    if depth == 0:
        return []
    try:
        below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "iter_")))
    except OSError:
        return []
    return [found for p in below[: 10 * MOST] for found in find_work_dirs(p, depth - 1)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from all others."""
    names = []
    for folder in folders:
        for length in range(1, len(folder.parts) + 1):
            tail = folder.parts[-length:]
            if sum(other.parts[-length:] == tail for other in folders) == 1:
                break
        names.append("/".join(tail))
    return names


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """`{"a": {"b": [1]}}` → `{"a.b.0": 1}`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= flatten(inner, f"{path}.{key}" if path else str(key))
    return found if items or not path else {path: value}
