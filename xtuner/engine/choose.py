"""Which strategy a run is trained with."""

from typing import NamedTuple

import torch

from xtuner.config.build import type_name
from xtuner.core.errors import ConfigError
from xtuner.core.log import logger
from xtuner.dist.mesh import Mesh, arrange
from xtuner.engine import memory, zero_config, zero_memory
from xtuner.engine.base import Strategy
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.strategies.sharded import ShardedStrategy
from xtuner.engine.trial import ADVICE
from xtuner.model.source import ModelSource


class Choice(NamedTuple):
    """What will train, known before anything is loaded."""

    deepspeed: str | None = None  # a shipped name or a JSON file
    fsdp: str | None = None  # "full" or "hybrid"
    state: int = 0  # bytes of weights, gradients and optimizer that a rank holds, by arithmetic
    mesh: Mesh = Mesh()
    pack: int = memory.PACK  # its tokens

    @property
    def name(self) -> str:
        return self.deepspeed or (f"FSDP, {self.fsdp}" if self.fsdp else "one process")


def choose(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    deepspeed: str | None,
    fsdp: str | None,
    mesh: Mesh | None = None,
    pack: int = memory.PACK,
) -> Choice:
    """DeepSpeed or FSDP if requested; else FSDP for several processes, and neither for one.

    Args:
        mesh: None for all processes there are.
        pack: tokens of a pack.

    Raises: ConfigError for what cannot be, DeepSpeed's settings included.
    """
    if deepspeed and fsdp:
        raise ConfigError(
            f"--deepspeed {deepspeed} and --fsdp {fsdp}",
            where="command line",
            why="both cut the model over the ranks, each in its way",
            do="give one of them",
        )
    mesh = mesh or arrange(fsdp)
    ranks = mesh.size
    if deepspeed and optim.states.name != "fp32":
        raise ConfigError(
            f'states = "{optim.states.name}" is not supported with DeepSpeed',
            where="optim_wrapper.states",
            why="DeepSpeed keeps the optimizer's state in fp32",
            do='set it to "fp32", or leave --deepspeed out: the state is then divided over the ranks in any form',
        )
    if deepspeed and source.adapter:
        raise ConfigError(
            "adapters are not supported with DeepSpeed", where="model.adapter", do="leave --deepspeed out"
        )
    if deepspeed:
        settings = zero_config.prepare(deepspeed, source, optim, device, ranks)
        if (idle := zero_config.without_effect(zero_config.read(deepspeed))) and mesh.is_main:
            logger.info(f"--deepspeed {deepspeed}: no effect here: {', '.join(idle)}")
        stage = settings["zero_optimization"].get("stage", 0)
        if stage:
            _require_cuttable(optim, device, f"--deepspeed {deepspeed}", zero=True)
        zero = zero_memory.of_zero(source, optim, device, mesh, settings, pack)
        return Choice(deepspeed, None, zero.state, mesh, pack)
    if fsdp or ranks > 1:
        mode = fsdp or "full"
        _require_cuttable(optim, device, f"--fsdp {mode}" if fsdp else f"{ranks} processes (FSDP)", zero=False)
        return Choice(None, mode, memory.of_mesh(source, optim, device, mesh, pack).state, mesh, pack)
    return Choice(state=memory.of_mesh(source, optim, device, mesh, pack).state, mesh=mesh, pack=pack)


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
    if choice.deepspeed:
        from xtuner.engine.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(source, optim, device, choice.deepspeed, choice.mesh, choice.pack)
    return ShardedStrategy(source, optim, device, choice.mesh, pack=choice.pack)
