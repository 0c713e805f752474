"""Job scripts: what is filled in cannot break out, nonsense is refused, a real Slurm does with them what is promised.

The training itself is played by a stand-in of the name `xtuner` that comes first on PATH; without `stand_in`'s
environment the same scripts run the real one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT
from helpers.slurm import Slurm

from xtuner.core.errors import ConfigError
from xtuner.tools.job_scripts import TEMPLATES

Command = Callable[..., int]
NASTY = 'it\'s "a" $(touch PWNED) `touch PWNED` $HOME ; # é: {x} \\n % @{name} *'  # a folder's name
RESUME = ["--resume", "auto"]

STAND_IN = """#!{python}
import json, os, signal, sys
folder, act = {folder!r}, os.environ["ACT"]
restart, rank = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_PROCID", "0")
def stop(number, frame):
    note("got", signal.Signals(number).name)
    os._exit(75)
def note(kind, what):
    path = os.path.join(folder, f"{{kind}}.{{restart}}.{{rank}}")
    with open(path + "~", "w") as f:
        json.dump(what, f)
    os.rename(path + "~", path)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
env = {{k: os.environ.get(k) for k in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "ADDR", "PORT")}}
note("start", {{"words": sys.argv[1:], "env": env}})
print("rank", rank, "restart", restart, flush=True)
if act.isdigit() or restart != "0":
    sys.exit(int(act) if act.isdigit() else 0)
while True:
    signal.pause()
"""


def stand_in(folder: Path, act: str) -> dict[str, str]:
    """Environment in which `xtuner` notes how it was started, and ends with the code `act`; `act` of "wait": waits to
    be told to stop and ends with 75 then, and with 0 when it is started again."""
    program = folder / "bin" / "xtuner"
    program.parent.mkdir(exist_ok=True)
    program.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}", "ACT": act}


def noted(folder: Path, kind: str, restart: int, ranks: int = 1) -> list[Any]:
    return [json.loads((folder / f"{kind}.{restart}.{rank}").read_text()) for rank in range(ranks)]


def script(xtuner: Command, config: Path, folder: Path, scheduler: str, *words: Any) -> Path:
    path = folder / f"job of {scheduler}.sh"
    assert xtuner("launch", "--scheduler", scheduler, config, "--output", path, *words) == 0
    return path


# ---------------------------------------------------------------------------------------------- under a real Slurm


def submitted(xtuner: Command, slurm: Slurm, config: Path, folder: Path, act: str) -> int:
    """A job of two nodes with two tasks each, all of which have started."""
    words = ["--nodes", 2, "--gpus-per-node", 2, "--time", "30", "--work-dir", folder / NASTY]
    job = slurm.sbatch(script(xtuner, config, folder, "slurm", *words), **stand_in(folder, act))
    slurm.until(lambda: all((folder / f"start.0.{rank}").exists() for rank in range(4)), "four tasks")
    return job


@pytest.mark.processes
def test_slurm_stops_in_time_and_goes_on(xtuner: Command, slurm: Slurm, tiny: Path, tmp_path: Path) -> None:
    """USR1 reaches every task; their 75 starts the job again, with the same words; its end is the job's."""
    job = submitted(xtuner, slurm, tiny, tmp_path, "wait")
    slurm.scancel(job, "USR1")
    end = slurm.wait(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), slurm.output(job)
    assert noted(tmp_path, "got", 0, 4) == ["SIGUSR1"] * 4
    first = ["train", str(tiny), "--launcher", "slurm", "--deepspeed", "deepspeed_zero1"]
    words = [*first, "--work-dir", str(tmp_path / NASTY), *RESUME]
    for restart in (0, 1):
        assert [note["words"] for note in noted(tmp_path, "start", restart, 4)] == [words] * 4
    assert {f"rank {r} restart {n}" for r in range(4) for n in (0, 1)} <= set(slurm.output(job).splitlines())
    assert not list(tmp_path.rglob("PWNED"))
    limit = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", (tmp_path / "job of slurm.sh").read_text()))
    assert (limit["signal"], limit["time"]) == ("USR1@300", "30")  # Slurm keeps the clock, by job steps, not the shell


