"""A small world to train in: a tokenizer, a data folder, a config; and the command line, run in this process."""

import multiprocessing.process
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("helpers")

from helpers import slurm as own_slurm  # noqa: E402
from helpers.corpus import VOCABULARY, train_tokenizer, write_corpus  # noqa: E402

# a busy machine is no fault of the code
hypothesis.settings.register_profile("any-machine", suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any-machine")

STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
started: list[str] = []  # processes that the test has started
original_start = multiprocessing.process.BaseProcess.start


def note_start(event: str, arguments: tuple[Any, ...]) -> None:
    if event in STARTS and arguments[:1] != ("/sbin/ldconfig",):  # Triton looks for libcuda when it is imported
        started.append(f"{event}{arguments[:2]}")


def noted_start(process: Any) -> None:
    """A spawned process of `multiprocessing`, which no audit event reports."""
    started.append(repr(process))
    original_start(process)


sys.addaudithook(note_start)
multiprocessing.process.BaseProcess.start = noted_start


def pytest_runtest_setup() -> None:
    started.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """`make test-fast` leaves out the tests marked `processes`: that mark has to be complete."""
    yield
    if started and not any(map(item.get_closest_marker, ("processes", "gpu"))):  # kernels are compiled by processes
        pytest.fail(f"starts a process and is not marked `processes`: {started[0][:200]}")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 10)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    """The shipped tiny config with paths set and everything small: 25 packs of 32 tokens, 2 an iteration."""
    from xtuner.config.load import SHIPPED

    text = (SHIPPED / "internlm2_tiny_w_tokenized_dataset.py").read_text()
    for old, new in (
        ("/path/to/your/dataset", str(corpus)),
        ("/path/to/your/tokenizer", str(tokenizer_folder)),
        ("vocab_size = 2048", f"vocab_size = {VOCABULARY}"),
        ("hidden_size = 256", "hidden_size = 128"),
        ("num_layers = 4", "num_layers = 1"),
        ("max_length = 1024", "max_length = 32"),
        ("accumulative_counts = 1 ", "accumulative_counts = 2 "),
        ("max_new_tokens=40", "max_new_tokens=4"),
        ("warm_up_ratio = 0.1 ", "warm_up_ratio = 0.3 "),  # an iteration at least, also of few packs
    ):
        assert old in text, old
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def slurm() -> Iterator[own_slurm.Slurm]:
    """A real Slurm of two nodes, where the machine has one and we are root."""
    yield from own_slurm.start()


@pytest.fixture
def xtuner() -> Callable[..., int]:
    """Run a command line in this process; returns the exit code. Errors for users are raised."""
    from xtuner.cli.main import main
    from xtuner.core.log import logger

    def run(*words: object) -> int:
        try:
            return main([str(w) for w in words])
        finally:
            logger.propagate = True  # where its own process would have ended: to pytest's caplog

    return run
