"""Plans for documents that cannot be cut: what is kept where, whether it fits, and what the errors advise."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from xtuner.core.errors import ConfigError
from xtuner.core.log import logger
from xtuner.core.system import sysinfo
from xtuner.dist.mesh import Mesh
from xtuner.engine import long_documents, memory
from xtuner.engine.capacity import require_capacity
from xtuner.engine.memory import MemoryPlan
from xtuner.engine.step_time import StepCost
from xtuner.engine.strategies.select import Choice
from xtuner.model.activation_memory import ATTENTION_ONLY, ON_HOST, ActivationPlan
from xtuner.model.ops.autograd_functions import KEEP_NONE
from xtuner.model.source import from_scratch
from xtuner.optim.optim_wrapper import OptimWrapper

GPU, GIB, K = torch.device("cuda"), 2**30, 1024
FREE = int(78.5 * GIB)
SHAPE = dict(vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
SEVEN = from_scratch(**SHAPE, num_attention_heads=32, num_key_value_heads=8, activation_checkpointing=True)


def wrapper(states: str) -> OptimWrapper:
    return OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16", states=states)


def plan(document: int, ranks: int, states: str, host: int = 0) -> MemoryPlan:
    """7B; every pack is a document of so many thousand tokens, which all ranks share."""
    mesh, pack = Mesh(cp=ranks, local_size=ranks), document * K // ranks
    return memory.plan_memory(SEVEN, wrapper(states), GPU, mesh, pack, FREE, document=document * K, host=host * GIB)


@pytest.mark.parametrize(
    ("document", "ranks", "states", "host", "recomputed", "most_on_host"),
    [
        (128, 4, "fp32", 0, 0, 0),
        (256, 4, "8bit", 0, 0, 0),
        (256, 4, "fp32", 100, 0, 30),
        (512, 4, "fp32", 100, 0, 70),
        (512, 4, "8bit", 100, 0, 40),
        (1024, 8, "fp32", 100, 0, 60),
        (256, 1, "8bit", 140, 0, 125),
        (384, 1, "8bit", 250, 0, 200),
        (256, 1, "8bit", 74, 24, 74),  # host memory for eight layers and all inputs
    ],
)
def test_7b_fits(document: int, ranks: int, states: str, host: int, recomputed: int, most_on_host: int) -> None:
    """Attention is recomputed in as few layers as memory allows; host memory is used as little as possible."""
    found = plan(document, ranks, states, host)
    tokens = document * K // ranks
    assert found.longest_row == tokens
    assert found.fits(tokens)
    assert sum(not policy.attention for policy in found.activations.choose_kept(tokens)) == recomputed
    assert found.activations.host_bytes(tokens) <= min(host, most_on_host) * GIB
    assert found.peak_bytes(tokens) <= FREE


def test_more_memory_never_recomputes_more() -> None:
    for tokens in (64 * K, 256 * K):
        before = 32
        for host in range(0, 160, 10):
            found = ActivationPlan(SEVEN.config, 2, 32 * GIB, host * GIB)
            policies = found.choose_kept(tokens)
            recomputed = sum(not policy.attention for policy in policies)
            if found.peak_bytes(tokens) <= 32 * GIB:
                assert recomputed <= before
                before = recomputed
            assert found.host_bytes(tokens) <= host * GIB
            assert not any(policy.on_host and policy.qkv for policy in policies)
    for tokens in (8 * K, 32 * K):  # nothing changes where attention is kept anyway
        with_host = ActivationPlan(SEVEN.config, 2, 32 * GIB, 100 * GIB).choose_kept(tokens)
        assert with_host == ActivationPlan(SEVEN.config, 2, 32 * GIB).choose_kept(tokens)


@pytest.mark.parametrize(
    ("document", "ranks", "products", "host", "layers", "gain"),
    [
        (32, 1, "own", 60, (24, 28), 0.11),
        (32, 1, "fp8_full", 60, (18, 23), 0.03),  # blocks take less time, in which less can be copied
        (32, 1, "own", 20, (8, 11), 0.03),  # as much host memory as there is
        (128, 4, "own", 60, (32, 32), 0.15),  # attention takes longer
        (64, 1, "own", 100, (0, 0), 0.0),  # attention would have to be recomputed
    ],
)
def test_factors_in_host_memory(
    document: int, ranks: int, products: Any, host: int, layers: tuple[int, int], gain: float
) -> None:
    """So many layers' factors of SwiGLU that copying them takes no time of its own; estimated without attention that
    every plan computes. Not of micro-batches that can be cut."""
    source, tokens, optim = replace(SEVEN, products=products), document * K // ranks, wrapper("8bit")
    free, mesh = FREE - 14 * GIB * (ranks == 4), Mesh(cp=ranks, local_size=ranks)

    def plan_with(host: int) -> tuple[MemoryPlan, float]:
        arguments: Any = dict(division=memory.ALL_FULL, host=host * GIB)
        found = memory.plan_memory(source, optim, GPU, mesh, tokens, free, document=document * K, **arguments)
        unknown = memory.plan_memory(source, optim, GPU, mesh, tokens, free, **arguments)  # may be as long as a pack
        assert unknown.activations == found.activations
        policies = found.activations.choose_kept(tokens)
        cost = StepCost(source.config, tokens, 1, policies, 0, 0, 0, length=document * K, products=products)
        return found, cost.seconds(Mesh())

    (without, slower), (found, faster) = plan_with(0), plan_with(host)
    hosted = [i for i, p in enumerate(found.activations.choose_kept(tokens)) if "gate_up" in p.on_host]
    assert layers[0] <= len(hosted) <= layers[1]
    assert found.activations.host_bytes(tokens) <= host * GIB
    assert found.peak_bytes(tokens) <= free
    assert slower / faster - 1 >= gain
    assert found.max_tokens == without.max_tokens
    assert not found.activations.hosts_factors(found.max_tokens or 0)
    gaps = {b - a for a, b in pairwise(hosted)}
    assert not gaps or max(gaps) - min(gaps) <= 1  # at equal distances
    longer = [replace(found.activations, hosted_factors=n).choose_kept(tokens) for n in (0, 8, 16, 24, 32)]
    recomputed = [sum(not policy.gate_up for policy in policies) for policies in longer]
    assert recomputed == sorted(recomputed, reverse=True)


def test_time_decides_between_host_and_recomputation() -> None:
    def seconds(policy: Any, document: int) -> float:
        cost = StepCost(SEVEN.config, document, 1, [policy] * 32, 0, 0, 0, length=document)
        return cost.seconds(Mesh()) / document

    kept, hosted, recomputed = (
        [seconds(p, n * K) for n in (32, 128, 512)] for p in (ATTENTION_ONLY, ON_HOST, KEEP_NONE)
    )
    assert kept[0] == pytest.approx(kept[2], rel=0.01)  # attention that every plan computes is left out
    assert kept < hosted < recomputed
    assert hosted[2] == pytest.approx(hosted[0], rel=0.01)
    assert recomputed[0] < recomputed[1] < recomputed[2] / 2


def test_what_cannot_fit_is_rejected_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: FREE)
    traits = wrapper("fp32").traits(torch.device("cpu"))  # the same on GPUs, where they are found by trying
    monkeypatch.setattr(OptimWrapper, "traits", lambda self, device: traits)

    def error_of(document: int, ranks: int, states: str, host: int) -> ConfigError:
        found = plan(document, ranks, states, host)
        choice = Choice(found, Mesh(cp=ranks, local_size=ranks))
        with pytest.raises(ConfigError) as error:
            require_capacity(choice, SEVEN, wrapper(states), GPU, "max_length")
        return error.value

    error = error_of(384, 1, "8bit", 140)
    assert error.exit_code == 2
    assert "a document of 393,216 tokens needs " in error.what
    assert "140.00 GiB of host memory are left by 43.24 GiB of state" in error.what
    assert error.where == "max_length: packs have documents of up to 393,216 tokens, each shared by 1 rank"
    assert error.do.startswith("sequence_parallel_size = 2,")
    assert "optim_wrapper" not in error.do  # there is no leaner state
    longest = int(error.do.split("max_length = ")[1].split()[0])
    assert plan(longest // K, 1, "8bit", 140).fits(longest)
    assert not plan(longest // K + 1, 1, "8bit", 140).fits(longest + K)
    error = error_of(2048, 2, "fp32", 0)
    sharers = int(error.do.split("sequence_parallel_size = ")[1].split(",")[0])
    assert plan(2048, sharers, "fp32").fits(2048 * K // sharers)
    assert not plan(2048, sharers // 2, "fp32").fits(4096 * K // sharers)
    assert 'optim_wrapper.states = "8bit", which frees up to 43.24 GiB on each GPU' in error.do
    require_capacity(Choice(plan(256, 1, "8bit", 140), Mesh()), SEVEN, wrapper("8bit"), GPU)


@pytest.fixture
def messages() -> Iterator[Callable[[], str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: "\n".join(lines)
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_plan_is_reported(messages: Callable[[], str]) -> None:
    pack = 64 * K
    found = replace(plan(256, 4, "fp32", 100), max_tokens=8192)
    found.log_plan(pack, Mesh(cp=4, local_size=4))
    policies = found.activations.choose_kept(pack)
    hosted = sum("input" in policy.on_host for policy in policies)
    assert 0 < hosted < 32
    assert "memory: documents of up to 262,144 tokens, 65,536 on each of 4 ranks, which cannot be cut" in messages()
    assert f"attention 32, qkv 0, residual 0, gate_up 0; of these in host memory: input {hosted}, " in messages()


@pytest.mark.parametrize(("longest", "shown"), [(None, ""), (8 * K, ""), (20 * K, "20,480"), (100 * K, "32,768")])
def test_longer_documents_of_usual_packs_are_reported(
    longest: int | None, shown: str, messages: Callable[[], str]
) -> None:
    usual = replace(plan(32, 1, "fp32", 100), max_tokens=8192, document=0)
    usual.log_plan(32 * K, Mesh(), longest)
    lines = messages().splitlines()
    assert len(lines) == 1 + bool(shown)
    assert f"documents of up to {shown} tokens, which cannot be cut: " in lines[-1] or not shown


def test_a_size_by_name_does_not_hide_what_fits() -> None:
    """Documents of 64k on four ranks, fp32 state: weights and gradients full leave too little for them."""
    mesh = Mesh(dp_shard=4, local_size=4)
    for tokens in (2048, 4096, None):
        optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16", micro_batch=tokens)
        found = memory.plan_memory(SEVEN, optim, GPU, mesh, 64 * K, FREE, document=64 * K)
        assert found.fits(64 * K), tokens
        assert found.division.name != "all"


def test_host_memory_is_divided_among_a_nodes_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What checkpoints copy, and a reserve, are left free."""
    monkeypatch.setattr(sysinfo, "memory", lambda: {"total": 2048 * GIB, "free": 1024 * GIB})
    optim, parameters = wrapper("8bit"), 7737708544
    eight, sixteen = (long_documents.min_host_bytes(SEVEN, optim, GPU, Mesh(dp_shard=n, local_size=8)) for n in (8, 16))
    assert eight == (1024 * GIB - 6 * parameters - 9 * long_documents.HOST_RESERVE) // 8
    assert sixteen == eight + 6 * parameters // 16
    monkeypatch.setattr(sysinfo, "memory", lambda: {"total": None, "free": None})
    assert long_documents.min_host_bytes(SEVEN, optim, GPU, Mesh()) == 0
    assert long_documents.min_host_bytes(SEVEN, optim, torch.device("cpu"), Mesh()) == 0
