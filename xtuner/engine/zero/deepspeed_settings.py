"""What each of DeepSpeed's settings means here: handed on, without effect, or rejected with the reason.

Keys are written with their section: `zero_optimization.stage`. What stands in none of the three tables is unknown to
DeepSpeed 0.19.8 (`tests/test_strategies.py` compares with its own descriptions).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xtuner.core.errors import ConfigError

AUTO = "auto"
_OFF = (None, False, AUTO)

# Tried with every stage they are for: the same numbers, resumed bit for bit.
HANDED_ON = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "bf16.enabled", "data_types", "data_types.grad_accum_dtype", "communication_data_type", "zero_optimization",
    "zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "comms_logger", "log_level", "timers",
    *(f"zero_optimization.{key}" for key in (
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "offload_optimizer", "offload_param",
        "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
        "ignore_unused_parameters", "parameter_alignment", "memory_efficient_linear", "override_module_apply",
        "log_trace_cache_warnings", "enable_sanity_checks",
    )),
    *(f"zero_optimization.offload_optimizer.{key}" for key in (
        "device", "pin_memory", "fast_init", "buffer_count", "pipeline_read", "pipeline_write",
    )),
    *(f"zero_optimization.offload_param.{key}" for key in (
        "device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu",
    )),
}  # fmt: skip

_CHECKPOINTS = "checkpoints are written and read by xtuner alone"
_ITS_OWN = "xtuner does this itself, or not at all"
WITHOUT_EFFECT = {
    "activation_checkpointing": "model.activation_checkpointing decides",
    "aio": "nothing is offloaded to NVMe",
    "checkpoint": _CHECKPOINTS,
    "dataloader_drop_last": "packs are read by xtuner",
    "datastates_ckpt": _CHECKPOINTS,
    "disable_allgather": "DeepSpeed reads it no more",
    "seed": "DeepSpeed has none; randomness.seed decides",
    "seq_parallel_communication_data_type": "sequences are not cut",
    "use_data_before_expert_parallelism": "there are no experts",
    "vocabulary_size": "the model's is known",
    "bf16.immediate_grad_update": "only ZeRO-1 with fp32 sums has it",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "DeepSpeed's Muon is not used",
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory stands in offload_optimizer and offload_param",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "DeepSpeed's CPU Adam is not used",
    "zero_optimization.offload_optimizer.nvme_path": "nothing is offloaded to NVMe",
    "zero_optimization.offload_param.nvme_path": "nothing is offloaded to NVMe",
}


class Rejected(NamedTuple):
    why: str
    may_be: tuple[Any, ...] = _OFF  # values that leave it off
    do: str = ""


_CUT = "models are cut over ranks by ZeRO alone"
_MODULES = "it replaces or wraps modules of the model, whose training has code of its own"
_LOST = "this feature has been removed from DeepSpeed"
_CURVES = Rejected("curves are written by xtuner, into vis_data/ of the work dir")
_ROUNDED = "weights or gradients would be sent with fewer bits: other numbers than every other engine's"
_MASTERS = "weights and optimizer state are kept in fp32 by every engine; checkpoints hold that"
REJECTED = {
    "optimizer": Rejected("the config has its own (optim_wrapper)"),
    "scheduler": Rejected("the config has its own (param_scheduler)"),
    "zero_force_ds_cpu_optimizer": Rejected("the config's optimizer takes the steps, also of a state that is offloaded",
                                            do="set it to false"),
    "amp": Rejected(_LOST, do="bf16 on GPUs is what optim_wrapper.dtype decides"),
    **dict.fromkeys(
        ("compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
         "elasticity", "nebula", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
         "zero_optimization.mics_hierarchical_params_gather", "zero_optimization.zeropp_loco_param"),
        Rejected(_LOST),
    ),
    "zero_optimization.mics_shard_size": Rejected(_LOST, (-1, None), "--fsdp hybrid cuts over the GPUs of a node"),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _CURVES),
    "flops_profiler": Rejected(_MODULES, do="the log shows MFU"),
    "autotuning": Rejected("it starts runs of its own"),
    "disable_python_gc": Rejected(_ITS_OWN),
    "torch_autocast": Rejected("optim_wrapper.dtype decides in what is computed"),
    "prescale_gradients": Rejected("gradients are divided by targets, not by ranks"),
    "gradient_predivide_factor": Rejected("gradients are divided by targets, not by ranks", (1, None)),
    "gradient_allreduce_op": Rejected("gradients are divided by targets, not by ranks", ("mean", None)),
    "managed_gradient_accumulation": Rejected("xtuner says where an iteration ends", (True, None)),
    **dict.fromkeys(("tensor_parallel", "expert_parallel", "pipeline"), Rejected(_CUT)),
    "sequence_parallel_size": Rejected(_CUT, (1, None)),
    **dict.fromkeys(("hybrid_engine", "compile", "weight_quantization"), Rejected(_MODULES)),
    "data_efficiency": Rejected("packs are chosen by xtuner"),
    "bf16.check_grad_overflow": Rejected("a step with a NaN would be applied", (True, None)),
    "bf16.bf16_master_weights_and_grads": Rejected(_MASTERS),
    "bf16.bf16_optimizer_states": Rejected(_MASTERS),
    "data_types.param_dtype": Rejected("optim_wrapper.dtype decides in what is computed"),
    "data_types.buffer_dtype": Rejected("angles of positions are kept in fp32"),
    "data_types.keep_in_fp32_modules": Rejected("optim_wrapper.dtype decides in what is computed"),
    "zero_optimization.compute_grad_norm": Rejected("every iteration logs the norm of its gradient", (True, None)),
    "zero_optimization.round_robin_gradients": Rejected(
        "DeepSpeed then keeps parameters in another order than it reports: weights would be mixed up"
    ),
    "zero_optimization.legacy_stage1": Rejected(_LOST),
    "zero_optimization.zenflow": Rejected("it applies a part of the gradient later: another result"),
    "zero_optimization.zero_hpz_partition_size": Rejected(
        "weights would lie in two ways at once", (1, None), "--fsdp hybrid cuts over the GPUs of a node"
    ),
    "zero_optimization.zero_quantized_weights": Rejected(_ROUNDED),
    "zero_optimization.zero_quantized_nontrainable_weights": Rejected(_ROUNDED),
    "zero_optimization.zero_quantized_gradients": Rejected(_ROUNDED),
    "zero_optimization.leaf_module": Rejected("xtuner says which modules are gathered at once"),
    "zero_optimization.cpu_offload": Rejected("its name of old", do='write "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": Rejected("its name of old", do='write "offload_param": {"device": "cpu"}'),
    "zero_optimization.offload_optimizer.ratio": Rejected("it needs DeepSpeed's CPU Adam", (1, None)),
    "zero_optimization.offload_optimizer.super_offload": Rejected("it needs DeepSpeed's CPU Adam"),
}  # fmt: skip
SECTIONS = ("bf16", "data_types", "zero_optimization", "zero_optimization.offload_optimizer",
            "zero_optimization.offload_param")  # fmt: skip
KNOWN = sorted({*HANDED_ON, *WITHOUT_EFFECT, *REJECTED})


def walk(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all settings, sections first."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        yield key, value
        if key in SECTIONS and isinstance(value, dict):
            yield from walk(value, f"{key}.")


def reject(settings: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for the first setting that would train otherwise than promised, or not at all."""
    for key, value in walk(settings):
        if key in SECTIONS and not isinstance(value, dict | None):
            raise ConfigError(f"{key} = {json.dumps(value)} is not a section", where=f"{where}: {key}", do="write {…}")
        rule = REJECTED.get(key)
        enabled = value.get("enabled", bool(value)) if isinstance(value, dict) else value
        if rule is None or any(enabled is v or (v is not None and enabled == v) for v in rule.may_be):
            continue
        what = f"the section {key!r}" if isinstance(value, dict) else f"{key} = {json.dumps(value)}"
        raise ConfigError(
            f"{what} is not supported", where=f"{where}: {key}", why=rule.why, do=rule.do or "delete it from the JSON"
        )


def drop(settings: dict[str, Any]) -> list[str]:
    """Take out what has no effect here and what is rejected but off. Returns the former, each with its reason."""
    told = []
    for key, _ in list(walk(settings)):
        if key in WITHOUT_EFFECT or key in REJECTED:
            *sections, name = key.split(".")
            holder = settings
            for section in sections:
                holder = holder[section]
            del holder[name]
            if key in WITHOUT_EFFECT:
                told.append(f"{key} ({WITHOUT_EFFECT[key]})")
    return told
