"""A folder of `.bin` files as one sequence: by the sorted walk, or by a data-order file."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import overload

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.log import logger
from xtuner.data.format import BinFile
from xtuner.data.walk import read_order, walk

SHOWN = 20  # problems in one message


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
    names = list(walk(root, file_type)) if data_order_path is None else read_order(data_order_path, root, file_type)
    if not names:
        raise DataError(
            f"no {file_type} file in the data folder",
            where=str(root),
            do="check dataset_folder; `.bin` and `.bin.meta` files are looked for at any depth",
        )
    files = [BinFile(root / name, name, min_length) for name in names]
    _check_all(files)
    kept = [f for f in files if f.num_documents]
    if len(kept) < len(files):
        logger.info(f"{len(files) - len(kept)} files have no document of at least {min_length} tokens: left out")
    return TokenizedFolder(root, kept)


def _check_all(files: list[BinFile]) -> None:
    """Read every meta; one error tells all that is wrong."""
    problems = []
    for file in files:
        try:
            file.check()
            _ = file.table
        except DataError as e:
            problems.append(e)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        shown = "\n".join(f"* {p}" for p in problems[:SHOWN])
        more = f"\n… and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"{len(problems)} of {len(files)} data files are faulty\n{shown}{more}")
