"""xtuner data convert SRC DST: rewrite token files of one kind as files of another."""

import argparse

from xtuner.cli.data.common import add_kind, find_kind, read_columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder of token files of any kind, or one file")
    parser.add_argument("target", metavar="DST", help="folder for the results; appears when it is complete")
    add_kind(parser, "--from")
    parser.add_argument(
        "--to",
        default=None,
        choices=("internevo", "megatron", "jsonl"),
        help="kind of the results (default: internevo)",
    )
    parser.add_argument(
        "--learn-zero", action="store_true", help="of .bin files: learn id 0, as learn_zero in a config"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="reject ids of N and above; below 65500, Megatron's have 16 bits"
    )
    parser.add_argument("--lossy", action="store_true", help="accept labels of id 0 that a .bin cannot hold")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from xtuner.core.errors import ConfigError
    from xtuner.core.remote.url import is_remote
    from xtuner.data.sources.convert import convert
    from xtuner.data.sources.files import find_files
    from xtuner.data.sources.kinds import INTERNEVO

    if args.vocab_size is not None and args.vocab_size < 1:
        raise ConfigError(f"a vocabulary of {args.vocab_size} has no ids", where="--vocab-size")
    if is_remote(args.target):
        raise ConfigError(
            "the results are written to a disk only",
            where=args.target,
            do="give a folder on a disk, and copy it with the storage's own tool",
        )
    kind = find_kind(args, args.source, prefer_bin=False)
    source = find_files(args.source, kind, read_columns(args), args.learn_zero)
    if args.to is None and source.kind.name == INTERNEVO:
        raise ConfigError("these are .bin files", where=args.source, do="say what to convert them to: --to megatron")
    target, to = Path(args.target).expanduser(), args.to or INTERNEVO
    done = convert(source, target, to, args.vocab_size, args.lossy, args.overwrite, args.workers)
    share = f" ({done.learned / done.tokens:.1%} learned)" if done.tokens else ""
    print(f"{done.files:,} files, {done.documents:,} documents, {done.tokens:,} tokens{share}: {target} ({to})")
    if done.label_pairs:
        print(
            f"{len(done.label_pairs):,} files have tokens that are not learned: their labels are in NAME_labels.bin "
            "and .idx, which xtuner finds by name, and GPT-NeoX reads as label_data_paths; Megatron-LM itself has none"
        )
    if done.zeros and not done.unlike:
        print(
            f"{done.zeros:,} tokens of id 0 are learned, and 0 has no sign in a .bin: train on it with "
            "learn_zero=True, which learns exactly these"
        )
    elif done.zeros:
        print(
            f"{done.zeros:,} tokens of id 0 are no longer learned; learn_zero=True would learn {done.unlike:,} tokens "
            f"otherwise than here. The first: {done.first}"
        )
    return 0
