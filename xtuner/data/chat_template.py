"""Chat templates by name, for configs: `PROMPT_TEMPLATE.internlm2_chat`, `PROMPT_TEMPLATE.plain`.

`PROMPT_TEMPLATE.tokenizer` is the one in the tokenizer's folder, else that of the model's family.
"""

import importlib

from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.data.tokenizer_template import FROM_TOKENIZER, TOKENIZER
from xtuner.families import chat_templates
from xtuner.families.chat import ChatFormat, ChatTemplate, Message, Piece
from xtuner.families.internlm2 import MARKS as INTERNLM2_MARKS
from xtuner.families.internlm2 import InternLM2

__all__ = ["INTERNLM2_MARKS", "PROMPT_TEMPLATE", "ChatTemplate", "Message", "Piece", "internlm2_chat"]

internlm2_chat = InternLM2.chat.pieces


class _Templates:
    def __getattr__(self, name: str) -> ChatFormat:
        known: dict[str, ChatFormat] = {**chat_templates(), TOKENIZER: FROM_TOKENIZER}
        if name not in known:
            hint = did_you_mean(name, list(known))
            raise AttributeError(f"no template PROMPT_TEMPLATE.{name}.{hint} There are {', '.join(known)}")
        return known[name]


PROMPT_TEMPLATE = _Templates()


def find_template(name: str, where: str = "--template", others: tuple[str, ...] = ()) -> ChatTemplate:
    """The template of that name; `package.module.NAME` is a user's own template, which every process can import.

    Args:
        others: other words that are valid at `where`.

    Raises: ConfigError.
    """
    known = chat_templates()
    if name in known:
        return known[name]
    module, _, last = name.rpartition(".")
    if module:
        try:
            template = getattr(importlib.import_module(module), last)
        except Exception as e:  # from any code of that module
            raise ConfigError(f"the template {name!r} cannot be imported: {e}", where=where) from None
        if not isinstance(template, ChatTemplate):
            raise ConfigError(f"{name} is a {type(template).__name__}, not a ChatTemplate", where=where)
        return template
    names = [*known, *others]
    raise ConfigError(f"no template {name!r}.{did_you_mean(name, names)}", where=where, do=f"one of {', '.join(names)}")
