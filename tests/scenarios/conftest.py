"""What several files of scenarios share."""

from pathlib import Path

import pytest
from helpers.processes import SHORT

from xtuner.cli.main import main


@pytest.fixture(scope="module")
def straight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a run that nothing disturbed."""
    work_dir = tmp_path_factory.mktemp("straight")
    assert main(["train", str(tiny), "--work-dir", str(work_dir), "--cfg-options", *SHORT]) == 0
    return work_dir / (work_dir / "last_checkpoint").read_text().strip()
