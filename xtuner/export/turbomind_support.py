"""What LMDeploy reads of a network, and its names of chat templates.

Found by running the converter of 0.9.2.post1 on small models of each family (tests/export/test_turbomind.py) and by
reading 0.18.0. Both drop what they do not read without a message.
"""

import re
from collections.abc import Collection
from typing import Any

from xtuner.families.base import ModelFamily
from xtuner.families.network import DecoderConfig

CONVERTER = "LMDeploy 0.9.2.post1"  # the last version with `lmdeploy convert`
BASE = "base"  # LMDeploy's name for no chat template
# architectures that the converter knows, as far as we have them → features that it reads in addition to SHARED
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "InternLM2ForCausalLM": (),
    "InternLM3ForCausalLM": (),
    "LlamaForCausalLM": (),
    "MistralForCausalLM": (),
    "Qwen2ForCausalLM": ("qkv_bias",),
    "Qwen3ForCausalLM": ("qk_norm", "attention_bias"),
}
SHARED = ("tie_word_embeddings", "rope_scaling")
# feature → keys of config.json that may say so, for messages
_KEYS = {
    "attention_bias": ("attention_bias", "qkv_bias", "bias"),
    "output_bias": ("bias",),
    "mlp_bias": ("mlp_bias", "bias"),
    "sliding_window": ("use_sliding_window", "sliding_window"),
    "rope_scaling.truncate": ("rope_scaling", "rope_parameters"),
}
# LMDeploy's chat templates of these families: its name → (paths that it is for, our name of such a template).
# The first whose pattern matches the path in lower case is chosen.
TEMPLATES = {
    "deepseek-r1": (r".*deepseek-r1", "deepseek_r1_chat"),
    "internlm2": (r"(?=.*internlm2).*(chat|math)", "internlm2_chat"),
    "internlm3": (r"(?=.*internlm3).*instruct", "internlm2_chat"),
    "llama2": (r".*llama-?2", ""),
    "llama3": (r".*llama-?3-", "llama3_chat"),
    "llama3_1": (r".*llama-?3\.[12]-", "llama3_chat"),
    "qwen": (r"(?!.*(qwen2\.5|qwq|qwen3)).*qwen", "qwen_chat"),
    "qwen2d5": (r"(?!.*vl).*qwen2\.5", "qwen_chat"),
    "qwq_preview": (r"(?=.*qwq).*preview", "qwen_chat"),
    "qwq": (r".*qwq", "qwen_chat"),
    "qwen3": (r".*qwen3", "qwen_chat"),
    "mistral": (r"(?=.*instruct).*mistral", "mistral"),
}


def missing_features(layout: ModelFamily, c: DecoderConfig) -> dict[str, str]:
    """Features of the network that the converter drops in this layout, in words, by feature."""
    found = c.special_features()
    if c.qkv_bias and c.output_bias:
        found["attention_bias"] = "biases in attention"
    if c.rope_scaling and not c.rope_scaling.truncate:
        found["rope_scaling.truncate"] = "yarn with borders that are not rounded"
    read = (*SHARED, *ARCHITECTURES.get(layout.architecture, ()))
    return {feature: what for feature, what in found.items() if feature not in read}


def key_of(feature: str, hf: dict[str, Any]) -> str:
    """The key of a `config.json` by which a network has the feature."""
    return next((key for key in _KEYS.get(feature, ()) if hf.get(key)), feature)


def why_not_converted(layout: ModelFamily, c: DecoderConfig) -> str:
    """Why a network in this layout is not converted; "" if it is."""
    if layout.architecture not in ARCHITECTURES:
        return f"{CONVERTER} does not know {layout.architecture}"
    return ", ".join(missing_features(layout, c).values())


def find_engine(layout: ModelFamily, c: DecoderConfig) -> str:
    """The engine of LMDeploy 0.18.0 that computes the network of a Hugging Face folder; "" if neither does.

    Its TurboMind does not know Mistral, and takes yarn's borders from the extended context instead of the original
    one. Its PyTorch engine gives all layers the same sliding window.
    """
    if c.num_windows not in (0, c.num_layers):
        return ""
    has_yarn = c.rope_scaling is not None and c.rope_scaling.kind == "yarn"
    if has_yarn or layout.architecture == "MistralForCausalLM" or missing_features(layout, c):
        return "pytorch"
    return "turbomind"


def template_by_path(path: str) -> str:
    """The chat template that LMDeploy selects for a model of these families, by its path alone."""
    return next((name for name, (paths, _) in TEMPLATES.items() if re.match(paths, path.lower())), BASE)


def find_chat(layout: ModelFamily, special: Collection[str]) -> str:
    """Our name of the chat template whose marks a tokenizer has; "" if it has none.

    Args:
        special: names of the tokenizer's special tokens.
    """
    chat = layout.chat_for(special)
    return chat.name if chat and any(mark in special for mark in chat.turn_marks) else ""


def better_template(template: str, layout: ModelFamily, chat: str) -> str:
    """A template of LMDeploy with the marks of our template `chat`; "" if `template` has them, or chat is "".

    Args:
        template: LMDeploy's name.
    """
    if not chat or (template != BASE and TEMPLATES[template][1] == chat):
        return ""
    suitable = [name for name, (_, ours) in TEMPLATES.items() if ours == chat]
    return layout.name if layout.name in suitable else suitable[0]
