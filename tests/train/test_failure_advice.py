"""Memory that runs out ends with command lines that need less of it and can be run as they are."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from helpers.configs import with_hook
from helpers.corpus import write_corpus
from helpers.paths import ROOT
from helpers.ranks import exit_codes, start_ranks, stderr_of
from helpers.runs import records, train_commands

from xtuner.config.load import load
from xtuner.dist.mesh import Mesh
from xtuner.engine.zero import zero_memory
from xtuner.model.activation_memory import Plan
from xtuner.optim.adamw import FORMS
from xtuner.train import preflight
from xtuner.train.plan import make_plan
from xtuner.train.reporting.failure_advice import _command_line, out_of_memory_error

# After an iteration the process may take 1 MiB more; the next one needs more than that.
LIMIT = """exec('import resource; n = next(x for x in open("/proc/self/status") if x.startswith("VmData")); \
n = int(n.split()[1]) * 1024 + 2**20; resource.setrlimit(resource.RLIMIT_DATA, (n, n))')"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_memory_runs_out(tiny: Path, tmp_path: Path) -> None:
    """The system itself refuses memory. The first command line then goes on where the run has saved last."""
    with_hook(tiny, tmp_path / "run.py", 2, f"os.environ.get('FREE') or run.saver.finish() or {LIMIT}")
    words = ["train", "run.py", "--work-dir", "it's here", "--resume", "auto", "--cfg-options", "evaluation_inputs=[]"]
    words += ["max_length=128", "save_steps=1", "hidden_size=512"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}  # what is freed goes back to the system

    def xtuner(*words: str, **more: str) -> tuple[int, str]:
        full = [sys.executable, "-m", "xtuner", *words]
        done = subprocess.run(full, env={**env, **more}, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, text = xtuner(*words)
    assert code == 2, text
    error = text[text.index("xtuner: memory ran out in iteration 3: ") :]
    assert "one process, ranks: 1, packs of 128 tokens, on cpu" in error
    assert re.search(r"take [\d.]+ MiB by arithmetic", error)
    again = train_commands(error)[0]
    assert again.endswith("--cfg-options model.activation_checkpointing=True --resume auto")
    program = shlex.split(again)
    assert program[:2] == ["xtuner", "train"]
    code, text = xtuner(*program[1:], FREE="1")
    assert code == 0, text
    assert "resumed from" in text
    assert sorted(records(tmp_path / "it's here")) == [1, 2, 3]


@pytest.mark.processes
def test_the_rank_whose_memory_it_was_tells(tiny: Path, tmp_path: Path) -> None:
    raises = "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB')"
    config = with_hook(tiny, tmp_path / "run.py", 1, f"if os.environ['RANK'] == '1':\n                {raises}")
    words = ["train", config, "--work-dir", tmp_path / "w", "--launcher", "pytorch", "--deepspeed", "deepspeed_zero1"]
    assert exit_codes(start_ranks([*words, "--cfg-options", "evaluation_inputs=[]"], tmp_path)) == [1, 2]
    assert "rank 1 has failed: ConfigError: memory ran out in iteration 2: CUDA out of memory" in stderr_of(tmp_path, 0)
    text = stderr_of(tmp_path, 1)
    assert "deepspeed_zero1, ranks: 2" in text
    assert train_commands(text)[0].startswith(f"torchrun --nproc-per-node=2 -m xtuner train {config} --work-dir ")


@pytest.mark.parametrize(
    ("zero", "fsdp", "more"),
    [
        ("deepspeed_zero1", None, ["zero2", "zero2_offload", "zero3", "zero3_offload"]),
        ("deepspeed_zero2", None, ["zero2_offload", "zero3", "zero3_offload"]),
        ("deepspeed_zero3_offload", None, []),
        (None, "full", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]),  # summing whole gradients
    ],
)
def test_a_7b_model_on_8_gpus(
    zero: str | None,
    fsdp: str | None,
    more: list[str],
    tiny: Path,
    tmp_path: Path,
) -> None:
    """What is advised of recompute, ZeRO's stages with offload, and shorter packs, with bytes of state."""
    data = write_corpus(tmp_path / "data", 2000)
    options = ["hidden_size=4096", "num_layers=32", "vocab_size=92544", "max_length=8192", f"dataset_folder={data}"]
    options += ["optim_wrapper.dtype=bf16", "param_scheduler=[]"]  # as on GPUs; one iteration
    config = load(str(tiny), options)
    mesh = Mesh(dp_shard=8, local_size=8)
    run = preflight.prepare_settings(config, [], tmp_path / "w", torch.device("cpu"), None, mesh)
    plan = make_plan(run, deepspeed=zero, fsdp=fsdp)
    words = ["c.py", *(["--deepspeed", zero] if zero else ["--fsdp"]), "--cfg-options", "a=b"]
    error = out_of_memory_error(run, plan, 0, words, torch.OutOfMemoryError("CUDA out of memory"))
    assert error.exit_code == 2
    found = train_commands(str(error))
    start = "NPROC_PER_NODE=8 xtuner train c.py"
    engine = f"--deepspeed {zero}" if zero else "--fsdp"
    full = {"zero2": " --cfg-options optim_wrapper.full=weights"}
    assert found == [
        f"{start} {engine} --cfg-options a=b --cfg-options model.activation_checkpointing=True --resume auto",
        *(f"{start} --cfg-options a=b --deepspeed deepspeed_{name}{full.get(name, '')} --resume auto" for name in more),
        f"{start} {engine} --cfg-options a=b --cfg-options max_length=4096 accumulative_counts=4",
    ]
    assert len(re.findall(r"# \d+\.\d\d GiB of state per GPU", str(error))) == len(more)
    run.optim.full = "all"  # what another stage, or sums by DeepSpeed, would refuse is taken back
    now = zero_memory.ZeroMemory(0, Plan(run.source.config, 2), 8200)
    full = {"zero2": "weights"} | dict.fromkeys(("zero1", "zero2_offload", "zero3", "zero3_offload"))
    found = train_commands(
        str(out_of_memory_error(run, plan, 0, words, torch.OutOfMemoryError("CUDA out of memory"), now))
    )
    smaller = [f"{start} {engine} --cfg-options a=b --cfg-options optim_wrapper.micro_batch=4096 --resume auto"]
    again = "--cfg-options a=b --deepspeed deepspeed_"
    assert found[1:-1] == (smaller if zero else []) + [
        f"{start} {again}{name} --cfg-options optim_wrapper.full={full[name]} --resume auto" for name in more
    ]
    run.optim.states = FORMS["split"]  # not with DeepSpeed
    assert len(
        train_commands(str(out_of_memory_error(run, plan, 0, words, torch.OutOfMemoryError("CUDA"), now)))
    ) == 2 + bool(zero)


@pytest.mark.parametrize(
    ("given", "more", "expected"),
    [
        ("c.py --resume a --fsdp --seed 1", ["--deepspeed", "z", "--resume"], "c.py --seed 1 --deepspeed z --resume"),
        ("c.py --deepspeed=a --resume", ["--deepspeed", "z"], "c.py --deepspeed z"),
        ("--deepspeed a c.py --fsdp full", ["--deepspeed", "z"], "c.py --deepspeed z"),
        ("c.py --deepspeed a --resume x.pth", ["--cfg-options", "a=1"], "c.py --deepspeed a --cfg-options a=1"),
        ("'a b.py'", [], "'a b.py'"),
    ],
)  # fmt: skip
def test_options_are_replaced_not_repeated(given: str, more: list[str], expected: str) -> None:
    assert _command_line(shlex.split(given), more, Mesh()) == f"xtuner train {expected}"
