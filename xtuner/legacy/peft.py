"""Adapters from PEFT's LoraConfig and transformers' BitsAndBytesConfig, in `model` of XTuner 0.1 and 0.2, to ours.

`compat/translate.py` replaces the old names by these. Defaults are those of the two packages.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.config.adapter import adapter
from xtuner.config.build import build, resolve_type, type_name
from xtuner.config.schema import Allowed
from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.families.network import DecoderConfig
from xtuner.model.adapters.lora import LoRA, build_lora, lora
from xtuner.model.ops.quantized import WeightKind

WHERE = "model.lora"
QUANTIZATION = "model.llm.quantization_config"
# Our setting → PEFT's
_WRITTEN = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "dropout": "lora_dropout"}
# Names of modules in files of a model → our part
_PARTS = {"tok_embeddings": "embedding", "embed_tokens": "embedding", "output": "output", "lm_head": "output"}
_SAME_EVERYWHERE = "every adapted matrix has factors of the same rank and scale, in every block"
_OTHER_START = "factors start as in PEFT by default: A at random, B at zero"
_VARIANT = "it is a variant of LoRA that xtuner does not have"
_LEAVE_OUT = "leave it out"


def _none(why: str = _VARIANT) -> Allowed:
    return Allowed((None,), why, _LEAVE_OUT)


_ONE_FOR_ALL = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters", "layer_replication")
_VARIANTS = (
    "trainable_token_indices", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "megatron_config",
)  # fmt: skip


@adapter(
    no_effect={
        "base_model_name_or_path": "the adapter records the model that it was trained on",
        "task_type": "models are decoders that predict the next token",
        "peft_type": "the type of the dict determines it",
    },
    allowed={
        "bias": Allowed(("none",), "biases of the base model stay as they are", "set bias = 'none'"),
        "task_type": Allowed((None, "CAUSAL_LM"), "models predict the next token", "set task_type = 'CAUSAL_LM'"),
        "peft_type": Allowed((None, "LORA"), _VARIANT, _LEAVE_OUT),
        "inference_mode": Allowed((False,), "the adapter would not be trained", "set it to False"),
        "fan_in_fan_out": Allowed((False,), "weights are stored as [output, input]", "set it to False"),
        "init_lora_weights": Allowed((True,), _OTHER_START, "set it to True"),
        **dict.fromkeys(_ONE_FOR_ALL, _none("all blocks are adapted alike, in the matrices of target_modules")),
        **dict.fromkeys(_VARIANTS, _none()),
        "lora_bias": Allowed((False,), "factors have no biases", "set it to False"),
    },
)
def LoraConfig(
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    loftq_config: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """The settings of our `lora`. Raises: ConfigError."""
    for name, value, why in (
        ("rank_pattern", rank_pattern, _SAME_EVERYWHERE),
        ("alpha_pattern", alpha_pattern, _SAME_EVERYWHERE),
        ("loftq_config", loftq_config, _OTHER_START),
    ):
        if value:
            raise ConfigError(f"{name} = {value!r} is not supported", where=f"{WHERE}.{name}", why=why, do=_LEAVE_OUT)
    train = [_find_part(name, i) for i, name in enumerate(modules_to_save or ())]
    targets: str | list[str] = "all"
    if target_modules not in (None, "all-linear"):
        if isinstance(target_modules, str):
            raise ConfigError(
                f"target_modules = {target_modules!r} is a pattern",
                where=f"{WHERE}.target_modules",
                why="matrices are given by their names",
                do="give a list of names, such as ['wqkv', 'wo'], or leave it out for all matrices of the blocks",
            )
        targets = sorted(set(target_modules or ()))
    scaling = "alpha/sqrt(rank)" if use_rslora else "alpha/rank"
    try:
        return lora(r, float(lora_alpha), targets, lora_dropout, scaling, use_dora, list(dict.fromkeys(train)))
    except ConfigError as e:
        raise _as_written(e) from None


def _find_part(name: str, number: int) -> str:
    if name not in _PARTS:
        raise ConfigError(
            f"{name!r} cannot be trained in full with an adapter.{did_you_mean(name, list(_PARTS))}",
            where=f"{WHERE}.modules_to_save.{number}",
            do=f"choose of {', '.join(_PARTS)}",
        )
    return _PARTS[name]


def build_adapter(spec: Mapping[str, Any], config: DecoderConfig) -> LoRA:
    """The adapter of a network, from `dict(type=LoraConfig, …)`. Raises: ConfigError with the names that PEFT has."""
    given = _build_only(LoraConfig, spec, WHERE)
    try:
        return build_lora(given, config)
    except ConfigError as e:
        raise _as_written(e) from None


def read_quantization(spec: Mapping[str, Any] | None) -> WeightKind:
    """The value of `frozen_weights`, from `dict(type=BitsAndBytesConfig, …)` or None. Raises: ConfigError."""
    kind: WeightKind = _build_only(BitsAndBytesConfig, spec, QUANTIZATION) if spec else "own"
    return kind


def _build_only(kind: Any, spec: Mapping[str, Any], where: str) -> Any:
    """Build `spec`, whose type must be `kind`."""
    if isinstance(spec, Mapping) and "type" in spec and resolve_type(spec["type"], where) is not kind:
        name = kind.__name__
        raise ConfigError(
            f"{type_name(spec['type'])} is not {name}", where=f"{where}.type", do=f"write dict(type={name}, …)"
        )
    return build(spec, where)


def _as_written(e: ConfigError) -> ConfigError:
    """The error with the names of the settings that the config has."""
    text = {
        "what": e.what,
        "where": e.where.replace("model.adapter", WHERE),
        "do": e.do.replace('"all"', "'all-linear'").replace("train=", "modules_to_save="),
    }
    for ours, theirs in _WRITTEN.items():
        text = {part: re.sub(rf"\b{ours}\b", theirs, value) for part, value in text.items()}
    return ConfigError(text["what"], where=text["where"], why=e.why, do=text["do"])


_INT8 = "weights are read back to the compute dtype before each product"


@adapter(
    no_effect={
        "llm_int8_threshold": _INT8,
        "bnb_4bit_compute_dtype": "the compute dtype is bf16 on GPUs and fp32 on CPUs",
        "bnb_4bit_quant_storage": "4-bit weights are kept as bytes",
    },
    allowed={
        "llm_int8_skip_modules": _none("the matrices of blocks are quantized, embedding and output layer are not"),
        "llm_int8_enable_fp32_cpu_offload": Allowed((False,), "all weights are on the GPU", "set it to False"),
        "llm_int8_has_fp16_weight": Allowed((False,), "there is no second copy of the weights", "set it to False"),
    },
)
def BitsAndBytesConfig(
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    bnb_4bit_quant_type: str = "fp4",
    bnb_4bit_use_double_quant: bool = False,
) -> WeightKind:
    """The value of our `frozen_weights`. Raises: ConfigError."""
    if load_in_4bit and load_in_8bit:
        raise ConfigError(
            "load_in_4bit and load_in_8bit are both True", where=QUANTIZATION, do="set one of them to False"
        )
    if not load_in_4bit:
        return "int8" if load_in_8bit else "own"
    for name, value, wanted in (
        ("bnb_4bit_quant_type", bnb_4bit_quant_type, "nf4"),
        ("bnb_4bit_use_double_quant", bnb_4bit_use_double_quant, True),
    ):
        if value != wanted:
            raise ConfigError(
                f"{name} = {value!r} is not supported",
                where=f"{QUANTIZATION}.{name}",
                why="4-bit weights are nf4 with double quantization",
                do=f"set {name} = {wanted!r}",
            )
    return "nf4"
