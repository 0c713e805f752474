"""The token files of a folder, of any kind, as found by their names: for tools that read each once, from end to end."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xtuner.core.errors import ConfigError
from xtuner.data.format.bin_kind import BinKind
from xtuner.data.format.cache_dirs import CacheDirs
from xtuner.data.format.document_file import DocumentFile, FileKind
from xtuner.data.format.file_order import require_folder, require_local
from xtuner.data.sources.columns import Columns
from xtuner.data.sources.kinds import INTERNEVO, Kind, detect_kind, list_files, make_kind


@dataclass(frozen=True)
class SourceFiles:
    root: Path
    names: list[str]
    kind: FileKind
    location: str  # as given by the user

    def __iter__(self) -> Iterator[DocumentFile]:
        return (self.kind.file(self.root / name, name, 0) for name in self.names)


def split_location(folder: str | Path) -> tuple[Path, str | None]:
    """(folder, name of the only file of it that is meant, or None). Raises: ConfigError if there is none."""
    if "://" in str(folder):
        raise ConfigError(
            "token files of other tools are read from a disk only",
            where=str(folder),
            do="copy them to a disk, or convert them to .bin (xtuner data convert)",
        )
    path = Path(os.path.expanduser(folder))
    return (
        (path.parent, path.name)
        if os.path.isfile(path)
        else (require_local(require_folder(folder), "this kind of files"), None)
    )


def find_files(folder: str | Path, kind: Kind, columns: Columns, learn_zero: bool = False) -> SourceFiles:
    """Raises: ConfigError, DataError."""
    root, only = split_location(folder)
    name = detect_kind(root, only) if kind == "auto" else kind
    names = [only] if only else list_files(name, root, columns)
    cache_dirs = CacheDirs(root, read_only=True)
    if name != INTERNEVO:
        return SourceFiles(root, names, make_kind(name, columns, cache_dirs), str(folder))
    if columns != Columns():
        raise ConfigError("InternEvo's .bin files have no columns", where=str(folder), do="leave these options out")
    return SourceFiles(root, names, BinKind(cache_dirs, learn_zero), str(folder))
