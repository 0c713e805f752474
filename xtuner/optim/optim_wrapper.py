"""The `optim_wrapper` of a config: which optimizer, how gradients are clipped and accumulated, in what precision."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from xtuner.config.build import check_arguments, resolve_type, type_name
from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError
from xtuner.model.source import DTYPES
from xtuner.optim import optimizer_trial
from xtuner.optim.adamw import FORMS, Form
from xtuner.optim.optimizer_trial import Traits
from xtuner.optim.parameter_groups import read_groups, split


class OptimWrapper:
    """Described once, used by every strategy.

    Its arguments are declared in config/settings.py. The optimizer is a class of `torch.optim` or another of its kind
    that passes the trial of optimizer_trial.py; states: see adamw.py; sums with DeepSpeed: zero_memory.py; groups:
    parameter_groups.py.
    """

    def __init__(
        self,
        optimizer: Mapping[str, Any],
        clip_grad: Mapping[str, Any] | None = None,
        accumulative_counts: int = 1,
        dtype: str = "auto",
        states: str = "fp32",
        sums: str | None = None,
        micro_batch: int | None = None,
        full: str | None = None,
        parameter_groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        SCHEMA.require("optim_wrapper", accumulative_counts=accumulative_counts, dtype=dtype, states=states, sums=sums,
                       micro_batch=micro_batch, full=full)  # fmt: skip
        self.kind = resolve_type(optimizer.get("type"), "optim_wrapper.optimizer")
        self.arguments = {k: v for k, v in optimizer.items() if k != "type"}
        check_arguments(self.kind, {"params": None, **self.arguments}, "optim_wrapper.optimizer")
        step = getattr(self.kind, "step", lambda: None)  # a function may make it, too
        closure = inspect.signature(step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ConfigError(
                f"{type_name(self.kind)} is not supported",
                where="optim_wrapper.optimizer.type",
                why="it computes losses of its own between the steps",
                do=optimizer_trial.ADVICE,
            )
        if "lr" not in self.arguments:
            raise ConfigError("the optimizer has no lr", where="optim_wrapper.optimizer.lr")
        if clip_grad is not None and set(clip_grad) - {"max_norm"}:
            other = ", ".join(sorted(set(clip_grad) - {"max_norm"}))
            raise ConfigError(f"clip_grad takes max_norm alone, not {other}", where="optim_wrapper.clip_grad")
        self.max_norm = float(clip_grad["max_norm"]) if clip_grad and clip_grad.get("max_norm") is not None else None
        if states != "fp32" and not self._is_adamw:
            raise ConfigError(
                f'states = "{states}" is for AdamW, not for {type_name(self.kind)}({self._shown()})',
                where="optim_wrapper.states",
                do='take torch.optim.AdamW without amsgrad or maximize, or states = "fp32"',
            )
        self.sums, self.micro_batch, self.full = sums, micro_batch, full
        self.accumulative_counts = accumulative_counts
        self.dtype = dtype
        self.states = FORMS[states]
        self._flags: dict[str, dict[str, bool]] = {}  # what `build` adds, by the kind of device of parameters
        self._traits: dict[str, Traits] = {}
        self.parameter_groups = read_groups(parameter_groups)
        self._try()

    def _try(self) -> None:
        """Raise ConfigError for an optimizer that no device and no engine could use."""
        there = {k: v for k, v in self.arguments.items() if k not in ("capturable", "fused")}  # GPUs have more of these
        try:
            optimizer_trial.examine(partial(self.kind, **there), type_name(self.kind), torch.device("cpu"))
            self._take_groups(there, [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)])
        except ConfigError as e:
            known = getattr(self.kind, "__module__", "").startswith("torch.optim")
            if known or e.__cause__ is None or isinstance(e.__cause__, TypeError):
                raise  # else it may need a GPU: `traits` reports it where the run is

    def _take_groups(self, arguments: Mapping[str, Any], parameters: Sequence[torch.nn.Parameter]) -> None:
        """Raise ConfigError for an optimizer that does not follow the settings of parameter groups."""
        if not self.parameter_groups:
            return
        try:
            groups = [dict(params=[p]) for p in parameters]
            built = self.kind(groups, **arguments)
            whole = built.param_groups
        except Exception as e:
            raise self._without_groups(f"does not take parameter groups: {e}") from None
        if len(whole) != len(groups):
            raise self._without_groups("makes groups of its own")
        if any(g.weight_decay is not None for g in self.parameter_groups) and "weight_decay" not in whole[0]:
            raise self._without_groups("has no weight_decay")

    def _without_groups(self, why: str) -> ConfigError:
        return ConfigError(
            f"{type_name(self.kind)} {why}",
            where="optim_wrapper.parameter_groups",
            why="the settings of groups would have no effect",
            do=f"leave parameter_groups out; or {optimizer_trial.ADVICE}",
        )

    def traits(self, device: torch.device) -> Traits:
        """What the optimizer does with parameters on a device. Raises: ConfigError if it cannot be used there."""
        if device.type not in self._traits:
            name, choices = type_name(self.kind), {"fused", "foreach"} & set(inspect.signature(self.kind).parameters)
            ways: list[dict[str, bool]] = [{}]
            if "fused" in choices and not choices & self.arguments.keys():
                ways.insert(0, {"fused": True})
            for flags in ways:
                try:
                    self._traits[device.type] = optimizer_trial.examine(
                        partial(self.kind, **self.arguments, **flags), name, device
                    )
                except ConfigError:
                    if flags is ways[-1]:
                        raise
                    continue
                self._flags[device.type] = flags
                break
        return self._traits[device.type]

    def taking(self, packs: int) -> "OptimWrapper":
        """The same with so many packs a rank and iteration."""
        other = copy.copy(self)
        other.accumulative_counts = packs
        return other

    @property
    def lr(self) -> float:
        return float(self.arguments["lr"])

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return DTYPES[self.dtype]

    @property
    def _is_adamw(self) -> bool:
        return self.kind is torch.optim.AdamW and self.arguments.keys() <= {"lr", "betas", "eps", "weight_decay"}

    def own_form(self, device: torch.device) -> Form | None:
        """The form of our own AdamW that our own strategy takes; None for PyTorch's optimizer on fp32 masters."""
        if self.states.name != "fp32":
            return self.states
        if device.type != "cuda" or not self._is_adamw:
            return None
        # bf16 that computes and the 16 bits it lacks are the same fp32 masters in less memory
        return FORMS["split" if self.compute_dtype(device) == torch.bfloat16 else "fp32"]

    def gradient_dtype(self, device: torch.device) -> torch.dtype:
        """Of the sums of gradients that our own strategy keeps."""
        form = self.own_form(device)
        if self.sums:
            return DTYPES[self.sums]
        return form.gradient if form else torch.float32

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer; by its fused kernel where it has one that works and nothing else is requested."""
        device = next(iter(parameters.values())).device
        self.traits(device)
        groups = split(parameters, self.parameter_groups) if self.parameter_groups else list(parameters.values())
        return self.kind(groups, **self.arguments, **self._flags[device.type])

    def describe(self) -> str:
        clip = f"gradients clipped to norm {self.max_norm:g}" if self.max_norm is not None else "no clipping"
        return f"{type_name(self.kind)}({self._shown()}), {clip}"

    def _shown(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.arguments.items())
