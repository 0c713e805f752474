"""`config.yaml` of a converted directory: written key for key like lmdeploy 0.9.2.post1, and read.

It needs a small part of YAML only: nested maps with sorted keys, lists of numbers, plain values.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.families.base import ModelFamily
from xtuner.families.network import DecoderConfig

_ROPE = {
    "attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "high_freq_factor": None,
    "low_freq_factor": None, "max_position_embeddings": None, "mrope_section": None,
    "original_max_position_embeddings": None, "type": "default",
}  # fmt: skip
_ATTENTION = {"cache_block_seq_len": 64, "softmax_scale": 0.0, "use_logn_attn": 0}
_LORA = {
    "lora_max_wo_r": 0, "lora_policy": "", "lora_r": 0, "lora_rank_pattern": "", "lora_scale": 0.0,
    "lora_scale_pattern": "",
}  # fmt: skip
_MODEL = {  # features that these models do not have
    "expert_inter_size": 0, "expert_num": [], "experts_per_token": 0, "group_size": 0,
    "kv_lora_rank": 0, "model_format": "hf", "moe_group_num": 1, "moe_shared_gate": False, "norm_topk_prob": False,
    "q_lora_rank": 0, "qk_rope_dim": 0, "routed_scale": 1.0, "topk_group": 1,
    "topk_method": "greedy", "tune_layer_num": 1, "v_head_dim": 0,
}  # fmt: skip


@dataclass(frozen=True)
class TurboMindSource:
    """A Hugging Face folder to convert."""

    folder: Path
    hf: dict[str, Any]  # its config.json
    layout: ModelFamily
    config: DecoderConfig
    tokenizer_size: int
    chat: str  # our name of the chat template whose marks its tokenizer has; "" for none

    def dtype(self, wanted: str) -> str:
        """The dtype to write. "auto" follows LMDeploy: bf16 stays, everything else becomes fp16."""
        found = self.hf.get("torch_dtype") or self.hf.get("dtype")
        return wanted if wanted != "auto" else "bfloat16" if found == "bfloat16" else "float16"


def _rope(source: TurboMindSource) -> dict[str, Any]:
    """Positions; numbers are written as config.json has them: 2 or 2.0."""
    hf, c = source.hf, source.config
    rope: dict[str, Any] = {**_ROPE, "base": c.rope_theta, "dim": c.head_dim}
    scaling, written = c.rope_scaling, hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not scaling:
        return rope

    def as_written(name: str, otherwise: Any) -> Any:
        return otherwise if written.get(name) is None else written[name]

    rope |= {"type": scaling.kind, "factor": as_written("factor", scaling.factor)}
    if scaling.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {name: as_written(name, getattr(scaling, name)) for name in names}
    if scaling.kind == "dynamic":
        rope["max_position_embeddings"] = c.max_position_embeddings
    if scaling.kind == "yarn":
        # lmdeploy divides max_position_embeddings by the original context instead, which is the factor if they agree
        derived = written.get("original_max_position_embeddings") is not None
        rope |= {
            "factor": scaling.factor if derived else rope["factor"],
            "max_position_embeddings": scaling.original_max_position_embeddings,
            "attention_factor": as_written("attention_factor", scaling.cos_sin_factor),
            "beta_fast": as_written("beta_fast", scaling.beta_fast),
            "beta_slow": as_written("beta_slow", scaling.beta_slow),
        }
    return rope


def render_yaml(source: TurboMindSource, tp: int, dtype: str, model_name: str, chat_template: str) -> str:
    """The file's text."""
    c = source.config
    model = {
        **_MODEL,
        "attn_tp_size": tp,
        "mlp_tp_size": tp,
        "chat_template": chat_template,
        "model_name": model_name,
        "model_arch": source.layout.architecture,
        "vocab_size": c.vocab_size,
        "embedding_size": c.vocab_size,
        "tokenizer_size": min(source.tokenizer_size, c.vocab_size),
        "num_layer": c.num_layers,
        "hidden_units": c.hidden_size,
        "inter_size": [c.intermediate_size + -c.intermediate_size % tp] * c.num_layers,
        "head_num": c.num_heads,
        "kv_head_num": max(c.num_kv_heads, tp),
        "size_per_head": c.head_dim,
        "attn_bias": int(c.attention_bias),
        "qk_norm": c.qk_norm,
        "norm_eps": c.rms_norm_eps,
        "session_len": c.max_position_embeddings,
        "weight_type": dtype,
    }
    attention = {**_ATTENTION, "max_position_embeddings": c.max_position_embeddings, "rope_param": _rope(source)}
    return _yaml({"attention_config": attention, "lora_config": _LORA, "model_config": model})


def _yaml(values: dict[str, Any], indent: str = "") -> str:
    text = ""
    for key, value in sorted(values.items()):
        text += f"{indent}{key}:"
        if isinstance(value, dict):
            text += "\n" + _yaml(value, indent + "  ")
        elif isinstance(value, list) and value:
            text += "\n" + "".join(f"{indent}- {_scalar(v)}\n" for v in value)
        else:
            text += f" {_scalar(value)}\n"
    return text


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        digits = repr(value)
        return digits if "." in digits else digits.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as a string
    if isinstance(value, str):
        words = value.lower() in ("yes", "no", "on", "off", "true", "false", "null")
        return value if re.fullmatch(r"[A-Za-z][\w./-]*", value) and not words else "'" + value.replace("'", "''") + "'"
    return str(value)


def flatten_yaml(text: str) -> dict[str, str]:
    """Parse such a file, ours or LMDeploy's: `model_config.head_num` → `32`; lists as values joined by spaces."""
    found: dict[str, str] = {}
    path: list[str] = []
    for line in text.splitlines():
        words = line.strip()
        if words.startswith("- "):
            found[".".join(path)] += words[1:]
            continue
        key, _, value = words.partition(":")
        path = [*path[: (len(line) - len(line.lstrip())) // 2], key]
        value = value.strip()
        found[".".join(path)] = value[1:-1].replace("''", "'") if value.startswith("'") else value
    return found


def find_difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """The first difference among keys that both have, or "". Other LMDeploy versions write other keys, too."""
    for key, value in wanted.items():
        if found.get(key, value) != value:
            return f"config.yaml says {key}: {found[key]} where the source gives {value}"
    return ""
