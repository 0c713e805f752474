"""Hugging Face transformers: its Llama or Qwen3 with FlexAttention; with Liger's kernels.   # pip install liger-kernel

On one GPU as its Trainer runs it: fp32 weights under autocast (`bf16=True`), or a model loaded in bf16. On several as
accelerate's FSDP2 does: each layer sharded separately, embedding and head with the root. Full recomputation. Positions
start again in each document, from which transformers derives the mask.
"""

from importlib.metadata import version

import torch
from benchlib.peers.training_loop import Peer, Settings, layout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner.data.loading.batch import Batch


def build(s: Settings) -> Peer:
    liger = s.engine == "hf-liger"
    attention = s.attention or ("sdpa" if s.long or s.device.type == "cpu" else "flex")
    recompute = s.recompute or "full"
    if attention not in ("flex", "sdpa") or recompute not in ("none", "full"):
        raise SystemExit("transformers: --attention is flex or sdpa, --recompute none or full")
    if liger:
        import liger_kernel.transformers

        getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{layout(s.shape).name}")()
    written = layout(s.shape).write_config(s.shape, str(s.dtype)[6:])
    config = AutoConfig.for_model(written.pop("model_type"), **written)
    config._attn_implementation = {"flex": "flex_attention"}.get(attention, attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(s.dtype)
    if recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if s.mesh:
        shard(model, s)
    model.to_empty(device=s.device)
    with s.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # frequencies are not parameters

    def loss(pack: Batch) -> torch.Tensor:
        row = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "labels": pack.targets}
        row = {name: value[None] for name, value in row.items()}
        with torch.autocast(s.device.type, s.compute, enabled=s.compute != s.dtype and not s.mesh):
            return model(**row, shift_labels=row["labels"], use_cache=False).loss

    packages = ["transformers", *(["liger-kernel"] if liger else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return Peer(f"{s.engine} {attention} {recompute}", attention, versions, model, loss)


def shard(model: PreTrainedModel, s: Settings) -> None:
    """Over the ranks of the mesh."""
    policy = MixedPrecisionPolicy(param_dtype=s.compute, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=s.mesh, mp_policy=policy)
    fully_shard(model, mesh=s.mesh, mp_policy=policy)
