"""The token files of a folder in the loader's order: by a sorted walk_files, or by a data-order file."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.foreign_inputs import short_repr
from xtuner.core.log import logger
from xtuner.core.remote.path import AnyPath, RemotePath, list_folder, make_path, open_any

ORDER_FILE = "data_order.txt"
SHOWN = 5  # names in one message
CACHE_FOLDER = ".xtuner-cache"  # next to the data; never contains data files


def require_folder(folder: str | Path) -> AnyPath:
    """The path of a data folder, `~` expanded. Raises: ConfigError unless it is an existing folder, or an address in
    object storage, which is not accessed here."""
    root = make_path(folder)
    if isinstance(root, RemotePath):
        return root
    if not os.path.isdir(root):
        raise ConfigError(
            f"the data folder {'is a file' if os.path.exists(root) else 'does not exist'}",
            where=str(folder),
            do="give the folder that contains your .bin and .bin.meta files, at any depth",
        )
    return root


def require_local(folder: AnyPath, use: str, do: str = "copy the folder to a disk first") -> Path:
    """Raises: ConfigError for a folder in object storage, whose complete text would be read."""
    if isinstance(folder, RemotePath):
        raise ConfigError(f"{use} needs a folder on a disk", where=str(folder), do=do)
    return folder


def no_files_error(folder: AnyPath, file_type: str) -> DataError:
    return DataError(
        f"no {file_type} file in the data folder",
        where=str(folder),
        do=f"give a folder that contains {file_type} and {file_type}.meta files, at any depth",
    )


def walk_files(folder: AnyPath, file_type: str | tuple[str, ...] = ".bin") -> Iterator[str]:
    """Relative POSIX paths of all token files below `folder`: a folder's files by code point, then its sub-folders.

    The order does not depend on the file system. Links are followed, except a link to one of its own parent folders.
    """
    if isinstance(folder, RemotePath):
        yield from _walk_listed(folder, file_type)
        return
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


def _walk_listed(folder: RemotePath, file_type: str | tuple[str, ...]) -> Iterator[str]:
    """`walk_files` of a folder whose objects are listed (core/remote/path.py)."""
    begin = len(f"{folder.url.key}/") if folder.url.key else 0
    names = [key[begin:].split("/") for key in folder.listed if key.endswith(file_type)]
    for parts in sorted(names, key=lambda parts: [(i < len(parts) - 1, part) for i, part in enumerate(parts)]):
        yield "/".join(parts)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return os.path.isdir(entry)
    except OSError:  # a dangling link counts as a file; opening it raises the error
        return False


def write_order(folder: str | Path, save_folder: Path, file_type: str = ".bin") -> tuple[Path, int]:
    """Write `save_folder/data_order.txt`. Returns (the file, number of names). Raises: ConfigError, DataError."""
    from xtuner.core.files import atomic_file

    root = require_folder(folder)
    root = list_folder(root) if isinstance(root, RemotePath) else root
    names = list(walk_files(root, file_type))
    if not names:
        raise no_files_error(root, file_type)
    broken = [n for n in names if "\n" in n or "\r" in n]
    if broken:
        raise DataError("a file name contains a line break", where=repr(broken[0]), do="rename the file")
    with atomic_file(save_folder / ORDER_FILE) as f:
        f.writelines(name + "\n" for name in names)
    return save_folder / ORDER_FILE, len(names)


def read_order(path: str | Path, folder: AnyPath, file_type: str = ".bin") -> list[str]:
    """Files of `folder` in the order of a data-order file, as paths relative to `folder`.

    The order may have been written for a parent folder: entries are resolved from the nearest folder P, starting with
    `folder` itself, for which one of them is a file of `folder`. Entries elsewhere below P are counted and skipped;
    entries in `folder` must exist. A file that is named several times is used as often, as by the reference loader:
    users raise its share this way. Files that are not named are logged, as they are not trained on.

    Raises: ConfigError with the faulty lines.
    """
    found = make_path(path, "data_order_path")
    if isinstance(found, RemotePath):
        found = found if found.name.endswith(".txt") else found / ORDER_FILE
    elif os.path.isdir(found):
        found = found / ORDER_FILE
    entries = _read_entries(found)
    for prefix in _prefixes(folder):
        inside = {n: e.removeprefix(prefix) for n, e in entries.items() if e.startswith(prefix)}
        if any(_is_file(folder / name) for name in inside.values()):
            break
    else:
        raise ConfigError(
            "no entry of the data order is a file of the data folder, also not relative to one of its parent folders",
            where=f"{found}, line {next(iter(entries))}: {short_repr(next(iter(entries.values())))} (folder {folder})",
            why="it was written for another folder",
            do=f"xtuner data order --data-folder {folder} --save-folder DIR",
        )
    absent = [n for n, name in inside.items() if not _is_file(folder / name)]
    if absent:
        lines = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
        raise ConfigError(
            f"{len(absent)} files of the data order do not exist; the first is {short_repr(inside[absent[0]])}",
            where=f"{found}, lines {lines} (folder {folder})",
            why="packs after a missing file would have other numbers than the order implies",
            do="write the order again, or restore the files",
        )
    if len(entries) > len(inside):
        logger.info(f"{len(entries) - len(inside)} entries of {found} are outside {folder}: skipped")
    named = Counter(inside.values())
    if repeated := [f"{name} {times} times" for name, times in named.items() if times > 1]:
        more = f", … and {len(repeated) - SHOWN} more" if len(repeated) > SHOWN else ""
        logger.info(
            f"{found} names {len(repeated)} of its {len(named)} files more than once; each is used as often as named: "
            f"{', '.join(repeated[:SHOWN])}{more}"
        )
    unnamed = [name for name in walk_files(folder, file_type) if name not in named]
    if unnamed:
        logger.warning(
            f"{len(unnamed)} files of {folder} are not in {found} and not trained on; the first is {unnamed[0]}"
        )
    return list(inside.values())


def _prefixes(folder: AnyPath) -> Iterator[str]:
    """What entries of `folder` begin with in an order of itself, of its parent folder, and so on."""
    if isinstance(folder, RemotePath):
        parts = [folder.url.bucket, *folder.url.key.split("/")]
        yield from ("".join(f"{part}/" for part in parts[i:] if part) for i in range(len(parts), -1, -1))
        return
    for root in dict.fromkeys((Path(os.path.abspath(folder)), folder.resolve())):  # as given, and with links resolved
        yield from ("" if base == root else root.relative_to(base).as_posix() + "/" for base in (root, *root.parents))


def _is_file(path: AnyPath) -> bool:
    return path.url.key in path.listed if isinstance(path, RemotePath) else os.path.isfile(path)


def _read_entries(path: AnyPath) -> dict[int, str]:
    """Line number → relative path. Raises: ConfigError, also for a path that leaves the folder."""
    try:
        with open_any(path) as f:
            text = f.read().decode("utf-8-sig", "surrogateescape")  # file names may be any bytes
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
