"""Hugging Face transformers: its Llama with FlexAttention, and with Liger's kernels.   # pip install liger-kernel

As its Trainer runs it on one GPU: fp32 weights under autocast (`bf16=True`), or a model loaded in bf16; full recompute.
Documents are kept apart by positions that begin again, from which transformers makes the mask.
"""

from importlib.metadata import version

import torch
from peer import Peer, Settings
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.data.batch import Batch
from xtuner.model.families import write_config


def build(s: Settings) -> Peer:
    liger = s.engine == "hf-liger"
    attention = s.attention or ("sdpa" if s.long or s.device.type == "cpu" else "flex")
    recompute = s.recompute or "full"
    if attention not in ("flex", "sdpa") or recompute == "selective":
        raise SystemExit("transformers: --attention is flex or sdpa, --recompute none or full")
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = LlamaConfig.from_dict(write_config(s.shape, "llama", s.dtype))
    config._attn_implementation = {"flex": "flex_attention"}.get(attention, attention)
    torch.set_default_dtype(s.dtype)
    with s.device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(pack: Batch) -> torch.Tensor:
        row = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "labels": pack.targets}
        row = {name: value[None] for name, value in row.items()}
        with torch.autocast(s.device.type, s.compute, enabled=s.compute != s.dtype):
            return model(**row, shift_labels=row["labels"], use_cache=False).loss

    packages = ["transformers", *(["liger-kernel"] if liger else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return Peer(f"{s.engine} {attention} {recompute}", attention, versions, model, loss)
