"""What configs of XTuner 0.1 and 0.2 name of models, as ours.

`compat/translate.py` puts these in place of the old names.
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

_FULL = Allowed((None,), "all weights are trained, in full precision: there are no adapters", "leave it out")
_DTYPE = "weights are kept in fp32 and computed with in bf16 on GPUs, in fp32 on CPUs"


class AutoModelForCausalLM:
    """Stands for transformers' class of this name in a config."""

    @staticmethod
    @adapter(
        no_effect={
            "trust_remote_code": ("no code of a hub is run", bool),
            "torch_dtype": _DTYPE,
            "dtype": _DTYPE,
            "attn_implementation": ("the fastest attention that there is for the device is taken", str | None),
            "low_cpu_mem_usage": ("weights are read a tensor at a time", bool | None),
            "use_cache": ("training keeps no cache", bool | None),
            "use_safetensors": ("safetensors are taken where there are any", bool | None),
        },
        allowed={
            "quantization_config": Allowed((None,), "quantized weights are not trained", "leave it out"),
            "device_map": Allowed((None,), "every process holds the model on its own device", "leave it out"),
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
        "tokenizer": Allowed((None,), "the vocabulary stays as long as it is", "leave it out"),
        "max_position_embeddings": Allowed(
            (None,),
            "the old tool scales the rotary frequencies then: another network",
            "write rope_scaling and max_position_embeddings in the model's config.json",
        ),
    }
)
def SupervisedFinetune(
    llm: Mapping[str, Any],
    use_varlen_attn: bool = True,
    use_activation_checkpointing: bool = True,
) -> ModelSource:
    """The model that `llm` describes; activation checkpointing is on unless it is switched off."""
    model: ModelSource = build(llm, "model.llm")
    return dataclasses.replace(model, recompute=use_activation_checkpointing)
