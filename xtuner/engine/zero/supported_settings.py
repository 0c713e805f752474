"""What happens to each of DeepSpeed's settings: passed on, ignored, or rejected with the reason.

Keys include their section: `zero_optimization.stage`. A key in none of the three tables is unknown to DeepSpeed 0.19.8;
a test compares the tables with DeepSpeed's own schema.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xtuner.core.errors import ConfigError

AUTO = "auto"
_OFF = (None, False, AUTO)

# Tested with every stage that they apply to: same results, and resumed bit for bit.
PASSED_ON = {
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
IGNORED = {
    "activation_checkpointing": "model.activation_checkpointing decides",
    "aio": "nothing is offloaded to NVMe",
    "checkpoint": _CHECKPOINTS,
    "dataloader_drop_last": "packs are read by xtuner",
    "datastates_ckpt": _CHECKPOINTS,
    "disable_allgather": "DeepSpeed no longer reads it",
    "seed": "DeepSpeed has none; randomness.seed decides",
    "seq_parallel_communication_data_type": "sequences are not split over ranks",
    "use_data_before_expert_parallelism": "there are no experts",
    "vocabulary_size": "the model's own is used",
    "bf16.immediate_grad_update": "it needs ZeRO-1 with fp32 sums",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "DeepSpeed's Muon is not used",
    "zero_optimization.cpu_offload_use_pin_memory": "set pin_memory in offload_optimizer and offload_param",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "DeepSpeed's CPU Adam is not used",
    "zero_optimization.offload_optimizer.nvme_path": "nothing is offloaded to NVMe",
    "zero_optimization.offload_param.nvme_path": "nothing is offloaded to NVMe",
}


class Rejected(NamedTuple):
    why: str
    may_be: tuple[Any, ...] = _OFF  # values that turn it off
    do: str = ""


_PARALLEL = "ZeRO is the only parallelism under DeepSpeed here"
_MODULES = "it replaces or wraps modules of the model, which have their own forward and backward"
_REMOVED = "this feature has been removed from DeepSpeed"
_CURVES = Rejected("curves are written by xtuner, into vis_data/ of the work dir")
_QUANTIZED = "weights or gradients would be sent with fewer bits: results would differ from every other engine's"
_MASTERS = "every engine keeps weights and optimizer state in fp32, and checkpoints contain them"
REJECTED = {
    "optimizer": Rejected("the config has its own (optim_wrapper)"),
    "scheduler": Rejected("the config has its own (param_scheduler)"),
    "zero_force_ds_cpu_optimizer": Rejected("the config's optimizer is used, also for offloaded state",
                                            do="set it to false"),
    "amp": Rejected(_REMOVED, do="set optim_wrapper.dtype for bf16"),
    **dict.fromkeys(
        ("compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
         "elasticity", "nebula", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
         "zero_optimization.mics_hierarchical_params_gather", "zero_optimization.zeropp_loco_param"),
        Rejected(_REMOVED),
    ),
    "zero_optimization.mics_shard_size": Rejected(_REMOVED, (-1, None), "--fsdp hybrid shards over the GPUs of a node"),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _CURVES),
    "flops_profiler": Rejected(_MODULES, do="the log shows MFU"),
    "autotuning": Rejected("it starts its own runs"),
    "disable_python_gc": Rejected(_ITS_OWN),
    "torch_autocast": Rejected("optim_wrapper.dtype sets the compute dtype"),
    "prescale_gradients": Rejected("gradients are divided by targets, not by ranks"),
    "gradient_predivide_factor": Rejected("gradients are divided by targets, not by ranks", (1, None)),
    "gradient_allreduce_op": Rejected("gradients are divided by targets, not by ranks", ("mean", None)),
    "managed_gradient_accumulation": Rejected("xtuner decides where an iteration ends", (True, None)),
    **dict.fromkeys(("tensor_parallel", "expert_parallel", "pipeline"), Rejected(_PARALLEL)),
    "sequence_parallel_size": Rejected(_PARALLEL, (1, None)),
    **dict.fromkeys(("hybrid_engine", "compile", "weight_quantization"), Rejected(_MODULES)),
    "data_efficiency": Rejected("packs are chosen by xtuner"),
    "bf16.check_grad_overflow": Rejected("a step with a NaN would be applied", (True, None)),
    "bf16.bf16_master_weights_and_grads": Rejected(_MASTERS),
    "bf16.bf16_optimizer_states": Rejected(_MASTERS),
    "data_types.param_dtype": Rejected("optim_wrapper.dtype sets the compute dtype"),
    "data_types.buffer_dtype": Rejected("rotary angles are computed in fp32"),
    "data_types.keep_in_fp32_modules": Rejected("optim_wrapper.dtype sets the compute dtype"),
    "zero_optimization.compute_grad_norm": Rejected("every iteration logs the norm of its gradient", (True, None)),
    "zero_optimization.round_robin_gradients": Rejected(
        "DeepSpeed then stores parameters in another order than it reports: weights would be mixed up"
    ),
    "zero_optimization.legacy_stage1": Rejected(_REMOVED),
    "zero_optimization.zenflow": Rejected("it applies a part of the gradient later, which changes the result"),
    "zero_optimization.zero_hpz_partition_size": Rejected(
        "weights would be sharded in two ways at once", (1, None), "--fsdp hybrid shards over the GPUs of a node"
    ),
    "zero_optimization.zero_quantized_weights": Rejected(_QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": Rejected(_QUANTIZED),
    "zero_optimization.zero_quantized_gradients": Rejected(_QUANTIZED),
    "zero_optimization.leaf_module": Rejected("xtuner decides which modules are gathered together"),
    "zero_optimization.cpu_offload": Rejected("this is an old name", do='write "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": Rejected(
        "this is an old name", do='write "offload_param": {"device": "cpu"}'
    ),
    "zero_optimization.offload_optimizer.ratio": Rejected("it needs DeepSpeed's CPU Adam", (1, None)),
    "zero_optimization.offload_optimizer.super_offload": Rejected("it needs DeepSpeed's CPU Adam"),
}  # fmt: skip
SECTIONS = ("bf16", "data_types", "zero_optimization", "zero_optimization.offload_optimizer",
            "zero_optimization.offload_param")  # fmt: skip
KNOWN = sorted({*PASSED_ON, *IGNORED, *REJECTED})


def walk(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all settings, sections first."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        yield key, value
        if key in SECTIONS and isinstance(value, dict):
            yield from walk(value, f"{key}.")


def reject_unsupported(settings: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for the first setting under which training would differ from the documentation, or fail."""
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


def drop_ignored(settings: dict[str, Any]) -> list[str]:
    """Remove settings that have no effect and rejected settings that are off. Returns the former with their reasons."""
    ignored = []
    for key, _ in list(walk(settings)):
        if key in IGNORED or key in REJECTED:
            *sections, name = key.split(".")
            holder = settings
            for section in sections:
                holder = holder[section]
            del holder[name]
            if key in IGNORED:
                ignored.append(f"{key} ({IGNORED[key]})")
    return ignored
