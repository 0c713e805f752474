"""Several ranks on this machine: a function on each, or `xtuner train` as a launcher starts it."""

import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import deepspeed  # noqa: F401  once, before processes are forked
import torch

from helpers.processes import listening_socket
from xtuner.cli.main import main
from xtuner.core.command import exit_with
from xtuner.dist.collectives import ALL, Ranks

# DeepSpeed looks for it at every start; its engines import as they are collected, and CPython 3.11 fails where that
# happens during another import (gh-106176). This way there is nothing to look for.
sys.modules.setdefault("fairseq.optim.fairseq_optimizer", None)  # type: ignore[arg-type]


def on_ranks(size: int, body: Callable[[Ranks, Path], None], folder: Path) -> list[int | None]:
    """Run `body(ranks, folder)` in `size` processes; returns their exit codes, negative for signals.

    What ranks that fail have written to stderr, also from C++, is printed once all have ended.
    """
    folder.mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as opened:
        logs = [opened.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(size)]
        children = [fork.Process(target=_run_body, args=(r, size, body, folder, logs[r])) for r in range(size)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        for rank, (child, log) in enumerate(zip(children, logs, strict=True)):
            if child.exitcode:
                log.seek(0)
                print(f"rank {rank} ended with {child.exitcode}:\n{log.read()}", file=sys.stderr)
    return [child.exitcode for child in children]


def _redirect_stderr(file: int) -> None:
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _run_body(rank: int, size: int, body: Callable[[Ranks, Path], None], folder: Path, log: IO[str]) -> None:
    _redirect_stderr(log.fileno())
    gc.freeze()  # DeepSpeed collects garbage for every engine: a second each, with all that is imported
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # DeepSpeed looks; nobody connects
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        body(ALL, folder)
        ALL.gather(None)  # nobody leaves while others still talk
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def start_ranks(words: list[Any], folder: Path, ranks: int = 2) -> list[Any]:
    """`xtuner train` as that many processes of a launcher; the stderr of each goes to `stderr.RANK`."""
    with contextlib.closing(listening_socket()) as server:
        port = str(server.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=_run_train, args=(r, ranks, port, list(map(str, words)), folder)) for r in range(ranks)
    ]
    for child in children:
        child.start()
    return children


def _run_train(rank: int, ranks: int, port: str, words: list[str], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(ranks)}
    _redirect_stderr(os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT))
    try:
        exit_with(lambda: main(words))
    except SystemExit as e:
        os._exit(e.code if isinstance(e.code, int) else 1)


def exit_codes(children: list[Any]) -> list[int]:
    """Exit codes. Processes that have not ended after a minute are killed, and their code is -9."""
    for child in children:
        child.join(60)
    for child in children:
        if child.is_alive():
            child.kill()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def stderr_of(folder: Path, rank: int) -> str:
    return (folder / f"stderr.{rank}").read_text(errors="replace")  # of a killed process: may end in a character
