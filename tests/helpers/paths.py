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
SHARED = ROOT.parent / "shared" / "reference"
COPIED = TESTS / "reference"  # a part of it, so that a clone alone tests itself


def reference(*parts: str) -> Path:
    """A path of the reference data: the shared folder where it is, else our copy, else the test is skipped."""
    for root in (SHARED, COPIED):
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    pytest.skip(f"reference data {'/'.join(parts)} is not here")
