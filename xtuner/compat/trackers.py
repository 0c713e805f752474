"""Backends of mmengine's visualizer that send figures to a service → trackers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from xtuner.compat.names import written_name
from xtuner.config.config import Config, Replacement
from xtuner.core.system.sysinfo import installed


class _Service(NamedTuple):
    """
    Args:
        package: the library; without it the backend has no effect, as reported.
        fields: `init_kwargs` that are settings of the tracker, by name; all others are passed to the library's `init`.
    """

    package: str
    tracker: str
    fields: Mapping[str, str]


_SHARED = {name: name for name in ("project", "name", "group", "tags", "mode")}
_SERVICES = {
    "WandbVisBackend": _Service("wandb", "xtuner.train.trackers.wandb.Wandb", {**_SHARED, "entity": "entity"}),
    "SwanlabVisBackend": _Service(
        "swanlab",
        "xtuner.train.trackers.swanlab.SwanLab",
        {**_SHARED, "workspace": "workspace", "experiment_name": "name"},
    ),
}
_MODES = {"dryrun": "offline", "run": "online"}  # old names
_AS_IS = "all figures are sent"


def move_trackers(config: Config) -> None:
    """Replace such backends, if their library is installed, by entries of `trackers`."""
    visualizer = config.values.get("visualizer")
    given = visualizer.get("vis_backends") if isinstance(visualizer, Mapping) else None
    backends = [given] if isinstance(given, Mapping) else given
    listed = config.values.get("trackers") or []
    if not isinstance(backends, list | tuple) or not isinstance(listed, list):
        return  # absent, or rejected by a check
    kept, moved = [], []
    for number, spec in enumerate(backends):
        name = written_name(spec.get("type")).rpartition(".")[2] if isinstance(spec, Mapping) else ""
        if tracker := _as_tracker(spec, name):
            moved.append(tracker)
            new = tracker["type"]
            config.replaced = [Replacement(r.old, new) if r.old.endswith(name) else r for r in config.replaced]
            for other in spec.keys() - {"type", "init_kwargs", "save_dir"}:
                config.dropped[f"visualizer.vis_backends.{number}.{other}"] = _AS_IS
        else:
            kept.append(spec)
    if moved:
        config.values["visualizer"] = {**(visualizer or {}), "vis_backends": kept}
        config.values["trackers"] = [*listed, *moved]


def _as_tracker(spec: Any, name: str) -> dict[str, Any] | None:
    service = _SERVICES.get(name)
    more = spec.get("init_kwargs") if service else None
    if not service or not isinstance(more, Mapping | None) or installed(service.package) is None:
        return None
    found: dict[str, Any] = {"type": service.tracker, "init": {}}
    for key, value in (more or {}).items():
        if key == "mode":
            value = _MODES.get(value, value)
            if value == "disabled":
                return None
        if value is None:
            continue
        if key in service.fields:
            found[service.fields[key]] = list(value) if key == "tags" else value
        else:
            found["init"][key] = value
    return found
