"""Tokenizers in tiktoken's form, lines of base64 and a rank, in the form of the `tokenizers` library.

The files lack the rule by which texts are split into words, and the special tokens; the family has them
(`ModelFamily.tiktoken`).
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from xtuner.core.errors import ConfigError
from xtuner.core.foreign_inputs import open_regular, read_regular
from xtuner.families import FAMILIES
from xtuner.families.base import Tiktoken

LINE = re.compile(rb"([A-Za-z0-9+/]+=*) (\d{1,9})")


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins with two lines of this form; a `tokenizer.model` may be SentencePiece's."""
    try:
        with open_regular(path) as f:
            lines = f.read(1024).split(b"\n", 2)
    except OSError:
        return False
    return len(lines) == 3 and all(LINE.fullmatch(line.rstrip(b"\r")) for line in lines[:2])


def find_tiktoken(folder: Path) -> tuple[Path, Tiktoken] | None:
    """The file of this form in a folder, and what its family knows of it."""
    forms = (family.tiktoken for family in FAMILIES.values() if family.tiktoken)
    return next(((folder / form.file, form) for form in forms if is_tiktoken(folder / form.file)), None)


def build_tokenizer_json(path: Path, form: Tiktoken) -> str:
    """The contents of a `tokenizer.json` with the same ids. Raises: ConfigError for a file that is incomplete."""
    ranks = _read_ranks(path)
    letters = _byte_letters()
    names = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [(ranks[a], ranks[b], [names[a], names[b]]) for a, b in splits if a in ranks and b in ranks]
        merges += [pair for _, _, pair in sorted(found, key=lambda f: f[:2])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = 1 + max(ranks.values())
    words = {"type": "Split", "pattern": {"Regex": form.words}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    found_json: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": first + i, "content": name, **flags} for i, name in enumerate(form.special)],
        "normalizer": {"type": "NFC"} if form.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is that token
            "vocab": {names[token]: rank for token, rank in ranks.items()}, "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(found_json, ensure_ascii=False)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_regular(path).splitlines(), 1):
        match = LINE.fullmatch(line.rstrip())
        try:
            if line.strip() and match:
                ranks[base64.b64decode(match[1], validate=True)] = int(match[2])
            elif line.strip():
                raise ValueError
        except ValueError:
            raise _broken(path, f"line {number} is not base64 and a rank") from None
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise _broken(path, f"{len(missing)} bytes have no token, such as {missing[0]}")
    if len(set(ranks.values())) != len(ranks) or max(ranks.values()) >= 2 * len(ranks):
        raise _broken(path, "the ranks are not the numbers of its tokens")
    return ranks


def _broken(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path.name} cannot be read: {what}", where=str(path), do="copy the model's file there again")


def _byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each byte: itself if printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]
