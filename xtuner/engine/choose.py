"""Which strategy a run is trained with."""

import torch

from xtuner.core import dist
from xtuner.core.errors import ConfigError
from xtuner.engine.base import Strategy
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.single import SingleStrategy
from xtuner.model.source import ModelSource


def strategy(
    source: ModelSource, optim: OptimWrapper, device: torch.device, deepspeed: str | None, fsdp: str | None
) -> Strategy:
    """DeepSpeed or FSDP if asked for; else FSDP for several processes, and nothing of that for one."""
    if deepspeed and fsdp:
        raise ConfigError(
            f"--deepspeed {deepspeed} and --fsdp {fsdp}",
            where="command line",
            why="both cut the model over the ranks, each in its way",
            do="give one of them",
        )
    if optim.states.name != "fp32" and (deepspeed or fsdp or dist.world_size() > 1):
        raise ConfigError(
            f'states = "{optim.states.name}" is for one process',
            where="optim_wrapper.states",
            why="engines that cut the state over ranks keep it in fp32",
            do='set it to "fp32"; the state is then divided by the number of ranks',
        )
    if deepspeed:
        from xtuner.engine.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(source, optim, device, deepspeed)
    if fsdp or dist.world_size() > 1:
        from xtuner.engine.fsdp import FSDPStrategy

        return FSDPStrategy(source, optim, device, fsdp or "full")
    return SingleStrategy(source, optim, device)
