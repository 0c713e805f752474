"""Mixtures: shares at every prefix, each source's own order, resume on any number of ranks, figures by source."""

import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import contents, records
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.config.load import load
from xtuner.core.errors import ConfigError, DataError
from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset, mixture
from xtuner.data.format import cache_dirs
from xtuner.data.inspect.statistics import compute_statistics
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.source_shares import MOST, arrange, divide_period
from xtuner.dist.mesh import Mesh
from xtuner.train import preflight
from xtuner.train.plan import make_plan


class Counted:
    """`documents` of 8 tokens: the packs of a source, if packs have 8 tokens."""

    def __init__(self, documents: int, name: str, tokens: int = 8) -> None:
        self.lengths, self.name, self.tokens = np.full(documents, tokens), name, tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, i: int) -> tuple[Any, Any]:
        return np.full(self.tokens, i % 50), np.ones(self.tokens, bool)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {len(self)}".encode()).hexdigest()


def counted(sizes: list[int], weights: list[float], **more: Any) -> PackedDataset:
    repeats = more.pop("max_repeats", [None] * len(sizes))
    sources = [
        dict(type=Counted, documents=n, weight=w, max_repeats=r) | dict(name=f"s{i}")
        for i, (n, w, r) in enumerate(zip(sizes, weights, repeats, strict=True))
    ]
    for i, source in enumerate(sources):
        source["type"] = lambda documents, i=i: Counted(documents, f"c{i}")
    return PackedDataset(mixture(sources, **more), 8)


WEIGHT = st.one_of(
    st.integers(1, 50).map(float), st.floats(0.01, 100, allow_nan=False), st.sampled_from([0.1, 0.3, 0.6, 1 / 3])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(WEIGHT, min_size=1, max_size=9))
