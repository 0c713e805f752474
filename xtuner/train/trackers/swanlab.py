"""Curves and samples in SwanLab (https://swanlab.cn)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner.train.trackers.service import (
    Service,
    describe_run,
    numbers,
    require_package,
)


@dataclass
class SwanLab(Service):
    """
    Args:
        project, workspace, group, tags: where the run is listed.
        name: of the run; None for that of the work dir.
        mode: "cloud"; "local" for files that `swanlab watch` shows; "offline" for files that `swanlab sync` uploads;
            None for SWANLAB_MODE, else cloud if an API key is found, else offline.
        init: other arguments of `swanlab.init`.
    """

    project: str = "xtuner"
    name: str | None = None
    workspace: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str | None = None
    init: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_package("swanlab", "swanlab>=0.10", "SwanLab")
        if self.mode == "local":
            require_package("swanboard", "swanlab[dashboard]", 'SwanLab with mode="local"')

    def begin(self, folder: Path, config: Mapping[str, Any]) -> str:
        import swanlab

        settings = swanlab.Settings(
            interactive=False,
            terminal=swanlab.Settings.Terminal(proxy_type="none"),  # the log file of the start has the output
            # command line, packages and git: ours are in `config`, without secrets
            probe=swanlab.Settings.Probe(runtime=False, requirements=False, git=False),
        )
        given = {
            "project": self.project, "name": self.name or folder.parent.name, "workspace": self.workspace,
            "group": self.group, "tags": self.tags, "id": self.run_id, "resume": "allow",
            "log_dir": str(folder / "swanlog"), "config": describe_run(folder, config), "settings": settings,
            **self.init,
        }  # fmt: skip
        known = swanlab.Settings()
        named = known.mode if "mode" in known.model_fields_set else None
        mode, problem = self.mode or named or ("cloud" if known.api_key else "offline"), ""
        try:
            self._run = swanlab.init(**given, mode=mode)
        except Exception as e:
            if mode not in ("cloud", "online"):
                raise
            mode, problem = "offline", f" ({type(e).__name__}: {e})"
            self._run = swanlab.init(**given, mode=mode)
        if mode == "local":
            return f"recorded locally; to see it: swanlab watch {folder / 'swanlog'}"
        if mode == "offline":
            return f"recorded offline{problem}; to upload it: swanlab sync {self._run.dir}"
        return str(self._run.url)

    def log(self, record: Mapping[str, Any]) -> None:
        curves = numbers(record)
        self._run.log(curves, step=int(curves.pop("iter")))

    def text(self, tag: str, value: str, iteration: int) -> None:
        import swanlab

        self._run.log({self.number_text(tag, iteration): swanlab.Text(value)}, step=iteration)

    def close(self) -> None:
        if self.failure:
            self._run.finish(state="crashed", error=self.failure)
        else:
            self._run.finish()
