"""LoRA and QLoRA of the transformers peer, by PEFT.   # pip install peft accelerate; for nf4 also bitsandbytes

The frozen matrices are nn.Linear in bf16 or bitsandbytes' Linear4bit (nf4, double quantization, computing in bf16); the
factors are fp32 under autocast, as `get_peft_model` and a Trainer with `bf16=True` have them. In the peer's favour:
norms, embedding and output layer stay in bf16 (`prepare_model_for_kbit_training` makes them fp32), PEFT's casts of
inputs to fp32 are off, as autocast would only cast them back, and PEFT's wrapper is left out: its layers replace those
of the model.
"""

from typing import Any

import torch
from benchlib.workloads import Terms
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
           "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}  # fmt: skip


def packages(terms: Terms) -> list[str]:
    return ["peft", *(["bitsandbytes"] if terms.weights == "nf4" else [])]


def add_terms(model: PreTrainedModel, terms: Terms, compute: torch.dtype) -> None:
    """Quantize the matrices of blocks if `terms` says so, freeze the model and add trained factors, in place."""
    if terms.weights == "nf4":
        quantize_blocks(model, compute)
    names = [MODULES[target] for target in Terms.TARGETS]
    chosen: Any = dict(r=terms.rank, lora_alpha=terms.alpha, lora_dropout=0.0, bias="none", target_modules=names)
    inject_adapter_in_model(LoraConfig(**chosen, task_type="CAUSAL_LM"), model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = compute == torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def quantize_blocks(model: PreTrainedModel, compute: torch.dtype) -> None:
    import bitsandbytes

    for layer in model.model.layers:
        for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
            sizes, weight = (linear.in_features, linear.out_features), linear.weight
            replaced = bitsandbytes.nn.Linear4bit(
                *sizes, linear.bias is not None, compute, compress_statistics=True, quant_type="nf4", device="meta"
            )
            replaced.weight = bitsandbytes.nn.Params4bit(
                weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=replaced
            )
            replaced.bias = linear.bias
            layer.set_submodule(name, replaced.to(weight.device))
    model.is_loaded_in_4bit = True  # PEFT asks
