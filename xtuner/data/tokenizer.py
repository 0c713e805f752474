"""Text ↔ token ids by the tokenizer files of a model folder: `tokenizer.model` (SentencePiece) or `tokenizer.json`."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from xtuner.core import hub
from xtuner.core.errors import ConfigError
from xtuner.core.files import read_json
from xtuner.core.foreign_inputs import read_regular, short_repr
from xtuner.data.tiktoken_files import build_tokenizer_json, find_tiktoken, is_tiktoken
from xtuner.families import FAMILIES, chat_templates
from xtuner.families.base import Tiktoken

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # of special tokens in settings files: `bos_token`


class Tokenizer(Protocol):
    """The interface of tokenizers. `folder` contains the tokenizer's files, which an export copies."""

    folder: Path
    special: Mapping[str, int]  # names of special tokens → ids
    bos_id: int | None
    eos_id: int | None
    has_begin: bool  # False: its settings say that texts begin without a token, as Qwen's do

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end tokens. Names of special tokens in the text become those tokens."""

    def encode_plain(self, text: str, allowed: Collection[str] = ()) -> list[int]:
        """Ids of a text in which names of special tokens are ordinary text, except those in `allowed`.

        For text from untrusted sources: a page that spells `<|im_end|>` must not end a turn.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens appear by name."""

    @property
    def vocab_size(self) -> int:
        """The largest id + 1, special tokens included."""

    def tokens_without_id(self) -> list[str]:
        """Special tokens that a settings file names without any file defining their ids.

        transformers assigns each a new id after the last one, which the data do not contain and the embedding may lack.
        """

    def identity(self) -> str:
        """sha256 over everything that determines the ids: the vocabulary file, and names and ids of special tokens."""


def single_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> list[int]:
    """Ids of the words that are a single token: generation can stop at these without decoding the text."""
    encoded = [tokenizer.encode(word) for word in words]
    return [ids[0] for ids in encoded if len(ids) == 1]


def begin_tokens(tokenizer: Tokenizer, bos: int | None) -> list[int]:
    """What a prompt begins with: the model's begin token, or nothing."""
    return [bos] if bos is not None and getattr(tokenizer, "has_begin", True) else []


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or hub id. Raises: ConfigError if it has none of a known form."""
    folder = hub.resolve(str(name_or_path), tokenizer_only=True)
    model = folder / "tokenizer.model"
    if os.path.isfile(model) and not is_tiktoken(model):
        return _SentencePiece(folder)
    if os.path.isfile(folder / "tokenizer.json"):
        return _JsonTokenizer(folder)
    if known := find_tiktoken(folder):
        return _TiktokenFile(folder, *known)
    old = (model.name, *(name for name in ("vocab.json", "merges.txt") if (folder / name).is_file()))
    tiktoken = sorted(path.name for path in folder.glob("*.tiktoken"))
    if found := [name for name in (*old, *tiktoken) if (folder / name).is_file()]:
        raise ConfigError(
            f"the folder has {', '.join(found)}, but no tokenizer.json",
            where=str(folder),
            why="these files lack the rule by which texts are split into words",
            do="write it once where the model's tokenizer loads: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)",
        )
    raise ConfigError(
        "the folder contains neither tokenizer.model nor tokenizer.json",
        where=str(folder),
        do="give the folder of the tokenizer that the data were tokenized with",
    )


class _SentencePiece:
    def __init__(self, folder: Path) -> None:
        import sentencepiece

        if hasattr(sentencepiece, "set_min_log_level"):  # errors only; InternLM2's model warns of its NUL piece
            sentencepiece.set_min_log_level(2)
        self.folder = folder
        path = folder / "tokenizer.model"
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=read_regular(path))
            self.bos_id, self.eos_id = _id(self._model.bos_id()), _id(self._model.eos_id())
            self.special: Mapping[str, int] = self._names()
            self.has_begin = _has_begin(folder)
            self._by_id = {i: name for name, i in self.special.items()}
            spelt = [*self.special, *(self._model.id_to_piece(i) for i in self._by_id if i < self._model.vocab_size())]
            # pieces that SentencePiece matches in any text, and whose ids are those of special tokens
            found = ((piece, self._model.encode(piece)) for piece in dict.fromkeys(spelt))
            self._dangerous = [piece for piece, ids in found if not self._by_id.keys().isdisjoint(ids)]
        except (RuntimeError, OSError, UnicodeDecodeError) as e:  # of the library; its messages may be any bytes
            raise _unreadable(path, e) from None

    def _names(self) -> dict[str, int]:
        """Control pieces of the model, unnamed special tokens of its family, and `tokenizer_config.json`, which takes
        precedence."""
        model = self._model
        names = {model.id_to_piece(i): i for i in (model.unk_id(), model.bos_id(), model.eos_id()) if i >= 0}
        for unnamed in (family.unnamed_tokens for family in FAMILIES.values()):
            is_last = 1 + max(unnamed, default=0) == model.vocab_size()
            if is_last and all(model.id_to_piece(i) == piece for i, (piece, _) in unnamed.items()):
                names |= {name: i for i, (_, name) in unnamed.items()}
        pieces = ((name, model.piece_to_id(name)) for name in _read_mentioned(self.folder))
        names |= {name: i for name, i in pieces if i != model.unk_id()}
        listed = _read_added_tokens(self.folder)
        taken = set(listed.values())
        return {name: i for name, i in names.items() if i not in taken} | listed

    @property
    def vocab_size(self) -> int:
        return max(int(self._model.vocab_size()), *(i + 1 for i in self.special.values()))

    def tokens_without_id(self) -> list[str]:
        return [name for name in _read_mentioned(self.folder) if name not in self.special]

    def encode(self, text: str) -> list[int]:
        return self.encode_plain(text, self.special)

    def encode_plain(self, text: str, allowed: Collection[str] = ()) -> list[int]:
        if not allowed:
            return self._plain(text)
        ids: list[int] = []
        for piece in _split_at(text, allowed):
            ids += [self.special[piece]] if piece in allowed else self._plain(piece)
        return ids

    def _plain(self, text: str) -> list[int]:
        if not any(piece in text for piece in self._dangerous):
            return list(self._model.encode(text))
        ids: list[int] = []
        for part in _break_up(text, self._dangerous):
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        plain: list[int] = []
        pieces = self._model.vocab_size()  # a model may have more ids than its tokenizer has pieces
        for i in [*ids, None]:
            if i is not None and i not in self._by_id and i < pieces:
                plain.append(int(i))
                continue
            parts.append(self._model.decode(plain))
            plain = []
            if i is not None:
                parts.append(self._by_id.get(int(i), "\ufffd"))
        return "".join(parts)

    def identity(self) -> str:
        return _identity(self.folder / "tokenizer.model", self.special)


class _JsonTokenizer:
    def __init__(self, folder: Path, file: str = "tokenizer.json", text: str | None = None) -> None:
        """`text`: the contents in the form of a tokenizer.json, if `file` has another form."""
        import tokenizers

        self.folder, self._file = folder, folder / file
        with self._catch_panics():
            try:
                self._model, self._without_names = (
                    tokenizers.Tokenizer.from_file(str(self._file)) if text is None
                    else tokenizers.Tokenizer.from_str(text)
                    for _ in range(2)
                )  # fmt: skip
            except Exception as e:  # the library raises plain Exception
                raise _unreadable(self._file, e) from None
        self._without_names.encode_special_tokens = True
        added = self._model.get_added_tokens_decoder()
        marks = {mark for chat in chat_templates().values() for mark in chat.marks}  # DeepSeek's are not `special`
        self.special: Mapping[str, int] = {t.content: i for i, t in added.items() if t.special or t.content in marks}
        self._matched = [t.content for t in added.values() if not t.special and t.content in marks]
        self.has_begin = _has_begin(folder)
        config = _read_config(folder)
        self.bos_id, self.eos_id = self._named(config.get("bos_token")), self._named(config.get("eos_token"))

    @contextlib.contextmanager
    def _catch_panics(self) -> Iterator[None]:
        """The library is written in Rust; unexpected values cause panics, which are not derived from Exception."""
        try:
            yield
        except BaseException as e:
            if type(e).__name__ == "PanicException":
                raise _unreadable(self._file, e) from None
            raise

    def _named(self, token: Any) -> int | None:
        name = token.get("content") if isinstance(token, dict) else token
        return self._model.token_to_id(name) if isinstance(name, str) and _is_valid_name(name) else None

    @cached_property
    def vocab_size(self) -> int:
        ids = self._model.get_vocab(with_added_tokens=True).values()
        return 1 + max(ids, default=-1)  # the library's get_vocab_size counts tokens, but ids may have gaps

    def tokens_without_id(self) -> list[str]:
        return [name for name in _read_mentioned(self.folder) if self._model.token_to_id(name) is None]

    def encode(self, text: str) -> list[int]:
        with self._catch_panics():
            return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str, allowed: Collection[str] = ()) -> list[int]:
        ids: list[int] = []
        for piece in _split_at(text, allowed):
            if piece in allowed:
                ids.append(self.special[piece])
            else:
                for part in _break_up(piece, self._matched) if self._matched else [piece]:
                    with self._catch_panics():
                        ids += self._without_names.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        with self._catch_panics():
            return str(self._model.decode(list(ids), skip_special_tokens=False))

    def identity(self) -> str:
        return _identity(self._file, {**self.special, "bos": self.bos_id, "eos": self.eos_id})


class _TiktokenFile(_JsonTokenizer):
    def __init__(self, folder: Path, path: Path, form: Tiktoken) -> None:
        super().__init__(folder, path.name, build_tokenizer_json(path, form))
        self.has_begin = self.has_begin and bool(form.begin)
        begin, end = self.special.get(form.begin), self.special.get(form.end)
        self.bos_id, self.eos_id = (begin if self.bos_id is None else self.bos_id), self.eos_id or end


def _unreadable(path: Path, error: BaseException) -> ConfigError:
    return ConfigError(f"{path.name} cannot be read: {error}", where=str(path), do="copy the model's file there again")


def _id(i: int) -> int | None:
    return int(i) if i >= 0 else None  # SentencePiece uses -1 for "none"


def _identity(vocabulary: Path, names: Mapping[str, int | None]) -> str:
    listed = json.dumps(sorted(names.items())).encode()
    return hashlib.sha256(vocabulary.read_bytes() + b"\0" + listed).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_object(folder / "tokenizer_config.json")


def _has_begin(folder: Path) -> bool:
    settings = _read_config(folder)
    return not ("bos_token" in settings and settings["bos_token"] is None)


def _read_listed_tokens(folder: Path) -> dict[str, int]:
    """Special tokens by name, as `tokenizer_config.json` lists them: `<|im_start|>` → 92543."""
    listed = _read_config(folder).get("added_tokens_decoder") or {}
    entries = listed.items() if isinstance(listed, dict) else [("", listed)]
    for i, entry in entries:
        name = entry.get("content") if isinstance(entry, dict) else None
        if not (isinstance(name, str) and _is_valid_name(name) and re.fullmatch(r"[0-9]{1,9}", i)):
            raise ConfigError(
                f"added_tokens_decoder has {short_repr(i)}: {short_repr(entry)}, not an id with the text of its token",
                where=str(folder / "tokenizer_config.json"),
                do="copy the model's file there again",
            )
    return {entry["content"]: int(i) for i, entry in entries}


def _read_added_tokens(folder: Path) -> dict[str, int]:
    """Added tokens by name, from `tokenizer_config.json`, which takes precedence, and the older `added_tokens.json`."""
    listed = _read_listed_tokens(folder)
    entries = _read_object(folder / "added_tokens.json").items()
    older = {n: i for n, i in entries if _is_valid_name(n) and type(i) is int and 0 <= i < 10**9}
    return {name: i for name, i in older.items() if i not in listed.values()} | listed


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist or contains anything else."""
    found = read_json(path) if os.path.exists(path) else {}
    return found if isinstance(found, dict) else {}


