"""xtuner log-dataset CONFIG: show the first packs that a config trains on."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--show", default="text", help="text (default), masked_text, input_ids, labels or all")
    parser.add_argument("--num-packs", type=int, default=1, help="number of packs, in training order (default: 1)")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")


def run(args: argparse.Namespace) -> int:
    from itertools import islice

    from xtuner.cli.data.show import print_packs
    from xtuner.compat.translate import load
    from xtuner.config.build import build
    from xtuner.config.check import check
    from xtuner.core import log
    from xtuner.data.loading.loader import PackLoader
    from xtuner.data.loading.sampler import Position
    from xtuner.data.packing.pack import PackedDataset
    from xtuner.train.plan import require_possible_mixture

    log.setup("WARNING")
    config = load(args.config, args.cfg_options)
    check(config)
    data = build(config.values["train_dataloader"]["dataset"], "train_dataloader.dataset")
    if isinstance(data, PackedDataset):
        data = data.with_packs_per_iteration(config.setting("optim_wrapper.accumulative_counts"))
        require_possible_mixture(config, data)
    sampler = build(config.values["train_dataloader"]["sampler"], "train_dataloader.sampler", dataset=data)
    tokenizer = build(config.values["tokenizer"], "tokenizer") if config.get("tokenizer") else None
    loader = PackLoader(
        data,
        sampler,
        balance=config.setting("train_dataloader.balance"),
        accumulative_counts=config.setting("optim_wrapper.accumulative_counts"),
        reshuffle=config.setting("train_dataloader.reshuffle"),
    )
    if loader.balance > 1:
        each = loader.accumulative_counts
        print(
            f"in the order of a single process with {each} pack{'s' * (each > 1)} per iteration: the packs of "
            f"{loader.balance} iterations are distributed by attention cost (train_dataloader.balance)"
        )
    packs = islice(loader.numbers_from(Position()), max(min(args.num_packs, len(data)), 0))
    return print_packs(data, list(packs), args.show, tokenizer)
