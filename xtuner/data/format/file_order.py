"""The token files of a folder in the loader's order: by a sorted walk_files, or by a data-order file."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.foreign_inputs import read_regular, short_repr
from xtuner.core.log import logger

ORDER_FILE = "data_order.txt"
SHOWN = 5  # names in one message
CACHE_FOLDER = ".xtuner-cache"  # next to the data; never contains data files


def require_folder(folder: str | Path) -> Path:
    """The path of a data folder, `~` expanded. Raises: ConfigError unless it is an existing folder."""
    root = Path(os.path.expanduser(folder))
    if not os.path.isdir(root):
        raise ConfigError(
            f"the data folder {'is a file' if os.path.exists(root) else 'does not exist'}",
            where=str(folder),
            do="give the folder that contains your .bin and .bin.meta files, at any depth",
        )
    return root


def no_files_error(folder: Path, file_type: str) -> DataError:
    return DataError(
        f"no {file_type} file in the data folder",
        where=str(folder),
        do=f"give a folder that contains {file_type} and {file_type}.meta files, at any depth",
    )


def walk_files(folder: Path, file_type: str | tuple[str, ...] = ".bin") -> Iterator[str]:
    """Relative POSIX paths of all token files below `folder`: a folder's files by code point, then its sub-folders.

    The order does not depend on the file system. Links are followed, except a link to one of its own parent folders.
    """
    try:
        above = [p.stat() for p in folder.resolve().parents]
    except (OSError, RuntimeError) as e:  # circular links
        raise DataError(f"a folder cannot be read: {e}", where=str(folder)) from None
    # Folders still to be walked, last first: (path below `folder`, identities of the folders above it). A loop, because
    # folders may nest deeper than Python's recursion limit.
    left = [("", tuple((s.st_dev, s.st_ino) for s in above))]
    while left:
        prefix, over = left.pop()
        here = os.path.join(folder, prefix)
        try:
            stat = os.stat(here)
            with os.scandir(here) as entries:
                found = sorted(entries, key=lambda e: e.name)
        except OSError as e:
            raise DataError(f"a folder cannot be read: {e.strerror}", where=str(here)) from None
        identity = (stat.st_dev, stat.st_ino)
        if identity in over:
            logger.warning(f"{here} is a link to one of its parent folders: not followed")
            continue
        folders = []
        for entry in found:
            if entry.name == CACHE_FOLDER:
                continue
            if _is_folder(entry):
                folders.append(entry.name)
            elif entry.name.endswith(file_type):
                yield prefix + entry.name
        left += [(f"{prefix}{name}/", (*over, identity)) for name in reversed(folders)]


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return os.path.isdir(entry)
    except OSError:  # a dangling link counts as a file; opening it raises the error
        return False


def write_order(folder: Path, save_folder: Path, file_type: str = ".bin") -> tuple[Path, int]:
    """Write `save_folder/data_order.txt`. Returns (the file, number of names). Raises: ConfigError, DataError."""
    from xtuner.core.files import atomic_file

    names = list(walk_files(require_folder(folder), file_type))
    if not names:
        raise no_files_error(folder, file_type)
    broken = [n for n in names if "\n" in n or "\r" in n]
    if broken:
        raise DataError("a file name contains a line break", where=repr(broken[0]), do="rename the file")
    with atomic_file(save_folder / ORDER_FILE) as f:
        f.writelines(name + "\n" for name in names)
    return save_folder / ORDER_FILE, len(names)


def read_order(path: str | Path, folder: Path, file_type: str = ".bin") -> list[str]:
    """Files of `folder` in the order of a data-order file, as paths relative to `folder`.

    The order may have been written for a parent folder: entries are resolved from the nearest folder P, starting with
    `folder` itself, for which one of them is a file of `folder`. Entries elsewhere below P are counted and skipped;
    entries in `folder` must exist. A file that is named several times is used as often, as by the reference loader:
    users raise its share this way. Files that are not named are logged, as they are not trained on.

    Raises: ConfigError with the faulty lines.
    """
    path = Path(os.path.expanduser(path))
    path = path / ORDER_FILE if os.path.isdir(path) else path
    entries = _read_entries(path)
    roots = dict.fromkeys((Path(os.path.abspath(folder)), folder.resolve()))  # as given, and with links resolved
    for root, base in ((r, b) for r in roots for b in (r, *r.parents)):
        prefix = "" if base == root else root.relative_to(base).as_posix() + "/"
        inside = {n: e.removeprefix(prefix) for n, e in entries.items() if e.startswith(prefix)}
        if any(os.path.isfile(folder / name) for name in inside.values()):
            break
    else:
        raise ConfigError(
            "no entry of the data order is a file of the data folder, also not relative to one of its parent folders",
            where=f"{path}, line {next(iter(entries))}: {short_repr(next(iter(entries.values())))} (folder {folder})",
            why="it was written for another folder",
            do=f"xtuner data order --data-folder {folder} --save-folder DIR",
        )
    absent = [n for n, name in inside.items() if not os.path.isfile(folder / name)]
    if absent:
        lines = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
        raise ConfigError(
            f"{len(absent)} files of the data order do not exist; the first is {short_repr(inside[absent[0]])}",
            where=f"{path}, lines {lines} (folder {folder})",
            why="packs after a missing file would have other numbers than the order implies",
            do="write the order again, or restore the files",
        )
    if len(entries) > len(inside):
        logger.info(f"{len(entries) - len(inside)} entries of {path} are outside {folder}: skipped")
    named = Counter(inside.values())
    if repeated := [f"{name} {times} times" for name, times in named.items() if times > 1]:
        more = f", … and {len(repeated) - SHOWN} more" if len(repeated) > SHOWN else ""
        logger.info(
            f"{path} names {len(repeated)} of its {len(named)} files more than once; each is used as often as named: "
            f"{', '.join(repeated[:SHOWN])}{more}"
        )
    unnamed = [name for name in walk_files(folder, file_type) if name not in named]
    if unnamed:
        logger.warning(
            f"{len(unnamed)} files of {folder} are not in {path} and not trained on; the first is {unnamed[0]}"
        )
    return list(inside.values())


def _read_entries(path: Path) -> dict[int, str]:
    """Line number → relative path. Raises: ConfigError, also for a path that leaves the folder."""
    try:
        text = read_regular(path).decode("utf-8-sig", "surrogateescape")  # file names may be any bytes
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"the data order cannot be read: {getattr(e, 'strerror', None) or e}",
            where=str(path),
            do="write one with `xtuner data order --data-folder DATA --save-folder DIR`",
        ) from None
    entries: dict[int, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        entry = posixpath.normpath(line)
        if entry.startswith(("/", "../")):
            raise ConfigError(f"the entry {short_repr(line)} leaves its folder", where=f"{path}, line {number}")
        entries[number] = entry
    if not entries:
        raise ConfigError("the data order is empty", where=str(path))
    return entries
