"""Processes of a run and the device of each."""

import torch

from xtuner.core.errors import ConfigError


def setup(launcher: str, deepspeed: str | None) -> torch.device:
    """Refuse what is not built; return this process's device."""
    if launcher != "none":
        raise ConfigError(
            f"--launcher {launcher} is not built yet",
            where="--launcher",
            why="training runs in one process for now",
            do="leave it out, or set it to none",
        )
    if deepspeed:
        raise ConfigError("--deepspeed is not built yet", where=f"--deepspeed {deepspeed}", do="leave it out")
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
