"""Ranks that share packs train what one process does: real processes over gloo, fp32."""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from helpers.configs import with_hook
from helpers.live_bytes import FlashBytes, LiveBytes
from helpers.models import CPU, LR, MAX_NORM, save_snapshot
from helpers.ranks import exit_codes, on_ranks, start_ranks, stderr_of
from helpers.runs import records
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from xtuner.config.load import load
from xtuner.core.errors import ConfigError
from xtuner.data.loading.batch import Batch, make_borders
from xtuner.data.loading.document_groups import ContextCosts, divide_documents, fill_up
from xtuner.dist.collectives import ALL, Ranks
from xtuner.dist.mesh import make_mesh
from xtuner.engine import memory
from xtuner.engine.base import Strategy
from xtuner.engine.strategies import select
from xtuner.model.activation_memory import ActivationPlan, kept_bytes_per_token
from xtuner.model.context_parallel.division import divide_heads, divide_queries, divide_turns
from xtuner.model.context_parallel.exchange import ContextGroup
from xtuner.model.context_parallel.shared_documents import SharedDocuments
from xtuner.model.decoder import make_positions
from xtuner.model.ops.autograd_functions import KEEP_ALL
from xtuner.model.source import ModelSource, from_scratch
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.train import trainer
from xtuner.train.preflight import check_settings, prepare_settings
from xtuner.train.trainer import Options

