"""Configs made from the `tiny` one of conftest.py."""

from collections.abc import Mapping
from pathlib import Path


def with_hook(config: Path, target: Path, at: int | str, action: str) -> Path:
    """The config with one more hook, which does `action` after iteration `at`, when all other hooks are through."""
    hook = f"""
from xtuner.train.hooks import Hook
class Act(Hook):
    priority = 95
    def after_iteration(self, run, it):
        import os, signal
        if it.state.iteration == {at}:
            {action}
"""
    first = "from torch.optim import AdamW\n"
    text = config.read_text().replace(first, first + hook)
    target.write_text(text.replace("custom_hooks = [\n", "custom_hooks = [\n    dict(type=Act),\n"))
    return target


PACKS = 4  # an iteration, of all ranks


TWO = {"accumulative_counts = 2 ": f"accumulative_counts = {PACKS // 2} "}  # packs of each of two ranks


FOUR = {"accumulative_counts = 2 ": f"accumulative_counts = {PACKS // 4} "}


ONE = {"accumulative_counts = 2 ": f"accumulative_counts = {PACKS} "}


def full_config(tiny: Path, folder: Path, changes: Mapping[str, str]) -> Path:
    """The tiny config with all of its hooks, samples and held-out data too: 3 epochs of 12 packs, 9 iterations."""
    text = tiny.read_text()
    data = next(line for line in text.splitlines() if line.startswith("dataset_folder")).partition("=")[2].strip()
    more = {"max_epochs = 1": "max_epochs = 3", "max_length = 32": "max_length = 68", "val_folder = None": ""}
    more |= {"warm_up_ratio = 0.3": "warm_up_ratio = 0.12", "start_factor=1 / 40": "start_factor=1.0"}  # one iteration
    for old, new in {**more, **changes}.items():
        assert old in text, old
        text = text.replace(old, new or f"val_folder = {data}")
    folder.mkdir(exist_ok=True)
    path = folder / "run.py"
    path.write_text(text)
    return path
