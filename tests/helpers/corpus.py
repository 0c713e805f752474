"""Data to train on: random documents, and a tokenizer of 400 pieces."""

from pathlib import Path

import numpy as np

from helpers.paths import TOKENIZER_TEXT

VOCABULARY = 400


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
        sentence_iterator=iter(TOKENIZER_TEXT.read_text().split("\n") * 3),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**plain, **options},
    )
    return folder
