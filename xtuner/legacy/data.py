"""Adapters from the tokenizers, samplers, collate functions and templates of XTuner 0.1 and 0.2 to ours.

`compat/translate.py` replaces the old names by these.
"""

from collections.abc import Sized
from typing import Any

from xtuner.compat.settings import HUB
from xtuner.config.adapter import adapter
from xtuner.config.schema import Allowed
from xtuner.core.errors import ConfigError
from xtuner.data import tokenizer
from xtuner.data.chat_template import PROMPT_TEMPLATE
from xtuner.data.loading import sampler
from xtuner.families.chat import ChatFormat

_SEED = 1024  # the old sampler ignores its `seed` and uses this one
_VARLEN = {
    "use_varlen_attn": Allowed(
        (True,), "without it the documents of a pack see each other", "set use_varlen_attn = True"
    )
}
_ITSELF = "the loader builds batches from packs itself"


class AutoTokenizer:
    """Replaces transformers' class of this name in a config."""

    @staticmethod
    @adapter(
        no_effect={
            "trust_remote_code": ("code of a hub is never run; tokenizer.model or tokenizer.json is read", bool),
            "padding_side": ("packs have no padding", str),
            "use_fast": ("tokenizer.model is read if there is one, else tokenizer.json", bool | None),
            "encode_special_tokens": ("only ChatGLM's tokenizer has it", bool | None),
        },
        allowed=HUB,
    )
    def from_pretrained(pretrained_model_name_or_path: str) -> tokenizer.Tokenizer:
        return tokenizer.load_tokenizer(pretrained_model_name_or_path)


@adapter(no_effect={"seed": ("the old sampler ignores it and always uses 1024; so does this one", int | None)})
def InternRepoSampler(dataset: Sized, shuffle: bool = True) -> sampler.InternRepoSampler:
    return sampler.InternRepoSampler(dataset, shuffle, _SEED)


InternlmRepoSampler = InternRepoSampler  # its first name


@adapter(
    no_effect={
        "round_up": ("no pack is repeated; the last packs that do not fill an iteration are left out of an epoch", bool)
    }
)
def DefaultSampler(dataset: Sized, shuffle: bool = True, seed: int | None = None) -> sampler.InternRepoSampler:
    """mmengine's sampler: also one permutation per epoch, but a different one (random without a seed)."""
    return sampler.InternRepoSampler(dataset, shuffle, _SEED if seed is None else seed)


@adapter(_ITSELF, allowed=_VARLEN, ignored={"packed_length": int | None})
def intern_repo_collate_fn(instances: Any = None) -> Any:
    return instances


@adapter(_ITSELF, allowed=_VARLEN, ignored={"pad_index": int, "return_hf_format": bool})
def default_collate_fn(instances: Any = None) -> Any:
    return instances


def template_named(name: str) -> ChatFormat:
    """The template of a name as in dumped configs, `….PROMPT_TEMPLATE.internlm2_chat`. Raises: ConfigError."""
    try:
        template: ChatFormat = getattr(PROMPT_TEMPLATE, name.rpartition(".")[2])
    except AttributeError as e:
        raise ConfigError(str(e), where="prompt_template") from None
    return template
