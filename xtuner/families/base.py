"""The interface of a model family: `ModelFamily`.

The decoder stores the weights of all families under its own names, which are InternLM2's. A family defines where its
files store each of them, and the meaning of its `config.json`. A new family is a subclass in one file. A shipped family
is added to the table of `families/__init__.py`; a user's own family is registered by

    from xtuner.families import register
    register(MyFamily())

in a config, or in a module that the config imports. `model = dict(type=from_scratch, family="its name", …)` creates
such a model, and folders whose `config.json` has its name as `model_type` can be read. Example: tests/granite.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from xtuner.core.errors import ConfigError
from xtuner.families.chat import ChatTemplate
from xtuner.families.hf_config import FIELDS, Reader
from xtuner.families.network import DecoderConfig


@dataclass(frozen=True)
class Released:
    """A released model: its hub id, and the fields of its `config.json` in which it differs from its family's defaults.

    Models with the same network, such as chat models, are listed once.
    """

    hub_id: str
    network: Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """A tensor of a family's files that is a part of one of the decoder's.

    Dimension 0 of the decoder's tensor consists of `groups` equal groups of rows. The file's tensor has rows
    [begin, end) of each group, concatenated; all rows if `end` is None.
    """

    name: str
    groups: int = 1
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Tiktoken:
    """What tokenizer files in tiktoken's form lack.

    Args:
        file: their name.
        words: the rule by which a text is split into words, a regular expression.
        special: special tokens, from the first id after the file's on.
        begin, end: those that begin and end a text; "" for none.
        nfc: whether texts are normalized to Unicode's NFC first.
    """

    file: str
    words: str
    special: tuple[str, ...]
    begin: str
    end: str
    nfc: bool = False


class ModelFamily(ABC):
    """Tensor names, settings and chat template of a family."""

    name: str  # `model_type` of its config.json; `--layout`; `family` of a config
    architecture: str  # its class in transformers and servers
    other_architectures: tuple[str, ...] = ()  # other classes that its config.json may name
    loads_as: str = ""  # family whose form transformers can load for these networks; "": its own
    tags: tuple[str, ...] = ()  # of the model card
    chat: ChatTemplate | None = None  # of its chat models
    other_chats: tuple[ChatTemplate, ...] = ()  # of models with its network; chosen by the tokenizer's special tokens
    trains_as: str = ""  # family of checkpoints and exports, if a folder of this one is only read; "": its own
    unread: tuple[str, ...] = ()  # beginnings of the names of tensors that are not a part of the network
    released: ClassVar[tuple[Released, ...]] = ()  # for `xtuner list-models`
    auto_map: ClassVar[Mapping[str, str]] = {}  # of config.json: classes in the files of `--with-code` (export/remote/)
    # special tokens that its tokenizer.model contains only as unnamed unused pieces: id → (piece, name)
    unnamed_tokens: ClassVar[Mapping[int, tuple[str, str]]] = {}
    tiktoken: Tiktoken | None = None  # its tokenizer files in that form
    fields: frozenset[str] = FIELDS  # keys of config.json that define the network: settings of `from_scratch`
    defaults: ClassVar[Mapping[str, Any]] = {}  # of these keys where a config omits them

    @abstractmethod
    def read_config(self, read: Reader) -> DecoderConfig:
        """The network of a `config.json`. Raises: ConfigError for unsupported features."""

    @abstractmethod
    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        """A `config.json` with every field explicit, because class defaults differ between releases.

        Args:
            dtype: of the weights next to it, such as "bfloat16".

        Raises: ConfigError for a network that the family cannot express.
        """

    @abstractmethod
    def stored(self, name: str, c: DecoderConfig) -> tuple[Stored, ...]:
        """Where its files store the decoder's tensor `name`: parts that together have all of its rows."""

    def chat_for(self, special: Collection[str]) -> ChatTemplate | None:
        """The first of the family's chat templates whose marks are special tokens of the tokenizer, else `chat`.

        Args:
            special: names of the tokenizer's special tokens.
        """
        known = (chat for chat in (self.chat, *self.other_chats) if chat)
        return next((chat for chat in known if all(mark in special for mark in chat.turn_marks)), self.chat)

    def require_expressible(self, features: Mapping[str, bool]) -> None:
        """Raises: ConfigError if the network has one of the features, given in words, that the family's files lack."""
        if found := [what for what, is_there in features.items() if is_there]:
            raise ConfigError(
                f"the network has {' and '.join(found)}, which the {self.name} layout cannot express",
                where=f"--layout {self.name}",
                why="what loads the folder would compute something else",
                do="leave out --layout: the model's own family can",
            )

    def not_served(self, c: DecoderConfig) -> list[str]:
        """Features of the network that common servers do not support in this form, in words."""
        return []
