"""Fields of a network that InternLM2's `config.json` cannot express: which they are, and how checkpoints store them.

Weights of a checkpoint have the decoder's names and InternLM2's `config.json`, for all families. What that lacks is
stored next to it, under one key, if the network has it.
"""

from dataclasses import replace
from typing import Any

from xtuner.core.errors import ConfigError
from xtuner.core.foreign_inputs import short, short_repr
from xtuner.families.hf_config import SCALING_FIELDS, Reader, read_scaling, write_scaling
from xtuner.families.network import DecoderConfig

BOOLS = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tie_word_embeddings")


def write_extra_fields(c: DecoderConfig) -> dict[str, Any]:
    """The network's fields that InternLM2's `config.json` lacks; empty if there are none."""
    lacking = set(c.special_features())
    if lacking & {"qkv_bias", "output_bias"}:
        lacking |= {"qkv_bias", "output_bias"}
    found = {name: getattr(c, name) for name in BOOLS if name in lacking}
    if "sliding_window" in lacking:
        found["sliding_window"] = c.sliding_window
        found |= {"sliding_layers": [*c.sliding_layers]} if c.sliding_layers is not None else {}
    return found | ({"rope_scaling": write_scaling(c.rope_scaling)} if "rope_scaling" in lacking else {})


def without_extra_fields(c: DecoderConfig) -> DecoderConfig:
    """The network as far as InternLM2's `config.json` can express it."""
    return replace(c, **{name: getattr(DecoderConfig, name) for name in write_extra_fields(c)})


def read_extra_fields(read: Reader, c: DecoderConfig) -> DecoderConfig:
    """Network `c` with the fields that `write_extra_fields` has written. Raises: ConfigError."""
    found: dict[str, Any] = {}
    for key in read.hf:
        if key in BOOLS:
            found[key] = read.only(key, (True, False), None)
        elif key == "sliding_window":
            found[key] = read.whole(key, read.hf[key], 2**40)
        elif key == "sliding_layers":
            layers = read.hf[key]
            if not isinstance(layers, list) or [*map(type, layers)] != [bool] * c.num_layers:
                raise read.wrong(key, f"{key} = {short_repr(layers)} is not a list of {c.num_layers} booleans")
            found[key] = tuple(layers)
        elif key == "rope_scaling":
            found[key] = read_scaling(read, read.inner(key), tuple(SCALING_FIELDS))
        else:
            what = f"a network with {short_repr(key)} is not supported by this version of xtuner"
            raise ConfigError(what, where=f"{read.where}{short(key)}", why="the network would differ")
    return replace(c, **found)
