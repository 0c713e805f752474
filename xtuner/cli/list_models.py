"""xtuner list-models: the models that families know, and the GPUs that train them."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--pattern", default="", help="only models whose hub id or family contains this")
    parser.add_argument("--gpu-memory", type=int, default=80, metavar="GIB", help="of a GPU (default: 80)")
    parser.add_argument("--max-length", type=int, default=32768, metavar="N", help="tokens per pack (default: 32768)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import json

    from xtuner.core import log
    from xtuner.core.errors import ConfigError
    from xtuner.families import FAMILIES
    from xtuner.tools.model_list import format_models, list_models

    log.setup("WARNING")
    for option, value in (("--gpu-memory", args.gpu_memory), ("--max-length", args.max_length)):
        if value < 1:
            raise ConfigError(f"{option} {value} is not a number above 0", where=option)
    found = list(list_models(args.pattern, args.gpu_memory * 2**30, args.max_length))
    if not found:
        raise ConfigError(
            f"no listed model contains {args.pattern!r}",
            where="--pattern",
            do=f"any other size of a known family can be trained as well; families: {', '.join(FAMILIES)}",
        )
    if args.json:
        print(json.dumps([row.as_json() for row in found], indent=2))
        return 0
    print(format_models(found))
    print(
        f"\nfp32, 8bit: GPUs of {args.gpu_memory} GiB that train it with that form of AdamW's state "
        f"(`optim_wrapper.states`), in packs of {args.max_length:,} tokens, by arithmetic. Other sizes of these "
        "families, base or chat, are read from their config.json"
    )
    return 0
