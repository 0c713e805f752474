"""Text of the installed Python packages as tokenized data: a file is a document, and no text occurs twice.

Imports no torch: the processes that tokenize import this module.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from xtuner.core.files import write_json
from xtuner.core.log import progress
from xtuner.core.system.sysinfo import usable_cpus
from xtuner.data.format.writer import Block, PairWriter, format_line
from xtuner.data.process_pool import map_ordered
from xtuner.data.tokenizer import load_tokenizer

KINDS = {
    "python": (".py", ".pyi", ".rst", ".md", ".txt", "METADATA"),  # sources of packages, and their documentation
    "c": (".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu"),  # what they bring to compile against
}
SIZES = range(200, 200_000)  # bytes of a file; larger ones are mostly tables
MOST_DIGITS = 0.2  # of the characters of a text; more are numbers for tests
AT_ONCE = 16  # files of a process


@dataclass(frozen=True)
class TextData:
    """What was written. `packs` of an epoch; with `epochs` of them, at least as many iterations as requested unless
    that is not a multiple."""

    kind: str
    documents: int
    tokens: int
    packs: int
    epochs: int
    unseen_tokens: int
    duplicates: int
    seconds: float


def find_files(kind: str, roots: Sequence[Path]) -> list[Path]:
    """Files of a kind below the roots, in an order that mixes the packages and is always the same."""
    found = []
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in ("site-packages", "dist-packages"))  # roots themselves
            found += [Path(folder, name) for name in sorted(names) if name.endswith(KINDS[kind])]
    random.Random(0).shuffle(found)
    return found


def installed_text() -> list[Path]:
    """The standard library and the folders of installed packages."""
    packages = [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return [p for p in dict.fromkeys([Path(sysconfig.get_paths()["stdlib"]), *packages]) if p.is_dir()]


def read_text(path: Path) -> str | None:
    """None for what is not text that people wrote."""
    try:
        if path.stat().st_size not in SIZES:
            return None
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    return text if "\0" not in text and sum(map(text.count, "0123456789")) < MOST_DIGITS * len(text) else None


def train_tokenizer(folder: Path, files: Sequence[Path], vocabulary: int) -> None:
    """Write FOLDER/tokenizer.model, trained on the first thousand files that are text."""
    import sentencepiece

    texts = [text for path in files[:1000] if (text := read_text(path))]
    if sum(map(len, texts)) < 100 * vocabulary:
        raise SystemExit(f"too little text for a tokenizer of {vocabulary:,} tokens; name more folders by --text")
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line + "\n" for text in texts for line in text.split("\n") if line),
        model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=vocabulary, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, input_sentence_size=200_000, shuffle_input_sentence=True,
        num_threads=usable_cpus(), minloglevel=2,
    )  # fmt: skip


def prepare_tokenizer(folder: Path, given: Path | None, files: Sequence[Path], vocabulary: int) -> None:
    """FOLDER with a copy of the given tokenizer.model (or of the one in the given folder), else with an own one."""
    if given is None:
        train_tokenizer(folder, files, vocabulary)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(given / "tokenizer.model" if given.is_dir() else given, folder / "tokenizer.model")


Encoded = tuple[bytes, bytes, int]  # digest of the text without white space, line of a .bin, number of tokens


@cache
def _tokenizer(folder: str):
    return load_tokenizer(folder)


def encode_files(job: tuple[str, int, list[Path]]) -> list[Encoded]:
    folder, longest, paths = job
    tokenizer, found = _tokenizer(folder), []
    for path in paths:
        if text := read_text(path):
            tokens = [tokenizer.bos_id, *tokenizer.encode_plain(text), tokenizer.eos_id][:longest]
            found.append((hashlib.sha256("".join(text.split()).encode()).digest(), format_line(tokens), len(tokens)))
    return found


def write_text(
    kind: str, roots: Sequence[Path], tokenizer: Path, folder: Path, pack: int, iterations: int, unseen: int
) -> TextData:
    """Write FOLDER/valid with `unseen` tokens, and FOLDER/train for that number of packs; with less text, for
    several epochs. Documents are cut at the length of a pack. FOLDER/text.json, written last, says what was written."""
    begin, digests, duplicates = time.perf_counter(), set[bytes](), 0
    parts, counts = {"valid": Block(), "train": Block()}, {"valid": 0, "train": 0}
    files = find_files(kind, roots)
    jobs = [(str(tokenizer), pack, files[i : i + AT_ONCE]) for i in range(0, len(files), AT_ONCE)]
    wanted = iterations * pack
    for digest, line, count in _flatten(map_ordered(encode_files, progress(jobs, "tokenizing"), usable_cpus())):
        if digest in digests:
            duplicates += 1
            continue
        digests.add(digest)
        part = "valid" if counts["valid"] < unseen else "train"
        parts[part].add(line, count)
        counts[part] += count
        if counts["train"] >= wanted:
            break
    if counts["train"] < pack:
        raise SystemExit(f"{counts['train']:,} tokens of {kind} text, less than a pack; name more folders by --text")
    epochs = -(-wanted // counts["train"])
    packs = iterations // epochs
    valid, train = _cut(parts["valid"], unseen), _cut(parts["train"], packs * pack)
    for part, block in (("valid", valid), ("train", train)):
        with PairWriter(folder / part / "text.bin") as writer:
            writer.write(block)
            writer.commit()
    data = TextData(
        kind, len(train.counts), sum(train.counts), packs, epochs, sum(valid.counts), duplicates,
        round(time.perf_counter() - begin, 1),
    )  # fmt: skip
    write_json(folder / "text.json", asdict(data))
    return data


def _flatten(chunks: Iterator[list[Encoded]]) -> Iterator[Encoded]:
    for chunk in chunks:
        yield from chunk


def _cut(block: Block, tokens: int) -> Block:
    """The first documents with exactly that number of tokens; the last one is cut."""
    found, begin, left = Block(), 0, tokens
    for size, count in zip(block.sizes, block.counts, strict=True):
        line = bytes(block.data[begin : begin + size])
        found.add(format_line(json.loads(line)["tokens"][:left]) if count > left else line, min(count, left))
        begin, left = begin + size, left - min(count, left)
        if not left:
            break
    return found
