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
from xtuner.model import source
from xtuner.model.source import ModelSource

_LORA = "write model = dict(type=from_pretrained, …, adapter=dict(type=lora, rank=…, alpha=…))"
_FULL = Allowed((None,), "LoRA has settings of its own here (docs/en/lora.md)", f"{_LORA}; or leave it out")
_MULTIPLE = 64  # of rows, where the old tool adds some
_DTYPE = "weights are kept in fp32; the compute dtype is bf16 on GPUs and fp32 on CPUs"


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
            "quantization_config": Allowed(
                (None,), "quantized weights are for adapters", f'{_LORA} with frozen_weights="nf4"; or leave it out'
            ),
            "device_map": Allowed((None,), "every process has the model on its own device", "leave it out"),
            **HUB,
        },
    )
    def from_pretrained(pretrained_model_name_or_path: str) -> ModelSource:
        return source.from_pretrained(pretrained_model_name_or_path)


@adapter(
    allowed={
        "use_varlen_attn": Allowed(
            (True,), "without it the documents of a pack see each other", "set use_varlen_attn = True"
        ),
        "lora": _FULL,
        "peft_model": _FULL,
        "max_position_embeddings": Allowed(
            (None,),
            "the old tool then scales the rotary frequencies, which changes the network",
            "write rope_scaling and max_position_embeddings in the model's config.json",
        ),
    }
)
def SupervisedFinetune(
    llm: Mapping[str, Any],
    use_varlen_attn: bool = True,
    use_activation_checkpointing: bool = True,
    tokenizer: Mapping[str, Any] | None = None,
) -> ModelSource:
    """The model of `llm`; activation checkpointing is on by default.

    If `tokenizer` has more ids than the embedding has rows, rows are added up to a multiple of 64.
    """
    model: ModelSource = build(llm, "model.llm")
    model = dataclasses.replace(model, recompute=use_activation_checkpointing)
    ids, rows = build(tokenizer, "model.tokenizer").vocab_size if tokenizer else 0, model.config.vocab_size
    if ids <= rows:
        return model
    grown = -(-ids // _MULTIPLE) * _MULTIPLE
    config = dataclasses.replace(model.config, vocab_size=grown)
    return dataclasses.replace(model, config=config, added_rows=grown - rows)
