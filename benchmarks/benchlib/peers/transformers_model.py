"""Hugging Face transformers: its Llama or Qwen3 with FlexAttention; with Liger's kernels.   # pip install liger-kernel
Adapters: peft_terms.py; fp8: fp8_products.py.

On one GPU as its Trainer runs it: fp32 weights under autocast (`bf16=True`), or a model loaded in bf16. On several as
accelerate's FSDP2 does: each layer sharded separately, embedding and head with the root. Full recomputation. Positions
start again in each document, from which transformers derives the mask. FlashAttention (`--attention flash4` or
`varlen`) is called with the borders of documents, as its Trainer does with a collator for packs; with adapters it is
the default.
"""

from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from benchlib.peers.training_loop import Peer, Settings, layout
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner.data.loading.batch import Batch
from xtuner.model.attention import choose_backend, load_backend

REGISTERED = "by_borders"  # transformers looks for a package of its own if a name contains "flash"


def build(s: Settings) -> Peer:
    liger = s.engine == "hf-liger"
    attention = s.attention or choose_attention(s)
    recompute = s.recompute or "full"
    by_borders = attention in ("flash4", "varlen", "loop")
    if (not by_borders and attention not in ("flex", "sdpa")) or recompute not in ("none", "full"):
        raise SystemExit("transformers: --attention is flash4, varlen, flex, sdpa or loop, --recompute none or full")
    if by_borders:
        register_attention(attention)
    if liger:
        import liger_kernel.transformers

        getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{layout(s.shape).name}")()
    written = layout(s.shape).write_config(s.shape, str(s.dtype)[6:])
    config = AutoConfig.for_model(written.pop("model_type"), **written)
    named = REGISTERED if by_borders else attention
    config._attn_implementation = {"flex": "flex_attention"}.get(named, named)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(s.dtype)
    if s.products:
        from benchlib.peers import fp8_products

        fp8_products.convert_layers(model.model.layers, s.products, s.device, liger)
    if recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if s.mesh:
        shard(model, s)
    model.to_empty(device=s.device)
    with s.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # frequencies are not parameters

    fp32_factors = s.terms is not None and s.compute != torch.float32
    mixed = not s.mesh and (s.compute != s.dtype or fp32_factors)

    def loss(pack: Batch) -> torch.Tensor:
        row = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "labels": pack.targets}
        row = {name: value[None] for name, value in row.items()}
        borders = dict(cu_seq_lens_q=pack.cu_seqlens, max_length_q=pack.max_seqlen) if by_borders else {}
        with torch.autocast(s.device.type, s.compute, enabled=mixed):
            return model(**row, **borders, shift_labels=row["labels"], use_cache=False).loss

    adapt = None
    packages = ["transformers", *(["liger-kernel"] if liger else []), *(["torchao"] if s.products else [])]
    if s.terms:
        from benchlib.peers import peft_terms

        adapt = partial(peft_terms.add_terms, model, s.terms, s.compute)
        packages += peft_terms.packages(s.terms)
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return Peer(s.label(attention, recompute), attention, versions, model, loss, adapt=adapt)


def choose_attention(s: Settings) -> str:
    if s.device.type == "cpu":
        return "sdpa"
    if s.terms:
        return choose_backend(s.device, s.compute, s.shape.head_dim, None, s.shape.queries_per_kv_head)
    return "sdpa" if s.long else "flex"


def register_attention(name: str) -> None:
    """Let transformers call a function for documents of variable length, the same one that ours calls."""
    function = load_backend(name)

    def attend(
        module: nn.Module, q_1NTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, mask: None, **more: Any
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (q_1NTD, k_1KTD, v_1KTD))
        return function(q, k, v, more["cu_seq_lens_q"], more["max_length_q"])[None], None

    AttentionInterface.register(REGISTERED, attend)


def shard(model: PreTrainedModel, s: Settings) -> None:
    """Over the ranks of the mesh."""
    policy = MixedPrecisionPolicy(param_dtype=s.compute, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=s.mesh, mp_policy=policy)
    fully_shard(model, mesh=s.mesh, mp_policy=policy)
