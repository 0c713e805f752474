"""Parameter groups: learning rate and weight decay of parameters whose names match a pattern.

    parameter_groups = [
        dict(match=r"norm|bias", weight_decay=0.0),         # no decay for norms and biases
        dict(match=r"tok_embeddings", weight_decay=0.0, lr_scale=0.1),
    ]

`match` is a regular expression, searched for in the name of a parameter as in checkpoints
(`model.layers.0.attention_norm.weight`). The first group that matches applies; all other parameters have the
optimizer's own settings. All strategies support groups. Checkpoints store state by parameter and do not depend on
groups.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.core.errors import ConfigError, did_you_mean

WHERE = "optim_wrapper.parameter_groups"
_SETTINGS = ("match", "lr_scale", "weight_decay")
_NUMBERED = re.compile(r"\.\d+\.")
_SHOWN = 12  # names in a message


@dataclass(frozen=True)
class ParameterGroup:
    match: str  # "" for the group of all parameters that match no other
    lr_scale: float = 1.0  # multiplies the learning rate of each step
    weight_decay: float | None = None  # None for the optimizer's own

    def __str__(self) -> str:
        decay = [] if self.weight_decay is None else [f"weight_decay={self.weight_decay:g}"]
        return ", ".join([f"lr × {self.lr_scale:g}"] * (self.lr_scale != 1) + decay)


REST = ParameterGroup("")


def read_groups(given: Any) -> tuple[ParameterGroup, ...]:
    """Parse the groups of a config. Raises: ConfigError."""
    if not isinstance(given, list | tuple):
        raise ConfigError(f"parameter_groups = {given!r} is not a list of dict(match=…, …)", where=WHERE)
    return tuple(_read(group, f"{WHERE}.{i}") for i, group in enumerate(given))


def _read(given: Any, where: str) -> ParameterGroup:
    if not isinstance(given, Mapping) or not isinstance(given.get("match"), str) or not given["match"]:
        raise ConfigError(
            f"expected dict(match=…, lr_scale=…, weight_decay=…), found {given!r}",
            where=where,
            do="match is a regular expression for names of parameters, such as 'norm|bias'",
        )
    for name, value in given.items():
        if name not in _SETTINGS:
            near = did_you_mean(str(name), list(_SETTINGS))
            raise ConfigError(f"a parameter group has no setting {name!r}.{near}", where=f"{where}.{name}")
        if name == "match" or (name == "weight_decay" and value is None):
            continue
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{name} = {value!r} is not a number of at least 0", where=f"{where}.{name}")
    try:
        re.compile(given["match"])
    except re.error as e:
        what = f"match = {given['match']!r} is not a regular expression: {e}"
        raise ConfigError(what, where=f"{where}.match") from None
    group = ParameterGroup(**given)
    if not str(group):
        what = f"the group {group.match!r} changes nothing"
        raise ConfigError(what, where=where, do="give lr_scale or weight_decay, or leave the group out")
    return group


def find_group(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup:
    return next((g for g in groups if re.search(g.match, name)), REST)


def require_matches(names: Iterable[str], groups: Sequence[ParameterGroup]) -> None:
    """Raise ConfigError for a group without parameters."""
    names = list(names)
    taken = {find_group(name, groups) for name in names}
    for i, group in enumerate(groups):
        if group in taken and group not in groups[:i]:
            continue
        where = f"{WHERE}.{i}.match"
        if matched := [name for name in names if re.search(group.match, name)]:
            raise ConfigError(
                f"match = {group.match!r} gets no parameter: {matched[0]} and all others match an earlier group",
                where=where,
                why="the first group that matches applies",
                do="move the group up",
            )
        kinds = list(dict.fromkeys(_NUMBERED.sub(".N.", name) for name in names))
        raise ConfigError(
            f"match = {group.match!r} matches no trained parameter",
            where=where,
            why="its settings would have no effect",
            do=f"names are: {', '.join(kinds[:_SHOWN])}{', …' if len(kinds) > _SHOWN else ''}",
        )


def split_into_groups(parameters: Mapping[str, Any], groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Parameters in the form of a PyTorch optimizer's groups, without empty groups."""
    found: dict[ParameterGroup, list[Any]] = {group: [] for group in (REST, *groups)}
    for name, parameter in parameters.items():
        found[find_group(name, groups)].append(parameter)
    decay = {g: {} if g.weight_decay is None else {"weight_decay": g.weight_decay} for g in found}
    return [{"params": held, "lr_scale": g.lr_scale, **decay[g]} for g, held in found.items() if held]


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate in every group of an optimizer, built with or without `split_into_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