@pytest.mark.processes
@pytest.mark.parametrize("how", ["scancel", "requeue off", "requeue"])
def test_slurm_told_from_outside(how: str, xtuner: Command, slurm: Slurm, tiny: Path, tmp_path: Path) -> None:
    """TERM, too, ends with 75, but only what Slurm itself requeues starts again: a cancelled job stays cancelled."""
    job = submitted(xtuner, slurm, tiny, tmp_path, "wait")
    if how == "requeue off":  # with all the time it needs: the documented way to end a job for good
        slurm.ask("scontrol", "update", f"jobid={job}", "requeue=0")
        slurm.scancel(job, "USR1")
    elif how == "scancel":
        slurm.scancel(job)
    else:
        slurm.requeue(job)
        slurm.until(lambda: slurm.facts(job)["Restarts"] == "1", "the requeue")
    end = slurm.wait(job)
    expected = {"scancel": ("CANCELLED", "0"), "requeue off": ("FAILED", "0"), "requeue": ("COMPLETED", "1")}[how]
    assert (end["JobState"], end["Restarts"]) == expected, slurm.output(job)
    assert noted(tmp_path, "got", 0, 4) == ["SIGUSR1" if how == "requeue off" else "SIGTERM"] * 4
    assert ("starting again" in slurm.output(job)) == (how == "requeue off")  # the script asks, Slurm refuses
    slurm.until(lambda: slurm.facts(job)["JobState"] != "COMPLETING", "an end")
    assert slurm.facts(job)["Restarts"] == expected[1]


@pytest.mark.processes
@pytest.mark.parametrize("code", [1, 65])
def test_slurm_passes_exit_codes_on(code: int, xtuner: Command, slurm: Slurm, tiny: Path, tmp_path: Path) -> None:
    end = slurm.wait(submitted(xtuner, slurm, tiny, tmp_path, str(code)))
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", f"{code}:0", "0")


# ------------------------------------------------------------------------------------------------- without a cluster


@pytest.mark.processes
@pytest.mark.parametrize("code", [0, 75, 65])
def test_dlc(code: int, xtuner: Command, tiny: Path, tmp_path: Path) -> None:
    path = script(xtuner, tiny, tmp_path, "dlc", "--work-dir", tmp_path / NASTY, "--fsdp")
    given = {"KUBERNETES_CONTAINER_RESOURCE_GPU": "8", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "3"}
    env = {**os.environ, **stand_in(tmp_path, str(code)), **given, "MASTER_ADDR": "job-master-0"}
    assert subprocess.run(["bash", path], env=env, cwd=tmp_path).returncode == code
    (start,) = noted(tmp_path, "start", 0)
    assert start["words"] == ["train", str(tiny), "--fsdp", "--work-dir", str(tmp_path / NASTY), *RESUME]
    names = {"NPROC_PER_NODE": "8", "NNODES": "4", "NODE_RANK": "3", "ADDR": "job-master-0", "PORT": "23456"}
    assert start["env"] == names
    assert not list(tmp_path.rglob("PWNED"))
    del env["MASTER_ADDR"]  # not on DLC: say which is missing instead of training alone on every node
    alone = subprocess.run(["bash", path], env=env, capture_output=True, text=True)
    assert alone.returncode != 0
    assert "MASTER_ADDR" in alone.stderr


