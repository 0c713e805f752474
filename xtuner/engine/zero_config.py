"""`--deepspeed NAME_OR_JSON`: DeepSpeed's own settings, with "auto" where the config decides.

What stands in both must agree: the config is what a run is known by, and DeepSpeed would silently follow its JSON.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.engine.optim import OptimWrapper

SHIPPED = Path(__file__).parents[1] / "configs" / "deepspeed"
AUTO = "auto"
KNOWN = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "bfloat16", "fp16", "data_types", "communication_data_type", "zero_optimization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients", 
    "gradient_predivide_factor", "sparse_gradients",
    "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "comms_logger", "flops_profiler",
    "activation_checkpointing", "aio", "tensorboard", "wandb", "csv_monitor", "optimizer", "scheduler", "checkpoint",
    "seed", "disable_allgather",
}  # fmt: skip


def shipped() -> list[str]:
    return sorted(p.stem for p in SHIPPED.glob("*.json"))


def read(name: str) -> dict[str, Any]:
    """The JSON of a shipped name or a file. Raises: ConfigError."""
    where = f"--deepspeed {name}"
    path = SHIPPED / f"{name}.json" if name in shipped() else Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"there are no such DeepSpeed settings.{did_you_mean(name, shipped())}",
            where=where,
            do=f"give a JSON file, or one of: {', '.join(shipped())}",
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"the DeepSpeed settings are not JSON: {e}", where=str(path)) from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError("the DeepSpeed settings have no zero_optimization", where=str(path))
    for key in settings:
        if key not in KNOWN:
            raise ConfigError(f"DeepSpeed has no setting {key!r}.{did_you_mean(key, sorted(KNOWN))}", where=str(path))
    return settings


def package() -> Any:
    """DeepSpeed itself. Raises: ConfigError if it is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it looks for others and warns
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            "DeepSpeed is not installed",
            where="--deepspeed",
            do="pip install 'xtuner[deepspeed]', or train without it: --fsdp needs nothing more",
        ) from None
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    return deepspeed


def resolve(
    settings: dict[str, Any], optim: OptimWrapper, device: torch.device, ranks: int, name: str
) -> dict[str, Any]:
    """Settings in which the config has filled every "auto". Raises: ConfigError naming both where they disagree."""
    where = f"--deepspeed {name}"
    found = json.loads(json.dumps(settings))
    bf16 = optim.compute_dtype(device) == torch.bfloat16
    for key in ("optimizer", "scheduler"):
        if key in found:
            raise ConfigError(
                f"the DeepSpeed settings have a section {key!r}",
                where=where,
                why=f"the config has its own ({'optim_wrapper' if key == 'optimizer' else 'param_scheduler'})",
                do="delete it from the JSON",
            )
    if _of(found, "fp16.enabled") not in (None, False, AUTO):
        raise ConfigError("fp16 is not supported", where=f"{where}: fp16.enabled", do="bf16 needs no loss scale")
    found.pop("fp16", None)
    wanted = {
        "train_micro_batch_size_per_gpu": (1, "one pack at a time"),
        "gradient_accumulation_steps": (optim.accumulative_counts, "accumulative_counts"),
        "train_batch_size": (optim.accumulative_counts * ranks, "accumulative_counts × ranks"),
        "gradient_clipping": (optim.max_norm or 0.0, "optim_wrapper.clip_grad.max_norm"),
        "bf16.enabled": (bf16, "optim_wrapper.dtype"),
    }
    for key, (value, ours) in wanted.items():
        theirs = _of(found, key)
        if theirs not in (None, AUTO) and theirs != value:
            raise ConfigError(
                f"{key} is {theirs} in the DeepSpeed settings, and by the config it is {value}",
                where=f"{where}: {key}; config: {ours}",
                why="one of them would be followed without a word",
                do=f'set it to "auto" in the JSON, or change {ours}',
            )
    found.pop("train_batch_size", None)
    found["train_micro_batch_size_per_gpu"] = 1
    found["gradient_accumulation_steps"] = optim.accumulative_counts
    found["gradient_clipping"] = optim.max_norm or 0.0
    found["bf16"] = {**(found.get("bf16") or {}), "enabled": bf16}
    if not bf16:
        found.pop("communication_data_type", None)
    if left := [key for key in _flat(found) if _of(found, key) == AUTO]:
        raise ConfigError(f'no setting of the config decides {left[0]} = "auto"', where=where, do="give it a value")
    zero = found["zero_optimization"] = _checked(
        found, "zero_optimization", "zero.config", "DeepSpeedZeroConfig", where
    )
    found["bf16"] = _checked(found, "bf16", "precision_config", "DeepSpeedBF16Config", where)
    for part in ("offload_optimizer", "offload_param"):
        to = zero.get(part, {}).get("device")
        if to == "nvme":
            raise ConfigError(
                "offload to NVMe is not supported",
                where=f"{where}: zero_optimization.{part}.device",
                why="checkpoints could not read the optimizer's state there",
                do='take "cpu"',
            )
        if to == "none":
            del zero[part]
    if not zero.get("stage") and bf16:
        raise ConfigError("stage 0 in bf16 keeps no fp32 weights", where=f"{where}: zero_optimization.stage",
                          do="take deepspeed_zero1")  # fmt: skip
    return found


def _checked(settings: dict[str, Any], section: str, module: str, kind: str, where: str) -> dict[str, Any]:
    """A section that DeepSpeed's own description of it accepts. Raises: ConfigError naming the first wrong key."""
    given = dict(settings[section])
    package()
    form = getattr(importlib.import_module(f"deepspeed.runtime.{module}"), kind)
    try:
        form(**given)
    except ValueError as e:  # pydantic's ValidationError is one
        first = e.errors()[0] if hasattr(e, "errors") else {"loc": (), "msg": str(e), "type": ""}
        key = ".".join(map(str, (section, *first["loc"])))
        if first["type"] == "extra_forbidden":
            near = did_you_mean(str(first["loc"][-1]), sorted(form.model_fields)) if len(first["loc"]) == 1 else ""
            raise ConfigError(f"DeepSpeed has no setting {key!r}.{near}", where=f"{where}: {key}") from None
        value = _of(settings, key)
        raise ConfigError(f"{key} = {json.dumps(value)}: {first['msg']}", where=f"{where}: {key}") from None
    if "stage" in given:
        given["stage"] = int(given["stage"])
    return given


def _of(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _flat(settings: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in settings.items():
        keys += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys
