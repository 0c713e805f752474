"""Adapters from mmengine's optimizer wrapper and schedulers to ours.

`compat/translate.py` replaces the old names by these. Defaults are mmengine's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xtuner.config.adapter import adapter
from xtuner.config.schema import Allowed
from xtuner.optim import pretraining_schedulers, schedule
from xtuner.optim.optim_wrapper import OptimWrapper

_DTYPES = {None: "auto", "float16": "auto", "bfloat16": "bf16", "float32": "fp32"}
_FP16 = "bf16 on GPUs and fp32 on CPUs are used instead"
_ONE_RATE = (
    "all parameters of this wrapper have the same learning rate and weight decay",
    "leave it out; xtuner.engine.OptimWrapper takes parameter_groups = [dict(match='norm', weight_decay=0.0)]",
)
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
        "paramwise_cfg": Allowed((None,), *_ONE_RATE),
        "constructor": Allowed((None, "DefaultOptimWrapperConstructor"), *_ONE_RATE),
    },
)
def AmpOptimWrapper(
    optimizer: Mapping[str, Any],
    clip_grad: Mapping[str, Any] | None = None,
    accumulative_counts: int = 1,
    dtype: str | torch.dtype | None = None,
) -> OptimWrapper:
    norm = {k: v for k, v in (clip_grad or {}).items() if k not in ("error_if_nonfinite", "norm_type", "type")}
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    return OptimWrapper(optimizer, norm or None, accumulative_counts, _DTYPES[name])


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
