"""What a run is doing now, from the files of its work dir: for `xtuner status` and the board."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from xtuner.core.errors import EXIT_BUG, EXIT_BUSY, EXIT_DONE, EXIT_STOPPED
from xtuner.core.foreign_inputs import open_regular
from xtuner.core.log import human_time
from xtuner.tools.run_metrics import SCALARS, Record, find_starts, parse_record

EVENTS = "events.json"
TAIL = 256 * 1024  # bytes at the end of a file that are read
# state of the newest start → exit code of `xtuner status`
EXIT_CODES = {
    "running": EXIT_BUSY,
    "finished": EXIT_DONE,
    "stopped": EXIT_STOPPED,
    "failed": EXIT_BUG,
    "ended": EXIT_BUG,  # without recording why: killed, or the machine is gone
}
ENDS = {"end": "finished", "stop": "stopped", "failure": "failed"}  # event → state


class Owner(NamedTuple):
    """The live holder of a work dir's lock."""

    host: str
    pid: int | None
    silent: float  # s since it touched the lock


def read_status(work_dir: Path, owner: Owner | None) -> dict[str, Any] | None:
    """The state of the newest start and its latest figures; None if the work dir has no starts.

    Args:
        owner: the live holder of the lock; None if there is none.
    """
    starts = find_starts(work_dir)
    if not starts:
        return None
    events = [e for line in tail(starts[-1] / EVENTS) if (e := parse_event(line))]
    record = _last_record(starts)
    ends = (e["event"] for e in reversed(events) if e["event"] in ("start", *ENDS))
    state = "running" if owner else ENDS.get(next(ends, "start"), "ended")
    plan: dict[str, Any] = next((e for e in reversed(events) if e["event"] == "start"), {})
    found: dict[str, Any] = {"work_dir": str(work_dir), "state": state, "start": starts[-1].name}
    found["iteration"] = max([int(record.get("iter", 0)), *(e["iter"] for e in events)])
    found["max_iterations"] = plan.get("max_iterations")
    for key in ("loss", "loss_smoothed", "tokens_per_s", "mfu", "tokens", "memory"):
        found[key] = record.get(key)
    written = _modified(starts[-1] / SCALARS)
    found["last_record_s_ago"] = round(time.time() - written, 1) if written else None
    eta = record.get("eta")
    found["eta_s"] = max(eta - (time.time() - (written or time.time())), 0) if eta and state == "running" else None
    saves = sorted((int(n), p) for p in work_dir.glob("iter_*.pth") if (n := p.name[5:-4]).isdigit() and p.is_dir())
    found["last_save"] = saves[-1][1].name if saves else None
    found["last_save_s_ago"] = round(time.time() - (_modified(saves[-1][1]) or 0), 1) if saves else None
    found["host"] = owner.host if owner else plan.get("host")
    found["pid"] = owner.pid if owner else plan.get("pid")
    found["ranks"] = plan.get("ranks")
    found["heartbeat_s_ago"] = round(owner.silent, 1) if owner else None
    found["last_warning"] = last_warning(starts[-1])
    found["error"] = next((e.get("error") for e in reversed(events) if e["event"] == "failure"), None)
    return found


def format_status(found: dict[str, Any]) -> str:
    """The status as lines of text."""

    def ago(key: str) -> str:
        return f"{human_time(found[key])} ago"

    where = (f"process {found['pid']} " if found["pid"] else "") + (f"on {found['host']}" if found["host"] else "")
    where += f", {found['ranks']} ranks" if (found["ranks"] or 1) > 1 else ""
    of = f"/{found['max_iterations']}" if found["max_iterations"] else ""
    rate = f"{found['tokens_per_s']:,.0f} tok/s" if found["tokens_per_s"] else ""
    loss = f"{found['loss']:.4f}" if found["loss"] is not None else ""
    if found["loss_smoothed"] is not None:
        loss += f" (smoothed {found['loss_smoothed']:.4f})"
    lines = {
        "state": found["state"] + (f", {where}" if where else ""),
        "heartbeat": ago("heartbeat_s_ago") if found["heartbeat_s_ago"] is not None else "",
        "iteration": f"{found['iteration']}{of}"
        + (f", recorded {ago('last_record_s_ago')}" if found["last_record_s_ago"] is not None else ""),
        "loss": loss,
        "speed": rate + (f", MFU {found['mfu']:.3f}" if found["mfu"] else ""),
        "ETA": human_time(found["eta_s"]) if found["eta_s"] is not None else "",
        "last save": f"{found['last_save']}, {ago('last_save_s_ago')}" if found["last_save"] else "none",
        "warning": found["last_warning"] or "",
        "error": found["error"] or "",
    }
    rows = [f"  {label:<10} {text}" for label, text in lines.items() if text]
    printed = "\n".join([found["work_dir"], *rows])  # a warning may contain what a terminal would execute
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in printed)


def parse_event(line: bytes) -> dict[str, Any] | None:
    """A line of events.json; None for a damaged one."""
    try:
        event = json.loads(line.decode())
        if isinstance(event["event"], str) and type(event["iter"]) is int and type(event["time"]) in (int, float):
            return dict(event)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


def tail(file: Path) -> list[bytes]:
    """The last complete lines of a file, and its first one."""
    try:
        with open_regular(file) as f:
            first = f.readline(TAIL)
            size = f.seek(0, os.SEEK_END)
            f.seek(max(size - TAIL, 0))
            lines: list[bytes] = f.read().split(b"\n")[:-1]
    except OSError:
        return []
    return [first, *lines[1:]]


def last_warning(start: Path) -> str | None:
    """The last warning or error in the log of a start."""
    for line in reversed(tail(start / f"{start.name}.log")):
        text = line.decode(errors="replace")
        date, _, rest = text.partition(",")
        if rest[4:11] in ("WARNING", "ERROR  ") and len(date) == 19:
            return f"{rest[12:]} ({date})"
    return None


def _last_record(starts: list[Path]) -> Record:
    for start in reversed(starts):
        for line in reversed(tail(start / SCALARS)):
            record = parse_record(line)
            if record and "loss" in record:
                return {key: value for key, value in record.items() if math.isfinite(value)}
    return {}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
