"""Hugging Face `config.json` and weight names ↔ ours, for each family we read and write.

Our names are InternLM2's. In the llama layout, `wqkv` falls apart into q, k and v, and names differ; values never do.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import read_json
from xtuner.core.inputs import short_repr
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


def layout_of(hf: Any, where: str = "config.json: ") -> str:
    """The layout that a `config.json` announces.

    Raises: ConfigError for other families; CheckpointError for what is as little a `config.json` as a torn file.
    """
    if not isinstance(hf, dict):
        what = f"config.json holds {short_repr(hf)}, not an object"
        raise CheckpointError(what, where=where.rstrip(": "), do=_COPY)
    kind = hf.get("model_type", "")
    if isinstance(kind, str) and kind in LAYOUTS:
        return kind
    raise ConfigError(
        f"models of type {short_repr(kind)} cannot be read",
        where=f"{where}model_type",
        do=f"known are: {', '.join(LAYOUTS)}",
    )


def read_config(hf: dict[str, Any], where: str = "config.json: ") -> DecoderConfig:
    """A `DecoderConfig` from the contents of a `config.json`.

    Args:
        where: stands before a key in messages.

    Raises: ConfigError for what we do not compute, and for values that describe no network.
    """
    layout = layout_of(hf, where)
    read = _Reader(hf, where)
    absent = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers") if k not in hf]
    absent += [k for k in ("num_attention_heads",) if k not in hf]
    if absent:
        raise ConfigError(f"config.json lacks {', '.join(absent)}", where=where.rstrip(": ."))
    read.only("hidden_act", ("silu", "swish"), "silu")
    read.only("tie_word_embeddings", (False,), False)
    read.only("mlp_bias", (False,), False)
    heads, hidden, vocabulary = read.size("num_attention_heads"), read.size("hidden_size"), read.size("vocab_size")
    kv_heads = read.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise read.wrong("num_key_value_heads", f"{heads} heads cannot share {kv_heads} key-value heads")
    if not hf.get("head_dim") and hidden % heads:
        raise read.wrong("hidden_size", f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = read.size("head_dim", hidden // heads)
    if head_dim % 2:
        at = "head_dim" if hf.get("head_dim") else "hidden_size"
        raise read.wrong(at, f"head_dim {head_dim} is odd, and rotary positions turn pairs")
    theta, scaling = _read_rope(read)
    bias = "bias" if layout == "internlm2" else "attention_bias"
    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=read.size("intermediate_size"),
        num_layers=read.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=read.size("max_position_embeddings", 2048),
        attention_bias=read.only(bias, (True, False), layout == "internlm2"),
        initializer_range=read.number("initializer_range", 0.02),
        bos_token_id=read.token("bos_token_id", 1),
        eos_token_id=read.token("eos_token_id", 2),
        pad_token_id=read.padding(vocabulary),
    )


_COPY = "copy the model's own config.json there again"
# Larger than any network that is. A layer takes a millisecond before anything is known of its weights.
_LARGEST = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 1000,
    "num_attention_heads": 2**13, "num_key_value_heads": 2**13, "head_dim": 2**13, "max_position_embeddings": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class _Reader:
    """Values of a `config.json`, which anybody may have written. `null` is as good as nothing."""

    hf: dict[str, Any]
    where: str

    def wrong(self, key: str, what: str) -> ConfigError:
        return ConfigError(what, where=f"{self.where}{key}", why="no network can be built from it")

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number that a size of a network can be. Of settings with a default, 0 means it."""
        value = self.hf.get(key)
        if default is not None and (value is None or value == 0):
            return default
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if type(whole) is not int or not 1 <= whole <= _LARGEST[key]:
            raise self.wrong(key, f"{key} = {short_repr(value)} is not a whole number from 1 to {_LARGEST[key]:,}")
        return whole

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.hf.get(key)
        return default if value is None else self.above_0(key, value)

    def above_0(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.wrong(key, f"{key} = {short_repr(value)} is not a number above 0")
        return float(value)

    def only(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.hf.get(key, default)
        if not isinstance(value, str | bool) or value not in allowed:
            what = f"{key} = {short_repr(value)} is not supported"
            raise ConfigError(what, where=f"{self.where}{key}", why="the network would differ")
        return value

    def token(self, key: str, default: int) -> Any:
        """An id, the first of several, or None for none."""
        ids = self.hf.get(key, default)
        value = ids[0] if isinstance(ids, list) and ids else ids
        if value is not None and (type(value) is not int or not -(2**31) <= value < 2**31):
            raise self.wrong(key, f"{key} = {short_repr(ids)} is not the id of a token")
        return value

    def padding(self, vocabulary: int) -> int | None:
        value = self.hf.get("pad_token_id")
        if value is not None and (type(value) is not int or not -vocabulary <= value < vocabulary):
            raise self.wrong("pad_token_id", f"pad_token_id = {short_repr(value)} is not below {vocabulary:,}")
        return value

    def inner(self, key: str) -> dict[str, Any]:
        """An object inside, empty if there is none."""
        value = self.hf.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, f"{key} = {short_repr(value)} is not an object")
        return value


def _read_rope(read: _Reader) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta`, `rope_parameters` (transformers 5) or `rotary` (early InternLM2)."""
    new, old, own = (read.inner(key) for key in ("rope_parameters", "rotary", "rope_scaling"))
    theta = read.above_0("rope_theta", new.get("rope_theta") or read.hf.get("rope_theta") or old.get("base") or 10000)
    scaling = own or new or old
    kind: Any = scaling.get("type") or scaling.get("rope_type") or "default"
    factor = scaling.get("factor")
    if (kind in ("default", "origin") and not factor) or (kind == "linear" and factor is None):
        return theta, None
    if kind == "linear" or kind == "dynamic":
        return theta, RopeScaling(kind, read.above_0("rope_scaling.factor", 1.0 if factor is None else factor))
    raise ConfigError(
        f"rope scaling {short_repr(kind)} is not supported",
        where=f"{read.where}rope_scaling",
        do="known are: linear, dynamic",
    )


def read_model(folder: Path) -> tuple[str, DecoderConfig]:
    """(layout, network) of a model's folder. Raises: ConfigError, CheckpointError; both name its `config.json`."""
    path = folder / "config.json"
    hf, where = read_json(path), f"{path}: "
    return layout_of(hf, where), read_config(hf, where)


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
