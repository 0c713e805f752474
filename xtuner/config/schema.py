"""How a setting is declared: once, in settings.py.

The declaration is read by `check-cfg`, by messages, by `xtuner list-cfg --settings`, by the reference page
(tools/settings_pages.py) and by the list of changes at a resume (train/reporting/config_changes.py). Code that uses a
setting calls `Config.setting`, which returns the value or the declared default.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from xtuner.config import types
from xtuner.core.errors import ConfigError, did_you_mean

ABSENT: Any = object()
REQUIRED: Any = object()  # in place of a default: the setting must be given
# What a resume does about a value that differs from the checkpoint's
Resume = Literal["harmless", "changes the result", "impossible", "not compared"]
HARMLESS: Resume = "harmless"
RESULT: Resume = "changes the result"
IMPOSSIBLE: Resume = "impossible"
NOT_COMPARED: Resume = "not compared"


@dataclass(frozen=True)
class Allowed:
    """The only values of a setting that are supported. A dict among them allows every dict with the same items."""

    values: tuple[Any, ...]
    why: str
    do: str

    def find_problem(self, name: str, value: Any) -> ConfigError | None:
        if any(_equal(value, a) for a in self.values):
            return None
        return ConfigError(f"{name} = {value!r} is not supported", where=name, why=self.why, do=self.do)


def _equal(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, Mapping):
        return isinstance(value, Mapping) and all(_equal(value.get(k, a), a) for k, a in allowed.items())
    return type(value) is type(allowed) and value == allowed  # 1 == True, but batch_size=True is a mistake


@dataclass(frozen=True)
class Rule:
    """Which values of the right type are accepted. `message` follows `name = value` in the error."""

    accepts: Callable[[Any], bool]
    message: str
    range: str = ""  # the accepted values, for tables
    why: str = ""
    names: tuple[str, ...] = ()  # the accepted ones, to suggest the nearest


@dataclass(frozen=True)
class Setting:
    """
    Args:
        key: dotted path in the config; `*` matches any characters but a dot.
        kind: type of its values, as an annotation.
        default: value if the setting is left out.
        help, zh: description in English and Chinese; without one it is a setting of older tools only.
        resume: what a value that differs from the checkpoint's means; None: the same as for its parent.
        rules: which values are accepted.
        owner: name of the class or function whose argument it is; "" for any.
        built: written as `dict(type=…, …)`.
        allowed: the supported values, if not all.
        no_effect: why it is accepted without effect.
        harmless: values among which a change is harmless, whatever `resume` says.
        expected: describes the values in messages, in place of the type.
    """

    key: str
    kind: Any = Any
    default: Any = None
    help: str = ""
    zh: str = ""
    resume: Resume | None = None
    rules: tuple[Rule, ...] = ()
    owner: str = ""
    built: bool = False
    allowed: Allowed | None = None
    no_effect: str = ""
    harmless: tuple[Any, ...] = ()
    expected: str = ""

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def is_legacy(self) -> bool:
        """A setting of older tools only."""
        return not self.help

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.key).replace(r"\*", "[^.]*"))

    def matches(self, key: str, kind: str | None) -> bool:
        return bool(self.pattern.fullmatch(key)) and (kind is None or self.owner in ("", kind))

    @property
    def type_text(self) -> str:
        return self.expected or types.describe(self.kind)

    def find_problem(self, name: str, value: Any, typed: bool = True) -> ConfigError | None:
        """What is wrong with a value, if anything. `typed`: check its type also."""
        if self.allowed and (problem := self.allowed.find_problem(name, value)):
            return problem
        if isinstance(value, float) and not math.isfinite(value):
            return None  # reported once, by rules.find_not_finite
        if not types.fits(value, self.kind):
            expected = f"expected {self.expected}, found {value!r}" if self.expected.startswith("dict(") else ""
            what = expected or f"{name} = {value!r} is not {self.type_text}"
            return ConfigError(what, where=name) if typed else None
        broken = next((rule for rule in self.rules if value is not None and not rule.accepts(value)), None)
        if broken is None:
            return None
        near = did_you_mean(value, list(broken.names)) if isinstance(value, str) else ""
        what = f"{name} = {value!r} {broken.message}" + (f".{near}" if near else "")
        return ConfigError(what, where=name, why=broken.why)


class Schema:
    """A list of declared settings, after those of `base`."""

    def __init__(self, declared: Sequence[Setting], base: "Schema | None" = None) -> None:
        self.declared, self._base = tuple(declared), base

    @property
    def settings(self) -> tuple[Setting, ...]:
        return (*(self._base.settings if self._base else ()), *self.declared)

    def find(self, key: str, kind: str | None = None) -> Setting | None:
        """The declaration of a setting; `kind`: name of the class whose argument it is, None for any."""
        return next((s for s in self.settings if s.matches(key, kind)), None)

    def inside(self, parent: str) -> Iterator[Setting]:
        """Settings directly below a path; "" for those at the top level."""
        return (s for s in self.settings if s.parent == parent)

    def default(self, key: str) -> Any:
        found = self.find(key)
        assert found is not None and found.default is not REQUIRED, key  # noqa: PT018
        return found.default

    def require(self, parent: str, **values: Any) -> None:
        """Check a constructor's arguments. Raises: ConfigError for a value that its declaration rejects."""
        for name, value in values.items():
            setting = self.find(f"{parent}.{name}")
            if setting and (problem := setting.find_problem(name, value)):
                raise ConfigError(problem.what, where=f"{parent}.{name}", why=problem.why)

    def resume(self, key: str, before: Any, now: Any) -> Resume:
        """What a change of the value at `key` means for a resume, by its declaration or its nearest parent's."""
        parts = key.split(".")
        for n in range(len(parts), 0, -1):
            found = [s for s in self.settings if s.matches(".".join(parts[:n]), None) and s.resume]
            if found:
                one = found[0]
                same = one.harmless and all(value in one.harmless for value in (before, now))
                return HARMLESS if same else one.resume or RESULT
        return NOT_COMPARED
