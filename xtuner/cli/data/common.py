"""Shared by the verbs that open data folders."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtuner.data.format.folder import TokenizedFolder
    from xtuner.data.sources.columns import Columns
    from xtuner.data.sources.kinds import Kind

FOLDER = "folder of token files: .bin and .bin.meta, or those of another kind"
KINDS = ("auto", "internevo", "megatron", "parquet", "arrow", "jsonl")
_COLUMNS = ("ids", "labels", "mask")
_USED = {"internevo": ("file_type", "learn_zero"), "megatron": ("labels", "mask")}  # options; others have columns
_ABSENT = {**dict.fromkeys(_COLUMNS, "auto"), "file_type": ".bin", "learn_zero": False}


def add_shared(parser: argparse.ArgumentParser, cache: str) -> None:
    """`cache`: description of --cache-dir."""
    parser.add_argument("--seed", type=int, default=1024, help="seed, as in the config (default: 1024)")
    parser.add_argument("--min-length", type=int, default=0, help="min_length, as in the config (default: 0)")
    parser.add_argument("--data-order", help="data_order.txt (default: folders in sorted order)")
    parser.add_argument("--file-type", default=".bin", help="suffix of the token files (default: .bin)")
    parser.add_argument("--cache-dir", metavar="DIR", help=f"{cache} (default: next to the data)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    add_kind(parser)


def add_kind(parser: argparse.ArgumentParser, name: str = "--kind") -> None:
    """Options that say which documents a folder of any kind has, as in `load_token_files`."""
    parser.add_argument(
        name,
        dest="kind",
        default="auto",
        choices=KINDS,
        help="kind of the files; auto (default): by the files, .bin where there are several",
    )
    parser.add_argument(
        "--ids", default="auto", metavar="COLUMN", help="column of token ids; auto (default): input_ids, tokens or ids"
    )
    parser.add_argument(
        "--labels", default="auto", metavar="COLUMN", help="column of labels, or none; auto (default): labels"
    )
    parser.add_argument(
        "--mask",
        default="auto",
        metavar="COLUMN",
        help="column of a mask of 0 and 1, or none; auto (default): loss_mask or mask",
    )


def read_columns(args: argparse.Namespace) -> "Columns":
    """Raises: ConfigError."""
    from xtuner.data.sources.columns import Columns
    from xtuner.data.sources.kinds import NONE

    return Columns(args.ids, *(None if column == NONE else column for column in (args.labels, args.mask)))


def find_kind(args: argparse.Namespace, folder: str, prefer_bin: bool = True) -> "Kind":
    """The kind of the files in a folder, or of one file, which must have a use for all options of `args`.

    Args:
        prefer_bin: see `detect_kind`.

    Raises: ConfigError, DataError.
    """
    from xtuner.data.sources.files import split_location
    from xtuner.data.sources.kinds import detect_kind

    found: Kind = args.kind
    if found == "auto" and (getattr(args, "file_type", ".bin") != ".bin" or "://" in folder):
        found = "internevo"
    if found == "auto":
        found = detect_kind(*split_location(folder), prefer_bin=prefer_bin)
    _require_use(args, found)
    return found


def _require_use(args: argparse.Namespace, kind: "Kind") -> None:
    """Raise ConfigError for an option that has no meaning for files of this kind."""
    from xtuner.core.errors import ConfigError

    for name, absent in _ABSENT.items():
        if getattr(args, name, absent) != absent and name not in _USED.get(kind, _COLUMNS):
            option = f"--{name.replace('_', '-')}"
            kinds = ", ".join(k for k in KINDS[1:] if name in _USED.get(k, _COLUMNS))
            raise ConfigError(f"{option} has no meaning for {kind} files, only for {kinds}", where=option, do="omit it")


def open_folder(args: argparse.Namespace) -> "TokenizedFolder":
    """Open the data folder of `args`. Raises: ConfigError, DataError."""
    from xtuner.core.errors import ConfigError
    from xtuner.data.format.folder import load_intern_repo_tokenized_dataset
    from xtuner.data.sources.kinds import INTERNEVO
    from xtuner.data.sources.load import load_token_files

    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"seed is {args.seed}, not in 0 … 2^32 - 1", where="--seed")
    kind = find_kind(args, args.folder)
    if kind == INTERNEVO:
        return load_intern_repo_tokenized_dataset(
            args.folder, args.min_length, args.data_order, args.file_type, args.cache_dir,
            getattr(args, "learn_zero", False),
        )  # fmt: skip
    columns = read_columns(args)
    return load_token_files(
        args.folder, kind, columns.ids, columns.labels, columns.mask, args.min_length, args.data_order, args.cache_dir
    )
