"""xtuner status WORK_DIR: what a run is doing now. Exit codes: 73 running, 0 finished, 75 stopped, 1 failed."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="work dir of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def describe_work_dir(work_dir: Path) -> dict[str, Any]:
    """The state of a work dir, {} without starts."""
    from xtuner.tools.run_status import Owner, read_status
    from xtuner.train.checkpoints.work_dir_lock import find_live_owner

    found = find_live_owner(work_dir)
    return read_status(work_dir, Owner(*found) if found else None) or {}


def run(args: argparse.Namespace) -> int:
    import json

    from xtuner.core.errors import ConfigError
    from xtuner.tools.run_status import EXIT_CODES, format_status

    found = describe_work_dir(Path(args.work_dir))
    if not found:
        raise ConfigError(
            "no run here",
            where=args.work_dir,
            do="give the work dir of `xtuner train`: it has a folder of logs for each start",
        )
    print(json.dumps(found, indent=2, allow_nan=True) if args.json else format_status(found))
    return EXIT_CODES[found["state"]]
