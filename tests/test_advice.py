"""Memory that runs out ends with command lines that need less of it and can be run as they are."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
from test_launchers import ROOT
from test_lost_ranks import ended, started, told
from test_train import records, with_hook

from xtuner.train.advice import _line

# After an iteration the process may take 1 MiB more; the next one needs more than that
LIMIT = """exec('import resource; n = next(x for x in open("/proc/self/status") if x.startswith("VmData")); \
n = int(n.split()[1]) * 1024 + 2**20; resource.setrlimit(resource.RLIMIT_DATA, (n, n))')"""


def commands(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.match(r"\s+(\w+=\S+ |torchrun .*)?xtuner train ", line)]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_memory_runs_out(tiny: Path, tmp_path: Path) -> None:
    """The system itself refuses memory. The command that computes blocks again then goes on where the run ended."""
    with_hook(tiny, tmp_path / "run.py", 2, f"os.environ.get('FREE') or {LIMIT}")
    words = ["train", "run.py", "--work-dir", "it's here", "--resume", "auto", "--cfg-options", "evaluation_inputs=[]"]
    words += ["max_length=128", "save_steps=1", "hidden_size=512"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}  # what is freed goes back to the system
    done = subprocess.run(
        [sys.executable, "-m", "xtuner", *words], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    error = done.stderr[done.stderr.index("xtuner: memory ran out in iteration 3: ") :]
    assert "one process, ranks: 1, packs of 128 tokens, on cpu" in error
    assert re.search(r"take [\d.]+ MiB here by arithmetic", error)
    again, zero2, zero3 = commands(error)
    assert again.endswith("--cfg-options model.activation_checkpointing=True --resume auto")
    assert "deepspeed_zero2_offload --resume auto" in zero2
    assert "deepspeed_zero3_offload --resume auto" in zero3
    program = shlex.split(again)
    assert program[:2] == ["xtuner", "train"]
    done = subprocess.run(
        [sys.executable, "-m", *program], env={**env, "FREE": "1"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert sorted(records(tmp_path / "it's here")) == [1, 2, 3]


def test_two_ranks_are_told_what_divides_more(tiny: Path, tmp_path: Path) -> None:
    """What one rank's GPU says, all end with; the rank whose memory it was gives the advice."""
    raises = "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB')"
    config = with_hook(tiny, tmp_path / "run.py", 1, f"if os.environ['RANK'] == '1':\n                {raises}")
    words = ["train", config, "--work-dir", tmp_path / "w", "--launcher", "pytorch", "--deepspeed", "deepspeed_zero1"]
    children = started([*words, "--cfg-options", "evaluation_inputs=[]"], tmp_path)
    assert ended(children) == [1, 2]
    assert "rank 1 has failed: ConfigError: memory ran out in iteration 2: CUDA out of memory" in told(tmp_path, 0)
    text = told(tmp_path, 1)
    assert "deepspeed_zero1, ranks: 2" in text
    start = "torchrun --nproc-per-node=2 -m xtuner train"
    more = [c for c in commands(text) if "activation_checkpointing" not in c]
    assert [re.sub(r".*--deepspeed (\w+) --resume auto", r"\1", c) for c in more] == [
        "deepspeed_zero2_offload",
        "deepspeed_zero3_offload",
    ]
    assert all(c.startswith(start) for c in commands(text))
    sizes = re.findall(r"# ([\d.]+) MiB of state a GPU; slower", text)
    assert len(sizes) == 2
    assert all(float(n) < 12 * 299392 / 2**20 for n in sizes)  # ZeRO-1 on two: 4 + 16 / 2 bytes a parameter


@pytest.mark.parametrize(
    ("given", "more", "expected"),
    [
        ("c.py --resume auto --fsdp --seed 1", ["--deepspeed", "z", "--resume", "a"], "c.py --seed 1 --deepspeed z --resume a"),
        ("c.py --deepspeed=a --resume", ["--deepspeed", "z"], "c.py --deepspeed z"),
        ("--deepspeed a c.py --fsdp full", ["--deepspeed", "z"], "c.py --deepspeed z"),
        ("c.py --deepspeed a --resume x.pth", ["--cfg-options", "a=1"], "c.py --deepspeed a --cfg-options a=1"),
        ("'a b.py'", [], "'a b.py'"),
    ],
)  # fmt: skip
def test_options_are_replaced_not_repeated(given: str, more: list[str], expected: str) -> None:
    assert _line(shlex.split(given), more) == f"xtuner train {expected}"
