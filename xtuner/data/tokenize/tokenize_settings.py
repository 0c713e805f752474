"""Settings of the tokenizer command: everything that determines the contents of an output."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.data.chat_template import find_template
from xtuner.data.tokenizer import Tokenizer
from xtuner.data.tokenizer_template import TOKENIZER, is_same, read_template, require_template
from xtuner.families import chat_templates
from xtuner.families.internlm2 import InternLM2

TEXTS = ("txt", "json", "jsonl")
CHATS = ("alpaca", "chat", "ftdp")
FORMATS = TEXTS + CHATS
_KEYED = ("json", "jsonl")  # of which one key is the text
OWN_TEMPLATE = InternLM2.chat.name
# the one in the tokenizer's folder, unless a known one, whose marks the tokenizer has, writes the same
AUTO = "auto"
INTERNEVO = "internevo"  # InternEvo's rule for alpaca records, which is not a chat template
RULES = 1  # increase it when the same input and settings give a different output, so that old outputs are replaced
FTDP_LENGTH = 32768
INTERNEVO_LENGTH = 2048


@dataclass(frozen=True)
class TokenizeSettings:
    """None means the default of the format. `tokenizer` is a folder or hub id."""

    tokenizer: str
    format: str = "auto"
    text_key: str = "text"
    whole_record: bool = False  # tokenize a record's JSON, as InternEvo's tool does, instead of its text
    template: str = AUTO
    add_bos: bool | None = None
    add_eos: bool | None = None
    max_length: int | None = None
    allow_special: tuple[str, ...] = ()
    valid_fraction: float = 0.0
    seed: int = 0
    wording: str = ""  # of the template in the tokenizer's folder

    def check(self) -> None:
        """Raises: ConfigError."""
        known = ("auto", *FORMATS)
        if self.format not in known:
            hint = did_you_mean(self.format, list(known))
            raise ConfigError(f"unknown {self.format!r}.{hint}", where="--format", do=f"one of {', '.join(known)}")
        if self.template not in (INTERNEVO, AUTO, TOKENIZER):
            find_template(self.template, others=(INTERNEVO, TOKENIZER))
        if not 0 <= self.valid_fraction <= 1:
            raise ConfigError(f"{self.valid_fraction} is not a fraction", where="--valid-fraction", do="from 0 to 1")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"{self.max_length} tokens are too few", where="--max-length", do="2 or more")
        if self.template == INTERNEVO and self.format not in ("auto", "alpaca"):
            raise ConfigError(
                f"the internevo template writes alpaca records only, not {self.format}",
                where="--template internevo",
                do=f"--format alpaca, or --template {OWN_TEMPLATE}",
            )
        if self.whole_record and self.text_key != TokenizeSettings.text_key:
            raise ConfigError(
                "it would have no effect: the JSON of a record is tokenized, with all keys",
                where=f"--text-key {self.text_key}",
                do="omit it, or omit --whole-record",
            )
        if self.seed and not self.valid_fraction:
            raise ConfigError(
                "it is the seed of the split into train and valid",
                where=f"--seed {self.seed}",
                do="give --valid-fraction, or omit it",
            )

    def require_effect(self, used: Sequence["TokenizeSettings"]) -> None:
        """Raise ConfigError for a setting that has no effect on any input.

        Args:
            used: these settings as `resolved` for each input.
        """
        found = ", ".join(sorted({one.format for one in used}))
        for option, given, has_effect, formats in (
            ("--whole-record", self.whole_record, any(one.whole_record for one in used), _KEYED),
            ("--text-key", self.text_key != TokenizeSettings.text_key, any(one.text_key for one in used), _KEYED),
            (
                f"--template {self.template}",
                self.template != AUTO,
                any(one.template == self.template for one in used),
                ("alpaca",) if self.template == INTERNEVO else CHATS,
            ),
        ):
            if given and not has_effect:
                what = f"it would have no effect: the input is {found}, not {' or '.join(formats)}"
                raise ConfigError(what, where=option, do="omit it, or give the --format of the input")

    def for_tokenizer(self, tokenizer: Tokenizer) -> "TokenizeSettings":
        """With the defaults that depend on the tokenizer: the chat template, and whether texts have a begin token."""
        found = self
        if self.add_bos is None and not tokenizer.has_begin:
            found = replace(found, add_bos=False)
        if self.template == AUTO:
            known = (chat for chat in chat_templates().values() if chat.marks)
            fitting = next((c for c in known if all(mark in tokenizer.special for mark in c.marks)), InternLM2.chat)
            own = read_template(tokenizer)
            found = replace(found, template=fitting.name if own is None or is_same(own, fitting) else TOKENIZER)
        if found.template == TOKENIZER:
            found = replace(found, wording=require_template(tokenizer).text)
        return found

    def resolved(self, kind: str) -> "TokenizeSettings":
        """The settings for one file of format `kind`: defaults filled in, settings without effect cleared."""
        is_text = kind in TEXTS
        if is_text and self.max_length is not None:
            raise ConfigError(
                f"{kind} documents are not cut",
                where=f"--max-length {self.max_length}",
                why="the rest of each would be lost; packing cuts them without loss",
                do="omit --max-length",
            )
        internevo = kind == "alpaca" and self.template == INTERNEVO
        default_length = INTERNEVO_LENGTH if internevo else FTDP_LENGTH if kind == "ftdp" else None
        keyed = kind in _KEYED
        return replace(
            self,
            format=kind,
            text_key=self.text_key if keyed and not self.whole_record else "",
            whole_record=self.whole_record and keyed,
            template="" if is_text else self.template if internevo or self.template != INTERNEVO else OWN_TEMPLATE,
            add_bos=(is_text or self.template != TOKENIZER) if self.add_bos is None else self.add_bos,
            add_eos=(is_text or internevo) if self.add_eos is None else self.add_eos,
            max_length=self.max_length or default_length,
            allow_special=tuple(sorted(set(self.allow_special))),
            seed=self.seed if self.valid_fraction else 0,
        )

    def recipe(self, tokenizer_identity: str) -> dict[str, Any]:
        """The settings as recorded with an output. They contain no paths, so that a tokenizer may be moved."""
        values = asdict(self)
        if "." in self.template:  # which users may change
            values["wording"] = repr(find_template(self.template))
        elif self.template != TOKENIZER:
            del values["wording"]
        return {"rules": RULES, **values, "tokenizer": tokenizer_identity}