ITERATIONS, PACKS, PACK = 10, 4, 64
LENGTHS = ([64], [20, 44], [1] * 64, [3, 1, 0, 60], [7] * 9 + [1], [63, 1], [2] * 32)  # of the documents of a pack
HEADS = {"grouped": (8, 2), "one kv head": (4, 1), "uneven": (6, 3), "fewer than ranks": (2, 1), "windows": (2, 1)}
SEVEN_B = dict(
    vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
CASES = [  # ranks, cp, --deepspeed, --fsdp, heads, bytes for activations
    (2, 2, None, "full", "grouped", None),
    (2, 2, "deepspeed_zero1", None, "one kv head", 0),
    (4, 4, None, "full", "one kv head", 0),
    (4, 2, None, "full", "uneven", 30_000),
    (4, 4, None, "full", "uneven", 60_000),
    (4, 4, None, "full", "uneven", 80_000),
    (4, 2, "deepspeed_zero3", None, "grouped", None),
    (4, 4, "deepspeed_zero2", None, "grouped", 30_000),
    (4, 4, None, "full", "fewer than ranks", 0),
    (4, 4, None, "full", "fewer than ranks", 60_000),
    (4, 2, None, "hybrid", "grouped", None),
    (2, 2, None, "full", "windows", 60_000),
    (4, 4, None, "full", "windows", 0),
]


def model(heads: str) -> ModelSource:
    """Documents longer than 32 tokens stretch the base of their angles. "windows" also has norms of q and k and one
    weight for embedding and output layer."""
    num_heads, num_kv_heads = HEADS[heads]
    source = from_scratch(
        activation_checkpointing=True, seed=0, vocab_size=101, hidden_size=8 * num_heads, intermediate_size=72,
        num_hidden_layers=2, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads,
        max_position_embeddings=32, rope_scaling=dict(type="dynamic", factor=2.0),
    )  # fmt: skip
    if heads != "windows":
        return source
    more = dict(sliding_window=9, sliding_layers=(True, False), qk_norm=True, tie_word_embeddings=True)
    return replace(source, config=replace(source.config, **more))


def packs() -> list[Batch]:
    draw, found = torch.Generator().manual_seed(1), []
    for i in range(PACKS * ITERATIONS):
        borders = make_borders(LENGTHS[i % len(LENGTHS)])
        ids = torch.randint(3, 101, (PACK,), generator=draw)
        targets = torch.where(torch.rand(PACK, generator=draw) < 0.7, ids.roll(-1), -100)
        targets[:] = -100 if i % 9 == 4 else targets
        count = int((targets >= 0).sum())
        longest = int(borders.diff().max())
        found.append(Batch(ids, targets, make_positions(borders, PACK), borders, longest, count, i))
    return found


def train(strategy: Strategy, dp_rank: int, dp_size: int, iterations: range) -> Iterator[tuple[float, float]]:
    everything = packs()
    for n in iterations:
        these = everything[PACKS * n : PACKS * (n + 1)]
        batch = these[dp_rank::dp_size]
        _, parts = ALL.sums_and_maxima([], strategy.count_micro_batches(batch))
        loss = strategy.forward_backward(batch, sum(p.num_targets for p in these), parts)
        yield loss, strategy.step(LR, MAX_NORM)[0]


def make(heads: str, room: int | None, cp: int = 1, zero: str | None = None, fsdp: str | None = None) -> Any:
    mesh = make_mesh(fsdp, cp=cp)
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=MAX_NORM), PACKS // mesh.dp_size)
    source = model(heads)
    choice = select.choose_strategy(source, optim, CPU, zero, fsdp, mesh, PACK)
    strategy: Any = select.build_strategy(choice, source, optim, CPU)
    strategy.memory = replace(strategy.memory, max_tokens=40 // cp)  # several micro-batches a pack
    # then attention's outputs are in host memory instead of recomputed, and factors of SwiGLU
    host = 2**20 * (room in (30_000, 80_000))
    strategy.model.keep_activations(ActivationPlan(source.config, 4, room, host, cp, hosted_factors=2))
    return strategy


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, for each model: losses and norms, and the checkpoint at the end."""
    folder = tmp_path_factory.mktemp("alone")
    for heads in HEADS:
        strategy = make(heads, None)
        (folder / f"{heads}.json").write_text(json.dumps(list(train(strategy, 0, 1, range(ITERATIONS)))))
        save_snapshot(strategy, folder / heads)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_packs_equal_one_process(
    ranks: int, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten iterations: losses, norms and final weights; documents of one, some and all tokens, with and without
    recomputation, more ranks than heads, and ranks without tokens."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # hybrid: two nodes

    def body(group: Ranks, folder: Path) -> None:
        for number, (size, cp, zero, fsdp, heads, room) in enumerate(CASES):
            if size != ranks:
                continue
            strategy = make(heads, room, cp, zero, fsdp)
            mesh = strategy.mesh
            assert (mesh.cp, mesh.dp_size, mesh.size) == (cp, size // cp, size)
            expected = json.loads((alone / f"{heads}.json").read_text())
            found = list(train(strategy, mesh.dp_rank, mesh.dp_size, range(ITERATIONS)))
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
            saved = save_snapshot(strategy, folder / str(number))
            if group.rank == 0:
                own, other = (load_file(f / "weights/model.safetensors") for f in (saved, alone / heads))
                for name, value in own.items():
                    assert (value - other[name]).abs().max() < 1e-5, (CASES[number], name)

    assert set(on_ranks(ranks, body, tmp_path / "ranks")) == {0}


@pytest.mark.processes
def test_what_sharers_keep_is_planned(tmp_path: Path) -> None:
    """Four ranks share a document: with fewer heads of keys some keep copies of the same, with q, k and v only."""

    def body(group: Ranks, folder: Path) -> None:
        ids, borders = torch.randint(3, 400, (256,), generator=torch.Generator().manual_seed(0)), make_borders([256])
        whole = Batch(ids, ids.roll(-1), make_positions(borders, 256), borders, 256, 256)
        mine = whole.share(4, group.rank, ContextCosts(1.0, 1e-3, 0.1))
        for kv_heads, keep in product((4, 2, 1), (KEEP_ALL, replace(KEEP_ALL, qkv=False))):
            context = ContextGroup(torch.distributed.group.WORLD, group.rank, 4, 8, kv_heads, divide_queries=False)
            kept = {}
            for layers in (1, 3):
                shape = dict(vocab_size=401, hidden_size=128, intermediate_size=64, num_hidden_layers=layers)
                source = from_scratch(seed=0, **shape, num_attention_heads=8, num_key_value_heads=kv_heads)
                model = source.build()
                for block in model.model.layers:
                    block.attention.attend = lambda q, k, v, *_: FlashBytes.apply(q, k, v)  # type: ignore[union-attr]
                policies = [keep] * layers
                model.keep_activations(SimpleNamespace(choose_kept=lambda _, p=policies: p))  # type: ignore[arg-type]
                with LiveBytes(list(model.parameters())) as live:
                    inputs = (mine.input_ids, mine.cu_seqlens, mine.targets, mine.position_ids, mine.max_seqlen)
                    loss = model(*inputs, scale=1 / 256, shared=SharedDocuments(mine.shared, context))
                    gc.collect()
                    kept[layers] = live.now
                    loss.backward()
            size = kept_bytes_per_token(source.config, 4, 4)
            planned = sum(size[name] for name in size if name == "input" or getattr(keep, name)) * 64
            assert (kept[3] - kept[1]) / 2 == pytest.approx(planned, rel=0.001), (kv_heads, keep)

    assert set(on_ranks(4, body, tmp_path / "ranks")) == {0}


@pytest.mark.processes
def test_a_run_resumes_with_any_number_of_sharers(tiny: Path, tmp_path: Path, xtuner: Callable[..., int]) -> None:
    """Two ranks share packs, then one process, then four ranks: losses of one process throughout. The config has the
    line of older tools that makes up for the packs that ranks share."""
    text = tiny.read_text()
    for old, new in (
        ("accumulative_counts = 2 ", "accumulative_counts = 1\naccumulative_counts *= sequence_parallel_size"),
        ("sequence_parallel_size = 1", "sequence_parallel_size = 2"),
        ("evaluation_inputs = ", "evaluation_inputs = [] and "),
    ):
        assert old in text
        text = text.replace(old, new)
    plain = tmp_path / "plain.py"
    plain.write_text(text)
    stopping = with_hook(
        plain, tmp_path / "run.py", "0 or it.state.iteration in [4, 8]", "os.kill(os.getpid(), signal.SIGTERM)"
    )
    alone = ("--cfg-options", "sequence_parallel_size=1", "accumulative_counts=2")
    assert xtuner("train", plain, "--work-dir", tmp_path / "one", *alone) == 0
    for ranks, expected in ((2, 75), (1, 75), (4, 0)):
        words = ["train", stopping, "--work-dir", tmp_path / "w", "--resume", "auto", "--launcher", "pytorch"]
        words += ["--cfg-options", f"sequence_parallel_size={ranks}"] if ranks != 2 else []
        assert set(exit_codes(start_ranks(words, tmp_path, ranks))) == {expected}, stderr_of(tmp_path, 0)
    lines, straight = records(tmp_path / "w"), records(tmp_path / "one")
    assert lines.keys() == straight.keys() == set(range(1, 16))
    for number, line in straight.items():
        assert abs(lines[number]["loss"] - line["loss"]) < 1e-5
        assert [lines[number][k] for k in ("lr", "targets")] == [line[k] for k in ("lr", "targets")]


def test_as_many_ranks_share_as_the_longest_document_needs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7B in fp32 on 8 ranks with 80 GB: packs of 32k and of 128k tokens."""

    class Packs(list[int]):
        packed_length = 0

    line = "accumulative_counts = 1\naccumulative_counts *= sequence_parallel_size"
    (tmp_path / "config.py").write_text(tiny.read_text().replace("accumulative_counts = 2 ", line))
    config = load(str(tmp_path / "config.py"), ["sequence_parallel_size=auto"])
    assert config.setting("sequence_parallel_size") == config.get("accumulative_counts") == 1
    extensions = check_settings(config)
    settings = prepare_settings(config, extensions.hooks, tmp_path / "w", CPU, None, make_mesh(None, 8))
    source = from_scratch(**SEVEN_B, activation_checkpointing=True)
    found = {}
    monkeypatch.setattr(memory, "min_free_bytes", lambda device, mesh: int(78.5 * 2**30))
    for length in (2**15, 2**17):
        packs: Any = Packs(range(16))
        packs.packed_length = length
        chosen = replace(settings, source=source, dataset=packs)
        after = trainer.choose_context_size(chosen, Options(ranks=8))
        found[length] = after.mesh.cp, after.mesh.dp_size, after.optim.accumulative_counts
        assert after.config.setting("sequence_parallel_size") == after.mesh.cp
    assert found == {2**15: (1, 8, 1), 2**17: (4, 2, 4)}


def test_ranks_that_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="sequence_parallel_size = 3, and the number of ranks is 8") as error:
        make_mesh(None, 8, 3)
    assert "set it to 1 or 2 or 4 or 8, or start a multiple of 3 processes" in error.value.do
    with pytest.raises(ConfigError, match="sequence_parallel_size = 16, and a node has 8 ranks"):
        make_mesh("hybrid", 16, 16)


