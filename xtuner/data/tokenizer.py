"""Text ↔ token ids by the tokenizer files of a model folder: `tokenizer.model` (SentencePiece) or `tokenizer.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from xtuner.core import hub
from xtuner.core.errors import ConfigError
from xtuner.core.files import read_json

FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


class Tokenizer(Protocol):
    """What the toolkit needs of a tokenizer. `folder` holds its files, which an export copies."""

    folder: Path

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end tokens. Names of special tokens in it become those tokens."""

    def decode(self, ids: Sequence[int]) -> str: ...

    @property
    def vocab_size(self) -> int: ...


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or hub id. Raises: ConfigError if it has none that we read."""
    folder = hub.resolve(str(name_or_path), tokenizer_only=True)
    if (folder / "tokenizer.model").is_file():
        return _SentencePiece(folder)
    if (folder / "tokenizer.json").is_file():
        return _Fast(folder)
    raise ConfigError(
        "no tokenizer.model and no tokenizer.json in the folder", where=str(folder), do="copy the model's there"
    )


class _SentencePiece:
    def __init__(self, folder: Path) -> None:
        import sentencepiece

        self.folder = folder
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self._special = _named_tokens(folder)
        self._by_id = {i: name for name, i in self._special.items()}

    @property
    def vocab_size(self) -> int:
        return int(self._model.vocab_size())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _split_at(text, list(self._special)):
            ids += [self._special[piece]] if piece in self._special else self._model.encode(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        plain: list[int] = []
        for i in [*ids, None]:
            if i is not None and i not in self._by_id:
                plain.append(int(i))
                continue
            parts.append(self._model.decode(plain))
            plain = []
            if i is not None:
                parts.append(self._by_id[int(i)])
        return "".join(parts)


class _Fast:
    def __init__(self, folder: Path) -> None:
        import tokenizers

        self.folder = folder
        self._model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids), skip_special_tokens=False))


def _named_tokens(folder: Path) -> dict[str, int]:
    """Special tokens by name, as `tokenizer_config.json` lists them: `<|im_start|>` → 92543."""
    path = folder / "tokenizer_config.json"
    listed = read_json(path).get("added_tokens_decoder", {}) if path.is_file() else {}
    return {entry["content"]: int(i) for i, entry in listed.items()}


def _split_at(text: str, names: list[str]) -> list[str]:
    import re

    if not names:
        return [text]
    longest_first = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
    return [p for p in re.split(f"({longest_first})", text) if p]
