"""Rules about values that types do not express, and between several settings."""

import math
from collections.abc import Iterator

from xtuner.config.config import Config
from xtuner.config.specs import ROOTS, Spec, walk_values
from xtuner.core.errors import ConfigError


def find_not_finite(config: Config) -> Iterator[ConfigError]:
    """Values that are infinite or nan, anywhere in what is built."""
    for root in ROOTS:
        for key, value in walk_values(root, config.values.get(root)):
            if isinstance(value, float) and not math.isfinite(value):
                name = key.rpartition(".")[2]
                if not (root == "param_scheduler" and name == "end" and value == math.inf):
                    yield ConfigError(f"{name} = {value!r} is not a finite number", where=key)


def check_shape(spec: Spec) -> Iterator[ConfigError]:
    """Check the sizes of a model with random weights."""
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    sizes = {name: spec.arguments[name] for name in names if spec.arguments.get(name) is not None}
    if any(type(size) is not int or size < 1 for size in sizes.values()):
        return  # reported with the settings
    heads, groups, hidden = (sizes.get(n) for n in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and hidden and "head_dim" not in sizes and hidden % heads:
        yield ConfigError(
            f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}",
            where="model.hidden_size",
            why="all heads have the same width",
        )
    elif heads and hidden and (size := sizes.get("head_dim", hidden // heads)) % 2:
        yield ConfigError(
            f"head_dim = {size} is odd, but rotary positions rotate pairs of elements",
            where="model.head_dim" if "head_dim" in sizes else "model.hidden_size",
            do="choose an even head_dim (64 and 128 are supported everywhere), or another hidden_size or head count",
        )
    if heads and groups and heads % groups:
        yield ConfigError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}",
            where="model.num_key_value_heads",
            why="each key-value head is shared by the same number of query heads",
        )
