"""xtuner data stats FOLDER: what is in the data, and what packs of it are like."""

import argparse

from xtuner.cli.data.common import add_shared, opened


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of .bin and .bin.meta files")
    parser.add_argument("--max-length", type=int, default=32768, metavar="N", help="tokens of a pack (default: 32768)")
    parser.add_argument("--ranks", default="8,64,512", help="tell the imbalance over so many (default: 8,64,512)")
    parser.add_argument("--no-text", action="store_true", help="metas alone: seconds, but no learned share")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots, which needs no network")
    add_shared(parser, "where the index is kept")


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from xtuner.core.errors import CheckpointError, ConfigError
    from xtuner.core.files import atomic_file
    from xtuner.core.log import logger
    from xtuner.data.inspect.statistics import compute_statistics, format_statistics
    from xtuner.data.inspect.stats_page import html_page

    if args.max_length < 1:
        raise ConfigError(f"no pack has {args.max_length} tokens", where="--max-length")
    words = [word.strip() for word in args.ranks.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"{args.ranks!r} are no numbers of ranks", where="--ranks", do="e.g. --ranks 8,64")
    data = opened(args)
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
        logger.info(f"the page is in {args.html}")
    return 0