def _read_mentioned(folder: Path) -> list[str]:
    """Special tokens that the settings files name without their ids."""
    found: dict[str, None] = {}
    for settings in (_read_config(folder), _read_object(folder / "special_tokens_map.json")):
        entries = [settings.get(f"{role}_token") for role in ROLES]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = settings.get(key)
            entries += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        names = (entry.get("content") if isinstance(entry, dict) else entry for entry in entries)
        found |= dict.fromkeys(name for name in names if isinstance(name, str) and _is_valid_name(name))
    return list(found)


def _is_valid_name(name: str) -> bool:
    """Whether a name is not empty and has no half of a surrogate pair, which JSON allows."""
    try:
        return name.encode() != b""
    except UnicodeEncodeError:
        return False


def _split_at(text: str, names: Collection[str]) -> list[str]:
    """The text split before and after each occurrence of `names`; empty parts are omitted."""
    if not any(name in text for name in names):
        return [text] if text else []
    longest_first = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
    return [p for p in re.split(f"({longest_first})", text) if p]


def _break_up(text: str, pieces: Collection[str]) -> Iterator[str]:
    """The text split after the first character of each occurrence of `pieces`, so that none of them remains intact."""
    rest = ""
    for part in _split_at(text, pieces):
        if part in pieces:
            yield rest + part[0]
            rest = part[1:]
        else:
            rest += part
    if rest:
        yield rest
