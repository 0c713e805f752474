"""Messages for a `config.json` of a model that no family can read: what it is, and how it differs from the closest."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from xtuner.core.errors import ConfigError
from xtuner.core.foreign_inputs import short, short_repr
from xtuner.families.base import ModelFamily
from xtuner.families.hf_config import Reader

SHOWN = 8  # keys in a message
# keys that do not change what a network computes, or that all families read
_SHARED = frozenset({
    "model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "_name_or_path", "attention_dropout", "hidden_dropout", "pretraining_tp", "hidden_act", "tie_word_embeddings",
    "rope_parameters", "attention_bias", "mlp_bias", "return_dict", "output_attentions", "output_hidden_states",
    "attn_implementation", "_attn_implementation", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types",
})  # fmt: skip
_EXPERTS = re.compile(r"(?:^|_)(?:num|n)_(?:\w+_)?experts$")
_DEPTH = 3  # of objects in config.json that describe parts of a model


def reject_experts(hf: Mapping[str, Any], where: str, inner: str = "", outer_kind: Any = "") -> None:
    """Raises: ConfigError for a Mixture-of-Experts model, by whatever name its number of experts has.

    Args:
        inner: keys that lead to `hf` in the file, such as "text_config."; "" for all of it.
        outer_kind: type of the model that `hf` is a part of, if it does not say its own.
    """
    kind = hf.get("model_type") or outer_kind
    key = next((key for key, value in hf.items() if value and _EXPERTS.search(key)), None)
    if key is not None:
        raise ConfigError(
            f"{short_repr(kind)} is a Mixture-of-Experts model ({inner}{short(key)} = {short_repr(hf[key])}), which is "
            "not supported",
            where=f"{where}{inner}{short(key)}",
            why="the decoder has one MLP in each layer; experts need a router with its balance loss, grouped matrix "
            "products, and experts divided over ranks",
            do="train a dense model of the same series",
        )
    for key, value in hf.items():
        if isinstance(value, dict) and inner.count(".") < _DEPTH:
            reject_experts(value, where, f"{inner}{short(key)}.", kind)


def reject_quantized(hf: Mapping[str, Any], where: str) -> None:
    """Raises: ConfigError for a model whose `config.json` says that its weights are quantized."""
    key = next((key for key in ("quantization_config", "compression_config") if hf.get(key)), None)
    if key is None:
        return
    method = hf[key].get("quant_method") if isinstance(hf[key], dict) else None
    raise ConfigError(
        "the model's weights are quantized" + (f" ({short_repr(method)})" if method else ""),
        where=f"{where}{key}",
        why="weights are read as they are in their files: quantized ones are other numbers, or have other shapes",
        do=f"give the model from which it was quantized; if the files contain ordinary weights, remove {key}",
    )


def require_same_class(hf: Mapping[str, Any], family: ModelFamily, known: Iterable[ModelFamily], where: str) -> None:
    """Raises: ConfigError if `architectures` names the class of another of the `known` families."""
    named = hf.get("architectures")
    names = named if isinstance(named, list) else [named]
    own = (family.architecture, *family.other_architectures)
    other = next((f.architecture for f in known if f.architecture in names and f.architecture not in own), None)
    if other is not None and not any(name in names for name in own):
        Reader(dict(hf), where).require_equal("model_type", family.name, "architectures", [other])


def explain_unknown(hf: dict[str, Any], families: Mapping[str, ModelFamily], where: str) -> ConfigError:
    """The error for a `model_type` that is not in `families`."""
    kind = hf.get("model_type", "")
    closest = find_closest(hf, families)
    code = "; its own code, which its config.json names in auto_map, is never executed" if hf.get("auto_map") else ""
    return ConfigError(
        f"models of type {short_repr(kind)} are not supported{code}",
        where=f"{where}model_type",
        why=f"the closest known family is {closest.name}; it has {'; '.join(list_differences(hf, closest, where))}",
        do=f"supported are: {', '.join(families)}. A model that differs only in names and fields is one file: "
        "docs/en/extend.md",
    )


def find_closest(hf: Mapping[str, Any], families: Mapping[str, ModelFamily]) -> ModelFamily:
    """The family whose name begins the model's type, else one whose name has the same letters before its number, else
    any: of several the one that knows most of the fields (of equals, Llama, whose names most models have)."""
    kind = str(hf.get("model_type", ""))
    if named := [name for name in families if kind.startswith(name)]:
        return families[max(named, key=len)]
    readable = [family for family in families.values() if not family.trains_as]
    series = [family for family in readable if _letters(family.name) == _letters(kind)]
    return min(series or readable, key=lambda family: (len(_unknown_keys(hf, family)), family.name != "llama"))


def _letters(name: str) -> str:
    return re.split(r"[^a-z]", name.lower())[0]


def list_differences(hf: dict[str, Any], family: ModelFamily, where: str) -> list[str]:
    """How a `config.json` differs from those of a family, key by key."""
    unknown = _unknown_keys(hf, family)
    found = [f"no field {short(key)} (here {short_repr(hf[key])})" for key in unknown[:SHOWN]]
    if len(unknown) > SHOWN:
        found.append(f"{len(unknown) - SHOWN} more fields that it lacks")
    try:
        family.read_config(Reader(hf, where))
    except ConfigError as e:
        found.append(f"another condition: {e.what}")
    return found or ["the same fields, but the model's own code may compute something else"]


def _unknown_keys(hf: Mapping[str, Any], family: ModelFamily) -> list[str]:
    return [key for key in hf if key not in _SHARED and key not in family.fields and hf[key] is not None]
