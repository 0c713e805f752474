"""What is known of a setting, in one declaration each (settings.py).

`check-cfg`, messages, `xtuner list-cfg --settings`, the reference page (tools/settings_pages.py) and the list of
changes of a resume (train/reporting/config_changes.py) read it. So do the uses: `Config.setting` gives the value, or
the declared default.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from xtuner.config import types
from xtuner.core.errors import ConfigError

ABSENT: Any = object()
NEEDED: Any = object()  # in place of a default: the setting has to be given
# What a value that is not the checkpoint's means for a resume; "not compared": nothing
Resume = Literal["harmless", "changes the result", "impossible", "not compared"]
HARMLESS: Resume = "harmless"
RESULT: Resume = "changes the result"
IMPOSSIBLE: Resume = "impossible"
NOTHING: Resume = "not compared"


@dataclass(frozen=True)
class Only:
    """The values of a setting that are built or make sense; a dict, all that say nothing else of its keys."""

    allowed: tuple[Any, ...]
    why: str
    do: str

    def problem(self, name: str, value: Any) -> ConfigError | None:
        if any(_equal(value, a) for a in self.allowed):
            return None
        return ConfigError(f"{name} = {value!r} is not supported", where=name, why=self.why, do=self.do)


def _equal(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, Mapping):
        return isinstance(value, Mapping) and all(_equal(value.get(k, a), a) for k, a in allowed.items())
    return type(value) is type(allowed) and value == allowed  # 1 == True, but batch_size=True is no batch size


@dataclass(frozen=True)
class Rule:
    """Which values of the right type are accepted; `words` follow `name = value` in the message."""

    accepts: Callable[[Any], bool]
    words: str
    sign: str = ""  # the same for tables
    why: str = ""


@dataclass(frozen=True)
class Setting:
    """
    Args:
        key: dotted path in the config; `*` stands for any part of a part.
        kind: type of its values, as an annotation.
        default: what holds where it is left out.
        help, zh: what it is, in English and Chinese.
        resume: what another value than the checkpoint's means; None: as for what it is a part of.
        rules: which values are accepted.
        of: of a class or function with this name alone.
        built: described as `dict(type=…, …)`.
        only: some values are built; idle: accepted, and why it has no effect.
        harmless: values among which a change is harmless, whatever `resume` says.
        words: in place of the type's, for messages.
    """

    key: str
    kind: Any = Any
    default: Any = None
    help: str = ""
    zh: str = ""
    resume: Resume | None = None
    rules: tuple[Rule, ...] = ()
    of: str = ""
    built: bool = False
    only: Only | None = None
    idle: str = ""
    harmless: tuple[Any, ...] = ()
    words: str = ""

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def old(self) -> bool:
        """Of older tools: accepted, and no more."""
        return not self.help

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.key).replace(r"\*", "[^.]*"))

    def is_meant(self, key: str, kind: str | None) -> bool:
        return bool(self.pattern.fullmatch(key)) and (kind is None or self.of in ("", kind))

    @property
    def type_words(self) -> str:
        return self.words or types.words(self.kind)

    def problem(self, name: str, value: Any, typed: bool = True) -> ConfigError | None:
        """What is wrong with a value. Args: typed: look at its type, too."""
        if self.only and (problem := self.only.problem(name, value)):
            return problem
        if isinstance(value, float) and not math.isfinite(value):
            return None  # reported once, wherever it stands
        if not types.fits(value, self.kind):
            expected = f"expected {self.words}, found {value!r}" if self.words.startswith("dict(") else ""
            what = expected or f"{name} = {value!r} is not {self.type_words}"
            return ConfigError(what, where=name) if typed else None
        broken = next((rule for rule in self.rules if value is not None and not rule.accepts(value)), None)
        return ConfigError(f"{name} = {value!r} {broken.words}", where=name, why=broken.why) if broken else None


class Schema:
    """All settings. Args: below: further ones."""

    def __init__(self, declared: Sequence[Setting], below: "Schema | None" = None) -> None:
        self.declared, self._below = tuple(declared), below

    @property
    def settings(self) -> tuple[Setting, ...]:
        return (*(self._below.settings if self._below else ()), *self.declared)

    def find(self, key: str, kind: str | None = None) -> Setting | None:
        """The declaration of a setting. Args: kind: name of the class whose argument it is; None for any."""
        return next((s for s in self.settings if s.is_meant(key, kind)), None)

    def inside(self, parent: str) -> Iterator[Setting]:
        """Settings directly below a path; "" for those at the top level."""
        return (s for s in self.settings if s.parent == parent)

    def default(self, key: str) -> Any:
        found = self.find(key)
        assert found is not None and found.default is not NEEDED, key  # noqa: PT018
        return found.default

    def require(self, parent: str, **values: Any) -> None:
        """For who is built by arguments of these names. Raises: ConfigError for one that its declaration rejects."""
        for name, value in values.items():
            setting = self.find(f"{parent}.{name}")
            if setting and (problem := setting.problem(name, value)):
                raise ConfigError(problem.what, where=f"{parent}.{name}", why=problem.why)

    def resume(self, key: str, before: Any, now: Any) -> Resume:
        """What a change of a value at `key`, declared or part of something that is, means for a resume."""
        parts = key.split(".")
        for n in range(len(parts), 0, -1):
            found = [s for s in self.settings if s.is_meant(".".join(parts[:n]), None) and s.resume]
            if found:
                one = found[0]
                same = one.harmless and all(value in one.harmless for value in (before, now))
                return HARMLESS if same else one.resume or RESULT
        return NOTHING
