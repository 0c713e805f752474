"""The JSON that the page receives: its runs, the curves of one, settings and samples."""

from typing import Any

from xtuner.tools.board.curves import MARKS, Curves
from xtuner.tools.board.work_dirs import Board, RunFiles

SAMPLES = 200  # of a run, the newest ones


class Snapshots:
    """Answers the page's requests; keeps joined curves until a file grows."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._runs: dict[str, RunFiles] = {}
        self._curves: dict[str, tuple[int, Curves]] = {}

    def list_runs(self) -> dict[str, Any]:
        """All runs with their state; reads what was written since the last call."""
        self.board.read_new()
        self._runs = {run.id: run for run in self.board.runs()}
        return {"version": self.board.version, "runs": [self._describe(run) for run in self._runs.values()]}

    def show_run(
        self, identity: str, begin: float = 0, end: float = float("inf"), buckets: int = 1000,
        smoothing: float | None = None,
    ) -> dict[str, Any] | None:  # fmt: skip
        """Curves between two iterations, marks, and axes; None for an unknown run."""
        run = self._runs.get(identity)
        if run is None:
            return None
        curves = self._join(run)
        return {"curves": curves.reduce(begin, end, buckets, smoothing), "axes": curves.axes(), "marks": find_marks(run)
                | {"skipped": [{"iter": i} for i in curves.unapplied()]}}  # fmt: skip

    def show_details(self, identity: str) -> dict[str, Any] | None:
        """Settings by dotted path, and samples; None for an unknown run."""
        run = self._runs.get(identity)
        if run is None:
            return None
        samples = [{"iter": e["iter"], "text": str(e.get("text", ""))}
                   for e in counted_events(run) if e["event"] == "sample"]  # fmt: skip
        return {"config": run.newest.config(), "samples": samples[-SAMPLES:]}

    def _join(self, run: RunFiles) -> Curves:
        version = self.board.version
        known = self._curves.get(run.id)
        if known is None or known[0] != version:
            known = self._curves[run.id] = version, Curves(run)
        return known[1]

    def _describe(self, run: RunFiles) -> dict[str, Any]:
        curves = self._join(run)
        state = self.board.describe(run.work_dir) if run.current else {"state": "replaced"}
        found = {"id": run.id, "name": run.name, "folder": str(run.work_dir), "current": run.current}
        found |= {"state": state.get("state", "ended"), "eta": state.get("eta_s"), "host": state.get("host")}
        found |= {"warning": state.get("last_warning"), "max_iterations": state.get("max_iterations")}
        found |= {key: curves.last(key) for key in ("loss", "val_loss", "tokens_per_s", "tokens", "mfu", "memory")}
        found |= {"iteration": curves.last_iteration, "starts": len(run.parts)}
        found["damaged"] = sum(start.damaged for start, _ in run.parts)
        return found


def counted_events(run: RunFiles) -> list[dict[str, Any]]:
    """The events of a run, without those after the checkpoint from which a later start resumed."""
    return [e for start, until in run.parts for e in start.events if until is None or e["iter"] <= until]


def find_marks(run: RunFiles) -> dict[str, list[dict[str, Any]]]:
    """Marks by kind: resumes, stops and failures, saves, and what the run has warned of."""
    events = counted_events(run)
    marks = {"save": [_mark(e) for e in events if e["event"] == "save"][-MARKS:]}
    marks["stop"] = [_mark(e) for start, _ in run.parts for e in start.events if e["event"] in ("stop", "failure")]
    marks |= {
        kind: [_mark(e) for e in events if e["event"] == kind][-MARKS:] for kind in ("spike", "plateau", "slow rank")
    }
    marks["resume"] = [{"iter": start.resumed_at} for start, _ in run.parts[1:] if start.resumed_at is not None]
    return marks


def _mark(event: dict[str, Any]) -> dict[str, Any]:
    text = next((str(event[key]) for key in ("reason", "error", "folder") if event.get(key)), "")
    return {"iter": event["iter"], "text": text[:300], "kind": event["event"]}


def export_all(snapshots: Snapshots, buckets: int) -> dict[str, Any]:
    """Everything that a page without a server shows."""
    listed = snapshots.list_runs()
    runs = {run["id"]: snapshots.show_run(run["id"], buckets=buckets) for run in listed["runs"]}
    details = {run["id"]: snapshots.show_details(run["id"]) for run in listed["runs"]}
    return {**listed, "curves": runs, "details": details}