@given(
    lengths=st.lists(st.integers(0, 3000), max_size=40),
    ranks=st.integers(1, 9),
    pair=st.sampled_from([0.0, 1e-3, 1.0]),
    exchanged=st.sampled_from([0.0, 0.1, 100.0]),
)
def test_documents_are_divided_evenly(lengths: list[int], ranks: int, pair: float, exchanged: float) -> None:
    division = divide_documents(lengths, ranks, ContextCosts(1.0, pair, exchanged))
    found = sorted(division.shared + [i for group in division.local for i in group])
    assert found == [i for i, n in enumerate(lengths) if n]
    assert sum(division.pieces) == sum(lengths[i] for i in division.shared)
    assert min(division.pieces, default=0) >= 0
    held = [sum(lengths[i] for i in group) for group in division.local]
    if division.shared and min(division.pieces):
        tokens = [a + b for a, b in zip(held, division.pieces, strict=True)]
        assert max(tokens) - min(tokens) <= 1


def test_a_document_is_shared_if_it_is_long() -> None:
    costs = ContextCosts(token=6.6e-5, pair=1.7e-9, exchanged=5.2e-6)  # 7B on H100s
    assert divide_documents([131072], 4, costs).pieces == [32768] * 4
    short = divide_documents([700 + 13 * i for i in range(40)], 4, costs)
    assert not short.shared
    mixed = divide_documents([65536] + [1024] * 64, 4, costs)
    assert 0 in mixed.shared
    assert len(mixed.shared) < 9
    assert fill_up([5, 0, 9], 7) == [1, 6, 0]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), parts=st.integers(1, 6), cut=st.integers(1, 50))
