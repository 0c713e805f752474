"""The files and config lines of docs/*/extend.md, extracted and run together: one run, one resume, one export."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.launchers import RankInfo, read_rank
from xtuner.families import FAMILIES
from xtuner.model import load_pretrained
from xtuner.model.attention import BACKENDS, attend_loop

VOCABULARY = 400  # of the config `tiny`
DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(language: str) -> list[tuple[str, str]]:
    """(file name, text) of each block that names a file."""
    text = (DOCS / language / "extend.md").read_text()
    return re.findall(r"^```python (\w+\.py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def extended(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, the working directory, with the page's files, a config that uses them, and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny.read_text()
    for name, text in blocks("en"):
        if name == "config.py":
            config += f"\n{text}"
        else:
            (tmp_path / name).write_text(text)
    (tmp_path / "config.py").write_text(config)
    draw = np.random.RandomState(0)
    lengths = draw.randint(3, 40, 40)
    (tmp_path / "token_array").mkdir()
    np.save(tmp_path / "token_array" / "ends.npy", lengths.cumsum())
    np.save(tmp_path / "token_array" / "tokens.npy", draw.randint(3, VOCABULARY, lengths.sum()).astype(np.uint16))
    yield tmp_path
    FAMILIES.pop("seed_oss", None)
    BACKENDS.pop("masked", None)


def test_both_languages_have_the_same_files() -> None:
    english, chinese = (
        [(name, re.sub(r" *#.*| *\"\"\".*", "", text)) for name, text in blocks(language)]
        for language in ("en", "zh_cn")
    )
    assert english == chinese
    assert len(english) == 13


def losses(work_dir: Path) -> dict[int, float]:
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    return {r["iter"]: r["loss"] for r in map(json.loads, file.read_text().splitlines()) if "loss" in r}


@pytest.mark.processes
def test_the_page_trains_resumes_and_exports(
    extended: Path, monkeypatch: pytest.MonkeyPatch, xtuner: Callable[..., int]
) -> None:
    from transformers import AutoModelForCausalLM, SeedOssForCausalLM

    for name, value in dict(TASK_ID="0", TASK_COUNT="1", TASKS_PER_HOST="1", FIRST_HOST="127.0.0.1").items():
        monkeypatch.setenv(name, value)
    assert xtuner("check-cfg", "config.py") == 0
    small = ("--cfg-options", "lr=2e-4", "save_steps=4", "save_total_limit=-1", "evaluation_inputs=[]")
    launched = ("train", "config.py", "--launcher", "my_launcher.MyCluster")
    assert xtuner(*launched, "--work-dir", "straight", *small) == 0
    assert xtuner(*launched, "--work-dir", "resumed", "--resume", "straight/iter_4.pth", *small) == 0

    expected = losses(Path("straight"))
    assert len(expected) > 8
    assert losses(Path("resumed")) == {n: loss for n, loss in expected.items() if n > 4}
    (table,) = Path("straight").glob("*/loss.csv")
    rows = list(csv.DictReader(table.open()))
    assert {int(row["iter"]): float(row["loss"]) for row in rows} == expected

    (log,) = Path("straight").glob("*/2*.log")
    report = log.read_text()
    for part in (
        "Lion(lr=0.0002, weight_decay=0.1)",
        "SDPA with one mask",
        "in 40 documents, 1 files, token_array",
        "match '^output': lr × 0.5",
    ):
        assert part in report, part
    assert "4 parameters that match 'norm|tok_embeddings': weight_decay=0" in report
    last = max(expected)
    assert sorted(path.name for path in Path("kept").iterdir()) == sorted({"iter_4", "iter_8", f"iter_{last}"})
    assert (Path("kept") / "iter_4" / "model.safetensors").read_bytes() == (
        Path("straight") / "iter_4.pth" / "weights" / "model.safetensors"
    ).read_bytes()

    assert xtuner("convert", "pth_to_hf", "config.py", f"straight/iter_{last}.pth", "hf", "--fp32") == 0
    theirs, problems = AutoModelForCausalLM.from_pretrained("hf", output_loading_info=True)
    assert type(theirs) is SeedOssForCausalLM
    assert not any(problems.values())
    ids = torch.arange(3, 40)
    with torch.no_grad():
        assert (theirs.eval()(ids[None]).logits[0] - load_pretrained("hf")(ids)).abs().max() < 1e-5


def test_each_part_alone(extended: Path) -> None:
    import my_attention
    import my_optimizer
    import my_source

    assert read_rank(
        "my_launcher.MyCluster", dict(TASK_ID="5", TASK_COUNT="8", TASKS_PER_HOST="4", FIRST_HOST="a")
    ) == (RankInfo(5, 8, 1, "a", 29500))

    source = my_source.TokenArray(extended / "token_array")
    first = source.read(0)[0].tolist()
    packs = PackedDataset(source, 32)
    ids = np.concatenate([packs[i]["input_ids"] for i in range(len(packs))]).tolist()
    assert len(packs) > 20
    assert any(ids[i : i + len(first)] == first for i in range(len(ids)))

    borders = torch.tensor([0, 1, 8, 8, 20], dtype=torch.int32)
    draw = torch.Generator().manual_seed(0)
    found = []
    for attend in (my_attention.attend, attend_loop):
        qkv = [torch.randn(20, heads, 16, generator=draw.manual_seed(0)).requires_grad_() for heads in (4, 2, 2)]
        attend(*qkv, borders, 12).square().sum().backward()
        found.append([x.grad for x in qkv])
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*found, strict=True))

    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    weight.grad = torch.tensor([0.3, -0.1])
    my_optimizer.Lion([weight], lr=0.1, weight_decay=0.5).step()
    assert weight.tolist() == pytest.approx([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1])
