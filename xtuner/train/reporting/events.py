"""The events of a run that trackers receive, besides those that the loop itself records."""

import contextlib
import os
import platform
from collections.abc import Iterator

from xtuner.train.run import Run


@contextlib.contextmanager
def record_events(run: Run) -> Iterator[None]:
    """Record the start of a run, and its error if it fails."""
    plan = {"max_iterations": run.max_iterations, "ranks": run.mesh.size}
    run.metrics.event("start", run.state.iteration, **plan, host=platform.node(), pid=os.getpid())
    try:
        yield
    except BaseException as e:
        first, *_ = str(e).splitlines() or [""]
        run.metrics.event("failure", run.state.iteration, error=f"{type(e).__name__}: {first}")
        raise