@pytest.mark.processes
def test_kubernetes(xtuner: Command, tiny: Path, tmp_path: Path) -> None:
    """The manifest parses to what was asked for, and a container's command starts the training with it."""
    yaml = pytest.importorskip("yaml")
    config = tmp_path / "7B it's.py"
    config.write_text(f"\n   # 中文\u3000: '\" |\n\n{tiny.read_text()}\n# end  \n")
    zero = tmp_path / "zero.json"
    zero.write_text('{"zero_optimization": {"stage": 3}}')
    words = ["--nodes", 4, "--gpus-per-node", 2, "--image", "r.example:5000/t/xtuner:1", "--namespace", "team"]
    words += ["--pvc", "data:/data", "--pvc", "out.disk:/out", "--work-dir", f"/out/{NASTY}", "--deepspeed", zero]
    files, job = yaml.safe_load_all(script(xtuner, config, tmp_path, "k8s", *words).read_text())
    assert files["data"]["7B_it_s.py"] == config.read_text()
    assert json.loads(files["data"]["deepspeed.json"]) == json.loads(zero.read_text())
    assert [part["metadata"] for part in (files, job)] == [{"name": "b-it-s", "namespace": "team"}] * 2
    master, worker = (job["spec"]["pytorchReplicaSpecs"][role] for role in ("Master", "Worker"))
    assert (master["replicas"], worker["replicas"]) == (1, 3)
    assert master["template"] == worker["template"]
    assert master["restartPolicy"] == worker["restartPolicy"] == "OnFailure"
    pod = master["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for it
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]}
    mounts = {m["mountPath"]: claims[m["name"]] for m in container["volumeMounts"]}
    assert mounts == {"/etc/xtuner": None, "/dev/shm": None, "/data": "data", "/out": "out.disk"}
    env = {e["name"]: e["value"].replace("$$", "$") for e in container["env"]}  # as Kubernetes does
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", "".join(e["value"] for e in container["env"]))  # no variable of its own
    env |= {"RANK": "2", "MASTER_ADDR": "b-it-s-master-0", "MASTER_PORT": "23456", **stand_in(tmp_path, "75")}
    done = subprocess.run([*container["command"], *container["args"]], env=env, cwd=tmp_path)
    assert done.returncode == 75
    (start,) = noted(tmp_path, "start", 0)
    assert start["words"][:4] == ["train", "/etc/xtuner/7B_it_s.py", "--deepspeed", "/etc/xtuner/deepspeed.json"]
    assert start["words"][4:] == ["--work-dir", f"/out/{NASTY}", *RESUME]
    names = {"NPROC_PER_NODE": "2", "NNODES": "4", "NODE_RANK": "2", "ADDR": "b-it-s-master-0", "PORT": "23456"}
    assert start["env"] == names
    assert not list(tmp_path.rglob("PWNED"))
    single = script(xtuner, tiny, tmp_path, "k8s", "--image", "x:1", "--pvc", "data:/data")
    _, job = yaml.safe_load_all(single.read_text())
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Master"]


