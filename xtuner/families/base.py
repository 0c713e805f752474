"""What the toolkit has to know of a family of models: `ModelFamily`.

The decoder holds every family's weights under its own names, which are InternLM2's. A family says where its files keep
each of them, and what else its `config.json` and its users mean. A new family is a subclass in one file and, for a
shipped one, a name in the table of `families/__init__.py`; for one's own

    from xtuner.families import register
    register(MyFamily())

in a config, or in a module that the config imports. `model = dict(type=from_scratch, family="its name", …)` then starts
one, and a folder whose `config.json` names it as `model_type` is read. tests/granite.py is one to copy.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from xtuner.families.chat import ChatTemplate
from xtuner.families.hf_config import FIELDS, Reader
from xtuner.families.network import DecoderConfig


@dataclass(frozen=True)
class Stored:
    """A tensor of a family's files as a part of one of ours.

    Dimension 0 of ours is `groups` equal groups of rows. The file has rows [begin, end) of each, one group after the
    other; all rows of each if `end` is None.
    """

    name: str
    groups: int = 1
    begin: int = 0
    end: int | None = None


class ModelFamily(ABC):
    """Names of a family's files, its settings, and how its models speak."""

    name: str  # `model_type` of its config.json; `--layout`; `family` of a config
    architecture: str  # the class that transformers and servers have for it
    loads_as: str = ""  # the family in whose form transformers loads these networks; "": its own
    tags: tuple[str, ...] = ()  # of a model card
    chat: ChatTemplate | None = None  # of its chat models
    auto_map: ClassVar[Mapping[str, str]] = {}  # of config.json: classes in the files of `--with-code` (export/remote/)
    # special tokens that its tokenizer.model has as unused pieces, and nowhere names: id → (piece, name)
    unnamed_tokens: ClassVar[Mapping[int, tuple[str, str]]] = {}
    fields: frozenset[str] = FIELDS  # of config.json that say what network it is: settings of `from_scratch`
    defaults: ClassVar[Mapping[str, Any]] = {}  # of these where a config leaves them out

    @abstractmethod
    def read_config(self, read: Reader) -> DecoderConfig:
        """The network of a `config.json`. Raises: ConfigError for what we do not compute."""

    @abstractmethod
    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        """A `config.json` with every field written out, since class defaults differ between releases.

        Args:
            dtype: of the weights beside it, such as "bfloat16".

        Raises: ConfigError for a network that the family does not have.
        """

    @abstractmethod
    def stored(self, name: str, c: DecoderConfig) -> tuple[Stored, ...]:
        """Where its files keep our tensor `name`: parts that are all of its rows."""

    def not_served(self, c: DecoderConfig) -> list[str]:
        """What common servers do not read of such a network from this form, in words."""
        return []
