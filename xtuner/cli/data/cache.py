"""xtuner data cache FOLDER: build index and token caches before a run, so that it starts at once."""

import argparse

from xtuner.cli.data.common import FOLDER, add_shared, open_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help=FOLDER)
    parser.add_argument(
        "--index-only", action="store_true", help="only the index (12 bytes per document), no tokens (4 bytes each)"
    )
    add_shared(parser, "folder for caches")


def run(args: argparse.Namespace) -> int:
    from xtuner.core.errors import CheckpointError
    from xtuner.core.log import human_bytes
    from xtuner.data.inspect.build_caches import build_caches

    data = open_folder(args)
    made = build_caches(data, args.seed, not args.index_only, args.workers)
    if made.index:
        size = human_bytes(made.index.stat().st_size)
        print(
            f"index of {data.num_documents:,} documents in {len(data):,} files, seed {args.seed}: {made.index} ({size})"
        )
    if made.tokens:
        print(f"token caches: {made.tokens:,} files ({made.made:,} new), {human_bytes(made.bytes)}")
    if made.failed or made.index is None:
        name, why = made.failed[0] if made.failed else ("the index", "; ".join(data.cache_dirs.failures))
        raise CheckpointError(
            f"{len(made.failed)} token caches could not be written"
            if made.failed
            else "the index could not be written",
            where=name,
            why=why,
            do="free disk space, or give another --cache-dir; without caches a run reads the text",
        )
    return 0
