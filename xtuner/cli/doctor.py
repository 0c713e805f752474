"""xtuner doctor: check versions, GPUs, disk and limits of this machine, and run a small computation on each device."""

import argparse

COLOURS = {"ok": "\033[32m", "note": "\033[33m", "problem": "\033[31m"}
RESET = "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work-dir", default="work_dirs", help="folder for runs, whose disk is checked (default: ./work_dirs)"
    )
    parser.add_argument("--json", action="store_true", help="print the report and all facts of the machine as JSON")


def run(args: argparse.Namespace) -> int:
    import contextlib
    import json
    import sys
    from dataclasses import asdict
    from pathlib import Path

    from xtuner.core.errors import EXIT_CONFIG, EXIT_DONE
    from xtuner.core.log import human_bytes, use_colour
    from xtuner.core.secrets import mask, mask_text
    from xtuner.core.system import sysinfo
    from xtuner.tools.doctor import NOTE, PROBLEM, Row, examine

    colour, watched = use_colour(sys.stdout), use_colour(sys.stderr)

    def step(done: int) -> None:
        if watched:
            print(f"\r\033[Kmeasuring the disk: {human_bytes(done)}", end="", file=sys.stderr, flush=True)

    def show(row: Row) -> None:
        state = f"{COLOURS[row.state]}{row.state:<7}{RESET}" if colour else f"{row.state:<7}"
        print(f"{state}  {row.name:<15}  {row.found}" + (f"\n{'':26}next: {row.do}" if row.do else ""), flush=True)

    rows = []
    for found in examine(Path(args.work_dir), step):
        row = Row(found.name, found.state, mask_text(found.found), mask_text(found.do))
        rows.append(row)
        if watched:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if not args.json:
            show(row)
    problems, notes = (sum(row.state == state for row in rows) for state in (PROBLEM, NOTE))
    if args.json:
        facts = None
        with contextlib.suppress(ImportError, OSError, RuntimeError):  # torch is missing or broken: a check reports it
            facts = mask(sysinfo.facts())
        report = {"ok": not problems, "problems": problems, "notes": notes}
        print(json.dumps(report | {"checks": [asdict(r) for r in rows], "machine": facts}, indent=2))
    else:
        verdict = "training will not work correctly here" if problems else "training will work here"
        print(f"\n{verdict}: problems: {problems}, notes: {notes}")
    return EXIT_CONFIG if problems else EXIT_DONE
