"""Adapters: functions that take the settings of an object of an older tool and return our object.

    @adapter(no_effect={"padding_side": ("packs have no padding", str)}, allowed={"lora": Allowed((None,), "…", "…")})
    def AutoTokenizer(name): …

Settings in `no_effect` are accepted and reported. Settings in `allowed` are rejected for any other value: by `check`
before a run, and by the adapter when it is called. Both are passed to the function only if it has a parameter of that
name. Names may be dotted (`clip_grad.error_if_nonfinite`); `no_effect` may concern one value only (`dtype=float16`).
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from xtuner.config.config import value_at
from xtuner.config.schema import ABSENT, Allowed
from xtuner.core.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Adapter:
    """What `check` reads of an adapter. `unused`: why the whole object has no effect here."""

    unused: str = ""
    no_effect: Mapping[str, str] = field(default_factory=dict)
    allowed: Mapping[str, Allowed] = field(default_factory=dict)

    def find_rejected(self, arguments: Mapping[str, Any]) -> Iterator[ConfigError]:
        for name, allowed in self.allowed.items():
            value = value_at(arguments, name, ABSENT)
            if value is not ABSENT and (problem := allowed.find_problem(name, value)):
                yield problem

    def find_without_effect(self, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(setting, why) for each of `arguments` without effect; an empty setting stands for the whole object."""
        if self.unused:
            yield "", self.unused
        for setting, why in self.no_effect.items():
            name, _, only = setting.partition("=")
            value = value_at(arguments, name, ABSENT)
            if value is not ABSENT and only in ("", str(value)):
                yield name, why


def adapter(
    unused: str = "",
    no_effect: Mapping[str, str | tuple[str, Any]] = MappingProxyType({}),
    allowed: Mapping[str, Allowed] = MappingProxyType({}),
    ignored: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[F], F]:
    """Mark a function as an adapter (see the top of this file).

    Args:
        unused: why the whole object has no effect.
        no_effect: setting → why it has no effect, or (why, type of its values).
        ignored: setting → type of its values; accepted and not reported.
    """
    reasons = {name: why if isinstance(why, str) else why[0] for name, why in no_effect.items()}
    facts = Adapter(unused, reasons, allowed)
    kinds = {name: Any if isinstance(why, str) else why[1] for name, why in no_effect.items()}
    kinds = {
        name: kind for name, kind in (dict.fromkeys(allowed, Any) | kinds | {**ignored}).items() if name.isidentifier()
    }

    def mark(function: F) -> F:
        taken = inspect.signature(function)
        left_out = {name: kind for name, kind in kinds.items() if name not in taken.parameters}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for problem in facts.find_rejected(kwargs):
                raise problem
            return function(*args, **{name: value for name, value in kwargs.items() if name not in left_out})

        function.__annotations__.update(left_out)
        more = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=left_out[n]) for n in left_out
        ]
        call.__dict__["__signature__"] = taken.replace(parameters=[*taken.parameters.values(), *more])
        call.__dict__["xtuner_adapter"] = facts
        return call  # type: ignore[return-value]

    return mark


def find_adapter(kind: Any) -> Adapter | None:
    found = getattr(kind, "xtuner_adapter", None)
    return found if isinstance(found, Adapter) else None
