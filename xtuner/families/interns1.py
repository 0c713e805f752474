"""Intern-S1-mini: the text part only, which is a Qwen3 network. It is read here, and trained and exported as Qwen3."""

import re
from typing import Any, ClassVar

from xtuner.core.foreign_inputs import short_repr
from xtuner.families.base import Stored
from xtuner.families.hf_config import Reader
from xtuner.families.network import DecoderConfig
from xtuner.families.qwen3 import Qwen3


class InternS1(Qwen3):
    name = "interns1"
    trains_as = Qwen3.name
    released: ClassVar = ()
    unread = ("model.vision_tower.", "model.multi_modal_projector.")

    def read_config(self, read: Reader) -> DecoderConfig:
        text = Reader(read.inner("text_config"), f"{read.where}text_config.")
        kind = text.hf.get("model_type")
        if kind != Qwen3.name:
            what = f"text_config.model_type = {short_repr(kind)} is not {Qwen3.name}"
            raise text.wrong("model_type", what)
        outer, inner = (hf.get("tie_word_embeddings") for hf in (read.hf, text.hf))
        if None not in (outer, inner):
            text.require_equal("tie_word_embeddings of the complete model", outer, "tie_word_embeddings", inner)
        tied = outer if inner is None else inner
        return super().read_config(Reader({**text.hf, "tie_word_embeddings": tied}, text.where))

    def write_config(self, c: DecoderConfig, dtype: str) -> dict[str, Any]:
        self.require_expressible({"no vision tower": True})
        return {}

    def stored(self, name: str, c: DecoderConfig) -> tuple[Stored, ...]:
        inner = super().stored(name, c)
        return tuple(
            Stored(re.sub(r"^model\.", "model.language_model.", s.name), s.groups, s.begin, s.end) for s in inner
        )


INTERNS1 = InternS1()
