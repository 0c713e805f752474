"""What an optimizer does, found by trying it on two small parameters.

No list of names can say what decides here: whether a checkpoint holds all of an optimizer's state, and whether it
updates each number by itself, so that a parameter may be cut over ranks. Both show in a few steps on a matrix and a
vector, for the optimizers of `torch.optim` as for any other class.

State has one packed form, in checkpoints and here: a scalar; a flat tensor [n] with one number for each number of the
parameter; or, with a leading dimension of 1, a tensor of a shape of its own, which cannot be cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xtuner.core.errors import ConfigError

Build = Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]
MATRIX, VECTOR = (64, 80), (48,)  # some optimizers keep small parameters in another way: 5,120 numbers are not small
CUT = 40  # rows of the matrix in the first part of two
LR = 1e-2
ADVICE = "use torch.optim.AdamW; docs/en/config.md lists what works where"


@dataclass(frozen=True)
class Traits:
    """Of one optimizer with its arguments, on one kind of device."""

    moments: float  # bytes of state for each number of a parameter
    scalars: Mapping[str, Any]  # an example of each scalar of its state: where it lies, or that it is no tensor
    cuttable: bool  # whether parameters may be cut over ranks
    built_with_state: bool  # it makes state for its parameters before the first step

    def unpack(self, key: str, packed: torch.Tensor, parameter: torch.Tensor) -> Any:
        """A value of the parameter's state as the optimizer keeps it."""
        if packed.dim() > 1:
            return packed[0].to(parameter.device)
        if packed.dim() == 1:
            return packed.view(parameter.shape).to(parameter.device)
        example = self.scalars.get(key, packed)
        return packed.to(example.device) if torch.is_tensor(example) else type(example)(packed.item())


def pack(state: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's state in the form of checkpoints; views where it can be. Raises: TypeError for what has none."""
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


def accepts(build: Build, name: str, device: torch.device) -> None:
    """Raise ConfigError for arguments that the optimizer itself rejects."""
    try:
        build(_parameters([torch.zeros(MATRIX)], device))
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{name} does not take these values: {e}", where="optim_wrapper.optimizer") from None
    except Exception:
        return  # it needs a GPU, say


def examine(build: Build, name: str, device: torch.device) -> Traits:
    """Traits of the optimizer that `build` makes.

    Raises: ConfigError if it does not train both a matrix and a vector, or continues otherwise after a resume.
    """
    accepts(build, name, device)
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in (MATRIX, VECTOR)]
    # of other sizes in the other part, so that a norm over a whole parameter or over all of them shows
    scale = [torch.where(torch.arange(MATRIX[0])[:, None] < CUT, 1.0, 30.0), torch.tensor(30.0)]
    gradients = [
        [torch.randn(v.shape, generator=draw) * s for v, s in zip(start, scale, strict=True)] for _ in range(4)
    ]
    try:
        whole = _parameters(start, device)
        optimizer = build(whole)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"it is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        born = any(optimizer.state.get(p) for p in whole)
        _steps(optimizer, whole, gradients[:2])
        saved = [{k: v.clone() for k, v in pack(optimizer.state.get(p, {}), p).items()} for p in whole]
        scalars = {
            key: value
            for p in whole
            for key, value in optimizer.state.get(p, {}).items()
            if value is not None and not (torch.is_tensor(value) and value.dim())
        }
        moments = sum(v.nbytes for v in saved[0].values() if v.dim()) / whole[0].numel()
        again = _parameters(whole, device)
        _steps(optimizer, whole, gradients[2:])
    except Exception as e:
        raise ConfigError(
            f"{name} cannot train this model: {str(e).strip() or type(e).__name__}",
            where="optim_wrapper.optimizer",
            why="every optimizer is tried on a matrix and a vector first, as a model's weights are",
            do=ADVICE,
        ) from e
    traits = Traits(moments, scalars, True, born)
    _resumes(build, name, traits, again, saved, gradients[2:], whole)
    return Traits(moments, scalars, _cuttable(build, start, gradients, whole, device), born)


def _parameters(values: Sequence[torch.Tensor], device: torch.device) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(v.detach().clone().to(device)) for v in values]


def _steps(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], gradients: list[list[torch.Tensor]]
) -> None:
    for number, step in enumerate(gradients):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.to(parameter.device)
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + number % 2)
        optimizer.step()


def _resumes(
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
        _steps(optimizer, parameters, gradients)
        different = "its next steps are others"
    except Exception as e:
        different = f"{type(e).__name__}: {e}"
    else:
        if all(p.equal(e) for p, e in zip(parameters, expected, strict=True)):
            return
    raise ConfigError(
        f"{name} cannot be resumed from a checkpoint: {different}",
        where="optim_wrapper.optimizer",
        why="it keeps numbers outside the state of its parameters, or draws random ones; a checkpoint has neither",
        do=ADVICE,
    )


def _cuttable(
    build: Build,
    start: list[torch.Tensor],
    gradients: list[list[torch.Tensor]],
    expected: list[torch.nn.Parameter],
    device: torch.device,
) -> bool:
    """Whether two parts, some rows of the matrix (FSDP) and all the rest in one row (ZeRO), end as the whole does."""

    def cut(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        matrix, vector = values
        return [matrix[:CUT], torch.cat((matrix[CUT:].reshape(-1), vector))]

    parts = _parameters(cut(start), device)
    try:
        optimizer = build(parts)
        _steps(optimizer, parts, [cut(step) for step in gradients])
        states = [v for p in parts for v in pack(optimizer.state.get(p, {}), p).values()]
    except Exception:
        return False
    if any(v.dim() > 1 for v in states):
        return False
    with torch.no_grad():
        for part, whole, before in zip(parts, cut(expected), cut(start), strict=True):
            moved = (whole - before.to(device)).abs()
            if not ((part - whole).abs() <= 1e-3 * moved + 1e-6).all():
                return False
    return True
