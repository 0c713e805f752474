"""Memory that runs out on some ranks, wherever that happens: the iteration is repeated with smaller micro-batches."""

import logging
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
import torch._dynamo  # imported by optimizers: once, before processes are forked
from helpers.configs import with_hook
from helpers.models import LR, MAX_NORM, LowRanks, odd_model, save_snapshot, sharded_strategy
from helpers.ranks import exit_codes, on_ranks, start_ranks, stderr_of
from helpers.runs import assert_same_state, records, train_commands

from xtuner.core.log import logger
from xtuner.data.loading.batch import Batch
from xtuner.dist import collectives
from xtuner.dist.collectives import Ranks
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.memory import DIVISIONS, MemoryPlan
from xtuner.engine.strategies import sharded_parameters
from xtuner.engine.strategies.out_of_memory import Failure, OutOfMemory, agree_on_smaller, shrink_memory
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.ops.autograd_functions import KEEP_NONE
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.model.source import from_scratch

LENGTHS = (8, 20, 5, 3, 16, 12)  # 64 tokens


def pack(number: int, lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 401) -> Batch:
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(3, vocabulary, (sum(lengths),), generator=draw)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch.from_item(
        dict(input_ids=ids, targets=ids.roll(-1), position_ids=positions, cumulative_len=borders), number
    )


def train(
    s: Any, iteration: int, fault: "Fault | None" = None, lengths: tuple[int, ...] = LENGTHS, more: int | None = None
) -> tuple[float, float, bool]:
    """An iteration of two packs a rank, as the loop does it. Before the step, a fault is gone.

    Args:
        more: bytes that this process may take in forward and backward.
    """
    batch = [pack(100 * iteration + 2 * collectives.rank() + i, lengths) for i in range(2)]
    (targets,), parts = collectives.ALL.sums_and_maxima(
        [sum(p.num_targets for p in batch)], s.count_micro_batches(batch)
    )
    if more is not None:
        limit_data(more)
    loss = s.forward_backward(batch, int(targets), parts, iteration)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    if fault:
        fault.undo()
    return (loss, *s.step(LR, MAX_NORM))


def use(s: Any, m: MemoryPlan) -> None:
    s.memory = m
    s.model.keep_activations(m.activations)


def limit_data(more: int) -> None:
    """What this process may take in addition to what it has."""
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(data.split()[1]) * 1024 + more, resource.RLIM_INFINITY))


class Fault:
    """At the `count`th time that this rank comes to a point, memory runs out there; the graph must go before anything
    else happens.

    Args:
        point: "forward" or "backward" of the first block; "gather" or "gradient": where memory for such a buffer is
            taken.
    """

    def __init__(self, s: Any, point: str, count: int) -> None:
        self.left, self._graph, self._abandon = count, weakref.WeakSet[torch.Tensor](), s._divided.abandon_iteration
        s._divided.abandon_iteration = self.abandon
        self._undo: list[Callable[[], object]] = [lambda: vars(s._divided).pop("abandon_iteration")]
        block = s.model.model.layers[0]
        if point == "forward":
            self._undo.append(block.register_forward_pre_hook(lambda module, inputs: self.come()).remove)
        elif point == "backward":

            def hook(module: Any, inputs: Any, out: torch.Tensor) -> None:
                out.register_hook(lambda _: self.come())

            self._undo.append(block.register_forward_hook(hook).remove)
        else:
            owner, name = (sharded_parameters, "allocate") if point == "gather" else (GradientSum, "_allocate")
            original = getattr(owner, name)
            setattr(owner, name, lambda argument: (self.come(), original(argument)))
            self._undo.append(lambda: setattr(owner, name, original))
        for module in (s.model.model.tok_embeddings, block):
            self._undo.append(module.register_forward_hook(lambda module, inputs, out: self._graph.add(out)).remove)

    def come(self) -> None:
        self.left -= 1
        if not self.left:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def abandon(self) -> None:
        assert not self._graph
        self._abandon()

    def undo(self) -> None:
        for action in self._undo:
            action()


