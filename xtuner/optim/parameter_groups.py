r"""Parameter groups: settings of parameters whose names match a pattern.

    parameter_groups = [
        dict(match=r"norm|bias", weight_decay=0.0),         # no decay for norms and biases
        dict(match=r"layers\.[0-3]\.", frozen=True),        # not trained
        dict(match=r"tok_embeddings", weight_decay=0.0, lr_scale=0.1),
    ]

`match` is a regular expression, searched for in the name of a parameter as in checkpoints
(`model.layers.0.attention_norm.weight`). The first group that matches applies; all other parameters have the
optimizer's own settings. With `layer_decay` the rate of every layer is smaller than that of the layer above it, in
addition to groups. All strategies support groups. Checkpoints store state by parameter and do not depend on groups.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.core.errors import ConfigError, did_you_mean

WHERE = "optim_wrapper.parameter_groups"
_SETTINGS = ("match", "lr_scale", "weight_decay", "betas", "eps", "frozen")
_NUMBERED = re.compile(r"\.\d+\.")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_SHOWN = 12  # names in a message
NEAR = 3  # similar names in a message


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of a group; None for the optimizer's own."""

    match: str  # "" for the group of all parameters that match no other
    lr_scale: float = 1.0  # multiplies the learning rate of each step
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    frozen: bool = False  # not trained: no gradient, no optimizer state
    required: bool = True  # whether it is an error if no parameter matches

    def __str__(self) -> str:
        own = [f"{name}={value:g}" for name, value in (("weight_decay", self.weight_decay), ("eps", self.eps))
               if value is not None]  # fmt: skip
        own += [f"betas={self.betas}"] * (self.betas is not None) + ["frozen"] * self.frozen
        return ", ".join([f"lr × {self.lr_scale:g}"] * (self.lr_scale != 1) + own)

    def own_settings(self) -> dict[str, Any]:
        """Settings that replace the optimizer's, by its names."""
        own = {"weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps}
        return {name: value for name, value in own.items() if value is not None}


REST = ParameterGroup("")


def read_groups(given: Any) -> tuple[ParameterGroup, ...]:
    """Parse the groups of a config. Raises: ConfigError."""
    if not isinstance(given, list | tuple):
        raise ConfigError(f"parameter_groups = {given!r} is not a list of dict(match=…, …)", where=WHERE)
    return tuple(g if isinstance(g, ParameterGroup) else _read(g, f"{WHERE}.{i}") for i, g in enumerate(given))


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
        if name != "match" and (value is not None or name in ("lr_scale", "frozen")):
            _require_value(name, value, f"{where}.{name}")
    try:
        re.compile(given["match"])
    except re.error as e:
        what = f"match = {given['match']!r} is not a regular expression: {e}"
        raise ConfigError(what, where=f"{where}.match") from None
    betas = given.get("betas")
    group = ParameterGroup(**{**given, "betas": betas and (float(betas[0]), float(betas[1]))})
    if not str(group):
        what = f"the group {group.match!r} changes nothing"
        raise ConfigError(what, where=where, do="give lr_scale, weight_decay or frozen, or leave the group out")
    if group.frozen and str(group) != "frozen":
        what = f"the group {group.match!r} is frozen and has settings of training: {group}"
        raise ConfigError(what, where=where, why="a frozen parameter does not change", do="give one or the other")
    return group


def _require_value(name: str, value: Any, where: str) -> None:
    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and value >= 0

    if name == "frozen":
        right, kind = type(value) is bool, "True or False"
    elif name == "betas":
        right = isinstance(value, list | tuple) and len(value) == 2 and all(is_number(v) and v < 1 for v in value)
        kind = "two numbers of at least 0 and below 1"
    else:
        right, kind = is_number(value), "a number of at least 0"
    if not right:
        raise ConfigError(f"{name} = {value!r} is not {kind}", where=where)


def find_group(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup:
    return next((g for g in groups if re.search(g.match, name)), REST)


def layer_scale(name: str, layer_decay: float, num_layers: int) -> float:
    """What multiplies a parameter's rate: 1 for the last norm and the output layer, and `layer_decay` less for each
    layer below; the embedding is below the first block."""
    if layer := _LAYER.match(name):
        return layer_decay ** (num_layers - int(layer[1]))
    return layer_decay ** (num_layers + 1) if name == "model.tok_embeddings.weight" else 1.0


def require_matches(names: Iterable[str], groups: Sequence[ParameterGroup]) -> None:
    """Raise ConfigError for a group without parameters, and for groups that leave nothing to train."""
    names = list(names)
    taken = {find_group(name, groups) for name in names}
    for i, group in enumerate(groups):
        if (group in taken and group not in groups[:i]) or not group.required:
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
            f"match = {group.match!r} matches no trained parameter.{_similar(group.match, kinds)}",
            where=where,
            why="its settings would have no effect",
            do=f"names are: {', '.join(kinds[:_SHOWN])}{', …' if len(kinds) > _SHOWN else ''}",
        )
    if taken and all(group.frozen for group in taken):
        raise ConfigError("every parameter is frozen", where=WHERE, why="nothing would be trained")


def _similar(match: str, kinds: Sequence[str]) -> str:
    """Parts of names that are similar to words of a pattern, as a sentence; "" for none."""
    parts = list(dict.fromkeys(part for kind in kinds for part in kind.split(".")))
    words = [match, *re.findall(r"[A-Za-z_]\w+", match)]
    near = list(dict.fromkeys(n for word in words for n in difflib.get_close_matches(word, parts, NEAR, 0.6)))
    return f" Similar: {', '.join(map(repr, near[:NEAR]))}" if near else ""


def split_into_groups(parameters: Mapping[str, Any], group_of: Callable[[str], ParameterGroup]) -> list[dict[str, Any]]:
    """Parameters in the form of a PyTorch optimizer's groups."""
    found: dict[ParameterGroup, list[Any]] = {}
    for name, parameter in parameters.items():
        found.setdefault(group_of(name), []).append(parameter)
    return [{"params": held, "lr_scale": g.lr_scale, **g.own_settings()} for g, held in found.items()]


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate in every group of an optimizer, built with or without `split_into_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
