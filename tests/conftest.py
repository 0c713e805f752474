"""Where the reference data lie. The packing cases and two small models are also copied into tests/data."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "reference"
COPIED = HERE / "data"


def reference(*parts: str) -> Path:
    """A path of the reference data: the shared folder where it is, else our copy, else the test is skipped."""
    for root in (SHARED, COPIED):
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    pytest.skip(f"reference data {'/'.join(parts)} is not here")
