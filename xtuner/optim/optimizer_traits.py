"""An optimizer's traits, found by trying it on two small parameters.

Two traits matter: whether a checkpoint can contain all of an optimizer's state, and whether it updates each element
independently, so that parameters may be sharded. A list of names could not cover every class; a few steps on a matrix
and a vector show both.

State has a packed form, here and in checkpoints: a scalar; a flat tensor [n] with one element for each element of the
parameter; or, with a leading dimension of 1, a tensor of any other shape, which cannot be sharded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xtuner.config.usual_adamw import is_usual_adamw
from xtuner.core.errors import ConfigError

Build = Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]
MATRIX, VECTOR = (64, 80), (48,)  # some optimizers treat small parameters differently: 5,120 elements are enough
CUT_ROW = 40  # rows of the matrix in the first of two parts
LR = 1e-2
ADVICE = "use torch.optim.AdamW; docs/en/config.md lists what works where"


@dataclass(frozen=True)
class Traits:
    """Traits of an optimizer with its arguments, on one type of device."""

    moments: float  # bytes of state for each element of a parameter
    scalars: Mapping[str, Any]  # an example of each scalar of its state: a tensor on its device, or a Python number
    shardable: bool  # whether parameters may be sharded
    built_with_state: bool  # whether it creates state before the first step

    def unpack(self, key: str, packed: torch.Tensor, parameter: torch.Tensor) -> Any:
        """A value of the parameter's state in the optimizer's form."""
        if packed.dim() > 1:
            return packed[0].to(parameter.device)
        if packed.dim() == 1:
            return packed.view(parameter.shape).to(parameter.device)
        example = self.scalars.get(key, packed)
        return packed.to(example.device) if torch.is_tensor(example) else type(example)(packed.item())


def pack(state: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's state in packed form, as views if possible. Raises: TypeError for values that cannot be packed."""
    packed = {}
    for key, value in state.items():
        if torch.is_tensor(value):
            packed[key] = value if not value.dim() else _flat(value) if value.shape == parameter.shape else value[None]
        elif isinstance(value, bool | int | float):
            packed[key] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        elif value is not None:
            raise TypeError(f"its state {key!r} is a {type(value).__name__}")
    return packed


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1)


def require_valid_arguments(build: Build, name: str, device: torch.device) -> None:
    """Raise ConfigError for arguments that the optimizer itself rejects."""
    try:
        build(_parameters([torch.zeros(MATRIX)], device))
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{name} does not take these values: {e}", where="optim_wrapper.optimizer") from None
    except Exception:
        return  # it needs a GPU, say


def known_traits(kind: Callable[..., Any], arguments: Mapping[str, Any], device: torch.device) -> Traits | None:
    """Traits of PyTorch's AdamW with its usual arguments on a CPU, as `try_optimizer` finds them; None for others."""
    if device.type != "cpu" or not is_usual_adamw(kind, arguments):
        return None
    return Traits(8.0, {"step": torch.tensor(0.0)}, shardable=True, built_with_state=False)


def try_optimizer(build: Build, name: str, device: torch.device) -> Traits:
    """Traits of the optimizer that `build` returns.

    Raises: ConfigError if it cannot train both a matrix and a vector, or if a resumed run would differ.
    """
    require_valid_arguments(build, name, device)
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in (MATRIX, VECTOR)]
    # gradients of different scale in the second part reveal norms over a full parameter or over all parameters
    scale = [torch.where(torch.arange(MATRIX[0])[:, None] < CUT_ROW, 1.0, 30.0), torch.tensor(30.0)]
    gradients = [
        [torch.randn(v.shape, generator=draw) * s for v, s in zip(start, scale, strict=True)] for _ in range(4)
    ]
    try:
        full = _parameters(start, device)
        optimizer = build(full)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"it is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        has_state = any(optimizer.state.get(p) for p in full)
        _run_steps(optimizer, full, gradients[:2])
        saved = [{k: v.clone() for k, v in pack(optimizer.state.get(p, {}), p).items()} for p in full]
        scalars = {
            key: value
            for p in full
            for key, value in optimizer.state.get(p, {}).items()
            if value is not None and not (torch.is_tensor(value) and value.dim())
        }
        moments = sum(v.nbytes for v in saved[0].values() if v.dim()) / full[0].numel()
        resumed = _parameters(full, device)
        _run_steps(optimizer, full, gradients[2:])
    except Exception as e:
        raise ConfigError(
            f"{name} cannot train this model: {str(e).strip() or type(e).__name__}",
            where="optim_wrapper.optimizer",
            why="every optimizer is first tried on a matrix and a vector, the shapes of a model's weights",
            do=ADVICE,
        ) from e
    traits = Traits(moments, scalars, True, has_state)
    _require_exact_resume(build, name, traits, resumed, saved, gradients[2:], full)
    return Traits(moments, scalars, _is_shardable(build, start, gradients, full, device), has_state)


def _parameters(values: Sequence[torch.Tensor], device: torch.device) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(v.detach().clone().to(device)) for v in values]


def _run_steps(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], gradients: list[list[torch.Tensor]]
) -> None:
    for number, step in enumerate(gradients):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.to(parameter.device)
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + number % 2)
        optimizer.step()


def _require_exact_resume(
    build: Build,
    name: str,
    traits: Traits,
    parameters: list[torch.nn.Parameter],
    saved: list[dict[str, torch.Tensor]],
    gradients: list[list[torch.Tensor]],
    expected: list[torch.nn.Parameter],
) -> None:
    """Raise ConfigError unless a new optimizer with the saved state ends where the first one did."""
    try:
        optimizer = build(parameters)
        for parameter, state in zip(parameters, saved, strict=True):
            for key, value in state.items():
                optimizer.state[parameter][key] = traits.unpack(key, value, parameter)
        _run_steps(optimizer, parameters, gradients)
        different = "its next steps differ"
    except Exception as e:
        different = f"{type(e).__name__}: {e}"
    else:
        if all(p.equal(e) for p, e in zip(parameters, expected, strict=True)):
            return
    raise ConfigError(
        f"{name} cannot be resumed from a checkpoint: {different}",
        where="optim_wrapper.optimizer",
        why="it keeps values outside the state of its parameters, or uses random numbers; a checkpoint has neither",
        do=ADVICE,
    )


def _is_shardable(
    build: Build,
    start: list[torch.Tensor],
    gradients: list[list[torch.Tensor]],
    expected: list[torch.nn.Parameter],
    device: torch.device,
) -> bool:
    """Whether two parts, some rows of the matrix (FSDP) and the rest flattened (ZeRO), end like the full parameters."""

    def cut(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        matrix, vector = values
        return [matrix[:CUT_ROW], torch.cat((matrix[CUT_ROW:].reshape(-1), vector))]

    parts = _parameters(cut(start), device)
    try:
        optimizer = build(parts)
        _run_steps(optimizer, parts, [cut(step) for step in gradients])
        states = [v for p in parts for v in pack(optimizer.state.get(p, {}), p).values()]
    except Exception:
        return False
    if any(v.dim() > 1 for v in states):
        return False
    with torch.no_grad():
        for part, full, before in zip(parts, cut(expected), cut(start), strict=True):
            moved = (full - before.to(device)).abs()
            if not ((part - full).abs() <= 1e-3 * moved + 1e-6).all():
                return False
    return True