def test_shares_are_within_one_pack_at_every_prefix(weights: list[float]) -> None:
    slots = divide_period([Fraction(str(w)) for w in weights])
    exact = [Fraction(str(w)) / sum(Fraction(str(v)) for v in weights) for w in weights]
    assert sum(slots) <= MOST
    assert all(abs(Fraction(n, sum(slots)) - e) < Fraction(1, MOST) for n, e in zip(slots, exact, strict=True))
    if 0 in slots:
        return
    sequence = arrange(slots)
    n = np.arange(min(2 * sequence.period + 3, 100_000))
    sources, turns = sequence.locate(n)
    for s, slot in enumerate(slots):
        taken = sources == s
        ahead = np.cumsum(taken) * sequence.period - (n + 1) * slot
        assert np.abs(ahead).max() < sequence.period
        assert (turns[taken] == np.arange(taken.sum())).all()
        for at in (0, 1, len(n) // 2, len(n)):
            assert sequence.counts(at)[s] == taken[:at].sum()
        for number in range(min(3, int(taken.sum()))):
            assert sequence.position(s, number) == np.flatnonzero(taken)[number]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_pack_is_lost_or_doubled(data: Any) -> None:
    """Any number of ranks sees the stream of one; each source its own permutations, pass after pass."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    weights = data.draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, 7.0]), min_size=len(sizes), max_size=len(sizes)))
    repeats = data.draw(st.lists(st.sampled_from([None, 1, 3]), min_size=len(sizes), max_size=len(sizes)))
    begun_on, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9))
    packed = counted(sizes, weights, max_repeats=repeats)
    plan = packed.mixture
    assert plan
    loader = PackLoader(
        packed, InternRepoSampler(packed, seed=seed, rank=0, world_size=1), reshuffle=True, begun_on=begun_on
    )
    epoch = loader.packs_per_epoch
    if not epoch:
        return
    stream = list(islice(loader.numbers_from(Position()), 3 * epoch + 5))
    for s, size in enumerate(sizes):
        own = [p - plan.first_pack[s] for p in stream if plan.source_of(p) == s]
        most = repeats[s] or 1
        for epochs in (1, 2, 3):  # no pack more often than it may be
            assert max(Counter(p for p in stream[: epochs * epoch] if plan.source_of(p) == s).values(), default=0) <= (
                epochs * most
            )
        if s != plan.last:  # continues over the ends of epochs
            passes = [np.random.RandomState(seed + n).permutation(size) for n in range(len(own) // size + 1)]
            assert own == np.concatenate(passes)[: len(own)].tolist()
    done, ranks = data.draw(st.integers(0, 2 * epoch)), data.draw(st.integers(1, 4))
    position = Position().advance(done, epoch)
    for rank in range(ranks):
        sampler = InternRepoSampler(packed, seed=seed, rank=rank, world_size=ranks)
        resumed = PackLoader(packed, sampler, reshuffle=True, begun_on=begun_on).numbers_from(position)
        expected = stream[done:][rank::ranks]
        assert list(islice(resumed, len(expected))) == expected
    assert sampler.packs(done, len(stream), epoch).tolist() == stream[done:]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("reshuffle", [True, False])
def test_one_source_is_the_stream_without_a_mixture(ranks: int, reshuffle: bool, corpus: Path) -> None:
    plain = PackedDataset(load_intern_repo_tokenized_dataset(corpus), 32)
    source = dict(type=load_intern_repo_tokenized_dataset, folder=corpus, weight=1)
    mixed = PackedDataset(mixture([source]), 32)
    for rank in range(ranks):
        found = []
        for data in (plain, mixed):
            sampler = InternRepoSampler(data, rank=rank, world_size=ranks)
            loader = PackLoader(data, sampler, balance=2, accumulative_counts=2, reshuffle=reshuffle)
            balanced = list(islice(loader.numbers_from(Position(0, 5)), 60))
            loader.balance = 0
            straight = list(islice(loader.numbers_from(Position(1, 3)), 60))
            sampler.set_epoch(2)
            found.append((balanced, straight, list(sampler)))
        assert found[0] == found[1]
    for number in range(len(plain)):
        assert {k: v.tolist() for k, v in plain[number].items()} == {k: v.tolist() for k, v in mixed[number].items()}


def test_ends_of_epochs_and_units() -> None:
    plan = counted([30, 20], [0.5, 0.5]).mixture
    assert plan
    assert (plan.packs, plan.names[plan.last]) == (41, "s1")  # s0 20 or 21, s1 20
    more = counted([30, 20], [0.5, 0.5], max_repeats=[None, 4]).mixture
    assert more
    assert (more.packs, more.names[more.last]) == (60, "s0")
    both = counted([30, 20], [0.5, 0.5], epoch="all").mixture
    assert both
    assert both.sequence.counts(both.packs).tolist() in ([30, 29], [30, 30])
    with pytest.raises(ConfigError, match=r"repeats 's1' 1.[45].* times, and its max_repeats is 1"):
        counted([30, 20], [0.5, 0.5], epoch="all", max_repeats=[None, 1])
    short = [dict(type=lambda: Counted(80, "x", 2), name="short"), dict(type=lambda: Counted(20, "y", 8), name="long")]
    documents = PackedDataset(mixture(short, by="documents"), 8).mixture
    assert documents
    assert documents.sequence.slots.tolist() == [1, 4]  # four short documents fill a pack


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_schedule_is_exact_and_found_at_once(data: Any) -> None:
    """From each change on shares are within one pack of the new weights; each source continues its own permutations,
    on any number of ranks and from any position."""
    count = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    weight = st.sampled_from([0.0, 1.0, 2.0, 0.3, 5.0])
    weights = data.draw(st.lists(weight.filter(bool), min_size=count, max_size=count))
    at = sorted(data.draw(st.sets(st.integers(0, 12), max_size=3)))
    changes = [data.draw(st.dictionaries(st.integers(0, count - 1), weight, min_size=1)) for _ in at]
    now, phases = dict(enumerate(weights)), [(0, weights)]
    for iteration, change in zip(at, changes, strict=True):
        now = now | change
        phases = [p for p in phases if p[0] < iteration] + [(iteration, [now[s] for s in range(count)])]
    if not all(any(w) for _, w in phases):
        return
    schedule = [dict(iteration=i, weights={f"s{s}": w for s, w in c.items()}) for i, c in zip(at, changes, strict=True)]
    each, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 9))
    packed = counted(sizes, weights, schedule=schedule, max_repeats=[3] * count).with_packs_per_iteration(each)
    plan = packed.mixture
    assert plan
    try:
        plan.require_possible()
    except ConfigError as e:
        assert "is never reached" in str(e)  # noqa: PT017
        return
    assert plan.packs >= 1
    loader = PackLoader(packed, InternRepoSampler(packed, seed=seed, rank=0, world_size=1), reshuffle=True)
    stream = list(islice(loader.numbers_from(Position()), plan.packs))
    of = np.array([plan.source_of(p) for p in stream])
    for (begin, shares), end in zip(phases, [p[0] * each for p in phases[1:]] + [plan.packs], strict=True):
        taken = of[begin * each : end]
        for s, share in enumerate(shares):
            ahead = np.cumsum(taken == s) - np.arange(1, len(taken) + 1) * (share / sum(shares))
            assert np.abs(ahead).max(initial=0) < 1 + 1e-9
            assert share or not (taken == s).any()
    for s, size in enumerate(sizes):
        own = [p - plan.first_pack[s] for p in stream if plan.source_of(p) == s]
        passes = [np.random.RandomState(seed + n).permutation(size) for n in range(3)]
        assert own == np.concatenate(passes)[: len(own)].tolist(), "also: no pack more than 3 times"
    assert (of == plan.last).sum() == 3 * sizes[plan.last]
    done, ranks = data.draw(st.integers(0, plan.packs)), data.draw(st.integers(1, 4))
    for rank in range(ranks):
        sampler = InternRepoSampler(packed, seed=seed, rank=rank, world_size=ranks)
        resumed = PackLoader(packed, sampler, reshuffle=True, begun_on=1).numbers_from(Position(0, done))
        expected = stream[done:][rank::ranks]
        assert list(islice(resumed, len(expected))) == expected
    shares = plan.epoch_shares(plan.packs)
    assert sum(part.packs for part in shares) == plan.packs
    assert sum(part.requested for part in shares) == pytest.approx(1)
    assert all(abs(part.requested - part.obtained) * plan.packs <= len(phases) for part in shares)


def test_bad_schedules() -> None:
    for schedule, message in (
        (3, "is not a list of changes"),
        ([3], "is not a list of changes"),
        ([dict(iteration=1)], r"weights = None is not dict"),
        ([dict(iteration=1, weights={})], "is not dict"),
        ([dict(iteration=-1, weights=dict(s0=1))], "iteration = -1 is not a whole number"),
        ([dict(iteration=True, weights=dict(s0=1))], "iteration = True is not"),
        ([dict(iteration=1.5, weights=dict(s0=1))], "iteration = 1.5 is not"),
        ([dict(iterations=1, weights=dict(s0=1))], "no setting 'iterations'. Did you mean 'iteration'"),
        ([dict(iteration=2, weights=dict(s0=1)), dict(iteration=2, weights=dict(s0=2))], "2 follows iteration 2"),
        ([dict(iteration=2, weights=dict(s7=1))], "no source 's7'"),
        *(([dict(iteration=2, weights=dict(s0=w))], "is not a number from 0") for w in (-1, math.nan, "1", None, True)),
        ([dict(iteration=2, weights=dict(s0=0, s1=0))], "from iteration 2 on, all weights are 0"),
        ([dict(iteration=2, weights=dict(s0=1e-9))], "'s0' from iteration 2 on is less than 1 of 65,536"),
        ([dict(iteration=60, weights=dict(s0=1))], "iteration 60 .* is never reached: an epoch has 41 iterations"),
        ([dict(iteration=n, weights=dict(s0=1)) for n in range(101)], "101 changes"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message) as error:
            counted([30, 20], [0.5, 0.5], schedule=schedule).mixture.require_possible()  # type: ignore[union-attr]
        assert error.value.where.startswith("train_dataloader.dataset.dataset_cfg.schedule")
    endless = counted([30, 20], [1, 1], epoch="all", schedule=[dict(iteration=9, weights=dict(s0=0))]).mixture
    assert endless
    with pytest.raises(ConfigError, match="never ends: the schedule sets the weight of 's0' to 0"):
        endless.require_possible()


def source(folder: Path, **more: Any) -> dict[str, Any]:
    return dict(type=load_intern_repo_tokenized_dataset, folder=folder, **more)


def test_bad_mixtures(corpus: Path, tmp_path: Path) -> None:
    types = [corpus / name for name in ("code", "en")]
    for sources, error, message in (
        ([], ConfigError, "needs a list of sources"),
        (dict(a=1), ConfigError, "needs a list of sources"),
        *(([source(corpus, weight=w)], ConfigError, "weight = .* is not a number above 0")
          for w in (0, -1, math.nan, math.inf, "1", True)),
        ([source(corpus, wieght=1)], ConfigError, "no setting 'wieght'"),
        ([source(corpus, max_repeats=0)], ConfigError, "max_repeats = 0 is not at least 1"),
        ([source(corpus, name="a/b")], ConfigError, "is not a name"),
        ([source(types[0], name="a"), source(types[1], name="a")], ConfigError, "0 and 1 .* have one name, 'a'"),
        ([source(corpus), source(types[0])], DataError, "share a file"),
        ([source(types[0], weight=1e9), source(types[1], weight=1)], ConfigError, "is less than 1 of 65,536 packs"),
        ([dict(type=mixture, sources=[source(corpus)])], ConfigError, "not a source of another"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            PackedDataset(mixture(sources), 32)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the source 'en' of the mixture has no pack"):
        PackedDataset(mixture([source(types[0]), source(types[1], min_length=100_000)]), 32)
    with pytest.raises(ConfigError, match="by = 'bytes'"):
        mixture([source(corpus)], by="bytes")  # type: ignore[arg-type]


def test_sources_of_different_tokenizers(
    tmp_path: Path, tokenizer_folder: Path, xtuner: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    """What `data tokenize` records of each file is compared; where it says nothing, nothing is claimed."""
    other = shutil.copytree(tokenizer_folder, tmp_path / "other")
    with open(other / "tokenizer.model", "ab") as f:
        f.write(b"\xc2\x3e\x01x")  # a field that the library does not know
    for number, (name, tokenizer) in enumerate((("a", tokenizer_folder), ("b", tokenizer_folder), ("c", other))):
        text = tmp_path / f"{name}.txt"
        text.write_text("some text " * (20 + number))
        out = tmp_path / name
        assert xtuner("data", "tokenize", text, "--tokenizer", tokenizer, "--output", out, "--workers", 1) == 0
    folders = {name: source(tmp_path / name / "train", name=name) for name in "abc"}
    for names, warned in (("ab", False), ("ac", True), ("ca", True), ("c", False)):
        cache_dirs._logged.clear()
        caplog.clear()
        mixture([folders[name] for name in names])
        assert ("was written with another tokenizer" in caplog.text) == warned
    for harm in ("{", '{"settings": 3}', "[]"):
        (tmp_path / "c/made_from/en/c.json").write_text(harm)
        cache_dirs._logged.clear()
        caplog.clear()
        mixture([folders["a"], folders["c"]])
        assert "tokenizer" not in caplog.text


def test_a_source_that_changes_under_the_run(corpus: Path, tmp_path: Path) -> None:
    """Its file is named; packs of the other source are still read."""
    names = ("code", "en")
    for name in names:
        shutil.copytree(corpus / name, tmp_path / name)
    packed = PackedDataset(mixture([source(tmp_path / name) for name in names]), 32)
    plan = packed.mixture
    assert plan
    packed[plan.first_pack[1]]
    with open(tmp_path / "en/a.bin", "a") as f:
        f.write('{"tokens": [1]}\n')
    fresh = PackedDataset(packed.documents, 32)
    with pytest.raises(DataError, match=r"has changed|changed since") as error:
        fresh[plan.first_pack[1]]
    assert "en/a.bin" in str(error.value)
    assert len(fresh[0]["input_ids"]) == 32


@pytest.mark.processes
def test_a_mixture_of_a_config_trains_resumes_and_is_reported(
    tiny: Path, corpus: Path, tmp_path: Path, xtuner: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit after a resume, with figures of each source whose sum is the run's; a changed weight is rejected."""
    text, end = tiny.read_text(), "    packed_length=max_length"
    begin = text.index("    dataset_cfg=dict(")
    one, other = ({"type": "load", "folder": str(corpus / name)} for name in ("en", "code"))
    sources = [one | {"weight": 0.7}, other | {"weight": 0.3, "name": "py"}]
    cfg = f"    dataset_cfg=dict(type=mixture, sources={sources}),\n"
    text = text[:begin] + cfg.replace("'load'", "load_intern_repo_tokenized_dataset") + text[text.index(end) :]
    config = tmp_path / "mixed.py"
    config.write_text(f"from xtuner.data import mixture\n{text}val_dataset = train_dataset['dataset_cfg']\n")
    options = ["--cfg-options", "max_epochs=2", "save_steps=4", "save_total_limit=-1", "evaluation_inputs=[]"]
    straight = tmp_path / "straight"
    assert xtuner("check-cfg", config) == 0
    assert xtuner("train", config, "--work-dir", straight, *options) == 0
    lines = [json.loads(line) for line in next(straight.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    for line in lines:
        targets = [line["targets/en"], line["targets/py"]]
        losses = [line.get("loss/en", 0.0), line.get("loss/py", 0.0)]
        assert sum(targets) == line["targets"]
        mean = sum(a * b for a, b in zip(losses, targets, strict=True)) / sum(targets)
        assert mean == pytest.approx(line["loss"], rel=1e-6)
    assert {0} < {line["targets/py"] for line in lines}
    (log,) = straight.glob("*/2*.log")
    report = log.read_text()
    assert "en: 70.00% of packs" in report
    assert "by source: en " in report
    assert "validation at iteration" in report
    assert ": en " in report.partition("validation at iteration")[2]
    last = max(records(straight))
    resumed = tmp_path / "resumed"
    again = ["train", config, "--work-dir", resumed, "--resume", straight / "iter_4.pth", *options]
    assert xtuner(*again, "train_dataloader.num_workers=1") == 0
    assert records(resumed) == {n: line for n, line in records(straight).items() if n > 4}
    assert contents(resumed / f"iter_{last}.pth") == contents(straight / f"iter_{last}.pth")
    config.write_text(config.read_text().replace("'weight': 0.7", "'weight': 0.8"))
    with pytest.raises(DataError, match=r"sources.0.weight: 0.7 → 0.8"):
        xtuner(*again)
    capsys.readouterr()
    assert xtuner("log-dataset", config, "--show", "input_ids", "--num-packs", 3) == 0
    assert capsys.readouterr().out.count("pack ") == 3
    for before, after, message in (
        ("'weight': 0.8", "'weight': -0.8", r"weight = -0.8 is not above 0(.|\n)*mixed.py:"),
        ("'weight': 0.8", "'wieght': 0.8", "has no setting 'wieght'"),
        ("'name': 'py'", "'name': 3", "name = 3 is not"),
    ):
        bad = tmp_path / "bad.py"
        bad.write_text(config.read_text().replace(before, after).replace("mixed.py", "bad.py"))
        with pytest.raises(ConfigError, match=message.replace("mixed", "bad")):
            xtuner("check-cfg", bad)


@pytest.mark.processes
def test_a_schedule_of_a_config_and_a_mixture_of_one_source(
    tiny: Path, corpus: Path, tmp_path: Path, xtuner: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit after a resume. A run of a plain folder continues with a mixture of it, and the other way round."""
    text, end = tiny.read_text(), "    packed_length=max_length"
    begin = text.index("    dataset_cfg=dict(")
    kind = "type=load_intern_repo_tokenized_dataset"

    def write(name: str, sources: str, more: str = "") -> Path:
        path = tmp_path / name
        cfg = f"    dataset_cfg=dict(type=mixture, sources=[{sources}]{more}),\n"
        path.write_text(f"from xtuner.data import mixture\n{text[:begin]}{cfg}{text[text.index(end) :]}")
        return path

    options = ["--cfg-options", "max_epochs=1", "save_steps=3", "save_total_limit=-1", "evaluation_inputs=[]"]
    two = ", ".join(f"dict({kind}, folder={str(corpus / name)!r}, max_repeats=2)" for name in ("code", "en"))
    schedule = ", schedule=[dict(iteration=4, weights=dict(en=0)), dict(iteration=6, weights=dict(en=3))]"
    changing = write("changing.py", two, schedule)
    assert xtuner("check-cfg", changing) == 0
    one = write("one.py", f"dict({kind}, folder={str(corpus)!r}, weight=0.3)")
    for first, then in ((changing, changing), (tiny, one), (one, tiny)):
        straight, resumed = tmp_path / f"{first.stem}_straight", tmp_path / f"{first.stem}_resumed"
        assert xtuner("train", first, "--work-dir", straight, *options) == 0
        again = ["train", then, "--work-dir", resumed, "--resume", straight / "iter_3.pth", *options]
        assert xtuner(*again) == 0
        last = max(records(straight))
        losses = [{n: line["loss"] for n, line in records(folder).items()} for folder in (straight, resumed)]
        assert losses[1] == {n: loss for n, loss in losses[0].items() if n > 3}
        files = ("weights", "optimizer")
        found = [
            {n: c for n, c in contents(folder / f"iter_{last}.pth").items() if n.startswith(files)}
            for folder in (straight, resumed)
        ]
        assert found[0] == found[1]
        assert found[0]
    scalars = next((tmp_path / "changing_straight").glob("*/vis_data/scalars.json")).read_text()
    lines = {line["iter"]: line for line in map(json.loads, scalars.splitlines()) if "loss" in line}
    assert [lines[n]["targets/en"] for n in (5, 6)] == [0, 0]
    assert lines[7]["targets/en"] or lines[8]["targets/en"]
    (log,) = (tmp_path / "changing_straight").glob("*/2*.log")
    assert "from iteration 4" in log.read_text()
    resumed = tmp_path / "again"
    again = ["train", changing, "--work-dir", resumed, "--resume", tmp_path / "changing_straight/iter_3.pth", *options]
    with pytest.raises(DataError, match=r"schedule.0.iteration: 4 → 5"):
        xtuner(*again, "train_dataset.dataset_cfg.schedule.0.iteration=5")
    with pytest.raises(ConfigError, match=r"max_epochs = 2 with a schedule(.|\n)*give max_repeats"):
        xtuner("check-cfg", changing, "--cfg-options", "max_epochs=2")
    bad = write("bad.py", two, schedule.replace("iteration=6", "iteration=6000"))
    with pytest.raises(ConfigError, match=r"iteration 6,000 of the schedule is never reached(.|\n)*bad.py:"):
        xtuner("check-cfg", bad)
    found = load(str(changing), ["max_epochs=1", "train_dataset.dataset_cfg.schedule.1.iteration=16"])
    prepared = preflight.prepare_settings(found, [], tmp_path / "w", torch.device("cpu"), None, Mesh(dp_shard=2))
    with pytest.raises(ConfigError, match="iteration 16 of the schedule is never reached"):
        make_plan(prepared)
    resumed_on_two = preflight.with_accumulation(prepared, 1)  # as many packs per iteration as on one rank
    assert make_plan(resumed_on_two).facts["packs_per_iteration"] == 2
    assert resumed_on_two.dataset.mixture.phases[-1].iteration == 16  # type: ignore[union-attr]
    capsys.readouterr()
    assert xtuner("log-dataset", changing, "--show", "input_ids", "--num-packs", 30) == 0
    assert capsys.readouterr().out.count("pack ") == 30


@pytest.mark.processes
def test_statistics_of_a_mixture_before_a_run(
    tiny: Path, corpus: Path, tmp_path: Path, xtuner: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """As text, JSON and a page; the same numbers as those of the folders, the packs and the run's own report."""
    text = tiny.read_text()
    cfg = text[text.index("    dataset_cfg=dict(") : text.index("    packed_length=max_length")]
    kind = "type=load_intern_repo_tokenized_dataset"
    two = ", ".join(f"dict({kind}, folder={str(corpus / n)!r}, weight={w})" for n, w in (("code", 0.7), ("en", 0.3)))
    schedule = "schedule=[dict(iteration=4, weights=dict(en=1))]"
    config = tmp_path / "<b>.py"
    new = f"    dataset_cfg=dict(type=mixture, sources=[{two}], {schedule}),\n"
    config.write_text("from xtuner.data import mixture\n" + text.replace(cfg, new))
    page, options = tmp_path / "page.html", ["--cfg-options", "max_epochs=1", "accumulative_counts=2"]
    assert xtuner("data", "stats", config, "--json", "--html", page, "--workers", 1, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schedule"][1]["shares"] == {"code": pytest.approx(7 / 17), "en": pytest.approx(10 / 17)}
    assert (report["packs_per_iteration"], report["by"], report["ends_with"]) == (2, "tokens", "en")
    packs, sources = report["packs"], report["sources"]
    assert packs == sum(source["packs"] for source in sources)
    assert report["tokens"] == packs * report["packed_length"]
    en = sources[1]
    assert en["requested"] == pytest.approx((8 * 0.3 + (packs - 8) * 10 / 17) / packs)
    assert en["obtained"] == en["packs"] / packs
    assert (en["epochs"], en["packs"]) == (1, en["available"])
    assert xtuner("data", "stats", corpus / "en", "--max-length", report["packed_length"], "--json") == 0
    assert en["statistics"] == json.loads(capsys.readouterr().out)
    assert xtuner("data", "stats", config, "--no-text", *options) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("en "))
    assert row.split()[3:7] == [f"{en['packs']:,}", f"{en['tokens']:,}", f"{en['available']:,}", "1.00"]
    assert "schedule, with 2 packs an iteration:\n  from iteration 0 on: code 70.00%, en 30.00%\n  from" in shown
    assert xtuner("train", config, "--dry-run", "--work-dir", tmp_path / "w", *options) == 0
    assert f"{packs:,} packs an epoch, which ends with source 'en'" in capsys.readouterr().out
    html = page.read_text()
    assert not re.findall(r"https?:|src=|<script|url\(", html)
    assert "&lt;b&gt;.py" in html
    assert html.count("<svg") == 7
    assert xtuner("data", "stats", config, "--json", "--processes", 2, *options, "train_dataset.packing=whole") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packs_per_iteration"] == 4
    found = report["sources"][0]["statistics"]
    assert found["padding"] == found["packs"] * found["packed_length"] - found["tokens"]
    assert sum(bar[2] for bar in found["cost_bars"]) == found["packs"]
    assert xtuner("data", "stats", tiny, "--no-text") == 0
    assert "dropped tails" in capsys.readouterr().out
    for words, message in (
        ((config, "--max-length", 8), "--max-length is for folders"),
        ((config, "--processes", 0), "--processes 0"),
        ((corpus, "--cfg-options", "a=1"), "is not a config"),
        ((config, "--processes", 1000), "is never reached"),
        ((tmp_path / "none.py",), "no config file"),
    ):
        with pytest.raises(ConfigError, match=message):
            xtuner("data", "stats", *words, *([] if "--cfg-options" in words else options))


def test_statistics_of_other_sources() -> None:
    packed = counted([30, 20], [0.5, 0.5])
    for part in packed.documents.parts:  # type: ignore[union-attr]
        for packing in ("cut", "whole"):
            found = compute_statistics(part, 16, packing=packing)  # type: ignore[arg-type]
            assert (found.tokens, found.learned, found.packs) == (
                part.num_tokens,
                part.num_tokens,
                part.num_documents // 2,
            )
            assert found.cost["mean"] == 128
