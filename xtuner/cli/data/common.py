"""Shared by the verbs that open a data folder by its index."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtuner.data.format.folder import TokenizedFolder


def add_shared(parser: argparse.ArgumentParser, cache: str) -> None:
    """`cache`: description of --cache-dir."""
    parser.add_argument("--seed", type=int, default=1024, help="seed, as in the config (default: 1024)")
    parser.add_argument("--min-length", type=int, default=0, help="min_length, as in the config (default: 0)")
    parser.add_argument("--data-order", help="data_order.txt (default: folders in sorted order)")
    parser.add_argument("--file-type", default=".bin", help="suffix of the token files (default: .bin)")
    parser.add_argument("--cache-dir", metavar="DIR", help=f"{cache} (default: next to the data)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def open_folder(args: argparse.Namespace) -> "TokenizedFolder":
    """Open the data folder of `args`. Raises: ConfigError, DataError."""
    from xtuner.core.errors import ConfigError
    from xtuner.data.format.folder import load_intern_repo_tokenized_dataset

    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"seed is {args.seed}, not in 0 … 2^32 - 1", where="--seed")
    return load_intern_repo_tokenized_dataset(
        args.folder, args.min_length, args.data_order, args.file_type, args.cache_dir
    )
