"""What several files about ranks share."""

import os
import sys
from pathlib import Path

import pytest
from helpers.configs import ONE, full_config
from helpers.paths import ROOT
from helpers.runs import export

from xtuner.cli.main import main


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: its work dir, with an export in it."""
    folder = tmp_path_factory.mktemp("alone")
    path = full_config(tiny, folder, ONE)
    assert main(["train", str(path), "--work-dir", str(folder / "w")]) == 0
    export(path, folder / "w")
    return folder / "w"


@pytest.fixture(scope="module")
def path_with_xtuner(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which `xtuner` and `torchrun` are these."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in (("xtuner", "xtuner"), ("torchrun", "torch.distributed.run")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)
    source = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