def test_every_query_is_computed_once(lengths: list[int], parts: int, cut: int) -> None:
    borders = [0, *accumulate(lengths)]
    divided = [divide_queries(borders, part, parts) for part in range(parts)]
    assert sorted(t for q in divided for a, b in q.ranges for t in range(a, b)) == list(range(borders[-1]))
    for queries in divided:
        assert queries.ranges == sorted(queries.ranges)
        for (first, end), (begin, stop) in zip(queries.keys, queries.ranges, strict=True):
            assert first in borders
            assert end == stop
            assert begin >= first
        pieces = [(at, min(cut, borders[-1] - at)) for at in range(0, borders[-1], cut)]
        inside = [at + t for at, n in pieces for a, b in queries.ranges_within(at, n) for t in range(a, b)]
        assert inside == [t for a, b in queries.ranges for t in range(a, b)]


@given(kv=st.integers(1, 9), groups=st.integers(1, 9), ranks=st.integers(1, 20))
def test_every_head_is_computed_once(kv: int, groups: int, ranks: int) -> None:
    parts = divide_heads(kv * groups, kv, ranks, divide_queries=True)
    done = [(head, s.part, s.parts) for s in parts for head in range(s.queries.start, s.queries.stop)]
    assert len(parts) == ranks <= max(len(done), kv * groups)
    assert sum(Fraction(1, parts) for _, _, parts in done) == kv * groups
    assert len(set(done)) == len(done)
    shares = divide_heads(kv * groups, kv, ranks)
    assert len(shares) == ranks
    queries = [h for s in shares for h in range(s.queries.start, s.queries.stop)]
    assert queries == list(range(kv * groups))
    for share in shares:
        turns = divide_turns(share, 2)
        assert turns[0].queries.start == share.queries.start
        assert all(a.queries.stop == b.queries.start for a, b in pairwise(turns) if share.num_keys)
        for turn in turns:
            heads = [h // groups for h in range(turn.queries.start, turn.queries.stop)]
            assert sorted(set(heads)) == list(range(turn.keys.start, turn.keys.stop))
            assert not turn.num_keys or turn.num_queries % turn.num_keys == 0
