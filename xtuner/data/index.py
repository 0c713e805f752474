"""A folder of `.bin` files: which files, in which order.

The order is either the sorted walk (a folder's files by code point, then its sub-folders, each in the same way) or
what a data-order file says: one path relative to the folder a line.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import overload

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.log import logger
from xtuner.data.format import BinFile, meta_path


class TokenizedFolder:
    """The documents of a folder of tokenized files, as a sequence of `BinFile`s without the empty ones."""

    def __init__(self, folder: Path, files: list[BinFile]) -> None:
        self.folder = folder
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, i: int) -> BinFile: ...
    @overload
    def __getitem__(self, i: slice) -> list[BinFile]: ...
    def __getitem__(self, i: int | slice) -> BinFile | list[BinFile]:
        return self.files[i]

    def __iter__(self) -> Iterator[BinFile]:
        return iter(self.files)

    @property
    def num_documents(self) -> int:
        return sum(f.num_documents for f in self.files)

    @property
    def num_tokens(self) -> int:
        return sum(f.num_tokens for f in self.files)

    def fingerprint(self) -> str:
        """Identity of the contents: size, meta, first and last bytes of each file in order. No names, no times."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.identity())
        return digest.hexdigest()


def load_intern_repo_tokenized_dataset(
    folder: str | Path,
    min_length: int = 0,
    data_order_path: str | Path | None = None,
    file_type: str = ".bin",
) -> TokenizedFolder:
    """Index a folder of tokenized files. No text is read.

    Args:
        folder: holds `*.bin` and `*.bin.meta`, at any depth.
        min_length: documents with fewer tokens are left out; files that have none left, too.
        data_order_path: a file with one relative path a line; None for the sorted walk.
        file_type: ending of the token files.

    Raises: ConfigError for a folder that is not there, DataError for files that are.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(
            "the data folder is not there" if not root.exists() else "the data folder is a file",
            where=f"dataset_folder = {str(folder)!r}",
            do="set dataset_folder in the config to the folder that holds your .bin and .bin.meta files",
        )
    names = list(walk(root, file_type)) if data_order_path is None else read_data_order(data_order_path, root)
    if not names:
        raise DataError(
            f"no {file_type} file in the data folder",
            where=str(root),
            do="check dataset_folder; `.bin` and `.bin.meta` files are looked for at any depth",
        )
    files = [BinFile(root / name, name, min_length) for name in names]
    missing = [f.name for f in files if not meta_path(f.path).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files have no meta: " + ", ".join(missing[:5]),
            where=str(meta_path(root / missing[0])),
            why="the meta says where each document begins",
            do="write these files again, or remove them from the folder",
        )
    kept = [f for f in files if f.num_documents]
    if len(kept) < len(files):
        logger.info(f"{len(files) - len(kept)} files have no document of at least {min_length} tokens: left out")
    return TokenizedFolder(root, kept)


def walk(folder: Path, file_type: str = ".bin") -> Iterator[str]:
    """Relative POSIX paths of all token files below `folder`, in the loader's order on every file system.

    Links are followed; a link to a folder that contains it is skipped, so loops end.
    """
    yield from _walk(folder, "", file_type, ())


def _walk(folder: Path, prefix: str, file_type: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    stat = folder.stat()
    identity = (stat.st_dev, stat.st_ino)
    if identity in above:
        logger.warning(f"{folder} is a link to a folder above it: not followed")
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda e: e.name)
    folders = []
    for entry in found:
        if entry.is_dir():
            folders.append(entry.name)
        elif entry.name.endswith(file_type):
            yield prefix + entry.name
    for name in folders:
        yield from _walk(folder / name, f"{prefix}{name}/", file_type, (*above, identity))


def read_data_order(path: str | Path, folder: Path) -> list[str]:
    """Relative paths that a data-order file lists, in its order.

    Raises: ConfigError when the file is not there or names files that are not.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"the data order cannot be read: {e.strerror}",
            where=f"data_order_path = {str(path)!r}",
            do="write one with `xtuner data order --data-folder DATA --save-folder DIR`",
        ) from None
    names = {n: line.strip() for n, line in enumerate(text.splitlines(), 1) if line.strip()}
    absent = [n for n, name in names.items() if not (folder / name).is_file()]
    if absent:
        raise ConfigError(
            f"{len(absent)} files of the data order are not in the data folder; the first is {names[absent[0]]!r}",
            where=f"{path}, line {absent[0]} (folder {folder})",
            do="write the order again with `xtuner data order --data-folder DATA --save-folder DIR`",
        )
    return list(names.values())
