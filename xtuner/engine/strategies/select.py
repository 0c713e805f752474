"""Which strategy a run is trained with, and how it uses the memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xtuner.config.build import type_name
from xtuner.core.errors import ConfigError
from xtuner.core.log import logger
from xtuner.dist.mesh import Mesh, make_mesh
from xtuner.engine import memory
from xtuner.engine.base import Strategy
from xtuner.engine.memory import PACK, Memory
from xtuner.engine.strategies.sharded import ShardedStrategy
from xtuner.engine.zero import deepspeed_config, zero_memory
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.optimizer_trial import ADVICE


@dataclass(frozen=True)
class Choice:
    """What will train, known before anything is loaded.

    Args:
        memory: how a rank uses it; the strategy takes it from here.
        deepspeed: a shipped name or a JSON file; fsdp: "full" or "hybrid".
        settings: DeepSpeed's, complete.
        remark: what would be faster here, by arithmetic.
    """

    memory: Memory
    mesh: Mesh
    pack: int = PACK  # its tokens
    deepspeed: str | None = None
    fsdp: str | None = None
    settings: Mapping[str, Any] | None = None
    remark: str = ""

    @property
    def name(self) -> str:
        return self.deepspeed or (f"FSDP, {self.fsdp}" if self.fsdp else "one process")

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and optimizer that a rank holds, by arithmetic."""
        return self.memory.state


def choose(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    deepspeed: str | None = None,
    fsdp: str | None = None,
    mesh: Mesh | None = None,
    pack: int = PACK,
    free: int | None = None,
) -> Choice:
    """DeepSpeed or FSDP if requested; else FSDP for several processes, and neither for one.

    Args:
        mesh: None for all processes there are.
        pack: tokens of a pack.
        free: bytes that every rank can still get of its GPU (`memory.free_of_all`); None for what this one can.

    Raises: ConfigError for what cannot be, DeepSpeed's settings included.
    """
    if deepspeed and fsdp:
        raise ConfigError(
            f"--deepspeed {deepspeed} and --fsdp {fsdp}",
            where="command line",
            why="both cut the model over the ranks, each in its way",
            do="give one of them",
        )
    mesh = mesh or make_mesh(fsdp)
    if deepspeed:
        return _zero(source, optim, device, deepspeed, mesh, pack, free)
    mode = fsdp or ("full" if mesh.size > 1 else None)
    if mode:
        engine = f"--fsdp {mode}" if fsdp else f"{mesh.size} processes (FSDP)"
        _require_cuttable(optim, device, engine, zero=False)
    found = memory.of_mesh(source, optim, device, mesh, pack, free)
    remark = memory.faster_mesh(found, source, optim, device, mesh, pack, free)
    return Choice(found, mesh, pack, fsdp=mode, remark=remark)


def _zero(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    name: str,
    mesh: Mesh,
    pack: int,
    free: int | None,
) -> Choice:
    if optim.states.name != "fp32":
        raise ConfigError(
            f'states = "{optim.states.name}" is not supported with DeepSpeed',
            where="optim_wrapper.states",
            why="DeepSpeed keeps the optimizer's state in fp32",
            do='set it to "fp32", or leave --deepspeed out: the state is then divided over the ranks in any form',
        )
    if source.adapter:
        raise ConfigError(
            "adapters are not supported with DeepSpeed", where="model.adapter", do="leave --deepspeed out"
        )
    settings = deepspeed_config.prepare(name, source, optim, device, mesh.size)
    if (idle := deepspeed_config.without_effect(deepspeed_config.read(name))) and mesh.is_main:
        logger.info(f"--deepspeed {name}: no effect here: {', '.join(idle)}")
    if settings["zero_optimization"].get("stage", 0):
        _require_cuttable(optim, device, f"--deepspeed {name}", zero=True)
    found = zero_memory.of_zero(source, optim, device, mesh, settings, pack, free)
    remark = zero_memory.faster_own(found, source, optim, device, mesh, name, pack, free)
    return Choice(found, mesh, pack, name, settings=settings, remark=remark)


def _require_cuttable(optim: OptimWrapper, device: torch.device, engine: str, zero: bool) -> None:
    """Raise ConfigError for an optimizer whose update of a part of a parameter is not that part of the update."""
    traits, name = optim.traits(device), type_name(optim.kind)
    if traits.cuttable and zero and traits.built_with_state and optim.kind is not torch.optim.Adagrad:
        why = "it makes its state when it is built, and DeepSpeed, which replaces the parameters, knows this of Adagrad"
    elif not traits.cuttable:
        why = "each rank holds a part of every matrix, and this optimizer does not update each number by itself"
    else:
        return
    raise ConfigError(
        f"{name} cannot be used with {engine}",
        where="optim_wrapper.optimizer.type",
        why=why,
        do=f"train in one process; or {ADVICE}",
    )


def strategy(choice: Choice, source: ModelSource, optim: OptimWrapper, device: torch.device) -> Strategy:
    """What `choose` has chosen."""
    if choice.settings is not None:
        from xtuner.engine.zero.deepspeed_strategy import DeepSpeedStrategy

        assert isinstance(choice.memory, zero_memory.ZeroMemory)
        return DeepSpeedStrategy(source, optim, device, choice.settings, choice.mesh, choice.memory)
    return ShardedStrategy(source, optim, device, choice.mesh, choice.memory)
