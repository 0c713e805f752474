"""Runs targets, for `__main__.py`: `python -m fuzz.child SANDBOX SEED SECONDS TARGET…` (0 seconds: a few inputs).

Writes one line of JSON for each target to stdout. Before an input is read it lies in SANDBOX/last, so that whoever sees
this process die knows of what.
"""

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from fuzz.guard import Guard
from fuzz.targets import Target, targets

ROUND = 100  # inputs of one seed, where seconds count


def main(sandbox: Path, seed: int, seconds: float, names: list[str]) -> None:
    logging.disable(logging.CRITICAL)
    guard = Guard(sandbox)
    known = targets(sandbox)
    for name in names:
        target = known[name]
        guard.may_exec = target.may_exec
        begin = time.monotonic()
        _try(guard, sandbox, target, target.right)  # imports what is imported late
        if name == names[0]:
            guard.limit_memory()
        report = Report(guard, sandbox, target)
        report.take(target.right)
        if report.rejected:
            report.finds["the right input is rejected"] = ("", target.right)
        number = seed
        while True:
            report.explore(ROUND if seconds else target.few, number)
            number += 1
            if time.monotonic() - begin >= seconds or len(report.finds) >= 20:
                break
        line = {"target": name, "inputs": report.inputs, "rejected": report.rejected}
        line["seconds"] = round(time.monotonic() - begin, 1)
        line["finds"] = [[find, text, repr(case)] for find, (text, case) in report.finds.items()]
        print(json.dumps(line), flush=True)


class Report:
    def __init__(self, guard: Guard, sandbox: Path, target: Target) -> None:
        self.guard, self.sandbox, self.target = guard, sandbox, target
        self.inputs = self.rejected = 0
        self.finds: dict[str, tuple[str, Any]] = {}  # name → text, the smallest input that shows it

    def explore(self, examples: int, seed: int) -> None:
        quick = settings(
            max_examples=examples, database=None, deadline=None, phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        hypothesis.seed(seed)(quick(given(self.target.inputs)(self.take)))()

    def take(self, case: Any) -> None:
        found = _try(self.guard, self.sandbox, self.target, case)
        self.inputs += 1
        self.rejected += found == "rejected"
        if isinstance(found, tuple):
            name, text = found
            if name not in self.finds or len(repr(case)) < len(repr(self.finds[name][1])):
                self.finds[name] = text, case


def _try(guard: Guard, sandbox: Path, target: Target, case: Any) -> tuple[str, str] | str | None:
    """A find, "rejected" for one of our errors, or None for a right input."""
    folder = sandbox / "input"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (sandbox / "last").write_text(f"{target.name}\n{case!r}\n", errors="surrogatepass")
    os.chdir(folder)
    if isinstance(case, dict):
        for name, data in case.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    rejected = True

    def action() -> None:
        nonlocal rejected
        target.read(folder, case)
        rejected = False

    found = guard.run(action)
    return found or ("rejected" if rejected else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
