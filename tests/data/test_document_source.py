"""Documents that do not lie in `.bin` files: one class in a file of the user's, named in a config."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import on_ranks
from helpers.runs import contents, records

from xtuner.core.errors import ConfigError, DataError
from xtuner.data import build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.data.loading.batch import Batch
from xtuner.data.loading.open_on_ranks import open_on_ranks
from xtuner.data.packing.document_source import DocumentSource, SourceList
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.raw_pack import RawPack
from xtuner.dist.collectives import Ranks
from xtuner.model.source import from_scratch
from xtuner.train.evaluate import evaluate

ROWS = '''
"""Documents in a .npz: ids and learned of all of them end to end, and lengths."""
import hashlib
import numpy as np
class Rows:
    def __init__(self, path):
        found = np.load(path)
        self.name = path.rpartition("/")[2]
        self.ids, self.learned, self.lengths = (found[k] for k in ("ids", "learned", "lengths"))
        self.ends = np.cumsum(self.lengths)
    def __len__(self):
        return len(self.lengths)
    def read(self, i):
        part = slice(self.ends[i] - self.lengths[i], self.ends[i])
        return self.ids[part], self.learned[part]
    def fingerprint(self):
        return hashlib.sha256(b"".join(a.tobytes() for a in (self.ids, self.learned, self.lengths))).hexdigest()
def both(paths):
    return [Rows(path) for path in paths]
'''


class Given:
    """Documents from memory, reported as they are."""

    def __init__(self, documents: list[tuple[Any, Any]], **other: Any) -> None:
        self.documents, self.lengths = documents, np.array([len(ids) for ids, _ in documents])
        self.__dict__ |= other

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, i: int) -> tuple[Any, Any]:
        return self.documents[i]

    def fingerprint(self) -> str:
        return repr(self.documents)


def drawn(documents: int, vocabulary: int, seed: int = 0) -> list[tuple[Any, Any]]:
    """Of 0 to 60 tokens, ids from 0."""
    draw = np.random.RandomState(seed)
    ids = [draw.randint(0, vocabulary, draw.randint(0, 60)) for _ in range(documents)]
    return [(i.astype(np.uint16), draw.rand(len(i)) < 0.7) for i in ids]


def save(path: Path, documents: list[tuple[Any, Any]]) -> None:
    ids, learned = (np.concatenate(part) for part in zip(*documents, strict=True))
    np.savez(path, ids=ids, learned=learned, lengths=[len(i) for i, _ in documents])


@pytest.mark.parametrize("rule", ["internevo", "xtuner"])
def test_packs_of_a_source(rule: Any) -> None:
    """As the rules say, worked out by hand; id 0 is an id like others, and learned where the source says so."""
    documents, length = drawn(60, 5), 36
    data = PackedDataset(Given(documents), length, 7, rule)
    order = np.arange(60)
    np.random.RandomState(7).shuffle(order)
    line = [(i, last, bool(t)) for d in order for i, t, last in _marked(*documents[d])]
    assert len(data) == len(line) // length > 20
    seen = set()
    for number in range(len(data)):
        pack = {k: v.tolist() for k, v in data[number].items()}
        own = line[number * length : (number + 1) * length + 1]
        ids, last, learned = (list(part) for part in zip(*own, strict=True))
        after = [t if learned[i + 1] else -100 for i, t in enumerate(ids[1:])] + [-100] * (length + 1 - len(ids))
        if rule == "internevo":
            after = [-100 if last[i] else t for i, t in enumerate(after)]
        else:
            after[-1] = -100
        assert pack["input_ids"] == ids[:length]
        assert pack["labels"] == [t if known else -100 for t, known in zip(ids, learned, strict=True)][:length]
        assert pack["targets"] == after
        seen |= {*pack["targets"]}
        raw = data.raw(number)
        shipped = Batch.from_raw(RawPack.from_buffer(raw.buffer()), rule, number)
        assert shipped.targets.tolist() == pack["targets"]
        assert shipped.input_ids.tolist() == pack["input_ids"]
        assert shipped.cu_seqlens.tolist() == pack["cumulative_len"]
        assert shipped.attention_pairs == data.costs(np.array([number]))[0]
    assert seen == {-100, 0, 1, 2, 3, 4}


def _marked(ids: Any, learned: Any) -> list[tuple[int, bool, bool]]:
    return [(int(i), bool(t), n == len(ids) - 1) for n, (i, t) in enumerate(zip(ids, learned, strict=True))]


@pytest.mark.parametrize("min_length", [0, 12])
def test_a_folder_is_a_list_of_sources(min_length: int, corpus: Path) -> None:
    """The general way to read its files gives the packs, costs and losses that the fast one gives."""
    folder = load_intern_repo_tokenized_dataset(corpus, min_length)
    fast, general = PackedDataset(folder, 33), PackedDataset(SourceList(list(folder)), 33)
    assert general.packs_per_file == fast.packs_per_file
    assert general.tail_tokens_per_file == fast.tail_tokens_per_file
    for number in range(len(fast)):
        assert {k: v.tolist() for k, v in general[number].items()} == {k: v.tolist() for k, v in fast[number].items()}
    every = np.arange(len(fast))
    assert general.costs(every).tolist() == fast.costs(every).tolist()
    shape = dict(vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = from_scratch(seed=0, **shape, num_key_value_heads=1, max_position_embeddings=64).build()
    assert evaluate(model, general.documents, 16, quiet=True) == evaluate(model, folder, 16, quiet=True)


@pytest.mark.processes
def test_a_source_of_a_config_trains_and_resumes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xtuner: Callable[..., int]
) -> None:
    """Bit for bit, also by worker processes and from another folder; other contents are rejected."""
    (tmp_path / "my_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    first, second, held_out = (tmp_path / f"{name}.npz" for name in ("first", "second", "held_out"))
    for seed, path in enumerate((first, second, held_out)):
        save(path, drawn(30, 400, seed))
    text, end = tiny.read_text(), "    packed_length=max_length"
    begin = text.index("    dataset_cfg=dict(")
    own = "paths = [{}]\n".format(", ".join(repr(str(p)) for p in (first, second)))
    cfg = "    dataset_cfg=dict(type=both, paths=paths),\n"
    text = text[:begin] + cfg + text[text.index(end) :] + f"val_dataset = dict(type=Rows, path={str(held_out)!r})\n"
    config = tmp_path / "rows.py"
    config.write_text(f"from my_rows import Rows, both\n{own}{text}")
    options = ["--cfg-options", "max_epochs=2", "save_steps=4", "save_total_limit=-1", "evaluation_inputs=[]"]
    assert xtuner("check-cfg", config) == 0
    straight = tmp_path / "straight"
    assert xtuner("train", config, "--work-dir", straight, *options) == 0
    lines = records(straight)
    last = max(lines)
    assert last > 8
    (log,) = straight.glob("*/2*.log")
    report = log.read_text()
    assert "60 documents, 2 files, first.npz and 1 more" in report
    assert f"validation at iteration {last}: . " in report
    moved = tmp_path / "moved" / "second.npz"
    moved.parent.mkdir()
    shutil.copy(second, moved)
    more = [*options, f"paths={[str(first), str(moved)]!r}", "train_dataloader.num_workers=1"]
    resumed = tmp_path / "resumed"
    assert xtuner("train", config, "--work-dir", resumed, "--resume", straight / "iter_4.pth", *more) == 0
    assert records(resumed) == {n: line for n, line in lines.items() if n > 4}
    assert contents(resumed / f"iter_{last}.pth") == contents(straight / f"iter_{last}.pth")
    changed = drawn(30, 400, 1)
    changed[3][0][0] ^= 1
    save(moved, changed)
    with pytest.raises(DataError, match=r"not what the checkpoint was trained on: .*paths.1: (.|\n)*--allow-change"):
        xtuner("train", config, "--work-dir", tmp_path / "other", "--resume", straight / "iter_4.pth", *more)
    save(second, changed)
    with pytest.raises(DataError, match=r"files: 1 changed \(second.npz\)"):
        xtuner("train", config, "--work-dir", tmp_path / "other", "--resume", straight / "iter_4.pth", *options)
    assert not (tmp_path / "other").exists()
    for wrong, error, message in (
        ([(ids + 300, t) for ids, t in drawn(30, 400)], DataError, "id .* is outside the vocabulary of 400"),
        ([(np.arange(3), np.ones(3, bool))], DataError, r"0 packs.*\n  where: first.npz and 1 more: "),
        ([(ids, t & False) for ids, t in drawn(30, 400)], DataError, "nothing was trained.*(.|\n)*documents .* of "),
    ):
        save(first, wrong)
        save(second, wrong)
        with pytest.raises(error, match=message):
            xtuner("train", config, "--work-dir", tmp_path / "other", *options)


@pytest.mark.processes
def test_ranks_must_see_the_same_source(tmp_path: Path) -> None:
    def opened(ranks: Ranks, folder: Path) -> None:
        same = open_on_ranks(lambda _: PackedDataset(Given(drawn(40, 9)), 32), ranks)
        assert len(set(ranks.gather(same.fingerprint()))) == 1
        with pytest.raises(DataError, match="differ from those of rank 0\n  where: Given"):
            open_on_ranks(lambda _: PackedDataset(Given(drawn(40, 9, ranks.rank)), 32), ranks)

    assert on_ranks(2, opened, tmp_path) == [0, 0]


def unplugged(i: int) -> Any:
    raise OSError(5, "the disk is away")


class Derived(DocumentSource):
    """Of the protocol's class, which gives it no member."""

    def __init__(self) -> None:
        self.lengths = np.array([4])

    def __len__(self) -> int:
        return 1


