"""Selects a run's strategy and its memory plan."""

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
from xtuner.engine.memory import USUAL_PACK, MemoryPlan
from xtuner.engine.strategies.sharded_strategy import ShardedStrategy
from xtuner.engine.zero import deepspeed_config, zero_memory
from xtuner.model.adapters.lora import LoRA
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.optimizer_traits import ADVICE


@dataclass(frozen=True)
class Choice:
    """The selected strategy, before anything is loaded.

    Args:
        memory: the plan that the strategy will follow.
        pack: tokens of a pack on one rank.
        deepspeed: a shipped name or a JSON file.
        fsdp: "full" or "hybrid".
        settings: complete settings of DeepSpeed; None for our own strategy.
        remark: an alternative that is estimated to be faster, for the log.
    """

    memory: MemoryPlan
    mesh: Mesh
    pack: int = USUAL_PACK
    deepspeed: str | None = None
    fsdp: str | None = None
    settings: Mapping[str, Any] | None = None
    remark: str = ""

    @property
    def name(self) -> str:
        return self.deepspeed or (f"FSDP, {self.fsdp}" if self.fsdp else "one process")

    @property
    def state(self) -> int:
        """Estimated bytes of weights, gradients and optimizer state on a rank."""
        return self.memory.state


def choose_strategy(
    source: ModelSource,
    optim: OptimWrapper,
    device: torch.device,
    deepspeed: str | None = None,
    fsdp: str | None = None,
    mesh: Mesh | None = None,
    pack: int = USUAL_PACK,
    free: int | None = None,
    document: int = 0,
    host: int = 0,
) -> Choice:
    """DeepSpeed or FSDP if requested; else FSDP for several processes, and neither for a single one.

    Args:
        mesh: None for all processes.
        pack: tokens of a pack.
        free: bytes that every rank can still allocate on its GPU (`memory.min_free_bytes`); None to ask this GPU.
        document: tokens of the longest document in a pack; 0 if unknown.
        host: bytes of host memory for each rank's activations (`long_documents.min_host_bytes`).

    Raises: ConfigError for combinations or DeepSpeed settings that are not supported.
    """
    if deepspeed and fsdp:
        raise ConfigError(
            f"--deepspeed {deepspeed} and --fsdp {fsdp}",
            where="command line",
            why="both shard the model over the ranks",
            do="give one of them",
        )
    mesh = mesh or make_mesh(fsdp)
    pack = -(-pack // mesh.cp)
    if deepspeed:
        return _choose_deepspeed(source, optim, device, deepspeed, mesh, pack, free)
    mode = fsdp or ("full" if mesh.size > 1 else None)
    if mode:
        engine = f"--fsdp {mode}" if fsdp else f"{mesh.size} processes (FSDP)"
        _require_shardable(optim, device, engine, zero=False)
    found = memory.plan_memory(source, optim, device, mesh, pack, free, document=document, host=host)
    remark = memory.suggest_mesh(found, source, optim, device, mesh, pack, free)
    return Choice(found, mesh, pack, fsdp=mode, remark=remark)


def _choose_deepspeed(
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
            do='set it to "fp32", or leave --deepspeed out: xtuner\'s own sharding supports all states',
        )
    if optim.muon:
        raise ConfigError(
            "Muon is not supported with DeepSpeed",
            where="optim_wrapper.optimizer.type",
            why="DeepSpeed divides parameters into ranges, and Muon needs full matrices",
            do="leave --deepspeed out: xtuner's own sharding (--fsdp) supports Muon; or use torch.optim.AdamW",
        )
    settings = deepspeed_config.prepare_settings(name, source, optim, device, mesh.size)
    if source.adapter:
        _require_zero_adapter(source, name, settings)
    if (ignored := deepspeed_config.list_ignored(deepspeed_config.read_settings(name))) and mesh.is_main:
        logger.info(f"--deepspeed {name}: no effect here: {', '.join(ignored)}")
    if settings["zero_optimization"].get("stage", 0):
        _require_shardable(optim, device, f"--deepspeed {name}", zero=True)
    found = zero_memory.plan_zero_memory(source, optim, device, mesh, settings, pack, free)
    remark = zero_memory.suggest_own_sharding(found, source, optim, device, mesh, name, pack, free)
    return Choice(found, mesh, pack, name, settings=settings, remark=remark)


def _require_zero_adapter(source: ModelSource, name: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for an adapter that DeepSpeed cannot train."""
    zero, adapter = settings["zero_optimization"], source.adapter
    unsupported = {
        "model.frozen_weights": ("weights in 4 or 8 bits", source.frozen_weights != "own"),
        "model.adapter.dropout": ("dropout of adapters", isinstance(adapter, LoRA) and bool(adapter.dropout)),
        "model.adapter": (
            "adapters of your own" if not isinstance(adapter, LoRA) else "adapters with other stages than 1 and 2",
            not isinstance(adapter, LoRA) or zero.get("stage") not in (1, 2) or "offload_optimizer" in zero,
        ),
    }
    for where, (what, is_there) in unsupported.items():
        if is_there:
            raise ConfigError(
                f"--deepspeed {name} does not support {what}",
                where=where,
                do="leave --deepspeed out: xtuner's own sharding supports all of them",
            )


def _require_shardable(optim: OptimWrapper, device: torch.device, engine: str, zero: bool) -> None:
    """Raise ConfigError for an optimizer that does not update every element of a parameter independently."""
    traits, name = optim.traits(device), type_name(optim.optimizer_class)
    if traits.shardable and zero and traits.built_with_state and optim.optimizer_class is not torch.optim.Adagrad:
        why = (
            "it creates its state when it is built, and DeepSpeed, which replaces parameters, supports this in Adagrad"
        )
        why += " only"
    elif not traits.shardable:
        why = "each rank has a part of every matrix, and this optimizer does not update each element independently"
    else:
        return
    raise ConfigError(
        f"{name} cannot be used with {engine}",
        where="optim_wrapper.optimizer.type",
        why=why,
        do=f"train in one process; or {ADVICE}",
    )


def build_strategy(choice: Choice, source: ModelSource, optim: OptimWrapper, device: torch.device) -> Strategy:
    """Build the strategy that `choose_strategy` has selected."""
    if choice.settings is not None:
        from xtuner.engine.zero.deepspeed_strategy import DeepSpeedStrategy

        assert isinstance(choice.memory, zero_memory.ZeroMemoryPlan)
        return DeepSpeedStrategy(source, optim, device, choice.settings, choice.mesh, choice.memory)
    return ShardedStrategy(source, optim, device, choice.mesh, choice.memory)
