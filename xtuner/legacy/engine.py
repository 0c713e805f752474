"""Adapters from mmengine's optimizer wrapper and schedulers to ours.

`compat/translate.py` replaces the old names by these. Defaults are mmengine's.
"""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xtuner.config.adapter import adapter
from xtuner.config.build import resolve_type
from xtuner.config.schema import Allowed
from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.optim import pretraining_schedulers, schedule
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.parameter_groups import ParameterGroup

_DTYPES = {None: "auto", "float16": "auto", "bfloat16": "bf16", "float32": "fp32"}
_FP16 = "bf16 on GPUs and fp32 on CPUs are used instead"
_OTHER_CONSTRUCTOR = (
    "it would not be called",
    "leave it out; xtuner.engine.OptimWrapper takes parameter_groups = [dict(match='norm', weight_decay=0.0)]",
)
_PARAMWISE = ("custom_keys", "norm_decay_mult", "bias_decay_mult", "bias_lr_mult", "flat_decay_mult")
_NORM, _BIAS = r"norm\.weight$", r"\.bias$"
_FRESH = {
    "last_step": Allowed((-1,), "a resumed run restores its position itself", "leave it out"),
}
_QUIET = {"verbose": ("the learning rate is in every log line", bool)}


@adapter(
    no_effect={
        "loss_scale": "bf16 on GPUs and fp32 on CPUs need no loss scale",
        "dtype=float16": _FP16,
        "dtype=torch.float16": _FP16,
        "clip_grad.error_if_nonfinite": "a step with a gradient that is not finite is skipped and reported",
    },
    allowed={
        "clip_grad.error_if_nonfinite": Allowed(
            (False,), "such a step is skipped; the run continues", "set it to False"
        ),
        "clip_grad.norm_type": Allowed((2, 2.0), "gradients are clipped by their 2-norm", "set it to 2"),
        "clip_grad.type": Allowed(("norm",), "gradients are clipped by their norm", "leave it out"),
        "dtype": Allowed(
            (*_DTYPES, torch.float16, torch.bfloat16, torch.float32),
            "matrices are multiplied in bf16 or fp32 only",
            "leave it out: bf16 on GPUs, fp32 on CPUs",
        ),
        "use_fsdp": Allowed((False,), "the engine is chosen on the command line", "leave it out, and give --fsdp"),
        "constructor": Allowed((None, "DefaultOptimWrapperConstructor"), *_OTHER_CONSTRUCTOR),
    },
)
def AmpOptimWrapper(
    optimizer: Mapping[str, Any],
    clip_grad: Mapping[str, Any] | None = None,
    accumulative_counts: int = 1,
    dtype: str | torch.dtype | None = None,
    paramwise_cfg: Mapping[str, Any] | None = None,
) -> OptimWrapper:
    norm = {k: v for k, v in (clip_grad or {}).items() if k not in ("error_if_nonfinite", "norm_type", "type")}
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    groups = _read_paramwise(paramwise_cfg or {}, optimizer)
    return OptimWrapper(optimizer, norm or None, accumulative_counts, _DTYPES[name], parameter_groups=groups)


def _read_paramwise(given: Mapping[str, Any], optimizer: Mapping[str, Any]) -> list[ParameterGroup]:
    """Parameter groups of mmengine's multipliers. The longest of `custom_keys` that a name contains applies, and the
    others to names that contain none."""
    where = "optim_wrapper.paramwise_cfg"
    for key in given:
        if key not in _PARAMWISE:
            raise ConfigError(
                f"paramwise_cfg has no setting {key!r} here.{did_you_mean(str(key), list(_PARAMWISE))}",
                where=f"{where}.{key}",
                do=f"it takes: {', '.join(_PARAMWISE)}",
            )
    kind = resolve_type(optimizer.get("type"), "optim_wrapper.optimizer")
    default = inspect.signature(kind).parameters.get("weight_decay")
    decay = optimizer.get("weight_decay", default.default if default else 0.0)

    def group(where: str, match: str, rate: Any, of_decay: Any, required: bool = False) -> ParameterGroup | None:
        if any(type(m) not in (int, float, type(None)) or (m is not None and not 0 <= m < math.inf)
               for m in (rate, of_decay)):  # fmt: skip
            raise ConfigError("a multiplier is not a number of at least 0", where=where)
        scale, decays = 1.0 if rate is None else float(rate), None if of_decay is None else decay * of_decay
        found = ParameterGroup(match, scale, decays, required=required)
        return found if required or str(found) else None

    custom = given.get("custom_keys") or {}
    found = [
        group(f"{where}.custom_keys.{key}", re.escape(key), m.get("lr_mult"), m.get("decay_mult"), required=True)
        for key, m in sorted(custom.items(), key=lambda item: (-len(item[0]), item[0]))
    ]
    flat = given.get("flat_decay_mult")
    of_norms, of_biases = (given.get(name, flat) for name in ("norm_decay_mult", "bias_decay_mult"))
    found.append(group(f"{where}.norm_decay_mult", _NORM, None, of_norms))
    found.append(group(f"{where}.bias_decay_mult", _BIAS, given.get("bias_lr_mult"), of_biases))
    return [g for g in found if g]


@adapter(no_effect=_QUIET, allowed=_FRESH)
def LinearLR(
    start_factor: float = 1 / 3,
    end_factor: float = 1.0,
    begin: float = 0,
    end: float | None = None,
    by_epoch: bool = True,
    convert_to_iter_based: bool = False,
) -> schedule.LinearLR:
    return schedule.LinearLR(begin, end, by_epoch, convert_to_iter_based, start_factor, end_factor)


@adapter(no_effect=_QUIET, allowed=_FRESH)
def ConstantLR(
    factor: float = 1 / 3,
    begin: float = 0,
    end: float | None = None,
    by_epoch: bool = True,
    convert_to_iter_based: bool = False,
) -> schedule.ConstantLR:
    return schedule.ConstantLR(begin, end, by_epoch, convert_to_iter_based, factor)


@adapter(no_effect=_QUIET, allowed=_FRESH)
def MultiStepLR(
    milestones: Sequence[float],
    gamma: float = 0.1,
    begin: float = 0,
    end: float | None = None,
    by_epoch: bool = True,
    convert_to_iter_based: bool = False,
) -> schedule.MultiStepLR:
    return schedule.MultiStepLR(begin, end, by_epoch, convert_to_iter_based, gamma, milestones=milestones)


@adapter(no_effect=_QUIET, allowed=_FRESH)
def CosineAnnealingLR(
    eta_min: float | None = None,
    begin: float = 0,
    end: float | None = None,
    by_epoch: bool = True,
    convert_to_iter_based: bool = False,
    T_max: float | None = None,
    eta_min_ratio: float | None = None,
) -> schedule.CosineAnnealingLR:
    return schedule.CosineAnnealingLR(begin, end, by_epoch, convert_to_iter_based, eta_min, eta_min_ratio, T_max)


@adapter(no_effect=_QUIET, allowed=_FRESH)
def CosineRestartLR(
    periods: Sequence[float],
    restart_weights: Sequence[float] = (1,),
    eta_min: float | None = None,
    begin: float = 0,
    end: float | None = None,
    by_epoch: bool = True,
    convert_to_iter_based: bool = False,
    eta_min_ratio: float | None = None,
) -> pretraining_schedulers.CosineRestartLR:
    flags = begin, end, by_epoch, convert_to_iter_based
    return pretraining_schedulers.CosineRestartLR(*flags, restart_weights, eta_min, eta_min_ratio, periods=periods)
