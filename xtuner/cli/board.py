"""xtuner board [WORK_DIR ...]: follow and compare runs in a browser, or export them as one HTML file."""

import argparse
from pathlib import Path

DEFAULT = "work_dirs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "work_dirs", nargs="*", metavar="WORK_DIR", help=f"work dirs, or folders of them (default: {DEFAULT})"
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: 6060)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--export", metavar="FILE", help="write one HTML file that needs no server, and end")


def run(args: argparse.Namespace) -> int:
    from xtuner.cli.status import describe_work_dir
    from xtuner.core.errors import ConfigError
    from xtuner.tools.board.server import LOCAL, PORT, Server, write_report
    from xtuner.tools.board.snapshot import Snapshots
    from xtuner.tools.board.work_dirs import Board

    folders = [Path(name) for name in args.work_dirs or [DEFAULT]]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("not a folder", where=str(folder), do="give the work dir of `xtuner train`")
    snapshots = Snapshots(Board(folders, describe_work_dir))
    if args.export:
        target = Path(args.export)
        if not snapshots.list_runs()["runs"]:
            raise ConfigError(
                "no run to export",
                where=", ".join(map(str, folders)),
                do="give the work dir of `xtuner train`; metrics are written from the first log line on",
            )
        number = write_report(snapshots, target)
        print(f"written {target}: {number} run{'s' * (number != 1)}")
        return 0
    with Server(snapshots, args.host, PORT if args.port is None else args.port) as server:
        found = len(snapshots.list_runs()["runs"])
        waiting = "" if found else "; a run appears when it has written its first log line"
        print(f"{server.url} shows {found} run{'s' * (found != 1)}{waiting}. Ctrl-C ends it.", flush=True)
        if args.host != LOCAL:
            print("Anyone who reaches this address can read the metrics, settings and samples.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
