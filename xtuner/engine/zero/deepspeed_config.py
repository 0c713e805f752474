"""`--deepspeed NAME_OR_JSON`: DeepSpeed's own settings, with "auto" where the config decides.

A value that both define must be the same: the config describes the run, but DeepSpeed would silently follow its JSON.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.core.system import sysinfo
from xtuner.engine.zero import supported_settings
from xtuner.engine.zero.supported_settings import AUTO
from xtuner.model.flops import block_parameters
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper

OLDEST = "0.19.8"  # of DeepSpeed
BUCKET = 200_000_000  # elements that are sent at once: 0.8 GB in fp32, enough for the full speed of links
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
GRADIENTS = "data_types.grad_accum_dtype"
SHIPPED = Path(__file__).parents[2] / "configs" / "deepspeed"


def list_shipped() -> list[str]:
    return sorted(p.stem for p in SHIPPED.glob("*.json"))


def read_settings(name: str) -> dict[str, Any]:
    """The JSON of a shipped name or a file. Raises: ConfigError."""
    where = f"--deepspeed {name}"
    path = SHIPPED / f"{name}.json" if name in list_shipped() else Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"no such DeepSpeed settings.{did_you_mean(name, list_shipped())}",
            where=where,
            do=f"give a JSON file, or one of: {', '.join(list_shipped())}",
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"the DeepSpeed settings are not JSON: {e}", where=str(path)) from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError("the DeepSpeed settings have no zero_optimization", where=str(path))
    if "bfloat16" in settings:  # the old name
        settings["bf16"] = settings.pop("bfloat16")
    for key in settings:
        if key not in (*supported_settings.KNOWN, "fp16"):
            near = did_you_mean(key, [k for k in supported_settings.KNOWN if "." not in k])
            raise ConfigError(f"DeepSpeed has no setting {key!r}.{near}", where=str(path))
    return settings


def import_deepspeed() -> Any:
    """The package. Raises: ConfigError if it is not installed, or too old."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it searches for others and warns
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            "DeepSpeed is not installed",
            where="--deepspeed",
            do="pip install 'xtuner[deepspeed]', or train without it: --fsdp needs no other package",
        ) from None
    if sysinfo.release(deepspeed.__version__) < sysinfo.release(OLDEST):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} is older than {OLDEST}",
            where="--deepspeed",
            why="its gradient partitions are other ones than those that are filled here",
            do=f"pip install 'deepspeed>={OLDEST}'",
        )
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    return deepspeed


def prepare_settings(
    name: str, source: ModelSource, optim: OptimWrapper, device: torch.device, ranks: int, validate: bool = True
) -> dict[str, Any]:
    """The settings of a shipped name or a file, completed for a model. Raises: ConfigError.

    Args:
        validate: see `resolve_auto`.
    """
    found = resolve_auto(read_settings(name), optim, device, ranks, name, validate)
    zero = found["zero_optimization"]
    block = block_parameters(source.config)
    # if less than a block is prefetched, each block waits for the rest of its weights
    sizes = dict.fromkeys(BUCKETS[:2], BUCKET) | ({BUCKETS[2]: block} if zero.get("stage") == 3 else {})
    found["zero_optimization"] = sizes | zero
    return found


