"""benchmarks/learning.py: its verdicts on curves made by hand, runs of several starts, and the text that it writes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.corpus import VOCABULARY

from xtuner.data import build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.data.tokenizer import load_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_a_variant_passes_only_without_losses_and_spikes_of_its_own() -> None:
    from benchlib.learning_curves import Curve, judge

    draw = np.random.RandomState(0)
    hard = draw.normal(0, 0.3, 200)  # how hard the packs are, which is the same for all
    falling = 4 + 3 * np.exp(-np.arange(200) / 30) + hard
    reference = Curve(list(falling), {100: 5.0, 200: 4.0}, 1.0)

    def verdict(added: np.ndarray | float, unseen: float = 4.0) -> bool:
        found = judge(Curve(list(falling + added), {100: 5.0, 200: unseen}, 1.0), reference)
        assert found is not None
        assert found.iterations == 200
        return found.passed

    spike = np.where(np.arange(200) == 120, 0.4, 0)
    lasting = 0.4 * ((np.arange(200) >= 120) & (np.arange(200) < 170))
    noise = draw.normal(0, 0.01, 200)
    assert verdict(noise)
    assert verdict(-0.1)
    assert not verdict(spike)
    assert not verdict(lasting)
    assert verdict(spike / 5)
    assert verdict(np.where(np.arange(200) == 10, 0.4, 0)), "in the warm-up"
    assert verdict(spike - 0.5 * (np.arange(200) == 60)), "the reference has a larger one"
    assert verdict(-lasting), "when the reference's ends, the difference rises"
    last = np.mean(falling[180:])
    assert verdict(0.0029 * last)
    assert not verdict(0.0031 * last)
    assert verdict(0, 4.011)
    assert not verdict(0, 4.013)
    assert not verdict(np.where(np.arange(200) == 150, np.nan, 0))
    assert not verdict(0, math.nan)

    shorter = Curve([loss + 0.1 for loss in falling[:150]], {100: 5.0, 150: 9.0}, 1.0)
    found = judge(shorter, reference)
    assert found
    assert (found.iterations, found.unseen) == (150, 0), "unseen: where both were evaluated"
    assert found.last_tenth == pytest.approx(0.1 / np.mean(falling[135:150]))
    assert judge(replace(shorter, unseen={}), reference) is None
    assert judge(replace(shorter, losses=[1.0]), reference) is None


def test_a_curve_joins_the_starts_of_a_run(tmp_path: Path) -> None:
    from benchlib.learning_curves import read_curve

    def write(start: str, losses: dict[int, float], unseen: dict[int, float], end: str = "") -> None:
        records = [{"iter": i, "loss": loss, "tokens_per_s": 100 * i} for i, loss in losses.items()]
        lines = [json.dumps(r) for r in [*records, *({"iter": i, "val_loss": loss} for i, loss in unseen.items())]]
        file = tmp_path / start / "vis_data" / "scalars.json"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join([*lines, end]))

    assert read_curve(tmp_path) is None
    write("1", {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}, {2: 9.0, 4: 8.0}, '{"iter": 5, "lo')  # killed after a checkpoint at 2
    write("2", {3: 3.5}, {}, "")
    found = read_curve(tmp_path)
    assert found
    assert found.losses == [5.0, 4.0, 3.5]
    assert found.unseen == {2: 9.0}
    assert found.tokens_per_s == 200
    write("3", {1: 7.0}, {1: 6.0})  # from the beginning
    found = read_curve(tmp_path)
    assert found
    assert found.losses == [7.0]
    assert found.unseen == {1: 6.0}


@pytest.mark.processes
def test_text_is_written_once_and_fills_its_packs(tmp_path: Path, tokenizer_folder: Path) -> None:
    from benchlib.real_text import write_text

    source = tmp_path / "source"
    for i in range(12):
        (source / f"p{i}").mkdir(parents=True)
        (source / f"p{i}" / "a.py").write_text(f"def f{i}():\n" + f"    return 'number {'abcdefghijkl'[i]}'\n" * 20)
        (source / f"p{i}" / "same.md").write_text("# The same\n" + " text" * 60 + "\n" * i)
    (source / "table.py").write_text("x = [" + "1, 2, 3, " * 100 + "]")
    (source / "short.py").write_text("x = 1")
    (source / "other.h").write_text("int f(void);\n" * 30)
    (source / "image.txt").write_bytes(b"\xff\x00" * 500)

    def lines(part: str) -> list[list[int]]:
        return [json.loads(line)["tokens"] for line in (tmp_path / "data" / part / "text.bin").read_text().splitlines()]

    data = write_text("python", [source], tokenizer_folder, tmp_path / "data", 128, 6, 100)
    assert data.packs == 6
    assert data.epochs == 1
    assert data.tokens == 6 * 128 == sum(map(len, lines("train")))
    assert data.unseen_tokens == 100 == sum(map(len, lines("valid")))
    assert all(max(tokens) < VOCABULARY and len(tokens) <= 128 for tokens in lines("train")), (
        "none is longer than a pack"
    )
    texts = dict(type=load_intern_repo_tokenized_dataset, folder=str(tmp_path / "data" / "train"))
    assert len(build_packed_dataset(texts, 128, seed=1)) == 6

    all_ = write_text("python", [source], tokenizer_folder, tmp_path / "data", 128, 1000, 100)
    assert all_.duplicates == 11
    assert all_.epochs > 1
    assert 0 <= 1000 - all_.packs * all_.epochs < all_.epochs
    tokenizer = load_tokenizer(str(tokenizer_folder))
    found = [tokenizer.decode(tokens[1:]) for part in ("train", "valid") for tokens in lines(part)]
    assert sum("# The same" in text for text in found) == 1
    assert not any("1, 2, 3" in text for text in found)
    assert not any("int f" in text or text == "x = 1" for text in found)
