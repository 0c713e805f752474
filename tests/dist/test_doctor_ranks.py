"""xtuner doctor on an allocation: on two nodes of a real Slurm, and where something is wrong."""

import ctypes
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.processes import shell
from helpers.ranks import on_ranks
from helpers.slurm import Slurm

from xtuner.dist import measure
from xtuner.dist.collectives import Ranks
from xtuner.tools import doctor_ranks
from xtuner.tools.doctor import NOTE, OK, PROBLEM, Row
from xtuner.tools.doctor_ranks import checkpoint_row, examine_ranks, gather_rows

pytestmark = pytest.mark.processes
NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS


def test_two_nodes_of_slurm(tiny: Path, tmp_path: Path, slurm: Slurm, path_with_xtuner: dict[str, str]) -> None:
    words = [
        "xtuner",
        "doctor",
        tiny,
        "--launcher",
        "slurm",
        "--work-dir",
        tmp_path / "w",
        "--checkpoints",
        2,
        "--json",
    ]
    done = slurm.srun("-N", 2, "-n", 2, *words, timeout=120, **path_with_xtuner, MASTER_ADDR="127.0.0.1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = {row["name"]: (row["state"], row["found"]) for row in report["checks"]}
    assert found["ranks"] == (OK, "2 on 2 nodes: 1 on n1, 1 on n2")
    assert found["shared folder"] == (OK, f"all ranks see each other's files in {tmp_path}")
    assert found["same software"][0] == found["clocks"][0] == OK
    assert found["checkpoints"][1].endswith(f"checkpoints of {tiny}: 3.43 MiB each, 2 of them 6.85 MiB")
    assert found["all-reduce"][1].startswith("all 2 ranks: ")
    assert found["between nodes"][1].startswith("one rank of each of 2 nodes: ")
    assert {"python", "torch", "locks", "test cpu"} <= found.keys()
    assert list(tmp_path.iterdir()) == []


def wrong(ranks: Ranks, folder: Path) -> None:
    """Rank 2 is on a node of its own, which has another disk at the place of the shared one, and a wrong clock."""
    hosts = ["n1", "n1", "n2"]
    if ranks.rank == 2:
        assert ctypes.CDLL(None).unshare(NEW_NAMESPACE) == 0
        assert os.system(f"mount --make-rprivate / && mount -t tmpfs none {folder / 'shared'}") == 0
        measure.time = SimpleNamespace(time=lambda: 100.0, perf_counter=measure.time.perf_counter)  # type: ignore
        doctor_ranks.sysinfo.installed = lambda name: "0.0" if name == "numpy" else None  # type: ignore[assignment]
    times = {0: 1.0, 1: 1.0, 2: 1.5}
    measure.product_seconds = lambda device: times[ranks.rank]  # type: ignore[assignment]
    doctor_ranks.FAST["cpu"], doctor_ranks.VISIBLE = 1e15, 0.0
    rows = {row.name: row for row in examine_ranks(ranks, torch.device("cpu"), hosts, folder / "shared" / "new")}
    own = [Row("memory", NOTE, "little", "more"), Row("/dev/shm", NOTE if ranks.rank else OK, "small")]
    others = list(gather_rows(ranks, hosts, own if ranks.rank != 1 else []))
    if not ranks.is_main:
        return
    assert {name for name, row in rows.items() if row.state == PROBLEM} == {"same software", "clocks", "shared folder"}
    assert "rank 2 on n2: xtuner None, not " in rows["same software"].found
    assert "numpy 0.0, not " in rows["same software"].found
    assert rows["clocks"].found.startswith("differ from n1: n2 by -")
    assert "n1 does not see the files of n2, n2 does not see the files of n1" in rows["shared folder"].found
    assert rows["compute"].found.endswith("on the median rank; rank 2 on n2 1.50 times as long")
    assert (rows["between nodes"].state, rows["all-reduce"].state) == (NOTE, OK)
    assert others == [Row("/dev/shm", NOTE, "n2: small")], "the note on memory is rank 0's too"


def test_wrong_nodes(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    (tmp_path / "shared").mkdir()
    assert on_ranks(3, wrong, tmp_path) == [0, 0, 0]
    assert list((tmp_path / "shared").iterdir()) == []


def test_options(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    row = checkpoint_row(2 * 2**30, 1.5 * 2**30, 2, tmp_path, "x.py")
    assert (row.state, "1.50 GiB each, 2 of them 3.00 GiB" in row.found) == (PROBLEM, True)
    assert checkpoint_row(3 * 2**30, 1.5 * 2**30, 2, tmp_path, "x.py").state == OK
    for words, message in (
        (["--checkpoints", "0"], "is not at least 1"),
        (["--launcher", "slurm"], "needs SLURM_PROCID"),
    ):
        done = shell("doctor", *words)
        assert done.returncode == 2
        assert message in done.stderr
