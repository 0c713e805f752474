"""Reference data, and a small world to train in: a tokenizer, a data folder, a config."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import slurm as own_slurm

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "reference"
COPIED = HERE / "reference"  # the packing cases and two small models, so that a bare clone tests itself
VOCABULARY = 400


def reference(*parts: str) -> Path:
    """A path of the reference data: the shared folder where it is, else our copy, else the test is skipped."""
    for root in (SHARED, COPIED):
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    pytest.skip(f"reference data {'/'.join(parts)} is not here")


def write_corpus(folder: Path, documents: int, seed: int = 0, types: tuple[str, ...] = ("en", "code")) -> Path:
    """Random documents of 3 to 40 tokens in two files a type; some runs of tokens are not learned."""
    from xtuner.data.format.writer import write_bin

    draw = np.random.RandomState(seed)
    for kind in types:
        for name in ("a", "b"):
            texts = []
            for _ in range(documents):
                tokens = draw.randint(3, VOCABULARY, size=draw.randint(3, 40))
                learned = draw.rand(len(tokens)) < 0.8
                texts.append(np.where(learned, tokens, -tokens).tolist())
            write_bin(folder / kind / f"{name}.bin", texts)
    return folder


def train_tokenizer(folder: Path, **options: object) -> Path:
    """A byte-fallback BPE of 400 pieces that takes text as it is, like InternLM2's."""
    import sentencepiece

    folder.mkdir(exist_ok=True)
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((HERE / "conftest.py").read_text().split("\n") * 3),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**plain, **options},
    )
    return folder


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
