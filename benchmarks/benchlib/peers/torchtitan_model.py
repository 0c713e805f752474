"""torchtitan: its Llama 3 with its own activation checkpointing, blocks and loss compiled.

    pip install --no-deps torchtitan==0.2.2    # for torch 2.11; 0.3.0 needs a newer one; fp8 also needs torchao

Packages that its model imports but this does not use may be missing (`Absent`).

`parallelize_llama` unchanged (activation checkpointing, torch.compile, FSDP on several GPUs); FlexAttention with its
block-causal mask, its variable-length attention, or SDPA if a pack is one document. As in its trainer, the model gets
no positions: rotary positions are relative. On one GPU its FSDP on a mesh of one rank computes fp32 weights in bf16.
0.2.2 has only a loss on full logits: bf16 [T, V], and their gradient. By arithmetic, packs of 32,768 tokens fit into
80 GB with 'selective' at 1.8B (60 GiB) and with 'full' at 7B (50 GiB). 'budget-0.3' lets the compiler choose what to
keep, up to 0.3 of all activations. fp8 is its converter of all linear layers but the output layer, as its own Llama 3
configs have it (the recipes of fp8_products.py).
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from benchlib.peers.training_loop import Peer, Settings, Weights
from torch.distributed.fsdp import FSDPModule


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Replaces missing packages by modules in which every name exists: as an empty class, or in lower case as an empty
    module."""

    def __init__(self, *names: str) -> None:
        self.names = {name for name in names if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        there = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if there else None

    def exec_module(self, module: ModuleType) -> None:
        def named(name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            if name != name.lower():
                return type(name, (), {})
            empty = ModuleType(name)
            self.exec_module(empty)
            return empty

        module.__dict__["__getattr__"] = named


sys.meta_path.append(Absent("datasets", "torchdata", "tyro"))

from torchtitan.components.loss import build_cross_entropy_loss  # noqa: E402
from torchtitan.config import JobConfig  # noqa: E402
from torchtitan.distributed import ParallelDims, parallel_dims  # noqa: E402
from torchtitan.distributed.context_parallel import prepare_context_parallel_input  # noqa: E402
from torchtitan.models.llama3 import Transformer, TransformerModelArgs  # noqa: E402
from torchtitan.models.llama3.infra.parallelize import apply_fsdp, parallelize_llama  # noqa: E402
from torchtitan.models.llama3.model.args import RoPEScalingArgs  # noqa: E402
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter  # noqa: E402

from xtuner.data.loading.batch import Batch  # noqa: E402
from xtuner.model.decoder import DecoderConfig  # noqa: E402

MODES = {"none": "none", "selective": "selective", "full": "full", "budget": "memory_budget"}
END = SimpleNamespace(eos_id=1)  # its masks end documents at this token; the row that they get marks the ends only


def model_args(c: DecoderConfig, attention: str) -> TransformerModelArgs:
    return TransformerModelArgs(
        dim=c.hidden_size,
        n_layers=c.num_layers,
        n_heads=c.num_heads,
        n_kv_heads=c.num_kv_heads,
        vocab_size=c.vocab_size,
        ffn_dim_multiplier=c.intermediate_size / (4 * c.hidden_size),  # of 8/3 · dim: two thirds of the width,
        multiple_of=c.intermediate_size,  # of which the next multiple is the width
        norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),  # none
        max_seq_len=c.max_position_embeddings,
        attn_type=attention,
        attn_mask_type="causal" if attention == "sdpa" else "block_causal",
    )


def build(s: Settings) -> Peer:
    attention = s.attention or ("sdpa" if s.long else "flex")
    if attention not in ("flex", "varlen", "sdpa"):
        raise SystemExit("torchtitan: --attention is flex, varlen or sdpa")
    if attention == "sdpa" and not s.long:
        raise SystemExit("torchtitan's sdpa does not separate documents: use a case with one document per pack (-long)")
    recompute = s.recompute or ("full" if s.shape.hidden_size > 2048 else "selective")
    mode, _, budget = recompute.partition("-")
    if mode not in MODES or bool(budget) != (mode == "budget"):
        raise SystemExit("torchtitan: --recompute is none, selective, full or budget-PART, as budget-0.3")
    job = JobConfig()
    job.compile.enable = True
    job.activation_checkpoint.mode = MODES[mode]
    job.activation_checkpoint.selective_ac_option = "op"
    job.activation_checkpoint.memory_budget = float(budget or 1)
    job.training.mixed_precision_param = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[s.compute]
    torch.set_default_dtype(s.dtype)
    with torch.device("meta"):
        model = Transformer(model_args(s.shape, attention))
    torch.set_default_dtype(torch.float32)
    assert model.layers["0"].feed_forward.w1.out_features == s.shape.intermediate_size
    parallel_dims.device_type = s.device.type  # its default ignores CPUs
    ranks = s.mesh.size() if s.mesh else 1
    split = (1, ranks) if s.shared else (ranks, 1)  # of packs, of each pack's tokens
    dims = ParallelDims(1, *split, 1, 1, 1, 1, world_size=ranks)
    if s.products:
        convert_layers(model, s, dims, job)
    parallelize_llama(model, dims, job)
    if ranks == 1 and s.dtype != s.compute:
        backend = "nccl" if s.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        mesh = dist.init_device_mesh(s.device.type, (1,), mesh_dim_names=("fsdp",))
        apply_fsdp(model, mesh, param_dtype=s.compute, reduce_dtype=torch.float32, pp_enabled=False)
    for module in model.modules():
        if isinstance(module, FSDPModule) and s.device.type == "cpu":  # gloo lacks the scaled sums that 0.2.2 requests
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=s.device)
    with torch.no_grad():
        model.init_weights(s.device)  # also frequencies, which are not parameters
    cross_entropy = build_cross_entropy_loss(job)

    def loss(pack: Batch) -> torch.Tensor:
        masks = None
        if attention != "sdpa":
            ends = torch.zeros_like(pack.input_ids)
            ends[pack.cu_seqlens[1:].long() - 1] = END.eos_id
            masks = model.get_attention_masks(ends[None], END)
        ids, targets, positions = pack.input_ids[None], pack.targets[None], None
        if s.shared:  # with the balancer that its trainer chooses
            ids, targets, more = prepare_context_parallel_input(ids, targets, {}, dims.get_mesh("cp"), s.device)
            positions = more["positions"]
        logits = model(ids, attention_masks=masks, positions=positions)
        return cross_entropy(logits, targets) / pack.num_targets

    packages = ["torchtitan", *(["torchao"] if s.products else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    names = own_names(model)

    def rename(weights: Weights) -> Weights:
        return {names[name]: weight for name, weight in from_hf(model, weights).items()}

    return Peer(s.label(attention, recompute), attention, versions, model, loss, rename, adds_up=True)


def convert_layers(model: Transformer, s: Settings, dims: ParallelDims, job: JobConfig) -> None:
    from benchlib.peers.fp8_products import RECIPES
    from torchtitan.components.quantization.float8 import Float8LinearConverter

    chosen = job.quantize.linear.float8
    chosen.recipe_name, chosen.filter_fqns = RECIPES[s.products or "fp8"].value, ["output"]
    if s.device.type == "cpu":
        chosen.recipe_name, chosen.emulate, job.compile.enable = None, True, False
    Float8LinearConverter(job, dims).convert(model)


def own_names(model: Transformer) -> dict[str, str]:
    """Names before modules were wrapped → names after."""
    return {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): name
        for name, _ in model.named_parameters()
    }


def from_hf(model: Transformer, weights: Weights) -> Weights:
    """Weights of the llama layout by names before wrapping; rows of q and k permuted for its interleaved rotation."""
    return Llama3StateDictAdapter(model.model_args, None).from_hf(weights)
