"""Where things are: the checkout, data to compare with, programs of others."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
EXTERNAL = TESTS / "external"  # programs that run other tools
CACHE = Path(os.environ.get("XTUNER_TEST_CACHE") or Path.home() / ".cache" / "xtuner-tests")  # other tools themselves
LMDEPLOY = CACHE / "lmdeploy-0.9.2.post1"
TOKENIZER_TEXT = TESTS / "reference" / "tokenizer_text.txt"
REFERENCE = TESTS / "reference"  # see its README.md
SHARED = ROOT.parent / "shared" / "reference"  # all of what REFERENCE is a part of, where it is


def reference(*parts: str) -> Path:
    """A path of the reference data: ours, else the one in the shared folder, else the test is skipped."""
    for root in (REFERENCE, SHARED):
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    pytest.skip(f"reference data {'/'.join(parts)} is not here")


def reference_models() -> list[str]:
    """The names of those that are here."""
    return sorted({p.name for root in (REFERENCE, SHARED) for p in root.glob("models/*")})
