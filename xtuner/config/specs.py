"""Find every `dict(type=…)` of a config that `xtuner train` builds."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.config.config import Config

ROOTS = (
    "tokenizer", "model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "default_hooks",
    "custom_hooks", "trackers", "val_dataset", "visualizer",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """`dict(type=kind, …)` at a dotted path of the config."""

    key: str
    kind: Any  # as written: a callable, or its name
    arguments: dict[str, Any]

    def value(self, name: str, kind: Any) -> Any:
        """The value of an argument, or its default in the signature of `kind`."""
        if name in self.arguments:
            return self.arguments[name]
        parameter = inspect.signature(kind).parameters.get(name)
        return parameter.default if parameter and parameter.default is not parameter.empty else None


def find_specs(config: Config) -> Iterator[Spec]:
    """Each dict once, under the path where it occurs first."""
    seen: set[int] = set()
    for root in ROOTS:
        for key, value in walk_values(root, config.values.get(root), seen):
            if isinstance(value, Mapping) and "type" in value and _is_kind(value["type"]):
                yield Spec(key, value["type"], {str(k): v for k, v in value.items() if k != "type"})


def walk_values(key: str, value: Any, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of a value and of all values inside it; each dict and list once."""
    seen = set() if seen is None else seen
    if isinstance(value, Mapping | list | tuple):
        if id(value) in seen:
            return
        seen.add(id(value))
    yield key, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, part in items:
        yield from walk_values(f"{key}.{name}", part, seen)


def _is_kind(value: Any) -> bool:
    """clip_grad=dict(type="norm") and rope_scaling=dict(type="dynamic") are values, not objects to build."""
    return callable(value) or (isinstance(value, str) and "." in value)
