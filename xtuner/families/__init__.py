"""Model families: one file and one line of the table each. Imports no torch; used by `data` and `model`.

xtuner.families.base     what a family defines, and how to add one
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError
from xtuner.core.files import read_json
from xtuner.core.foreign_inputs import short_repr
from xtuner.core.registry import Registry
from xtuner.families.base import ModelFamily
from xtuner.families.chat import PLAIN, ChatTemplate
from xtuner.families.extra_fields import read_extra_fields, without_extra_fields, write_extra_fields
from xtuner.families.hf_config import Reader
from xtuner.families.internlm2 import INTERNLM2
from xtuner.families.internlm3 import INTERNLM3
from xtuner.families.interns1 import INTERNS1
from xtuner.families.llama import LLAMA
from xtuner.families.mistral import MISTRAL
from xtuner.families.network import DecoderConfig
from xtuner.families.qwen2 import QWEN2
from xtuner.families.qwen3 import QWEN3
from xtuner.families.unknown import explain_unknown, reject_experts, reject_quantized, require_same_class

_SHIPPED = (INTERNLM2, LLAMA, INTERNLM3, MISTRAL, QWEN2, QWEN3, INTERNS1)
FAMILIES: Registry[ModelFamily] = Registry("model family", {family.name: family for family in _SHIPPED})
NATIVE = INTERNLM2  # the decoder and checkpoints use its names
_FAMILY = "xtuner_family"  # key of a checkpoint's config.json: the model's family, if it is not NATIVE
_NETWORK = "xtuner_network"  # key of a checkpoint's config.json: what NATIVE's config.json cannot express, if anything
_EOS = "xtuner_generation_eos"  # key of a checkpoint's config.json: ids in the model's generation_config.json, if any
_COPY = "copy the model's own config.json there again"


def register(family: ModelFamily) -> ModelFamily:
    """Register a user's own family, in a config or in a module that it imports. Raises: ConfigError."""
    return FAMILIES.register(family.name, family)


def chat_templates() -> dict[str, ChatTemplate]:
    """The chat templates of all families by name, then the one without marks."""
    families = FAMILIES.values()
    found = {chat.name: chat for family in families for chat in (family.chat, *family.other_chats) if chat}
    return found | {PLAIN.name: PLAIN}


def find_family(hf: Any, where: str = "config.json: ") -> ModelFamily:
    """The family that a `config.json` names.

    Raises: ConfigError for unknown families, for Mixture-of-Experts models and for quantized ones; CheckpointError for
    contents that are not an object.
    """
    if not isinstance(hf, dict):
        what = f"config.json contains {short_repr(hf)}, not an object"
        raise CheckpointError(what, where=where.rstrip(": "), do=_COPY)
    kind = hf.get("model_type", "")
    reject_experts(hf, where)
    if isinstance(kind, str) and kind in FAMILIES:
        reject_quantized(hf, where)
        require_same_class(hf, FAMILIES[kind], FAMILIES.values(), where)
        return FAMILIES[kind]
    raise explain_unknown(hf, FAMILIES, where)


def read_config(hf: dict[str, Any], where: str = "config.json: ") -> DecoderConfig:
    """A `DecoderConfig` from the contents of a `config.json`.

    Args:
        where: prefix of keys in messages.

    Raises: ConfigError for unsupported features, and for values that do not describe a network.
    """
    family, read = find_family(hf, where), Reader(hf, where)
    name = hf.get(_FAMILY, family.trains_as or family.name)
    if not isinstance(name, str):
        raise read.wrong(_FAMILY, f"{_FAMILY} = {short_repr(name)} is not the name of a model family")
    extra = Reader(read.inner(_NETWORK), f"{where}{_NETWORK}.")
    found = read_extra_fields(extra, family.read_config(read))
    return replace(found, family=name, generation_eos=read.token_list(_EOS))


def read_model(folder: Path) -> tuple[ModelFamily, DecoderConfig]:
    """(family whose tensor names the files use, network) of a model's folder.

    Raises: ConfigError, CheckpointError; both name its `config.json` or `generation_config.json`.
    """
    path = folder / "config.json"
    hf, where = read_json(path), f"{path}: "
    family, config = find_family(hf, where), read_config(hf, where)
    generation = path.with_name("generation_config.json")
    if generation.is_file() and isinstance(settings := read_json(generation), dict):
        stops = Reader(settings, f"{generation}: ").token_list("eos_token_id", alone=True)
        config = replace(config, generation_eos=stops)
    return family, config


def checkpoint_config(c: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a checkpoint's weights, which use the decoder's names for all families."""
    named: dict[str, Any] = {} if c.family == NATIVE.name else {_FAMILY: c.family}
    extra = write_extra_fields(c)
    native = NATIVE.write_config(without_extra_fields(c), "float32")
    own = named | ({_EOS: [*c.generation_eos]} if c.generation_eos else {}) | ({_NETWORK: extra} if extra else {})
    return {k: v for k, v in native.items() if k not in extra} | own


def find_family_by_names(names: Collection[str]) -> ModelFamily:
    """The family whose files have tensors of these names; NATIVE if none has."""
    some = DecoderConfig(2, 2, 2, 1, 1, 1, 2)
    known = ((family, family.stored("model.tok_embeddings.weight", some)) for family in FAMILIES.values())
    return next((family for family, stored in known if stored[0].name in names), NATIVE)
