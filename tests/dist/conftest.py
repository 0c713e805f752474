"""What several files about ranks share."""

from pathlib import Path

import pytest
from helpers.configs import ONE, full_config
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
