"""Curves and samples in Weights & Biases (https://wandb.ai)."""

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner.train.trackers.service import (
    UPLOADING,
    Service,
    describe_run,
    numbers,
    require_package,
)


@dataclass
class Wandb(Service):
    """
    Args:
        project, entity, group, tags: where the run is listed.
        name: of the run; None for that of the work dir.
        mode: "online", or "offline" for files in the folder of the start, which `wandb sync` uploads; None for
            WANDB_MODE, else online if an API key is found.
        init: other arguments of `wandb.init`.
    """

    project: str = "xtuner"
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str | None = None
    init: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_package("wandb", "wandb>=0.31", "Wandb")

    def begin(self, folder: Path, config: Mapping[str, Any]) -> str:
        import wandb

        settings = wandb.Settings(
            console="off",  # the log file of the start has the output
            silent=True,
            x_disable_meta=True,  # command line, host, git: ours are in `config`, without secrets
            disable_git=True,
            disable_code=True,
            x_save_requirements=False,
            finish_timeout=UPLOADING,
        )
        given = {
            "project": self.project, "name": self.name or folder.parent.name, "entity": self.entity,
            "group": self.group, "tags": self.tags, "id": self.run_id, "resume": "allow", "dir": str(folder),
            "config": describe_run(folder, config), **self.init,
        }  # fmt: skip
        mode, problem = self.mode or os.environ.get("WANDB_MODE") or _find_mode(), ""
        try:
            self._run = wandb.init(**given, mode=mode, settings=settings)
        except Exception as e:
            if mode != "online":
                raise
            mode, problem = "offline", f" ({type(e).__name__}: {e})"
            self._run = wandb.init(**given, mode=mode, settings=settings)
        # not `step=`: after a resume from an earlier checkpoint, steps that are repeated would be rejected
        self._run.define_metric("iter")
        self._run.define_metric("*", step_metric="iter")
        if mode == "online":
            return str(self._run.url)
        return f"recorded offline{problem}; to upload it: wandb sync {Path(self._run.dir).parent}"

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(numbers(record))

    def text(self, tag: str, value: str, iteration: int) -> None:
        import wandb

        shown = wandb.Html(f"<pre>{html.escape(value)}</pre>", inject=False)
        self._run.log({"iter": iteration, self.number_text(tag, iteration): shown})

    def close(self) -> None:
        self._run.finish(exit_code=1 if self.failure else 0)


def _find_mode() -> str:
    import wandb

    try:
        return "online" if wandb.login(verify=False) else "offline"
    except wandb.errors.UsageError:  # no API key, and no terminal to type one
        return "offline"
