"""Dealing packs by attention cost: which iteration has a pack, which rank computes it, and what that saves."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.configs import with_hook
from helpers.paths import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xtuner.config.load import load
from xtuner.core.errors import ConfigError
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset
from xtuner.data.inspect.statistics import pack_costs
from xtuner.data.loading import balance as deal
from xtuner.data.loading.batch import Batch
from xtuner.data.loading.document_groups import ContextCosts, divide_documents
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position
from xtuner.data.packing import document_order
from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.mesh import Mesh
from xtuner.families.network import AttentionPairs, DecoderConfig
from xtuner.model.flops import count_attention_pairs
from xtuner.train import preflight
from xtuner.train.plan import find_longest_document, make_plan
from xtuner.train.reporting.start_report import format_start_report

CASES = sorted(p.parent for p in reference("packing").glob("*/expected.json"))


@pytest.mark.parametrize("indexed", [False, True])
def test_costs_are_those_of_the_batches(indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up in any order, from memory and from a mapped index; of all reference folders that can be read."""
    monkeypatch.setattr(document_order, "SMALL", 0 if indexed else document_order.SMALL)
    monkeypatch.setattr(deal, "BLOCK", 100)
    seen = 0
    for case in CASES:
        facts = json.loads((case / "expected.json").read_text())
        if any("raises" in pack for pack in facts.get("packs", [{"raises": ""}])) or not facts["packs"]:
            continue
        documents = load_intern_repo_tokenized_dataset(case / "input", cache_dir=tmp_path)
        data = PackedDataset(documents, len(facts["packs"][0]["input_ids"]))
        costs = [Batch.from_item(data[i]).attention_pairs for i in range(len(data))]
        order = np.random.RandomState(0).permutation(len(data)).astype(np.uint32)
        fresh = PackedDataset(documents, data.packed_length)
        assert fresh.costs(order).tolist() == [costs[i] for i in order]
        lengths = [int(documents.file(i).lengths.max(initial=0)) for i in range(len(documents))]
        assert fresh.longest_document() == max(lengths)
        assert bool(fresh._files) != indexed, "of files that others read nothing is opened or kept"
        of_files = [pack_costs(data.file_packs(i).ends, data.packed_length) for i in range(len(documents))]
        assert np.concatenate(of_files).tolist() == costs
        seen += len(data)
    assert seen > 200


