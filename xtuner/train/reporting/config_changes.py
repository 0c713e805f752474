"""Changes of a config and its data between a checkpoint and its resume, and their consequences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.compat.moved import find_current
from xtuner.compat.settings import SCHEMA
from xtuner.config.schema import NOT_COMPARED


@dataclass(frozen=True)
class Change:
    """`kind` is "harmless", "changes the result" or "impossible"."""

    key: str
    before: Any
    now: Any
    kind: str
    setting: str = ""  # the top-level name of the config that changed in the same way: what the user edited

    def __str__(self) -> str:
        change = f"{self.before!r} → {self.now!r}"
        return f"{self.setting}: {change} ({self.key})" if self.setting else f"{self.key}: {change}"


def compare_configs(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Differences of two resolved configs, sorted by key."""
    compared = [s.name for s in SCHEMA.inside("") if s.resume not in (None, NOT_COMPARED)]
    old, new = dict(_flatten(before, compared)), dict(_flatten(now, compared))
    settings = [
        (name, before[name], now[name])
        for name in before.keys() & now.keys()
        if name not in compared and before[name] != now[name]
    ]
    found = []
    for key in sorted(old.keys() | new.keys()):
        values = old.get(key), new.get(key)
        if values[0] != values[1]:
            names = sorted(name for name, *both in settings if tuple(both) == values)
            found.append(Change(key, *values, SCHEMA.resume(key, *values), names[0] if len(names) == 1 else ""))
    return found


def describe_changed_files(before: Any, now: Any) -> str:
    """The difference of two lists of `PackLoader.files` as text; empty if they are equal or cannot be compared."""
    if not isinstance(before, list) or not isinstance(now, list) or before == now:
        return ""
    old, new = ([str(entry).partition(" ")[::2] for entry in files] for files in (before, now))  # (identity, name)
    if [identity for identity, _ in old] == [identity for identity, _ in new]:
        return ""  # only renamed
    if sorted(identity for identity, _ in old) == sorted(identity for identity, _ in new):
        index = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a[0] != b[0])
        return f"the order of files: number {index + 1} was {old[index][1]}, is {new[index][1]}"
    olds, news = {name: identity for identity, name in old}, {name: identity for identity, name in new}
    parts = (
        ("changed", sorted(n for n in olds.keys() & news.keys() if olds[n] != news[n])),
        ("gone", sorted(olds.keys() - news.keys())),
        ("new", sorted(news.keys() - olds.keys())),
    )
    details = [f"{len(names)} {what} ({_first_names(names)})" for what, names in parts if names]
    return "files: " + (", ".join(details) or "some occur more or less often in the order")


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if names[3:] else "")


def _flatten(config: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    def walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            yield key, find_current(value) if key.endswith(".type") and isinstance(value, str) else value
        else:
            for k, v in items:
                yield from walk(f"{key}.{k}", v)

    for name in names:
        if name in config:
            yield from walk(name, config[name])
