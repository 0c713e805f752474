"""How a conversation is written as text for a chat model."""

from dataclasses import dataclass
from types import SimpleNamespace


@dataclass(frozen=True)
class ChatTemplate:
    """`{text}` stands for a turn's content. A model stops at any of `stop_words`."""

    system: str
    user: str
    assistant_begin: str
    assistant_end: str
    stop_words: tuple[str, ...]

    def prompt(self, user: str, system: str = "") -> str:
        """The text after which the model answers."""
        opening = self.system.format(text=system) if system else ""
        return opening + self.user.format(text=user) + self.assistant_begin


PROMPT_TEMPLATE = SimpleNamespace(
    internlm2_chat=ChatTemplate(
        system="<|im_start|>system\n{text}<|im_end|>\n",
        user="<|im_start|>user\n{text}<|im_end|>\n",
        assistant_begin="<|im_start|>assistant\n",
        assistant_end="<|im_end|>\n",
        stop_words=("<|im_end|>",),
    ),
    plain=ChatTemplate(system="{text}\n", user="{text}", assistant_begin="", assistant_end="\n", stop_words=()),
)
