"""The result of running a config file: the values that it assigns, and where each is written."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtuner.config.schema import ABSENT, Schema
from xtuner.config.settings import SCHEMA
from xtuner.core import secrets
from xtuner.core.errors import ConfigError


@dataclass(frozen=True)
class Replacement:
    """A name of an older tool, and our name in its place."""

    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old} → {self.new}"


@dataclass
class Config:
    """The values that a config file assigns at its top level, and where each is written."""

    path: Path
    source: str
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)  # "train_dataloader.sampler.seed" → line
    unused: list[str] = field(default_factory=list)  # names that the file assigns, but does not use
    unread: list[str] = field(default_factory=list)  # overrides of names that the file does not assign or does not use
    names: dict[str, str] = field(default_factory=dict)  # "train_dataloader.dataset" → "train_dataset"
    replaced: list[Replacement] = field(default_factory=list)  # names of older tools
    dropped: dict[str, str] = field(default_factory=dict)  # removed settings → why they have no effect
    unknown: dict[str, ConfigError] = field(default_factory=dict)  # path of an unknown `type` of another tool → error
    schema: Schema = SCHEMA
    # with sequence_parallel_size = "auto", which counts as 1: the config with the number of ranks that is chosen
    with_sharers: Callable[[int], "Config"] | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a dotted path, or `default`."""
        return value_at(self.values, key, default)

    def setting(self, key: str) -> Any:
        """The value of a declared setting, or its default."""
        value = self.get(key, ABSENT)
        return self.schema.default(key) if value is ABSENT else value

    def where(self, key: str) -> str:
        """`file:line key` for messages: the line of the value, or of its nearest parent that has one.

        For `optimizer=dict(lr=lr)` it is the line that assigns `lr`: `file:40 lr (optim_wrapper.optimizer.lr)`.
        """
        written = self.name_in_file(key)
        known = [".".join(written.split(".")[:n]) for n in range(written.count(".") + 1, 0, -1)]
        line = next((f":{self.lines[part]}" for part in known if part in self.lines), "")
        return f"{self.path}{line} {written}" + (f" ({key})" if written != key else "")

    def name_in_file(self, key: str) -> str:
        """The name under which the file assigns the value at `key`, for example `dataset_folder`."""
        for _ in range(10):  # a = b, b = c, …
            parts = key.split(".")
            heads = ((".".join(parts[:n]), parts[n:]) for n in range(len(parts), 0, -1))
            found = next(((self.names[head], rest) for head, rest in heads if head in self.names), None)
            if found is None:
                break
            key = ".".join((found[0], *found[1]))
        return key

    def resolved(self) -> dict[str, Any]:
        """All values as JSON, with dotted names for classes and functions, and `***` for secrets."""
        return {key: secrets.mask(_plain(value), key) for key, value in self.values.items()}


def value_at(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted path, or `default`. Items of lists are numbered: `sources.0.folder`."""
    value: Any = values
    for part in key.split("."):
        if isinstance(value, list | tuple):
            value = {str(i): item for i, item in enumerate(value)}
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)
