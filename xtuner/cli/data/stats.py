"""xtuner data stats FOLDER: statistics of documents, tokens and packs."""

import argparse

from xtuner.cli.data.common import FOLDER, add_shared, open_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help=FOLDER)
    parser.add_argument("--max-length", type=int, default=32768, metavar="N", help="tokens per pack (default: 32768)")
    parser.add_argument(
        "--ranks", default="8,64,512", help="numbers of ranks to compute the imbalance for (default: 8,64,512)"
    )
    parser.add_argument(
        "--no-text",
        action="store_true",
        help="read only the metas: takes seconds, but gives no share of learned tokens",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page with plots")
    add_shared(parser, "folder for the index")


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from xtuner.core.errors import CheckpointError, ConfigError
    from xtuner.core.files import atomic_file
    from xtuner.core.log import logger
    from xtuner.data.inspect.statistics import compute_statistics, format_statistics
    from xtuner.data.inspect.stats_page import html_page

    if args.max_length < 1:
        raise ConfigError(f"a pack of {args.max_length} tokens is too short", where="--max-length")
    words = [word.strip() for word in args.ranks.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"{args.ranks!r} is not a list of numbers of ranks", where="--ranks", do="e.g. --ranks 8,64")
    data = open_folder(args)
    found = compute_statistics(
        data, args.max_length, args.seed, [int(w) for w in words], not args.no_text, args.workers
    )
    print(json.dumps(found.as_json(), indent=2) if args.json else format_statistics(found))
    if args.html:
        try:
            with atomic_file(Path(args.html).expanduser()) as f:
                f.write(html_page(found))
        except OSError as e:
            raise CheckpointError(f"the page cannot be written: {e.strerror or e}", where=args.html) from None
        logger.info(f"page written to {args.html}")
    return 0
