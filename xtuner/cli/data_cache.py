"""xtuner data cache FOLDER: index and token caches made before a run, so that it starts at once and parses nothing."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of .bin and .bin.meta files")
    parser.add_argument("--cache-dir", metavar="DIR", help="where caches go (default: beside the data)")
    parser.add_argument("--index-only", action="store_true", help="12 bytes a document; no tokens (4 bytes each)")
    parser.add_argument("--seed", type=int, default=1024, help="as in the config (default: 1024)")
    parser.add_argument("--min-length", type=int, default=0, help="as in the config (default: 0)")
    parser.add_argument("--data-order", help="data_order.txt")
    parser.add_argument("--file-type", default=".bin", help="ending of the token files (default: .bin)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")


def run(args: argparse.Namespace) -> int:
    from xtuner.core import log
    from xtuner.core.errors import CheckpointError, ConfigError
    from xtuner.core.log import human_bytes
    from xtuner.data.cache import make
    from xtuner.data.index import load_intern_repo_tokenized_dataset

    log.setup()
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"seed is {args.seed}, not in 0 … 2^32 - 1", where="--seed")
    data = load_intern_repo_tokenized_dataset(
        args.folder, args.min_length, args.data_order, args.file_type, args.cache_dir
    )
    made = make(data, args.seed, not args.index_only, args.workers)
    if made.index:
        size = human_bytes(made.index.stat().st_size)
        print(
            f"index of {data.num_documents:,} documents in {len(data):,} files, seed {args.seed}: {made.index} ({size})"
        )
    if made.tokens:
        print(f"token caches: {made.tokens:,} files ({made.made:,} made now), {human_bytes(made.bytes)}")
    if made.failed or made.index is None:
        name, why = made.failed[0] if made.failed else ("the index", "; ".join(data.place.failures))
        raise CheckpointError(
            f"{len(made.failed or ())} token caches could not be written" if made.failed else "the index is not kept",
            where=name,
            why=why,
            do="make room, or give another --cache-dir; a run goes on without: it reads the text",
        )
    return 0
