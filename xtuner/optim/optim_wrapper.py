"""The `optim_wrapper` of a config: the optimizer, clipping and accumulation of gradients, and precision."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from xtuner.config.build import check_arguments, resolve_type, type_name
from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError
from xtuner.model.source import DTYPES, ModelSource
from xtuner.optim import optimizer_traits
from xtuner.optim.adamw import FORMS, Form
from xtuner.optim.muon import Muon, is_matrix
from xtuner.optim.optimizer_traits import Traits
from xtuner.optim.parameter_groups import (
    WHERE,
    ParameterGroup,
    find_group,
    layer_scale,
    read_groups,
    require_matches,
    split_into_groups,
)


class OptimWrapper:
    """The optimizer's description, used by every strategy.

    Its arguments are declared in config/settings.py. The optimizer is a class of `torch.optim` or a similar one that
    passes the trial of optimizer_traits.py, or our own Muon (muon.py). For `states` see adamw.py, for `sums` under
    DeepSpeed zero_memory.py, for groups parameter_groups.py.
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
        parameter_groups: Sequence[Mapping[str, Any] | ParameterGroup] = (),
        layer_decay: float | None = None,
    ) -> None:
        SCHEMA.require("optim_wrapper", accumulative_counts=accumulative_counts, dtype=dtype, states=states, sums=sums,
                       micro_batch=micro_batch, full=full, layer_decay=layer_decay)  # fmt: skip
        self.optimizer_class = resolve_type(optimizer.get("type"), "optim_wrapper.optimizer")
        self.arguments = {k: v for k, v in optimizer.items() if k != "type"}
        _reject_torch_muon(self.optimizer_class)
        check_arguments(self.optimizer_class, self.arguments, "optim_wrapper.optimizer", passed=["params"])
        step = getattr(self.optimizer_class, "step", lambda: None)  # `type` may be a function that builds it
        closure = inspect.signature(step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ConfigError(
                f"{type_name(self.optimizer_class)} is not supported",
                where="optim_wrapper.optimizer.type",
                why="its step needs a closure that computes the loss",
                do=optimizer_traits.ADVICE,
            )
        if "lr" not in self.arguments:
            raise ConfigError("the optimizer has no lr", where="optim_wrapper.optimizer.lr")
        if clip_grad is not None and set(clip_grad) - {"max_norm"}:
            other = ", ".join(sorted(set(clip_grad) - {"max_norm"}))
            raise ConfigError(f"clip_grad supports only max_norm, not {other}", where="optim_wrapper.clip_grad")
        self.max_norm = float(clip_grad["max_norm"]) if clip_grad and clip_grad.get("max_norm") is not None else None
        self.muon = Muon(**self.arguments) if self.optimizer_class is Muon else None
        self._require_states(states)
        self.sums, self.micro_batch, self.full = sums, micro_batch, full
        self.accumulative_counts = accumulative_counts
        self.dtype = dtype
        self.states = FORMS[states]
        self._flags: dict[str, dict[str, bool]] = {}  # by type of device, arguments that `build` adds
        self._traits: dict[str, Traits] = {}
        self.parameter_groups, self.layer_decay = read_groups(parameter_groups), layer_decay
        self._num_layers: int | None = None
        self._try_on_cpu()

    def _require_states(self, states: str) -> None:
        """Raise ConfigError for a form of state that the optimizer does not have."""
        if self.muon and states == "8bit":
            raise ConfigError(
                'states = "8bit" is not supported with Muon',
                where="optim_wrapper.states",
                why="its momentum is kept in fp32 or bf16",
                do='use states = "bf16", "split" or "fp32"',
            )
        if states != "fp32" and not self._is_adamw and not self.muon:
            raise ConfigError(
                f'states = "{states}" needs AdamW, not {type_name(self.optimizer_class)}({self._format_arguments()})',
                where="optim_wrapper.states",
                do='use torch.optim.AdamW without amsgrad or maximize, or states = "fp32"',
            )

    def _try_on_cpu(self) -> None:
        """Raise ConfigError for an optimizer that no device and no strategy can use."""
        if self.muon:
            return
        cpu = torch.device("cpu")
        # GPUs support more of these two
        arguments = {k: v for k, v in self.arguments.items() if k not in ("capturable", "fused")}
        try:
            if optimizer_traits.known_traits(self.optimizer_class, self.arguments, cpu) is None:
                optimizer_traits.try_optimizer(
                    partial(self.optimizer_class, **arguments), type_name(self.optimizer_class), cpu
                )
            self._check_groups(arguments, [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)])
        except ConfigError as e:
            known = getattr(self.optimizer_class, "__module__", "").startswith("torch.optim")
            if known or e.__cause__ is None or isinstance(e.__cause__, TypeError):
                raise  # otherwise it may need a GPU: `traits` tries it on the device of the run

    def _check_groups(self, arguments: Mapping[str, Any], parameters: Sequence[torch.nn.Parameter]) -> None:
        """Raise ConfigError for an optimizer that does not support the config's parameter groups."""
        if not self.parameter_groups and not self.layer_decay:
            return
        try:
            groups = [dict(params=[p]) for p in parameters]
            built = self.optimizer_class(groups, **arguments)
            built_groups = built.param_groups
        except Exception as e:
            raise self._groups_error(f"does not take parameter groups: {e}") from None
        if len(built_groups) != len(groups):
            raise self._groups_error("creates its own groups")
        for name in {name: None for group in self.parameter_groups for name in group.own_settings()}:
            if name not in built_groups[0]:
                raise self._groups_error(f"has no {name}")

    def _groups_error(self, why: str) -> ConfigError:
        setting = "parameter_groups" if self.parameter_groups else "layer_decay"
        return ConfigError(
            f"{type_name(self.optimizer_class)} {why}",
            where=f"optim_wrapper.{setting}",
            why="the settings of groups would have no effect",
            do=f"leave {setting} out; or {optimizer_traits.ADVICE}",
        )

    def traits(self, device: torch.device) -> Traits:
        """The optimizer's traits on a device. Raises: ConfigError if it cannot be used there."""
        if self.muon:
            return Traits(FORMS["fp32"].moment.itemsize, {}, shardable=True, built_with_state=True)
        if known := optimizer_traits.known_traits(self.optimizer_class, self.arguments, device):
            self._traits[device.type], self._flags[device.type] = known, {"fused": True}
        if device.type not in self._traits:
            name, choices = (
                type_name(self.optimizer_class),
                {"fused", "foreach"} & set(inspect.signature(self.optimizer_class).parameters),
            )
            attempts: list[dict[str, bool]] = [{}]
            if "fused" in choices and not choices & self.arguments.keys():
                attempts.insert(0, {"fused": True})
            for flags in attempts:
                try:
                    self._traits[device.type] = optimizer_traits.try_optimizer(
                        partial(self.optimizer_class, **self.arguments, **flags), name, device
                    )
                except ConfigError:
                    if flags is attempts[-1]:
                        raise
                    continue
                self._flags[device.type] = flags
                break
        return self._traits[device.type]

    def fit_to(self, source: ModelSource) -> tuple[ModelSource, "OptimWrapper"]:
        """The model with its frozen parameters, and a copy of this for the model's layers.

        Raises: ConfigError for a parameter group without parameters.
        """
        names = replace(source, frozen=frozenset()).trained_names()
        require_matches(names, self.parameter_groups)
        other = copy.copy(self)
        other._num_layers = source.config.num_layers
        self._require_effect(source)
        frozen = frozenset(name for name in names if find_group(name, self.parameter_groups).frozen)
        return replace(source, frozen=frozen), other

    def _require_effect(self, source: ModelSource) -> None:
        """Raise ConfigError for a group with AdamW's settings that has only matrices of Muon."""
        if not self.muon:
            return
        by_adamw = {
            find_group(n, self.parameter_groups) for n, s in source.trained_shapes.items() if not is_matrix(n, s)
        }
        for i, group in enumerate(self.parameter_groups):
            if (group.betas or group.eps is not None) and group not in by_adamw:
                raise ConfigError(
                    f"the group {group.match!r} has betas or eps, and Muon updates all of its parameters",
                    where=f"{WHERE}.{i}",
                    why="these are AdamW's settings, and would have no effect",
                    do="leave them out",
                )

    def count_matrices(self, source: ModelSource) -> int:
        """Number of trained elements that Muon updates."""
        return sum(s.numel() for n, s in source.trained_shapes.items() if is_matrix(n, s)) if self.muon else 0

    def find_group(self, name: str) -> ParameterGroup:
        """The group of a parameter, with what its layer makes of the rate."""
        group = find_group(name, self.parameter_groups)
        if self.layer_decay is None:
            return group
        assert self._num_layers is not None, "layer_decay needs a model: call `fit_to`"
        return replace(group, lr_scale=group.lr_scale * layer_scale(name, self.layer_decay, self._num_layers))

    def with_accumulation(self, packs: int) -> "OptimWrapper":
        """A copy with `packs` a rank and iteration."""
        other = copy.copy(self)
        other.accumulative_counts = packs
        return other

    def with_states(self, states: str) -> "OptimWrapper":
        """A copy with another form of AdamW's state."""
        self._require_states(states)
        other = copy.copy(self)
        other.states = FORMS[states]
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
        return self.optimizer_class is torch.optim.AdamW and self.arguments.keys() <= {
            "lr",
            "betas",
            "eps",
            "weight_decay",
        }

    def state_form(self, device: torch.device) -> Form | None:
        """The form of our own AdamW and Muon under our own strategy; None for PyTorch's optimizer on fp32 masters."""
        if self.states.name != "fp32":
            return self.states
        if device.type != "cuda" or not (self._is_adamw or self.muon):
            return FORMS["fp32"] if self.muon else None
        # split has the same fp32 masters in less memory
        return FORMS["split" if self.compute_dtype(device) == torch.bfloat16 else "fp32"]

    @property
    def adamw_arguments(self) -> Mapping[str, Any]:
        """Of our own AdamW."""
        return self.muon.adamw if self.muon else self.arguments

    def gradient_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of the gradient sums of our own strategy."""
        form = self.state_form(device)
        if self.sums:
            return DTYPES[self.sums]
        return form.gradient if form else torch.float32

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, with its fused kernel if that works and no other implementation is requested."""
        device = next(iter(parameters.values())).device
        self.traits(device)
        groups: list[Any] = list(parameters.values())
        if self.parameter_groups or self.layer_decay:
            groups = split_into_groups(parameters, self.find_group)
        return self.optimizer_class(groups, **self.arguments, **self._flags[device.type])

    def describe(self) -> str:
        clip = f"gradients clipped to norm {self.max_norm:g}" if self.max_norm is not None else "no clipping"
        return f"{type_name(self.optimizer_class)}({self._format_arguments()}), {clip}"

    def _format_arguments(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.arguments.items())


def _reject_torch_muon(optimizer: Any) -> None:
    if optimizer is torch.optim.Muon:
        raise ConfigError(
            "torch.optim.Muon cannot train this model: Muon only supports 2D parameters",
            where="optim_wrapper.optimizer.type",
            why="the weights of norms are vectors",
            do="use xtuner.engine.Muon, with the same settings and AdamW for all other parameters",
        )
