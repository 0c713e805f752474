"""xtuner data check FOLDER: check all files against their metas and the format, before a run reads them."""

import argparse

from xtuner.cli.data.common import FOLDER, add_kind, find_kind, read_columns

COLOURS = {"problem": "\033[31m", "note": "\033[33m", "fixed": "\033[32m"}
RESET = "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help=FOLDER)
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="report ids of N and above (default: accept all ids)"
    )
    parser.add_argument(
        "--fix-meta",
        action="store_true",
        help="rebuild missing or wrong metas from valid texts",
    )
    parser.add_argument("--file-type", default=".bin", help="suffix of the token files (default: .bin)")
    add_kind(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    import json
    import sys
    from dataclasses import asdict

    from xtuner.core.errors import EXIT_DATA, EXIT_DONE, ConfigError
    from xtuner.core.log import use_colour
    from xtuner.data.inspect.check_files import check_folder, describe_zeros, format_findings
    from xtuner.data.inspect.check_sources import check_sources
    from xtuner.data.sources.files import find_files
    from xtuner.data.sources.kinds import INTERNEVO

    if args.vocab_size is not None and args.vocab_size < 1:
        raise ConfigError(f"a vocabulary of {args.vocab_size} has no ids", where="--vocab-size")
    kind = find_kind(args, args.folder)
    if kind == INTERNEVO:
        report = check_folder(args.folder, args.vocab_size, args.fix_meta, args.workers, args.file_type)
    else:
        if args.fix_meta:
            raise ConfigError(f"{kind} files have no meta that could be rebuilt", where="--fix-meta")
        report = check_sources(find_files(args.folder, kind, read_columns(args)), args.vocab_size, args.workers)
    if args.json:
        print(json.dumps({**asdict(report), "problems": report.problems}, indent=2))
        return EXIT_DATA if report.problems else EXIT_DONE
    coloured = use_colour(sys.stdout)
    for line in format_findings(report, lambda kind, text: f"{COLOURS[kind]}{text}{RESET}" if coloured else text):
        print(line)
    if report.zeros:
        print(describe_zeros(report.zeros))
    share = f" ({report.learned / report.tokens:.1%} learned)" if report.tokens else ""
    print(
        f"{report.files:,} files, {report.documents:,} documents, {report.tokens:,} tokens{share}, "
        f"largest id {report.largest:,}; problems: {report.problems}"
    )
    return EXIT_DATA if report.problems else EXIT_DONE
