"""xtuner data stats FOLDER or CONFIG: statistics of documents, tokens and packs; of a mixture, what an epoch takes."""

import argparse
from typing import TYPE_CHECKING

from xtuner.cli.data.common import FOLDER, add_shared, open_folder

if TYPE_CHECKING:
    from xtuner.data.inspect.mixture_statistics import MixtureStats
    from xtuner.data.inspect.statistics import Stats

# options that a config sets itself
OF_FOLDERS = ("max_length", "seed", "min_length", "data_order", "file_type", "kind", "ids", "labels", "mask")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER|CONFIG", help=f"{FOLDER}; or a config")
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
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="overrides of a config")  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="of the run, that take packs; a schedule counts their iterations")  # fmt: skip
    add_shared(parser, "folder for the index")
    parser.set_defaults(defaults={name: parser.get_default(name) for name in OF_FOLDERS})


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from xtuner.core.errors import CheckpointError, ConfigError
    from xtuner.core.files import atomic_file
    from xtuner.core.log import logger
    from xtuner.data.inspect.mixture_statistics import MixtureStats, format_mixture, mixture_page
    from xtuner.data.inspect.statistics import compute_statistics, format_statistics
    from xtuner.data.inspect.stats_page import html_page

    for option, value in (("--max-length", args.max_length), ("--processes", args.processes)):
        if value < 1:
            raise ConfigError(f"{option} {value} is not at least 1", where=option)
    words = [word.strip() for word in args.ranks.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"{args.ranks!r} is not a list of numbers of ranks", where="--ranks", do="e.g. --ranks 8,64")
    ranks = [int(word) for word in words]
    found: Stats | MixtureStats
    if _is_config(args.folder):
        found = _of_config(args, ranks)
    elif args.cfg_options:
        raise ConfigError(f"{args.folder} is not a config", where="--cfg-options", do="give a config, or leave it out")
    elif args.processes != 1:
        raise ConfigError(
            f"{args.folder} is not a config: only the schedule of one depends on the number of processes",
            where="--processes",
            do="leave it out; --ranks gives the numbers of ranks to compute the imbalance for",
        )
    else:
        data = open_folder(args)
        found = compute_statistics(data, args.max_length, args.seed, ranks, not args.no_text, args.workers)
    text = format_mixture(found) if isinstance(found, MixtureStats) else format_statistics(found)
    print(json.dumps(found.as_json(), indent=2) if args.json else text)
    if args.html:
        page = mixture_page(found) if isinstance(found, MixtureStats) else html_page(found)
        try:
            with atomic_file(Path(args.html).expanduser()) as f:
                f.write(page)
        except OSError as e:
            raise CheckpointError(f"the page cannot be written: {e.strerror or e}", where=args.html) from None
        logger.info(f"page written to {args.html}")
    return 0


def _is_config(name: str) -> bool:
    from pathlib import Path

    from xtuner.config.load import shipped_file

    return not Path(name).expanduser().is_dir() and (name.endswith(".py") or shipped_file(name) is not None)


def _of_config(args: argparse.Namespace, ranks: list[int]) -> "Stats | MixtureStats":
    """Raises: ConfigError, DataError."""
    from xtuner.compat.translate import load
    from xtuner.config.check import check
    from xtuner.core.errors import ConfigError
    from xtuner.data.format.cache_dirs import Opening
    from xtuner.data.inspect.mixture_statistics import compute_mixture_statistics
    from xtuner.data.inspect.statistics import compute_statistics
    from xtuner.data.packing.pack import PackedDataset
    from xtuner.train.plan import require_possible_mixture
    from xtuner.train.preflight import DATASET, count_iterations, open_dataset

    for name in OF_FOLDERS:
        if getattr(args, name) != args.defaults[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for folders", where=str(args.folder),
                do="a config sets it: give --cfg-options to change it",
            )  # fmt: skip
    config = load(args.folder, args.cfg_options)
    check(config)
    data = open_dataset(config, Opening(args.cache_dir))
    if not isinstance(data, PackedDataset):
        raise ConfigError(f"{type(data).__name__} is not a PackedDataset", where=config.where(DATASET))
    data = count_iterations(config, data, config.setting("optim_wrapper.accumulative_counts") * args.processes)
    require_possible_mixture(config, data)
    if data.mixture:
        return compute_mixture_statistics(str(config.path), data, ranks, not args.no_text, args.workers)
    return compute_statistics(data.documents, data.packed_length, data.seed, ranks, not args.no_text, args.workers,
                              data.packing, data.long)  # fmt: skip