ONE = [(np.array([1, 2, 3, 4]), np.ones(4, bool))]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "int is not a source of documents: it has no __len__, lengths, read, fingerprint"),
        ([Given(ONE), dict()], "dict is not a source of documents: it has no lengths, read, fingerprint"),
        (Derived(), "Derived is not a source of documents: it has no read, fingerprint"),
        (Given(ONE, read=lambda i: ONE[0][0]), r"document 0 is a ndarray instead of \(ids, learned\)"),
        (Given(ONE, read=unplugged, name="x.npz"), r"document 0 cannot be read: .*the disk is away\n  where: x.npz"),
        (Given(ONE, lengths=[4.0]), r"lengths are float64 \[1\] instead of integers \[1\]"),
        (Given(ONE, lengths=[4, 4]), r"lengths are int64 \[2\] instead of integers \[1\]"),
        (Given(ONE, lengths=[-4]), "the length of document 0 is -4"),
        (Given(ONE, lengths=[5]), r"document 0 has ids int64 \[4\] and learned bool \[4\] instead of .* \[5\]"),
        (Given([(ONE[0][0], [1, 1, 0, 1])]), "learned int64"),
        (Given([(ONE[0][0] - 2, ONE[0][1])]), "document 0 contains -1, which is not a token id"),
        (Given([(ONE[0][0] + 2**31, ONE[0][1])]), "document 0 contains 21474836.., which is not a token id"),
        (Given(ONE, fingerprint=lambda: None), "its fingerprint is None"),
    ],
)
def test_what_is_not_a_source(source: Any, message: str) -> None:
    """Nothing that a source returns is taken unseen."""

    def use() -> None:
        data = build_packed_dataset(dict(type=lambda: source), 4)
        data.fingerprint()
        data.raw(0)

    with pytest.raises((ConfigError, DataError), match=message):
        use()


def test_a_source_of_nothing() -> None:
    for source in ([], Given([]), Given([([], [])])):
        data = PackedDataset(source, 4)
        assert (len(data), data.documents.num_tokens, json.dumps(data.fingerprint())[0]) == (0, 0, '"')
