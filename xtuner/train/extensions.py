"""The hooks and trackers of a config: built before everything else, since they need nothing of the run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from xtuner.compat.translate import PRIORITIES
from xtuner.config.build import build, type_name
from xtuner.config.config import Config
from xtuner.config.findings import Findings
from xtuner.core.errors import ConfigError
from xtuner.train.run import Hook
from xtuner.train.trackers import SwanLab, Tracker, Wandb
from xtuner.train.trackers.on_event import OnEvent

T = TypeVar("T")
SERVICES = {"swanlab": SwanLab, "wandb": Wandb}


class Extensions(NamedTuple):
    hooks: list[Hook]
    trackers: list[Tracker]


def add_trackers(config: Config, names: Sequence[str]) -> None:
    """Add the trackers of the command line to those of the config, unless it has them."""
    listed = config.values.get("trackers") or []
    if not names or not isinstance(listed, list):  # a check rejects it
        return
    present = [spec.get("type") for spec in listed if isinstance(spec, Mapping)]
    known = {kind if isinstance(kind, str) else getattr(kind, "__qualname__", "") for kind in present}
    added = [SERVICES[name] for name in dict.fromkeys(names)]
    new = [{"type": kind} for kind in added if not any(name.endswith(kind.__qualname__) for name in known)]
    config.values["trackers"] = [*listed, *new]


def build_extensions(config: Config, found: Findings) -> Extensions:
    """Build them all; mistakes are added to `found`, whose `check` raises them."""
    hooks, trackers = [], []
    named = [(f"default_hooks.{k}", spec) for k, spec in (config.get("default_hooks") or {}).items()]
    for name in ("custom_hooks", "trackers"):
        named += [(f"{name}.{i}", spec) for i, spec in enumerate(config.get(name) or [])]
    for key, spec in named:
        with found.collect(key):
            part = build(spec, key)
            if key.startswith("trackers."):
                tracker = _require(part, Tracker, "a tracker", "xtuner.train.trackers", key, spec)
                if tracker.own_process and not dataclasses.is_dataclass(tracker):
                    raise ConfigError(f"{type_name(spec['type'])} has own_process = True, and is not a dataclass")
                trackers.append(tracker)
            else:
                hook = _require(part, Hook, "a hook", "xtuner.train.hooks", key, spec)
                read_priority(hook)
                hooks.append(hook)
    with found.collect("on_event"):
        if command := config.setting("on_event"):
            trackers.append(OnEvent(command))
    return Extensions(hooks, trackers)


def _require(part: Any, base: type[T], what: str, module: str, key: str, spec: Mapping[str, Any]) -> T:
    if isinstance(part, base):
        return part
    raise ConfigError(
        f"{type_name(spec['type'])} is not {what}",
        where=key,
        why=f"the trainer calls methods of {module}.{base.__name__}",
        do=f"derive the class from it: from {module} import {base.__name__}",
    )


def read_priority(hook: Hook) -> float:
    """The number by which hooks are sorted; a class written for mmengine may use a name. Raises: ConfigError."""
    value: Any = hook.priority
    number = PRIORITIES.get(value.upper()) if isinstance(value, str) else value
    if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
        raise ConfigError(
            f"{type(hook).__name__}.priority = {value!r} is neither a number nor one of {', '.join(PRIORITIES)}",
            why="hooks are called in the order of their priorities, the lowest number first",
            do=f"omit it for {Hook.priority}; our own hooks measure at 10 to 20, log at 80, save at 90",
        )
    return number
