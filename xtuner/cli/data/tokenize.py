"""xtuner data tokenize INPUT... --tokenizer FOLDER --output DIR: convert text to .bin and .bin.meta files."""

import argparse

from xtuner.tools.tokenize_ftdp_datasets import add_run_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    both = argparse.BooleanOptionalAction
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, or folders (read in sorted order)")
    parser.add_argument("--tokenizer", required=True, help="model folder or hub id with tokenizer.model or .json")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for train/TYPE/NAME.bin, and valid/ if requested"
    )
    parser.add_argument(
        "--type", metavar="TYPE", help="folder name, e.g. cn, en, code, ja, ar, kaoshi (default: en; ftdp: cn/DATASET)"
    )
    parser.add_argument(
        "--format",
        default="auto",
        help="txt, json, jsonl, alpaca, chat, ftdp; auto (default): by suffix and first record",
    )
    parser.add_argument(
        "--suffix",
        action="append",
        default=[],
        metavar=".ENDING",
        help="read files of a folder with this suffix, e.g. .md; may be repeated (default: those of the format)",
    )
    parser.add_argument("--text-key", default="text", help="key of the text in a json record (default: text)")
    parser.add_argument(
        "--whole-record", action="store_true", help="tokenize the JSON of a record, as InternEvo's tool does"
    )
    parser.add_argument(
        "--template",
        default="auto",
        help="chat template: auto (default) is the one in the tokenizer's folder (tokenizer), else one whose marks the "
        "tokenizer has; internlm2_chat, llama3_chat, …; "
        "or package.module.NAME of your own; internevo writes alpaca records bit for bit as that tool does",
    )
    parser.add_argument(
        "--add-bos",
        action=both,
        help="start each document with the BOS token (default: yes, unless tokenizer_config.json says there is none)",
    )
    parser.add_argument(
        "--add-eos", action=both, help="end each document with the EOS token (default: text yes, chat no)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="truncate conversations to N tokens (default: 32768 for ftdp, else no limit)",
    )
    parser.add_argument(
        "--allow-special",
        action="append",
        default=[],
        metavar="NAME",
        help="special token to recognise in texts, e.g. '<s>'; may be repeated",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    from xtuner.data.tokenize.tokenize_files import tokenize
    from xtuner.data.tokenize.tokenize_settings import TokenizeSettings

    settings = TokenizeSettings(
        tokenizer=args.tokenizer,
        format=args.format,
        text_key=args.text_key,
        whole_record=args.whole_record,
        template=args.template,
        add_bos=args.add_bos,
        add_eos=args.add_eos,
        max_length=args.max_length,
        allow_special=tuple(args.allow_special),
        valid_fraction=args.valid_fraction,
        seed=args.seed,
    )
    tokenize(args.inputs, args.output, settings, args.type, args.workers, args.overwrite, args.suffix)
    return 0