K8S = ["--scheduler", "k8s", "--image", "x:1", "--pvc", "data:/data"]
SLURM = ["--scheduler", "slurm"]
NO_TIMES = ("soon", "1:2:3:4", "2-", "-5", "1d", "24h", "٣٠", "60 --wrap=x")
REFUSED = [
    ([*SLURM, "--gpus-per-node", "0"], "0 is not a number of at least 1"),
    ([*SLURM, "--nodes", "-1"], "-1 is not a number"),
    *[
        ([*SLURM, "--time", t], "is not a duration")
        for t in ("soon", "1:2:3:4", "2-", "-5", "1d", "24h", "٣٠", "60 --wrap=x")
    ],
    *[([*SLURM, "--time", t], "shorter than 10 minutes") for t in ("0", "9", "9:59", "0:09:59", "0-0:09")],
    ([*SLURM, "--partition", "a b"], "not a valid name for Slurm"),
    ([*SLURM, "--name", "x\n#SBATCH --uid=0"], "not a valid name for Slurm"),
    ([*SLURM, "--work-dir", "a\nb"], "not printable"),
    ([*SLURM, "--image", "x:1"], "--image has no effect with --scheduler slurm"),
    ([*SLURM, "--deepspeed", "zero5"], "no DeepSpeed setting 'zero5'"),
    ([*SLURM, "--deepspeed", "deepspeed_zero4"], "Did you mean 'deepspeed_zero3'?"),
    ([*SLURM, "--deepspeed", "none.json"], "there is no file 'none.json'"),
    ([*K8S, "--time", "24:00:00"], "--time has no effect with --scheduler k8s"),
    (K8S[:2], "no container image is given"),
    (K8S[:4], "no volume is given"),
    ([*K8S, "--image", "x y"], "is not a valid image"),
    *[([*K8S, f"--name={n}"], "is not a valid name for a job") for n in ("Big", "a_b", "-a", "a-", "7b", "a" * 41)],
    ([*K8S, "--namespace", "a.b"], "is not a valid namespace"),
    *[([*K8S, "--pvc", p], "not a valid name of a volume claim") for p in ("X:/y", ":/y", "a b:/y")],
    *[([*K8S, "--pvc", p], "") for p in ("a", "a:", "a:y", "a:/", "a:/x/../y", "a:/x:ro", "a:/x\ny", "a:/etc/xtuner")],
    ([*K8S, "--pvc", "b:/data/"], "two volumes have the same path"),
    *[([*K8S, "--work-dir", w], "is not on a volume") for w in ("/out", "here", "/data2", "/data/../out")],
    ([*SLURM, "--output", "{config}"], "not written by `xtuner launch`"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_nonsense_is_refused(
    words: list[str], message: str, xtuner: Command, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.read_text()
    with pytest.raises(ConfigError) as error:
        xtuner("launch", tiny, *[w.format(config=tiny) for w in words])
    assert message in str(error.value)
    assert error.value.where.startswith(("--", str(tiny)))
    assert capsys.readouterr().out == ""
    assert tiny.read_text() == before


@pytest.mark.processes
def test_what_is_told(xtuner: Command, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script to stdout, the command for it to stderr; times in all of Slurm's forms; the config is checked."""
    for time in ("10", "600", "90:00", "1:30:00", "2-0", "2-00:30", "1-02:03:04"):
        assert xtuner("launch", "--scheduler", "slurm", tiny, "--time", time, "--partition", "a,b-2") == 0
        out, err = capsys.readouterr()
        assert out.startswith("#!/usr/bin/env bash\n# Written by `xtuner launch")
        assert f"#SBATCH --partition=a,b-2\n#SBATCH --time={time}\n" in out
        assert "| sbatch" in err
    path = tmp_path / "my job.sh"
    for _ in range(2):  # its own may be replaced
        assert xtuner("launch", "--scheduler", "slurm", tiny, "--output", path) == 0
        assert capsys.readouterr().err == f"submit it with: sbatch '{path}'\n"
    assert xtuner("launch", "--scheduler", "dlc", tiny, "--image", "r/x:1", "--nodes", "2", "--output", path) == 0
    told = capsys.readouterr().err.removeprefix("submit it with: ")
    start = subprocess.run(["bash", "-c", f"printf '%s\\n' {told}"], capture_output=True, text=True).stdout.split("\n")
    assert start[:3] == ["dlc", "submit", "pytorchjob"]
    assert f"--command=bash '{path}'" in start
    wrong = tmp_path / "wrong.py"
    wrong.write_text(tiny.read_text().replace("max_epochs = 1", "max_epochs = 0"))
    with pytest.raises(ConfigError, match="max_epochs"):
        xtuner("launch", "--scheduler", "slurm", wrong)


@pytest.mark.processes
@pytest.mark.parametrize("scheduler", ["slurm", "dlc"])
def test_shellcheck(scheduler: str, xtuner: Command, tiny: Path, tmp_path: Path) -> None:
    path = script(xtuner, tiny, tmp_path, scheduler)
    subprocess.run(["bash", "-n", path], check=True)
    if program := shutil.which("shellcheck"):
        done = subprocess.run([program, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_and_not_roots() -> None:
    lines = (TEMPLATES / "Dockerfile").read_text().splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
    assert any("-c constraints.txt" in line for line in lines)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"


def test_a_process_group_leaves_nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process starts later is not a rank of this run."""
    from xtuner.dist.process_group import join_run
    from xtuner.dist.shipped_launchers import read_rank

    monkeypatch.setenv("RANK", "before")
    before = dict(os.environ)
    with join_run(read_rank("none", {}), group=True):
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    after = dict(os.environ)
    assert {**after, "PYTORCH_CUDA_ALLOC_CONF": ""} == {**before, "PYTORCH_CUDA_ALLOC_CONF": ""}