def test_costs_with_sliding_windows() -> None:
    """A direct count of the pairs in each layer; which rank gets which pack, and which documents, follows it."""
    network = DecoderConfig(9, 2, 2, 4, 1, 1, 2, sliding_window=5, sliding_layers=(True, False, True, True))
    pairs = network.attention_pairs

    def count(length: int) -> int:
        windows = [network.window(layer) or length for layer in range(network.num_layers)]
        return sum(min(t + 1, window) for window in windows for t in range(length))

    for length in (0, 1, 4, 5, 6, 7, 30, 1000):
        assert abs(2 * count(length) / network.num_layers - pairs.count(length)) <= length + 1
    lengths = np.array([1, 4, 7, 30, 1000])
    assert pairs.count(lengths).tolist() == [pairs.count(n) for n in lengths.tolist()]
    borders = torch.tensor([0, *lengths.cumsum()])
    assert count_attention_pairs(network, borders) == pairs.count(lengths).sum()
    long = 2**31 - 1
    assert pairs.count(np.array([long])).tolist() == [pairs.count(long)]

    ends, starts = np.array([16, 20, 24, 28, 32]), np.array([0, 16])
    plain = deal.attention_costs(ends, starts, 16)
    windowed = deal.attention_costs(ends, starts, 16, pairs)
    assert plain.tolist() == [256, 64]
    assert windowed.tolist() == [256 - 11 * 11 * 3 // 4, 64]

    costs = ContextCosts(token=1.0, pair=10.0, exchanged=4000.0)  # sharing costs more than what attention saves
    assert divide_documents([1000, 10], 2, costs).shared == [0]
    narrow = replace(costs, pairs=AttentionPairs(5, 1, 1))
    assert divide_documents([1000, 10], 2, narrow).shared == []


def test_costs_of_the_longest_documents_are_exact() -> None:
    length = 2**31 - 1
    ends = np.array([0, 3, 3, 2 * length], np.int64)  # also documents without tokens
    assert deal.attention_costs(ends, np.array([0, length]), length).tolist() == [9 + (length - 3) ** 2, length**2]


class Costly:
    """Stands for a dataset of packs of these costs."""

    def __init__(self, costs: Any) -> None:
        self.of = np.array(costs, np.int64)

    def __len__(self) -> int:
        return len(self.of)

    def costs(self, packs: Any) -> Any:
        return self.of[packs]


def loader(data: Costly, balance: int, each: int, rank: int, ranks: int, begun_on: int, origin: int) -> PackLoader:
    found = PackLoader(data, InternRepoSampler(data, rank=rank, world_size=ranks), balance=balance)  # type: ignore[arg-type]
    found.accumulative_counts, found.begun_on, found.windows_from, found.reshuffle = each, begun_on, origin, True
    return found


def taken(
    data: Costly, balance: int, packs: int, ranks: int, begun_on: int, begin: int, count: int, origin: int = 0
) -> list[Any]:
    """[iterations][ranks][packs a rank] from pack `begin` of the stream on."""
    each = packs // ranks
    position = Position().advance(begin, len(data) // begun_on * begun_on)
    rows = [
        list(islice(loader(data, balance, each, r, ranks, begun_on, origin).numbers_from(position), count * each))
        for r in range(ranks)
    ]
    return [[row[i : i + each] for row in rows] for i in range(0, count * each, each)]


def by_definition(costs: Any, stream: list[int], packs: int, per_epoch: int, begin: int, k: int) -> list[list[int]]:
    """The packs of each iteration of `stream`, of which the first pack is number `begin`."""
    numbers = range(len(stream) // packs)
    epochs = [{(begin + i * packs + j) // per_epoch for j in range(packs)} for i in numbers]
    found = []
    while len(found) < len(numbers):
        i = len(found)
        together = [
            j for j in numbers if i <= j < i // k * k + k and epochs[j] == epochs[i] and (j == i or len(epochs[j]) == 1)
        ]
        places = sorted(range(i * packs, i * packs + len(together) * packs), key=lambda place: costs[stream[place]])
        groups = sorted(sorted(places[n : n + packs]) for n in range(0, len(places), packs))
        found += [[stream[place] for place in group] for group in groups]
    return found


@settings(max_examples=60, deadline=None)
@given(
    num_packs=st.integers(3, 60), begun_on=st.integers(1, 3), packs=st.sampled_from((1, 2, 4, 6)), k=st.integers(0, 5),
    done=st.integers(0, 9), begin=st.integers(0, 5), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(num_packs=50, begun_on=3, packs=6, k=4, done=2, begin=0, seed=0)
def test_a_pure_function_of_stream_position_and_ranks(
    num_packs: int, begun_on: int, packs: int, k: int, done: int, begin: int, seed: int
) -> None:
    """Every iteration has the same packs on any number of ranks, those of the definition, also in a resume in the
    middle of a window, and where earlier iterations had other numbers of packs."""
    data = Costly(np.random.RandomState(seed).randint(1, 9, num_packs))
    per_epoch, count, origin = num_packs // begun_on * begun_on, 10, begin if k > 1 else 0
    sampler = InternRepoSampler(data, rank=0, world_size=1)
    stream = sampler.packs(begin, begin + (count + k) * packs, per_epoch).tolist()
    assert stream == taken(data, 0, len(stream) + begin, 1, begun_on, 0, 1)[0][0][begin:]
    expected = by_definition(data.of, stream, packs, per_epoch, begin, max(k, 1))[:count]
    for ranks in (n for n in (1, 2, 3, 4, 6) if packs % n == 0):
        dealt = taken(data, k, packs, ranks, begun_on, begin, count, origin)
        assert [sorted(chain.from_iterable(row)) for row in dealt] == [sorted(row) for row in expected]
        assert all(len(mine) == packs // ranks for row in dealt for mine in row)
        if k == 0 or ranks in (1, packs):
            assert dealt == [[row[r::ranks] for r in range(ranks)] for row in expected]
        assert taken(data, k, packs, ranks, begun_on, begin + done * packs, count - done, origin) == dealt[done:]


@pytest.mark.processes
def test_dealing_may_begin_in_the_middle_of_a_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xtuner: Any
) -> None:
    """From iteration 3 on 4 iterations are dealt together, stopped in the middle of a window: no pack comes twice."""
    seen: list[list[int]] = []
    real = PackLoader.iterate_from

    def recording(self: PackLoader, position: Position) -> Iterator[Batch]:
        seen.append([])
        for batch in real(self, position):
            seen[-1].append(batch.pack)
            yield batch

    monkeypatch.setattr(PackLoader, "iterate_from", recording)
    act = "os.kill(os.getpid(), signal.SIGTERM)"
    stopping = with_hook(tiny, tmp_path / "run.py", "0 or it.state.iteration in [3, 5]", act)
    train = (
        "train",
        stopping,
        "--work-dir",
        tmp_path / "w",
        "--cfg-options",
        "evaluation_inputs=[]",
        "val_dataset=None",
    )
    dealt = (*train, "train_dataloader.balance=4", "--resume")
    assert xtuner(*train) == 75
    with pytest.raises(ConfigError, match=r"train_dataloader.balance: 1 → 4"):
        xtuner(*dealt)
    assert xtuner(*dealt, "--allow-change") == 75
    assert xtuner(*dealt) == 0
    first, second, third = seen[0][:-2], seen[1][:-2], seen[2]
    order = InternRepoSampler(range(30)).permutation().tolist()
    later = second + third
    assert [first, len(second), len(third)] == [order[:6], 4, 20]
    for begin in (0, 8, 16):
        assert sorted(later[begin : begin + 8]) == sorted(order[6 + begin : 14 + begin])
    assert later != order[6:]
    facts = json.loads((tmp_path / "w" / "iter_15.pth" / "trainer.json").read_text())
    assert (facts["balance"], facts["windows_from"]) == (4, 6)


def test_ranks_get_equally_many_and_nearly_equal_costs() -> None:
    assert deal.assign_to_ranks(np.array([5, 1, 7, 3, 6, 2]), 2).tolist() == [
        [2, 3, 5],
        [4, 0, 1],
    ]  # 7 + 3 + 2, 6 + 5 + 1
    assert deal.assign_to_ranks(np.array([9, 1, 1, 1, 1, 1]), 2).tolist() == [
        [0, 4, 5],
        [1, 2, 3],
    ]  # not 9 against the rest
    assert deal.assign_to_ranks(np.array([4, 9, 4]), 3).tolist() == [[0], [1], [2]]
    assert deal.assign_to_ranks(np.array([4, 9, 4]), 1).tolist() == [[0, 1, 2]]
    assert deal.assign_to_iterations(np.array([5, 1, 7, 1, 6, 2]), 2).tolist() == [[0, 5], [1, 3], [2, 4]]
    costs = np.random.RandomState(0).lognormal(18, 0.7, 2**10)

    def wait(each: int, window: int) -> float:
        return deal.waiting_share(costs, lambda c: c + 6e8, 8, each, window)

    assert wait(1, 0) == wait(1, 1) > 2 * wait(1, 4) > 4 * wait(1, 16) > 0
    assert wait(1, 0) > wait(4, 0) > 2 * wait(4, 1) > 10 * wait(4, 16) > 0
    equal = np.full(64, 3.0)
    assert deal.waiting_share(equal, lambda c: c, 8) == 0
    cut, whole = (deal.waiting_share(costs[:n], lambda c: c, 8, window=16) for n in (70, 64))
    assert cut == whole


def test_a_dataset_without_costs_is_not_dealt() -> None:
    class Own:
        def __len__(self) -> int:
            return 9

    own: Any = Own()
    sampler = InternRepoSampler(own, rank=1, world_size=3)
    plain = PackLoader(own, sampler)
    plain.accumulative_counts = 3
    assert (plain.balance, plain.is_balanced) == (0, False)
    assert list(islice(plain.numbers_from(Position()), 3)) == sampler.permutation()[1::3].tolist()
    with pytest.raises(ConfigError, match=r"balance = 16, but Own has no method `costs`"):
        PackLoader(own, sampler, balance=16)
    assert find_longest_document(own) is None


@pytest.mark.parametrize(
    ("options", "ranks", "words"),
    [
        ([], 4, ["packs of an iteration are assigned to ranks", "the slowest instead of ", "= 16 would leave"]),
        (["accumulative_counts=1"], 4, ["one pack per rank and iteration, nothing to balance: ranks wait "]),
        (["train_dataloader.balance=0"], 2, ["packs are not balanced: ranks wait "]),
        (["train_dataloader.balance=3"], 2, ["packs of 3 iterations are assigned to ranks", "the slowest instead of "]),
        (
            ["train_dataloader.balance=16"],
            1,
            ["packs of 16 iterations are ordered by attention cost", "as on several ranks"],
        ),
        ([], 1, []),
    ],
)
def test_the_report_says_what_is_dealt(
    options: list[str], ranks: int, words: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "xtuner.train.reporting.start_report.MIN_GAIN", 0
    )  # attention is little of what a tiny model does
    config = load(str(tiny), options)
    settings = preflight.prepare_settings(config, [], tmp_path / "w", torch.device("cpu"), None, Mesh(dp_shard=ranks))
    plan = make_plan(settings)
    lines = [line for line in format_start_report(settings, plan).split("\n") if line.startswith("  balance ")]
    assert len(lines) == bool(words)
    for word in words:
        assert word in lines[0]
    assert plan.facts["balance"] == config.get("train_dataloader.balance", 1)


def test_log_dataset_shows_the_packs_that_come_first(tiny: Path, capsys: Any, xtuner: Any) -> None:
    shown = []
    for balance in (1, 4):
        options = [f"train_dataloader.balance={balance}", "accumulative_counts=3"]
        assert xtuner("log-dataset", tiny, "--show", "input_ids", "--num-packs", 30, "--cfg-options", *options) == 0
        shown.append(capsys.readouterr().out.split("\n"))
    assert "the packs of 4 iterations are distributed by attention cost" in shown[1].pop(0)
    assert sorted(shown[0]) == sorted(shown[1]) != []
    assert shown[0] != shown[1]
