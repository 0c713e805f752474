"""`dict(type=Class_or_function, key=value, …)` → the object it describes."""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from xtuner.core.errors import ConfigError, did_you_mean

OPENING = "opening"  # argument of what opens data, added by the run wherever it is accepted


def resolve_type(kind: Any, where: str = "") -> Callable[..., Any]:
    """The class or function of `type=`, imported if it is a name.

    Args:
        kind: a class or function, `package.module.name`, or `package.module.Class.name`.
        where: dotted path in the config, for messages.

    Raises: ConfigError.
    """
    if isinstance(kind, str):
        module, _, name = kind.rpartition(".")
        owner, _, last = module.rpartition(".")
        try:
            if last[:1].isupper():  # package.module.Class.method
                kind = getattr(getattr(importlib.import_module(owner), last), name)
            else:
                kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError) as e:
            raise ConfigError(f"type={kind!r} cannot be imported: {e}", where=where) from None
    if not callable(kind):
        raise ConfigError(f"type={kind!r} is neither a class nor a function", where=where)
    return kind


def type_name(kind: Any) -> str:
    """Short name for messages."""
    return getattr(kind, "__qualname__", str(kind))


def build(spec: Mapping[str, Any], where: str = "", **more: Any) -> Any:
    """Call `spec["type"]` with the other items of `spec` and with `more`.

    Raises: ConfigError if `type` is missing or a key does not match the signature.
    """
    if not isinstance(spec, Mapping) or "type" not in spec:
        raise ConfigError(f"expected dict(type=…, …), found {spec!r}", where=where)
    kind = resolve_type(spec["type"], where)
    arguments = {k: v for k, v in spec.items() if k != "type"}
    check_arguments(kind, [k for k in arguments if k != OPENING], where, passed=[*more, OPENING])
    return kind(**arguments, **more)


def check_arguments(
    kind: Callable[..., Any],
    names: Collection[str],
    where: str = "",
    also: Sequence[str] = (),
    passed: Collection[str] = (),
) -> None:
    """Raise ConfigError for unknown and missing arguments of `kind`.

    Args:
        names: the arguments in the config.
        also: settings that may stand here but are not arguments of `kind`, for hints.
        passed: arguments that the caller adds: not settings.
    """
    try:
        signature = inspect.signature(kind)
    except ValueError:  # some builtins have none
        return
    named = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = {p.name: p for p in named if p.name not in passed}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in names:
        if name not in known and (not takes_any or name in signature.parameters):
            raise ConfigError(
                f"{type_name(kind)} has no setting {name!r}.{did_you_mean(name, [*known, *also])}",
                where=f"{where}.{name}" if where else name,
                do=f"it takes: {', '.join([*known, *also])}" if known or also else "it takes none",
            )
    missing = [name for name, p in known.items() if p.default is p.empty and name not in names]
    if missing:
        raise ConfigError(f"{type_name(kind)} needs {', '.join(missing)}", where=where)
