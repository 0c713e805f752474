"""xtuner plan CONFIG: memory, speed and cost of a run on GPUs that need not be here."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--gpus", default="1,8,64", metavar="N,…", help="numbers of GPUs (default: 1,8,64)")
    parser.add_argument("--gpu", default="h100", help="kind: h100 (default), h200, a100, a800, l40s, 4090")
    parser.add_argument(
        "--network",
        default="400g",
        metavar="SPEED",
        help="between nodes, for each GPU, in bits a second (default: 400g)",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens per pack, instead of the config's")
    parser.add_argument("--tokens", metavar="N", help="tokens to train on, as 100B, instead of those of the data")
    parser.add_argument(
        "--host-memory", type=int, default=0, metavar="GIB",
        help="for each GPU, that activations of long documents may use (default: 0)",
    )  # fmt: skip
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import json

    from xtuner.compat.translate import load
    from xtuner.core import log
    from xtuner.core.errors import ConfigError
    from xtuner.engine.gpu_kinds import find_kind
    from xtuner.train.forecast import report
    from xtuner.train.forecast.forecast import Cluster, forecast_all, what_would_fit
    from xtuner.train.forecast.workload import parse_tokens, read_workload
    from xtuner.train.plan import DATASET

    log.setup("WARNING")
    counts, kind = _read_counts(args.gpus), find_kind(args.gpu)
    tokens = parse_tokens(args.tokens) if args.tokens is not None else None
    if args.host_memory < 0 or (args.max_length is not None and args.max_length < 1):
        options = {"--host-memory": args.host_memory, "--max-length": args.max_length}
        option, value = next((name, n) for name, n in options.items() if n is not None and n < (name == "--max-length"))
        raise ConfigError(f"{option} {value} is not a number above 0", where=option)
    cluster = Cluster(kind, _read_network(args.network), args.host_memory * 2**30)
    overrides = list(args.cfg_options)
    config = load(args.config, overrides)
    if args.max_length:
        overrides.append(f"{config.name_in_file(f'{DATASET}.packed_length')}={args.max_length}")
        config = load(args.config, overrides)
    work = read_workload(config, tokens)
    rows, best, lacking = [], [], []
    commands: dict[int, str] = {}
    for gpus in counts:
        found = forecast_all(work, cluster, gpus)
        rows += found
        if found[0].fits:
            best.append(found[0])
            commands[gpus] = report.command(found[0], [args.config], overrides, work.sharers)
        else:
            least = min(found, key=lambda f: f.peak)
            lacking.append(report.format_fit(gpus, cluster, least, what_would_fit(work, cluster, gpus)))
    if args.json:
        print(json.dumps(report.as_json(work, cluster, rows, commands) | {"does_not_fit": lacking}, indent=2))
        return 0 if best else 2
    print(report.describe(work, cluster))
    for gpus in counts:
        print("\n" + report.format_ways([row for row in rows if row.gpus == gpus]))
        if gpus in commands:
            print(f"fastest:  {commands[gpus]}")
    if lacking:
        print("\n" + "\n".join(lacking))
    if best:
        print("\n" + report.format_scaling(best, work.tokens))
    if best and not work.tokens:
        print("\nhours and GPU-hours: give --tokens, as --tokens 100B, or the data")
    return 0 if best else 2


def _read_counts(text: str) -> list[int]:
    from xtuner.core.errors import ConfigError

    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1 or found[-1] > 2**16:
        raise ConfigError(f"--gpus {text} are not numbers of GPUs", where="--gpus", do="as 8 or 1,8,64,1024")
    return found


def _read_network(text: str) -> float:
    """Bytes per second of `400g`, `3.2t`, `100Gbit/s`."""
    import re

    from xtuner.core.errors import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([gt])(?:bit/s|bps|b)?", text.strip().lower())
    speed = float(match[1]) * {"g": 1e9, "t": 1e12}[match[2]] / 8 if match else 0.0
    if not speed:
        raise ConfigError(
            f"--network {text} is not a speed", where="--network", do="as 400g: bits a second of each GPU's share"
        )
    return speed
