"""Adapters from the models of XTuner 0.1 and 0.2 to ours.

`compat/translate.py` replaces the old names by these.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from xtuner.compat.settings import HUB
from xtuner.config.adapter import adapter
from xtuner.config.build import build
from xtuner.config.schema import Allowed
from xtuner.core.errors import ConfigError
from xtuner.legacy import peft
from xtuner.model import source
from xtuner.model.source import ModelSource

_MULTIPLE = 64  # of rows, where the old tool adds some
_DTYPE = "weights that are trained are kept in fp32; the compute dtype is bf16 on GPUs and fp32 on CPUs"


class AutoModelForCausalLM:
    """Replaces transformers' class of this name in a config."""

    @staticmethod
    @adapter(
        no_effect={
            "trust_remote_code": ("code of a hub is never run", bool),
            "torch_dtype": _DTYPE,
            "dtype": _DTYPE,
            "attn_implementation": ("the fastest attention backend for the device is used", str | None),
            "low_cpu_mem_usage": ("weights are read one tensor at a time", bool | None),
            "use_cache": ("training uses no key-value cache", bool | None),
            "use_safetensors": ("safetensors are used if there are any", bool | None),
        },
        allowed={
            "device_map": Allowed((None,), "every process has the model on its own device", "leave it out"),
            **HUB,
        },
    )
    def from_pretrained(
        pretrained_model_name_or_path: str, quantization_config: Mapping[str, Any] | None = None
    ) -> ModelSource:
        if quantization_config is not None:  # in SupervisedFinetune, that reads it
            raise ConfigError(
                "quantization_config without lora",
                where=peft.QUANTIZATION,
                why="all weights would be trained, and quantized weights are for adapters",
                do="use SupervisedFinetune with this llm and lora = dict(type=LoraConfig, …), or leave it out",
            )
        return source.from_pretrained(pretrained_model_name_or_path)


@adapter(
    allowed={
        "use_varlen_attn": Allowed(
            (True,), "without it the documents of a pack see each other", "set use_varlen_attn = True"
        ),
        "peft_model": Allowed(
            (None,),
            "weights of an older tool's adapter are not read",
            "leave it out; load_from continues from an iter_N.pth",
        ),
        "max_position_embeddings": Allowed(
            (None,),
            "the old tool then scales the rotary frequencies, which changes the network",
            "write rope_scaling and max_position_embeddings in the model's config.json",
        ),
    }
)
def SupervisedFinetune(
    llm: Mapping[str, Any],
    lora: Mapping[str, Any] | None = None,
    use_varlen_attn: bool = True,
    use_activation_checkpointing: bool = True,
    tokenizer: Mapping[str, Any] | None = None,
) -> ModelSource:
    """The model of `llm`, with the adapter of `lora`; activation checkpointing is on by default.

    If `tokenizer` has more ids than the embedding has rows, rows are added up to a multiple of 64.
    """
    given = {k: v for k, v in llm.items() if lora is None or k != "quantization_config"}
    model: ModelSource = build(given, "model.llm")
    model = dataclasses.replace(model, recompute=use_activation_checkpointing)
    ids, rows = build(tokenizer, "model.tokenizer").vocab_size if tokenizer else 0, model.config.vocab_size
    if lora is not None:
        if ids > rows:
            raise ConfigError(
                f"lora with a tokenizer that has more ids ({ids:,}) than the model ({rows:,})",
                where="model.tokenizer",
                why="the added rows of the embedding would not be trained, and are not in the base model",
                do="leave tokenizer out of model, or lora",
            )
        terms, kind = peft.build_adapter(lora, model.config), peft.read_quantization(llm.get("quantization_config"))
        return dataclasses.replace(model, adapter=terms, frozen_weights=kind)
    if ids <= rows:
        return model
    grown = -(-ids // _MULTIPLE) * _MULTIPLE
    config = dataclasses.replace(model.config, vocab_size=grown)
    return dataclasses.replace(model, config=config, added_rows=grown - rows)
