"""Every reader of foreign bytes, given the same odd inputs each time: `make fuzz` gives it others, for longer."""

import pytest

from fuzz.__main__ import NAMES, explore


@pytest.mark.slow
@pytest.mark.processes
def test_only_our_own_errors_come_out() -> None:
    """No traceback, no hang, no memory beyond the input's measure, nothing run, nothing written outside."""
    finds = []
    for report in explore(list(NAMES), seed=0, seconds=0):
        finds += [f"{report['target']}: {name}\n{text}\n{case[:2000]}" for name, text, case in report["finds"]]
        assert report["inputs"] > 50 or finds
        assert report["rejected"] > 0 or report["target"] == "caches"
    assert finds == []