def warnings() -> Iterator[str]:
    """Each call of `next` gives the warnings logged since the last, joined."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    while True:
        text = "\n".join(lines)
        lines.clear()
        yield text


# rank → (point, at the how many-th time), of an iteration; with 48 tokens at most: 2 micro-batches a pack, 4 in all
FAULTS: list[dict[int, tuple[str, int]]] = [
    {1: ("backward", 4)},
    {0: ("gradient", 3)},
    {1: ("gather", 5)},
    {0: ("backward", 2), 1: ("forward", 3)},
    {1: ("forward", 1)},
    {1: ("forward", 4)},
    {0: ("backward", 1)},
]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "kind", "division", "faults"),
    [
        (1, "", "all", FAULTS),
        (2, "", "all", FAULTS),
        (2, "", "weights", FAULTS[:2]),
        (2, "", "gradients", FAULTS[:3]),
        (2, "", "blocks", FAULTS),
        (2, "adapter", "blocks", FAULTS[:4]),
        (4, "hybrid", "blocks", FAULTS[1:2]),
    ],
)
def test_it_is_repeated_as_if_nothing_had_been(
    ranks: int, kind: str, division: str, faults: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step with a run that has had the smaller micro-batches from the iteration's start: losses, norms, all bits."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(memory, "MIN_MICRO_BATCH", 16)
    model = replace(odd_model(), adapter=LowRanks()) if kind == "adapter" else odd_model()

    def new() -> Any:
        return sharded_strategy(
            "fp32", DIVISIONS[division] if ranks > 1 else None, model, kind if kind == "hybrid" else None
        )

    def body(_: Ranks, folder: Path) -> None:
        s, undisturbed = new(), new()
        logged = warnings()
        next(logged)
        for n, of_ranks in enumerate(faults, 1):
            keeps = n % 2 * 150_000  # bytes: all but q, k and v in one layer; or nothing
            use(s, replace(s.memory, activations=replace(s.memory.activations, room=keeps), max_tokens=48))
            fault = Fault(s, *of_ranks[collectives.rank()]) if collectives.rank() in of_ranks else None
            line = train(s, n, fault)
            failed = [r for r, met in enumerate(collectives.ALL.gather(fault is not None and fault.left <= 0)) if met]
            gathers = division in ("gradients", "blocks")
            assert failed == [r for r, (point, _) in of_ranks.items() if r < ranks and (gathers or point != "gather")]
            text = next(logged)
            if failed:
                assert text.startswith(f"iteration {n}: memory ran out ")
                assert text.count("\n") == 0
                assert all((f"on rank {r} " in text) == (r in failed) for r in range(ranks) if ranks > 1)
                assert f"micro-batches of at most {s.memory.max_tokens} tokens (before: 48)" in text
                assert s.memory.max_tokens < 48
                assert bool(keeps) == (s.memory.activations.room < keeps) == ("KiB of memory for each" in text)
            else:
                assert not text
            use(undisturbed, s.memory)
            assert line == train(undisturbed, n)
            assert line[2]
        assert_same_state(save_snapshot(s, folder / "a"), save_snapshot(undisturbed, folder / "b"))
        again = new()
        use(again, s.memory)
        again.load(folder / "a")
        assert train(again, 99) == train(s, 99)
        # nothing smaller is left: all ranks raise what rank 0 has met
        memory.MIN_MICRO_BATCH = 4096
        use(s, replace(s.memory, activations=replace(s.memory.activations, room=0)))
        fault = None if collectives.rank() else Fault(s, "backward", 1)
        with pytest.raises(OutOfMemory, match="Tried to allocate 1 GiB") as error:
            train(s, 100, fault)
        assert error.value.rank == 0

    assert on_ranks(ranks, body, tmp_path) == [0] * ranks


def refused(_: Ranks, folder: Path) -> None:
    """6 MiB for forward and backward are not enough; to the last rank, the system gives no more."""
    memory.MIN_MICRO_BATCH, lengths, ranks = 64, (64,) * 16, collectives.ALL.size
    s, undisturbed = (sharded_strategy(division=DIVISIONS["blocks"] if ranks > 1 else None) for _ in range(2))
    use(s, replace(s.memory, max_tokens=64))
    use(undisturbed, s.memory)
    assert train(s, 0, lengths=lengths) == train(undisturbed, 0, lengths=lengths)
    use(s, replace(s.memory, max_tokens=None))
    line = train(s, 1, None, lengths, more=6 * 2**20 if collectives.rank() == ranks - 1 else None)
    assert s.memory.max_tokens is not None
    assert 64 < s.memory.max_tokens < 800
    use(undisturbed, s.memory)
    assert line == train(undisturbed, 1, lengths=lengths)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_the_system_refuses_memory(tmp_path: Path) -> None:
    """At whatever allocation that is; to a single process, and to one of two."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
    code = f"""
from pathlib import Path
from test_out_of_memory import on_ranks, refused
for ranks in (1, 2):
    assert on_ranks(ranks, refused, Path({str(tmp_path)!r}) / str(ranks)) == [0] * ranks
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_sizes_go_down_until_nothing_is_left() -> None:
    """7B, 24 GiB for micro-batches: fewer tokens as long as possible, then less is kept, until all is recomputed."""
    shape = dict(vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    config = from_scratch(**shape, num_attention_heads=32, num_key_value_heads=8).config

    def steps(now: MemoryPlan | None, lengths: Callable[[MemoryPlan], tuple[int, ...]]) -> list[MemoryPlan]:
        found: list[MemoryPlan] = []
        while now is not None:
            found.append(now)
            now = shrink_memory(now, pack(0, lengths(now)))
        return found

    def half(m: MemoryPlan) -> tuple[int, ...]:
        return ((m.max_tokens or 32768) // 2, (m.max_tokens or 32768) // 2)

    first = MemoryPlan(0, ActivationPlan(config, 2, 24 * 2**30), 7168)
    assert first.activations.keeps_everything(7168)
    down = steps(first, half)
    assert 5 <= len(down) <= 12
    for before, after in pairwise(down):
        tokens = before.max_tokens or 0
        assert after.activations.peak_bytes(after.max_tokens or 0) < before.activations.peak_bytes(tokens)
        assert after.max_tokens == max(after.max_tokens or 0, memory.MIN_MICRO_BATCH)
        assert after.activations.keeps_everything(after.max_tokens) or after.max_tokens == memory.MIN_MICRO_BATCH
    assert down[-1].activations.choose_kept(memory.MIN_MICRO_BATCH) == [KEEP_NONE] * 32
    # a document cannot be cut: it keeps less, and micro-batches stay as large as fits without recomputing
    long = steps(first, lambda _: (32768,))
    assert all(b.activations.peak_bytes(32768) < a.activations.peak_bytes(32768) for a, b in pairwise(long))
    assert long[-1].activations.choose_kept(32768) == [KEEP_NONE] * 32
    # by name everything is kept, or nothing is counted (CPUs): only sizes change
    for room in (None, 0):
        sizes = [m.max_tokens for m in steps(MemoryPlan(0, ActivationPlan(config, 2, room)), half)]
        assert sizes == [None, 24576, 18432, 13824, 10368, 7776, 5832, 4374, 4096]
        assert len(steps(MemoryPlan(0, ActivationPlan(config, 2, room)), lambda _: (32768,))) == 1


def test_after_a_long_document_what_did_not_fit_is_cut() -> None:
    """The document was larger, but fitted: it kept nothing."""
    config = from_scratch(vocab_size=401, hidden_size=64, intermediate_size=120, num_hidden_layers=2,
                          num_attention_heads=4).config  # fmt: skip
    now, long, others = MemoryPlan(0, ActivationPlan(config, 2, 0), 8192), pack(0, (30000,)), pack(1, (2048,) * 4)
    assert shrink_memory(now, long) is None
    assert agree_on_smaller(now, Failure(long, others, ""), Mesh())[0].max_tokens == 6144
    with pytest.raises(OutOfMemory):
        agree_on_smaller(now, Failure(long, long, ""), Mesh())


def test_host_memory_that_cannot_be_pinned_is_planned_without() -> None:
    """What was to be there took GPU memory: with the host memory that there is, as much GPU memory suffices."""
    config = from_scratch(vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                          num_attention_heads=32, num_key_value_heads=8).config  # fmt: skip
    room, gib, document = 40 * 2**30, 2**30, pack(0, (131072,))
    now = MemoryPlan(0, ActivationPlan(config, 2, room, 200 * gib), 8192)
    assert now.activations.host_bytes(131072) > 20 * gib
    after, text = agree_on_smaller(now, Failure(document, document, "", 20 * gib), Mesh())
    assert (after.activations.room, after.max_tokens, after.activations.host) == (room, 8192, 20 * gib)
    assert after.activations.host_bytes(131072) <= 20 * gib
    assert after.activations.peak_bytes(131072) <= room
    assert "repeated with 20.00 GiB of host memory for activations (before: 200.00 GiB), also for the rest" in text
    again, _ = agree_on_smaller(after, Failure(document, document, "", 20 * gib), Mesh())
    assert (again.activations.host, (again.activations.room or 0) < room) == (20 * gib, True)


def fail(run: Any) -> None:
    """Memory runs out on rank 1: once in the next iteration, and whenever it computes in the one after."""
    memory.MIN_MICRO_BATCH = 8
    begun, once = run.state.iteration, []

    def hook(*_: Any) -> None:
        if collectives.rank() == 1 and (not once or run.state.iteration > begun):
            once.append(None)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    run.strategy.model.model.norm.register_forward_pre_hook(hook)


@pytest.mark.processes
def test_a_run_says_so_and_ends_with_advice_if_nothing_helps(tiny: Path, tmp_path: Path) -> None:
    config = with_hook(tiny, tmp_path / "run.py", 1, "import test_out_of_memory; test_out_of_memory.fail(run)")
    words = ["train", config, "--work-dir", tmp_path / "w", "--launcher", "pytorch", "--fsdp"]
    assert exit_codes(start_ranks([*words, "--cfg-options", "evaluation_inputs=[]", "max_length=64"], tmp_path)) == [
        2,
        2,
    ]
    assert sorted(records(tmp_path / "w")) == [1, 2]
    first, second = stderr_of(tmp_path, 0), stderr_of(tmp_path, 1)
    assert first.count("iteration 2: memory ran out on rank 1 with micro-batches of up to ") == 1
    assert "xtuner: memory ran out in iteration 3: CUDA out of memory. Tried to allocate 1 GiB" in second
    assert train_commands(second)
    assert "xtuner: " not in first
