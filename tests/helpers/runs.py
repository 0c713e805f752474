"""What a run leaves: its log lines and checkpoints, and whether two runs are equal."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from xtuner.cli.main import main
from xtuner.core import files


def records(work_dir: Path) -> dict[int, dict[str, Any]]:
    """Log lines by iteration; where starts overlap they must agree."""
    found: dict[int, dict[str, Any]] = {}
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if "loss" not in record:  # of validation
                continue
            kept = {k: record[k] for k in ("lr", "loss", "grad_norm", "targets", "applied")}
            assert found.setdefault(record["iter"], kept) == kept
    return found


def contents(checkpoint: Path) -> dict[str, Any]:
    """Sizes and hashes of a checkpoint's tensors, and its state."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    state = json.loads((checkpoint / "trainer.json").read_text())["state"]
    return {**{k: v for k, v in files.items() if k.endswith(".safetensors")}, "state": state}


def optimizer_states(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state in a checkpoint by name, flat; put together from slices by another way than ours."""
    shapes = {n: t.shape for file in folder.glob("[wa]*/model.safetensors") for n, t in load_file(file).items()}
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("optimizer/*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            metadata = {k: json.loads(v) for k, v in tensors.metadata().items()}
            for key in tensors.keys():  # noqa: SIM118
                value, name = tensors.get_tensor(key), key.partition(":")[0]
                if not value.dim():
                    found[name] = value
                elif "begins" in metadata:
                    begin = metadata["begins"][key]
                    whole = found.setdefault(name, torch.zeros(_length(name, shapes), dtype=value.dtype))
                    whole[begin : begin + len(value)] = value
                else:
                    offset, of = metadata["slices"][key]
                    whole = found.setdefault(name, torch.zeros(torch.Size(of).numel(), dtype=value.dtype))
                    inside = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
                    whole.view(of)[inside] = value
    return found


def _length(name: str, shapes: dict[str, torch.Size]) -> int:
    key, _, parameter = name.partition("/")
    return -(-shapes[parameter].numel() // 256) if key.endswith("_scale") else shapes[parameter].numel()


def train_commands(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.match(r"\s+(\w+=\S+ |torchrun .*)?xtuner train ", line)]


def export(path: Path, work_dir: Path) -> None:
    last = work_dir / (work_dir / "last_checkpoint").read_text().strip()
    assert main(["convert", "pth_to_hf", str(path), str(last), str(work_dir / "hf"), "--fp32"]) == 0


def assert_equals_one_process(path: Path, work_dir: Path, alone: Path) -> None:
    """Losses, norms, weights and exports are those of one process; every rank's log and checkpoint is whole."""
    ours, expected = records(work_dir), records(alone)
    assert len(expected) == 9
    assert ours.keys() == expected.keys()
    for number, line in expected.items():
        assert abs(ours[number]["loss"] - line["loss"]) < 1e-5
        assert abs(ours[number]["grad_norm"] - line["grad_norm"]) < 1e-5 * line["grad_norm"]
        assert [ours[number][k] for k in ("lr", "targets", "applied")] == [
            line[k] for k in ("lr", "targets", "applied")
        ]
    last = (work_dir / "last_checkpoint").read_text().strip()
    assert last == (alone / "last_checkpoint").read_text().strip()
    files.verify(work_dir / last)
    export(path, work_dir)
    a, b = (load_file(w / "hf" / "model.safetensors") for w in (work_dir, alone))
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert (a[name] - value).abs().max() < 1e-5, name
    log = "".join(f.read_text() for f in work_dir.glob("*/2*.log"))
    assert "validation at iteration 9" in log
    assert log.count("sample at iteration") >= 2


def assert_same_state(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits, in whatever slices."""
    for file in ("weights/model.safetensors", "adapter/model.safetensors"):
        if (a / file).exists() or (b / file).exists():
            first, second = load_file(a / file), load_file(b / file)
            assert first.keys() == second.keys()
            assert all(second[n].equal(v) for n, v in first.items()), file
    first, second = optimizer_states(a), optimizer_states(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name].equal(value), name
