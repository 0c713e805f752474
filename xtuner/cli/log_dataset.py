"""xtuner log-dataset CONFIG: the first packs that a config trains on."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--show", default="text", help="text (default), masked_text, input_ids, labels or all")
    parser.add_argument("--num-packs", type=int, default=1, help="how many, in the order of training (default: 1)")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")


def run(args: argparse.Namespace) -> int:
    from xtuner.cli.data_show import print_packs
    from xtuner.config.build import build
    from xtuner.config.check import check
    from xtuner.config.load import load
    from xtuner.core import log

    log.setup("WARNING")
    config = load(args.config, args.cfg_options)
    check(config)
    data = build(config.values["train_dataloader"]["dataset"], "train_dataloader.dataset")
    sampler = build(config.values["train_dataloader"]["sampler"], "train_dataloader.sampler", dataset=data)
    tokenizer = build(config.values["tokenizer"], "tokenizer") if config.get("tokenizer") else None
    return print_packs(data, list(sampler)[: args.num_packs], args.show, tokenizer)
