"""Compare values with annotations. An annotation that cannot be checked accepts every value."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", type(None): "None"}


_PLURALS = {int: "whole numbers", float: "numbers", str: "strings", dict: "dicts"}


def parameter_types(kind: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters of `kind`, by name; empty if they cannot be read."""
    function = kind.__init__ if inspect.isclass(kind) else inspect.unwrap(kind)
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}


def fits(value: Any, wanted: Any) -> bool:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, w) for w in inner)
    if origin is Literal:
        return value in inner
    if wanted is None or wanted is type(None):
        return value is None
    if wanted is bool or wanted is str or wanted is int:
        return type(value) is wanted
    if wanted is float:
        return type(value) in (int, float)
    plain = origin or wanted
    if not inspect.isclass(plain) or plain is object:
        return True
    if plain in (list, tuple, Sequence):  # interchangeable
        items = [w for w in inner if w is not ...]
        if not isinstance(value, list | tuple):
            return False
        each = items if plain is tuple and ... not in inner else items * len(value)
        return len(each) in (0, len(value)) and all(fits(v, w) for v, w in zip(value, each, strict=False))
    if plain is Mapping or plain is dict:
        return isinstance(value, Mapping)
    if isinstance(value, Mapping) and "type" in value:
        return True  # an object that will be built
    try:
        return isinstance(value, plain)
    except TypeError:  # a Protocol
        return True


def describe(wanted: Any) -> str:
    """`float | None` → "a number or None"."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(w) for w in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (list, tuple, Sequence):
        return "a list of " + " and ".join(dict.fromkeys(_PLURALS.get(w) or describe(w) for w in inner if w is not ...))
    if (origin or wanted) in (Mapping, dict):
        return "a dict"
    return _NAMES.get(wanted) or str(getattr(wanted, "__name__", wanted))
