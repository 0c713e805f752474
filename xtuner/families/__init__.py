"""Families of models: a file each, a line each in the table. Holds no torch; `data` and `model` both use it.

xtuner.families.base     what a family says, and how to add one of your own
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import read_json
from xtuner.core.foreign_inputs import short_repr
from xtuner.core.registry import Registry
from xtuner.families.base import ModelFamily
from xtuner.families.chat import PLAIN, ChatTemplate
from xtuner.families.hf_config import Reader
from xtuner.families.internlm2 import INTERNLM2
from xtuner.families.llama import LLAMA
from xtuner.families.network import DecoderConfig

FAMILIES: Registry[ModelFamily] = Registry("model family", {family.name: family for family in (INTERNLM2, LLAMA)})
NATIVE = INTERNLM2  # whose names are the decoder's, and those of checkpoints
_FAMILY = "xtuner_family"  # in a checkpoint's config.json: the model's, where that is another than NATIVE
_COPY = "copy the model's own config.json there again"


def register(family: ModelFamily) -> ModelFamily:
    """Make a family of one's own known, in a config or in a module that it imports. Raises: ConfigError."""
    return FAMILIES.register(family.name, family)


def chat_templates() -> dict[str, ChatTemplate]:
    """The families' own by name, then the one that marks nothing."""
    return {chat.name: chat for family in FAMILIES.values() if (chat := family.chat)} | {PLAIN.name: PLAIN}


def find_family(hf: Any, where: str = "config.json: ") -> ModelFamily:
    """The family that a `config.json` announces.

    Raises: ConfigError for other families; CheckpointError for what is as little a `config.json` as a torn file.
    """
    if not isinstance(hf, dict):
        what = f"config.json holds {short_repr(hf)}, not an object"
        raise CheckpointError(what, where=where.rstrip(": "), do=_COPY)
    kind = hf.get("model_type", "")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    raise ConfigError(
        f"models of type {short_repr(kind)} cannot be read",
        where=f"{where}model_type",
        do=f"known are: {', '.join(FAMILIES)}",
    )


def read_config(hf: dict[str, Any], where: str = "config.json: ") -> DecoderConfig:
    """A `DecoderConfig` from the contents of a `config.json`.

    Args:
        where: stands before a key in messages.

    Raises: ConfigError for what we do not compute, and for values that describe no network.
    """
    family, read = find_family(hf, where), Reader(hf, where)
    name = hf.get(_FAMILY, family.name)
    if not isinstance(name, str):
        raise read.wrong(_FAMILY, f"{_FAMILY} = {short_repr(name)} is not the name of a model family")
    return replace(family.read_config(read), family=name)


def read_model(folder: Path) -> tuple[ModelFamily, DecoderConfig]:
    """(the family by whose names weights lie there, network) of a model's folder.

    Raises: ConfigError, CheckpointError; both name its `config.json`.
    """
    path = folder / "config.json"
    hf, where = read_json(path), f"{path}: "
    return find_family(hf, where), read_config(hf, where)


def checkpoint_config(c: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a checkpoint's weights, which have the decoder's names whatever the model's family."""
    named = {} if c.family == NATIVE.name else {_FAMILY: c.family}
    return {**NATIVE.write_config(c, "float32"), **named}


def find_family_by_names(names: Collection[str]) -> ModelFamily:
    """The family whose files have tensors of such names; NATIVE if none has."""
    some = DecoderConfig(2, 2, 2, 1, 1, 1, 2)
    known = ((family, family.stored("model.tok_embeddings.weight", some)) for family in FAMILIES.values())
    return next((family for family, stored in known if stored[0].name in names), NATIVE)
