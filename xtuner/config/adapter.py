"""Adapters: functions that take the settings of an older tool's object and return ours.

    @adapter(no_work={"padding_side": ("packs have no padding", str)}, only={"lora": Only((None,), "…", "…")})
    def AutoTokenizer(name): …

`no_work` settings are accepted and reported; of `only` settings other values are refused, by `check` before a run and
by the adapter itself when it is called. The function takes them, too, if it has a use for them. Names may have dots,
`clip_grad.error_if_nonfinite`, and `no_work` may be meant for one value, `dtype=float16`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from xtuner.config.config import value_at
from xtuner.config.schema import ABSENT, Only
from xtuner.core.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Adapter:
    """What `check` must know of an adapter. `idle`: why the whole object has no work to do here."""

    idle: str = ""
    no_work: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Only] = field(default_factory=dict)

    def refused(self, arguments: Mapping[str, Any]) -> Iterator[ConfigError]:
        for name, only in self.only.items():
            value = value_at(arguments, name, ABSENT)
            if value is not ABSENT and (problem := only.problem(name, value)):
                yield problem

    def without_work(self, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(setting, why) of those given."""
        if self.idle:
            yield "", self.idle
        for setting, why in self.no_work.items():
            name, _, only = setting.partition("=")
            value = value_at(arguments, name, ABSENT)
            if value is not ABSENT and only in ("", str(value)):
                yield name, why


def adapter(
    idle: str = "",
    no_work: Mapping[str, str | tuple[str, Any]] = MappingProxyType({}),
    only: Mapping[str, Only] = MappingProxyType({}),
    ignored: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[F], F]:
    """Mark a function as an adapter; see above.

    Args:
        no_work: why a setting has no effect, and the type of its values if others are mistakes.
        ignored: further settings that are accepted, and the types of their values.
    """
    reasons = {name: why if isinstance(why, str) else why[0] for name, why in no_work.items()}
    facts = Adapter(idle, reasons, only)
    kinds = {name: Any if isinstance(why, str) else why[1] for name, why in no_work.items()}
    kinds = {
        name: kind for name, kind in (dict.fromkeys(only, Any) | kinds | {**ignored}).items() if name.isidentifier()
    }

    def mark(function: F) -> F:
        taken = inspect.signature(function)
        left_out = {name: kind for name, kind in kinds.items() if name not in taken.parameters}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for problem in facts.refused(kwargs):
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


def adapter_of(kind: Any) -> Adapter | None:
    found = getattr(kind, "xtuner_adapter", None)
    return found if isinstance(found, Adapter) else None
