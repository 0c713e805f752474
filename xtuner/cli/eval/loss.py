"""xtuner eval loss MODEL DATA: compute mean loss and perplexity on tokenized data."""

import argparse

from xtuner.cli.data.common import FOLDER, add_kind, open_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, checkpoint, or config (its initial weights)")
    parser.add_argument("folder", metavar="data_folder", help=FOLDER)
    parser.add_argument(
        "--max-length", type=int, default=32768, help="longer documents are split into parts of this length"
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help="save results per data file, to continue after an interruption (default: not saved)",
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="an adapter on MODEL: a checkpoint of a run with LoRA, or a folder of PEFT"
    )
    add_kind(parser)
    parser.set_defaults(seed=1024, min_length=0, data_order=None, file_type=".bin", cache_dir=None)
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from xtuner.core.errors import ConfigError
    from xtuner.dist.process_group import select_device
    from xtuner.train.evaluate import Record, check_record_path, evaluate, open_model

    if args.max_length < 2:
        raise ConfigError("a part needs at least 2 tokens", where=f"--max-length {args.max_length}")
    save = Path(args.save).expanduser() if args.save else None
    if save:
        check_record_path(save)
    documents = open_folder(args)
    model, identity = open_model(args.model, args.cfg_options, select_device(), args.adapter)
    record = Record(save, identity, args.max_length)
    results = evaluate(model, documents, args.max_length, record)
    width = max(len(r.name) for r in results)
    print(f"{'':<{width}}  {'tokens':>12}  {'loss':>8}  {'perplexity':>10}")
    for r in results:
        print(f"{r.name:<{width}}  {r.tokens:>12,}  {r.loss:>8.4f}  {r.perplexity:>10.2f}")
    return 0
