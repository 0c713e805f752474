"""python xtuner/tools/tokenize_ftdp_datasets.py --processed-dir P --tokenized-dir T --tokenizer-path M

P/DATASET/processed/**.jsonl → T/chatml_llamav13_32k/{train,valid}/cn/DATASET/FILE.bin. Equivalent to
`xtuner data tokenize P --tokenizer M --output T --format ftdp`.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processed-dir", required=True, help="folder with DATASET/processed/**.jsonl")
    parser.add_argument(
        "--tokenized-dir", required=True, help="folder for chatml_llamav13_32k/train/cn/DATASET/FILE.bin"
    )
    parser.add_argument("--tokenizer-path", required=True, help="model folder or hub id")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut conversations to N tokens (default: 32768)")
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options that this script shares with `xtuner data tokenize`."""
    parser.add_argument("--valid-fraction", type=float, default=0.0, metavar="F", help="share of documents for valid/")
    parser.add_argument("--seed", type=int, default=0, help="of the split into train and valid (default: 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")


def run(args: argparse.Namespace) -> int:
    from xtuner.data.tokenize.tokenize_files import tokenize
    from xtuner.data.tokenize.tokenize_settings import OWN_TEMPLATE, TokenizeSettings

    settings = TokenizeSettings(
        tokenizer=args.tokenizer_path,
        format="ftdp",
        template=OWN_TEMPLATE,
        max_length=args.max_length,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
    )
    tokenize([args.processed_dir], args.tokenized_dir, settings, None, args.workers, args.overwrite)
    return 0


if __name__ == "__main__":
    from xtuner.core.command import run_script

    run_script("ftdp data sets → .bin and .bin.meta files", add_arguments, run)
