"""Hugging Face `config.json` and weight names ↔ ours, for each family we read and write.

Our names are InternLM2's. In the llama layout, `wqkv` falls apart into q, k and v, and names differ; values never do.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from xtuner.core.errors import ConfigError
from xtuner.model.decoder import DecoderConfig
from xtuner.model.rope import RopeScaling

Tensors = dict[str, torch.Tensor]
LAYOUTS = ("internlm2", "llama")

_LLAMA_NAMES = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.wo.bias": "self_attn.o_proj.bias",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def hf_names(name: str, layout: str) -> list[str]:
    """Names under which the layout keeps our tensor `name`: one, or q, k and v."""
    if layout == "internlm2":
        return [name]
    in_layer = re.fullmatch(r"(model\.layers\.\d+)\.(.+)", name)
    if not in_layer:
        return [_LLAMA_NAMES[name]]
    layer, rest = in_layer.groups()
    if rest.startswith("attention.wqkv."):
        return [f"{layer}.self_attn.{part}.{rest.rpartition('.')[2]}" for part in _QKV]
    return [f"{layer}.{_LLAMA_NAMES[rest]}"]


def split(name: str, tensor: torch.Tensor, layout: str, c: DecoderConfig) -> Tensors:
    """Our tensor in the layout's form, by the layout's names."""
    names = hf_names(name, layout)
    if len(names) == 1:
        return {names[0]: tensor}
    rows = tensor.view(c.num_kv_heads, c.num_heads // c.num_kv_heads + 2, c.head_dim, *tensor.shape[1:])
    parts = rows[:, :-2], rows[:, -2], rows[:, -1]
    return {n: p.reshape(-1, *tensor.shape[1:]) for n, p in zip(names, parts, strict=True)}


def join(parts: list[torch.Tensor], c: DecoderConfig) -> torch.Tensor:
    """The inverse of `split`: the tensors of `hf_names`, in that order, as ours."""
    if len(parts) == 1:
        return parts[0]
    tail = parts[0].shape[1:]
    q, k, v = (p.reshape(c.num_kv_heads, -1, c.head_dim, *tail) for p in parts)
    return torch.cat((q, k, v), dim=1).reshape(-1, *tail)


def layout_of(hf: dict[str, Any]) -> str:
    """The layout that a `config.json` announces. Raises: ConfigError for other families."""
    kind = hf.get("model_type", "")
    if kind in LAYOUTS:
        return str(kind)
    raise ConfigError(
        f"models of type {kind!r} cannot be read",
        where="config.json: model_type",
        do=f"known are: {', '.join(LAYOUTS)}",
    )


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    """A `DecoderConfig` from the contents of a `config.json`. Raises: ConfigError for what we do not compute."""
    layout = layout_of(hf)
    absent = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers") if k not in hf]
    absent += [k for k in ("num_attention_heads",) if k not in hf]
    if absent:
        raise ConfigError(f"config.json lacks {', '.join(absent)}", where="config.json")
    _refuse(hf, "hidden_act", ("silu", "swish"), "silu")
    _refuse(hf, "tie_word_embeddings", (False,), False)
    _refuse(hf, "mlp_bias", (False,), False)
    heads = int(hf["num_attention_heads"])
    if not hf.get("head_dim") and int(hf["hidden_size"]) % heads:
        raise ConfigError(
            f"hidden_size {hf['hidden_size']} is not a multiple of num_attention_heads {heads}",
            where="config.json: hidden_size",
            why="each head takes an equal part of the hidden state",
        )
    theta, scaling = _read_rope(hf)
    return DecoderConfig(
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        intermediate_size=int(hf["intermediate_size"]),
        num_layers=int(hf["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // heads),
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=int(hf.get("max_position_embeddings", 2048)),
        attention_bias=bool(hf.get("bias" if layout == "internlm2" else "attention_bias", layout == "internlm2")),
        initializer_range=float(hf.get("initializer_range", 0.02)),
        bos_token_id=_first(hf.get("bos_token_id", 1)),
        eos_token_id=_first(hf.get("eos_token_id", 2)),
        pad_token_id=hf.get("pad_token_id"),
    )


def _first(ids: int | list[int]) -> int:
    return ids[0] if isinstance(ids, list) else ids


def _refuse(hf: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> None:
    value = hf.get(key, default)
    if value not in allowed:
        raise ConfigError(
            f"{key} = {value!r} is not supported", where=f"config.json: {key}", why="the network would differ"
        )


def _read_rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta`, `rope_parameters` (transformers 5) or `rotary` (early InternLM2)."""
    new = hf.get("rope_parameters") or {}
    old = hf.get("rotary") or {}
    theta = float(new.get("rope_theta") or hf.get("rope_theta") or old.get("base") or 10000)
    scaling = hf.get("rope_scaling") or new or old
    kind: Any = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind in ("default", "origin", "linear") and not scaling.get("factor"):
        return theta, None
    if kind == "linear" or kind == "dynamic":
        return theta, RopeScaling(kind, float(scaling.get("factor") or 1.0))
    raise ConfigError(
        f"rope scaling {kind!r} is not supported", where="config.json: rope_scaling", do="known are: linear, dynamic"
    )


def write_config(c: DecoderConfig, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of a `config.json` with every field written out, since class defaults differ between releases."""
    scaling = c.rope_scaling and {"type": c.rope_scaling.kind, "factor": c.rope_scaling.factor}
    shape = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    family: dict[str, Callable[[], dict[str, Any]]] = {
        "internlm2": lambda: {  # no auto_map: the .py files it would name are not there
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "bias": c.attention_bias,
            "attn_implementation": "eager",
            **({} if c.head_dim * c.num_heads == c.hidden_size else {"head_dim": c.head_dim}),  # not in the originals
        },
        "llama": lambda: {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": c.attention_bias,
            "mlp_bias": False,
            "head_dim": c.head_dim,
        },
    }
    return {**family[layout](), **shape}
