"""Rules about values and between fields, which types alone do not tell."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xtuner.config.adapter import ABSENT
from xtuner.config.build import type_name
from xtuner.config.config import Config
from xtuner.config.walk import ROOTS, Spec, walked
from xtuner.core.errors import ConfigError


def _at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v >= least, f"at least {least:g}"


_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda v: v > 0, "above 0")
_COUNT: tuple[Callable[[Any], bool], str] = (lambda v: v == -1 or v >= 1, "-1 (all) or at least 1")
_SEED: tuple[Callable[[Any], bool], str] = (lambda v: 0 <= v < 2**32, "in 0 … 2^32 - 1")
_INT32 = 2**31  # ids and borders of documents have 32 bits
_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")
# the last part of a path → the range of its number; under any parent
_RANGES = {
    "accumulative_counts": _at_least(1),
    "balance": _at_least(0),
    "every_n_iters": _at_least(1),
    "lr": _POSITIVE,
    "max_keep_ckpts": _COUNT,
    "max_new_tokens": _at_least(1),
    "max_norm": _POSITIVE,
    "min_length": _at_least(0),
    "num_workers": _at_least(0),
    "initializer_range": _at_least(0),
    "packed_length": (lambda v: 1 <= v < _INT32, "at least 1 and below 2^31"),
    "rms_norm_eps": _at_least(0),
    "rope_theta": _POSITIVE,
    "seed": _SEED,
    "val_interval": _at_least(1),
    "weight_decay": _at_least(0),
}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


def of_spec(spec: Spec, kind: Any) -> Iterator[ConfigError]:
    """Mistakes inside one `dict(type=…)`."""
    yield from _ranges(spec.key, spec.arguments)
    interval = spec.arguments.get("interval")
    if spec.key.startswith("default_hooks.") and type(interval) is int and interval < 1:
        saves = type_name(kind).endswith("CheckpointHook")
        if not (saves and interval == -1):
            words = "-1 (only at the end) or at least 1" if saves else "at least 1"
            yield ConfigError(f"interval = {interval} is not {words}", where=f"{spec.key}.interval")
    if spec.key == "model":
        yield from _shape(spec)


def not_finite(config: Config) -> Iterator[ConfigError]:
    """Numbers that are none, anywhere in what is built."""
    for root in ROOTS:
        for key, value in walked(root, config.values.get(root)):
            if isinstance(value, float) and not math.isfinite(value):
                name = key.rpartition(".")[2]
                if not (root == "param_scheduler" and name == "end" and value == math.inf):
                    yield ConfigError(f"{name} = {value!r} is not a finite number", where=key)


def of_runtime(config: Config) -> Iterator[ConfigError]:
    """Mistakes in settings that are no `dict(type=…)`."""
    yield from _ranges("train_dataloader", config.get("train_dataloader") or {})
    yield from _ranges("optim_wrapper.clip_grad", config.get("optim_wrapper.clip_grad") or {})
    yield from _ranges("", {"val_interval": config.get("val_interval")})
    yield from _ranges("randomness", config.get("randomness") or {})
    for key, wanted, words in (
        ("resume", (bool, str, type(None)), "True, False or a checkpoint"),
        ("load_from", (str, type(None)), "a folder or None"),
        ("work_dir", (str, type(None)), "a folder or None"),
        ("randomness", (dict, type(None)), "a dict of seed and deterministic"),
        ("train_dataloader.num_workers", (int,), "a whole number"),
        ("train_dataloader.balance", (int,), "a whole number"),
        ("randomness.seed", (int, type(None)), "a whole number or None"),
        ("randomness.deterministic", (bool,), "True or False"),
        ("val_interval", (int,), "a whole number"),
        ("optim_wrapper.clip_grad.max_norm", (int, float, type(None)), "a number or None"),
    ):
        value = config.get(key, ABSENT)
        if value is not ABSENT and (type(value) not in wanted or value == ""):
            yield ConfigError(f"{key} = {value!r} is not {words}", where=key)
    level = config.get("log_level", "INFO")
    if not isinstance(level, str) or level.upper() not in _LEVELS:
        yield ConfigError(f"log_level = {level!r} is not one of {', '.join(_LEVELS)}", where="log_level")


def _number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))  # the others are reported once


def _ranges(key: str, values: Any) -> Iterator[ConfigError]:
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if name in _RANGES and _number(value):
            right, words = _RANGES[name]
            if not right(value):
                yield ConfigError(f"{name} = {value!r} is not {words}", where=f"{key}.{name}".lstrip("."))


def _shape(spec: Spec) -> Iterator[ConfigError]:
    """Sizes of a model that starts from random weights."""
    sizes = {name: spec.arguments[name] for name in _SIZES if spec.arguments.get(name) is not None}
    wrong = {name for name, size in sizes.items() if type(size) is not int or not 0 < size < _INT32}
    for name in wrong:
        words = "a whole number above 0" if not isinstance(sizes[name], int) or sizes[name] < 1 else "below 2^31"
        yield ConfigError(f"{name} = {sizes[name]!r} is not {words}", where=f"model.{name}")
    if wrong:
        return
    heads, groups, hidden = (sizes.get(n) for n in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and hidden and "head_dim" not in sizes and hidden % heads:
        yield ConfigError(
            f"hidden_size = {hidden} is no multiple of num_attention_heads = {heads}",
            where="model.hidden_size",
            why="each head takes an equal part of the hidden state",
        )
    elif heads and hidden and (size := sizes.get("head_dim", hidden // heads)) % 2:
        yield ConfigError(
            f"heads of {size} cannot be turned by rotary positions, which turn pairs of numbers",
            where="model.head_dim" if "head_dim" in sizes else "model.hidden_size",
            do="choose an even head_dim (64 and 128 are served everywhere), or another hidden_size or number of heads",
        )
    if heads and groups and heads % groups:
        yield ConfigError(
            f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {groups}",
            where="model.num_key_value_heads",
            why="each key-value head serves an equal number of heads",
        )
