"""xtuner data show FOLDER: print packs in readable form."""

import argparse
import sys
from typing import TYPE_CHECKING

from xtuner.cli.data.common import FOLDER, add_kind, open_folder
from xtuner.core import log
from xtuner.core.errors import ConfigError, DataError, did_you_mean
from xtuner.core.log import use_colour
from xtuner.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from xtuner.data.packing.pack import PackedDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help=FOLDER)
    parser.add_argument("--pack", type=int, default=0, help="number of the pack (default: 0)")
    parser.add_argument("--tokenizer", help="folder or hub id of the tokenizer (default: show token ids)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens per pack (default: 2048)")
    parser.add_argument("--seed", type=int, default=1024, help="seed of the document order (default: 1024)")
    parser.add_argument(
        "--packing", default="cut", choices=("cut", "whole"), help="packing, as in the config (default: cut)"
    )
    parser.add_argument(
        "--long", default="cut", choices=("cut", "drop", "own"), help="long, as in the config (default: cut)"
    )
    parser.add_argument("--learn-zero", action="store_true", help="learn_zero, as in the config")
    parser.add_argument("--data-order", help="data_order.txt (default: folders in sorted order)")
    add_kind(parser)
    parser.set_defaults(min_length=0, file_type=".bin", cache_dir=None)
    parser.add_argument(
        "--show",
        default=None,
        help="text, masked_text, input_ids, labels or all (default: text with a tokenizer, else input_ids)",
    )


def run(args: argparse.Namespace) -> int:
    from xtuner.data.packing.pack import PackedDataset

    if args.packing == "cut" and args.long != "cut":
        raise ConfigError(
            "packing that cuts documents also cuts long ones", where=f"--long {args.long}", do="give --packing whole"
        )
    log.setup("WARNING")
    data = PackedDataset(open_folder(args), args.max_length, args.seed, packing=args.packing, long=args.long)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    return print_packs(data, [args.pack], args.show or ("text" if tokenizer else "input_ids"), tokenizer)


def print_packs(data: "PackedDataset", packs: list[int], way: str, tokenizer: Tokenizer | None) -> int:
    """Show packs on the terminal; see `show_pack`."""
    from xtuner.data.inspect.show_packs import WAYS, show_pack

    if way not in WAYS:
        raise ConfigError(
            f"unknown form {way!r}.{did_you_mean(way, list(WAYS))}",
            where="--show",
            do=f"choose one of {', '.join(WAYS)}",
        )
    if way in ("text", "masked_text", "all") and tokenizer is None:
        raise ConfigError("text needs a tokenizer", where=f"--show {way}", do="give --tokenizer FOLDER")
    if not len(data):
        raise DataError(
            "there are no packs",
            where=f"{data.documents.location}: {data.documents.num_tokens:,} tokens",
            why=f"no file has {data.packed_length:,} tokens",
            do="give a smaller --max-length",
        )
    for pack in packs:
        for line in show_pack(data, pack, way, tokenizer, use_colour(sys.stdout)):
            print(line)
    return 0