def resolve_auto(
    settings: dict[str, Any], optim: OptimWrapper, device: torch.device, ranks: int, name: str, validate: bool = True
) -> dict[str, Any]:
    """The settings with every "auto" replaced by the config's value. Raises: ConfigError naming both if they differ.

    Args:
        validate: by DeepSpeed's own schema, which takes half a second to import; shipped settings are valid.
    """
    where = f"--deepspeed {name}"
    found = json.loads(json.dumps(settings))
    bf16 = optim.compute_dtype(device) == torch.bfloat16
    if _get(found, "fp16.enabled") not in (None, False, AUTO):
        raise ConfigError("fp16 is not supported", where=f"{where}: fp16.enabled", do="bf16 needs no loss scale")
    found.pop("fp16", None)
    supported_settings.reject_unsupported(found, where)
    supported_settings.drop_ignored(found)
    for key in BUCKETS:
        if found["zero_optimization"].get(key) == AUTO:
            del found["zero_optimization"][key]  # set by `prepare_settings`
    wanted = {
        "train_micro_batch_size_per_gpu": (1, ""),
        "gradient_accumulation_steps": (optim.accumulative_counts, "accumulative_counts"),
        "train_batch_size": (optim.accumulative_counts * ranks, "accumulative_counts × ranks"),
        "gradient_clipping": (optim.max_norm or 0.0, "optim_wrapper.clip_grad.max_norm"),
        "bf16.enabled": (bf16, "optim_wrapper.dtype"),
    }
    for key, (value, ours) in wanted.items():
        theirs = _get(found, key)
        if theirs not in (None, AUTO) and theirs != value:
            raise ConfigError(
                f"{key} is {theirs} in the DeepSpeed settings, and by the config it is {value}",
                where=f"{where}: {key}" + (f"; config: {ours}" if ours else ""),
                why="DeepSpeed would silently use its own" if ours else "each GPU computes one pack at a time",
                do='set it to "auto" in the JSON' + (f", or change {ours}" if ours else ""),
            )
    found.pop("train_batch_size", None)
    found["train_micro_batch_size_per_gpu"] = 1
    found["gradient_accumulation_steps"] = optim.accumulative_counts
    found["gradient_clipping"] = optim.max_norm or 0.0
    found["bf16"] = {**(found.get("bf16") or {}), "enabled": bf16}
    found["zero_allow_untested_optimizer"] = True
    found["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's default is true
    if not bf16:
        found.pop("communication_data_type", None)
    elif found.setdefault("communication_data_type", "fp32") not in ("fp32", "bf16"):
        raise ConfigError(
            f"communication_data_type = {json.dumps(found['communication_data_type'])} is not fp32 or bf16",
            where=f"{where}: communication_data_type",
            why="other types cannot represent the range of gradients",
        )
    if left := [key for key in _flatten_keys(found) if _get(found, key) == AUTO and key != GRADIENTS]:
        raise ConfigError(f'no setting of the config decides {left[0]} = "auto"', where=where, do="give it a value")
    if validate:
        found["zero_optimization"] = _checked(found, "zero_optimization", "zero.config", "DeepSpeedZeroConfig", where)
        found["bf16"] = _checked(found, "bf16", "precision_config", "DeepSpeedBF16Config", where)
    zero = found["zero_optimization"]
    if strange := next((key for key, _ in supported_settings.walk(found) if key not in supported_settings.KNOWN), None):
        raise ConfigError(
            f"{strange} is not supported", where=f"{where}: {strange}", why="DeepSpeed 0.19.8 has no such setting"
        )
    _set_sums(found, optim, bf16, where)
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        to = (zero.get(part) or {}).get("device", "none")
        if to == "nvme":
            raise ConfigError(
                "offload to NVMe is not supported",
                where=f"{where}: zero_optimization.{part}.device",
                why="checkpoints could not read the optimizer's state there",
                do='take "cpu"',
            )
        if to == "none":
            zero.pop(part, None)
        elif zero.get("stage", 0) < least:
            raise ConfigError(
                f"{part} needs stage {least} or higher",
                where=f"{where}: zero_optimization.{part}",
                why=f"stage {zero.get('stage', 0)} keeps this full on every GPU",
            )
    if not zero.get("stage") and bf16:
        raise ConfigError("stage 0 in bf16 keeps no fp32 weights", where=f"{where}: zero_optimization.stage",
                          do="take deepspeed_zero1")  # fmt: skip
    return found


def _set_sums(found: dict[str, Any], optim: OptimWrapper, bf16: bool, where: str) -> None:
    """Set the dtype in which gradients are summed over the packs of an iteration: fp32, or bf16 on request.

    In bf16 the error of the sum grows with the number of packs.
    """
    wanted = (found.pop("data_types", None) or {}).get("grad_accum_dtype")
    wanted = None if wanted == AUTO else wanted
    stage = _get(found, "zero_optimization.stage") or 0
    at = f"{where}: data_types.grad_accum_dtype"
    if wanted not in ((None, "fp32", "bf16") if bf16 else (None, "fp32")):
        may = "fp32 or bf16" if bf16 else "fp32, in which everything is computed"
        raise ConfigError(f"data_types.grad_accum_dtype = {json.dumps(wanted)} is not {may}", where=at)
    if wanted and optim.sums and wanted != optim.sums:
        raise ConfigError(
            f"data_types.grad_accum_dtype is {wanted} in the DeepSpeed settings, and by the config it is {optim.sums}",
            where=f"{at}; config: optim_wrapper.sums",
            why="DeepSpeed would silently use its own",
            do='set it to "auto" in the JSON, or change optim_wrapper.sums',
        )
    offload = (_get(found, "zero_optimization.offload_optimizer.device") or "none") != "none"
    by_deepspeed = "with offload" if offload else "with sums in bf16" if bf16 and wanted == "bf16" else ""
    full = {1: ("all",), 2: ("weights",) if by_deepspeed else ("all", "weights"), 3: ("blocks",)}.get(stage, ())
    if optim.full and optim.full not in full:
        raise ConfigError(
            f'full = "{optim.full}" is not what ZeRO-{stage} can do {by_deepspeed}'.rstrip(),
            where=f"optim_wrapper.full; {where}: zero_optimization.stage",
            do=f"take one of {', '.join(full)}, or leave it out" if full else "leave it out",
        )
    if not bf16 or not stage:
        return
    # under stage 1 DeepSpeed sums in fp32 with offload only; else gradient_exchange.py does, and under stage 2 if it
    # fits
    if stage > 1 or offload or wanted == "bf16":
        by_name = optim.sums if stage == 3 or offload or optim.full == "weights" else None
        found["data_types"] = {"grad_accum_dtype": wanted or by_name or "fp32"}


def list_ignored(settings: dict[str, Any]) -> list[str]:
    """Settings without effect here, each with its reason."""
    return supported_settings.drop_ignored(json.loads(json.dumps(settings)))


def _checked(settings: dict[str, Any], section: str, module: str, kind: str, where: str) -> dict[str, Any]:
    """A section, validated by DeepSpeed's own schema. Raises: ConfigError naming the first wrong key."""
    given = dict(settings[section])
    import_deepspeed()
    form = getattr(importlib.import_module(f"deepspeed.runtime.{module}"), kind)
    try:
        form(**given)
    except ValueError as e:  # pydantic's ValidationError is one
        first = e.errors()[0] if hasattr(e, "errors") else {"loc": (), "msg": str(e), "type": ""}
        key = ".".join(map(str, (section, *first["loc"])))
        if first["type"] == "extra_forbidden":
            near = did_you_mean(str(first["loc"][-1]), sorted(form.model_fields)) if len(first["loc"]) == 1 else ""
            raise ConfigError(f"DeepSpeed has no setting {key!r}.{near}", where=f"{where}: {key}") from None
        value = _get(settings, key)
        words = "Input should be 0, 1, 2 or 3" if key == "zero_optimization.stage" else first["msg"]
        raise ConfigError(f"{key} = {json.dumps(value)}: {words}", where=f"{where}: {key}") from None
    if "stage" in given:
        given["stage"] = int(given["stage"])
    return given


def _get(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _flatten_keys(settings: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in settings.items():
        keys += _flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys
