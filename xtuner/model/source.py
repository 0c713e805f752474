"""Where a model comes from: described in a config, made only when a strategy asks for it, on the device it names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from xtuner.core import hub, path_kinds
from xtuner.core.errors import ConfigError
from xtuner.families import FAMILIES, NATIVE, read_config, read_model
from xtuner.families.base import ModelFamily
from xtuner.model import attention
from xtuner.model.activation_memory import Plan
from xtuner.model.decoder import CausalLM, DecoderConfig, initialize
from xtuner.model.ops import matmul as products
from xtuner.model.ops.matmul import Kind
from xtuner.model.weights import Part, fill, hf_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Adapter(Protocol):
    """What a strategy puts into the network before it trains it. Names of the network's own parameters must stay."""

    def apply(self, model: CausalLM) -> None:
        """Change modules of a network that has no contents yet (it may lie on "meta"); freeze what is not to learn."""

    def initialize(self, name: str, weight: torch.Tensor) -> None:
        """First values, in place, of a parameter that the adapter has added: the same on every rank."""


@dataclass(frozen=True)
class ModelSource:
    """A model that is not in memory yet.

    `folder` holds weights under the names of `layout`; None means random weights drawn from `seed`
    (the run's own seed if that is None).
    """

    config: DecoderConfig
    folder: Path | None
    layout: ModelFamily = NATIVE
    seed: int | None = None
    recompute: bool = False
    attention: str | None = None  # a backend's name; None: the fastest
    products: str = "own"  # or "fp8", see ops/products.py
    adapter: "Adapter | None" = None

    def __post_init__(self) -> None:
        if self.attention is not None:
            attention.find(self.attention)

    def network(self) -> CausalLM:
        """The network as a strategy trains it."""
        model = CausalLM(self.config)
        if self.adapter is not None:
            self.adapter.apply(model)
        return model

    def empty(self, device: torch.device, dtype: torch.dtype) -> CausalLM:
        """The network with uninitialised weights on `device`, configured; on "meta" without memory, and not."""
        with torch.device("meta"):
            model = self.network().to(dtype)
        if device.type != "meta":
            model = model.to_empty(device=device)
            self.configure(model, device, dtype)
        return model

    def trained_names(self) -> list[str]:
        """Names of the parameters that are trained, as checkpoints have them."""
        model = self.empty(torch.device("meta"), torch.float32)
        return [name for name, p in model.named_parameters() if p.requires_grad]

    def configure(self, model: CausalLM, device: torch.device, dtype: torch.dtype) -> None:
        """Choose the attention backend, how products are computed, and what the backward keeps."""
        self.require(device, dtype)
        model.use_attention(self.attention_backend(device, dtype))
        model.use_products(self.products)
        model.model.keeps = Plan(self.config, dtype.itemsize, 0 if self.recompute else None).keeps

    def require(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ConfigError for what training cannot do there."""
        self.attention_backend(device, dtype)
        c = self.config
        width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        sides = (c.hidden_size, width, c.num_heads * c.head_dim, c.intermediate_size)
        if why := products.why_not(self.products, sides, device, dtype):
            raise ConfigError(
                f"products = {self.products!r} cannot be used: {why}",
                where="model.products",
                do="leave it out: products are then computed in the dtype of everything else",
            )

    def attention_backend(self, device: torch.device, dtype: torch.dtype) -> str:
        """Name of the one that training uses there."""
        groups = self.config.num_heads // self.config.num_kv_heads
        return attention.choose(device, dtype, self.config.head_dim, self.attention, groups)

    def fill(self, parts: Mapping[str, Part], shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        """Give this process's `parts` their first values. One full parameter more is in memory at a time.

        Args:
            shapes: of all parameters, by name.
            device: where random values are drawn: the one that trains, wherever the parts lie, as each kind of
                device draws its own.
        """
        own = hf_shapes(self.config)
        if self.folder is not None:
            fill(parts, self.folder, self.layout, self.config)
        for name, part in parts.items():
            if name in own and self.folder is not None:
                continue
            held, numel = part.values, shapes[name].numel()
            full = torch.empty(shapes[name], device=device)
            if type(part) is Part and (len(held), held.device, held.dtype) == (numel, device, torch.float32):
                full = held.view(shapes[name])
            if name in own:
                initialize(name, full, self.config, self.seed or 0)
            else:
                assert self.adapter is not None
                self.adapter.initialize(name, full)
            if full.data_ptr() != held.data_ptr():
                part.take(full)

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CausalLM:
        """The network with its weights."""
        device = torch.device(device)
        model = self.empty(device, dtype)
        parameters = dict(model.named_parameters())
        parts = {n: Part.whole(p) for n, p in parameters.items()}
        self.fill(parts, {n: p.shape for n, p in parameters.items()}, parts["model.norm.weight"].values.device)
        return model


def from_pretrained(
    pretrained_model_name_or_path: str,
    use_varlen_attn: bool = True,
    activation_checkpointing: bool = False,
    attention: str | None = None,
    products: Kind = "own",
) -> ModelSource:
    """Start from weights in a folder, in the Hugging Face cache, or on a hub.

    Args:
        pretrained_model_name_or_path: a folder with config.json and weights, or a hub id such as
            `internlm/internlm2-7b`. HF_ENDPOINT and HF_HUB_OFFLINE are honoured. No code of the hub is run.
        use_varlen_attn: must be True; documents of a pack do not see each other.
        activation_checkpointing: compute again in the backward what memory cannot hold; on CPUs all but each block's
            input.
        attention: a backend by name: flash4, varlen, cudnn, flex, loop, or a registered one (model/attention.py);
            without one, the fastest that runs.
        products: what blocks multiply with their weights in while they learn: "own", the dtype of everything else, or
            "fp8" (Hopper and later GPUs; see ops/products.py).
    """
    _require_varlen(use_varlen_attn)
    folder = hub.resolve(str(pretrained_model_name_or_path))
    path_kinds.require_kind(
        folder, (path_kinds.HF, path_kinds.BARE, path_kinds.UNKNOWN), "pretrained_model_name_or_path", "give {} there"
    )
    layout, config = read_model(folder)
    return ModelSource(config, folder, layout, None, activation_checkpointing, attention, products)


def from_scratch(
    use_varlen_attn: bool = True,
    activation_checkpointing: bool = False,
    attention: str | None = None,
    products: Kind = "own",
    seed: int | None = None,
    family: str = NATIVE.name,
    **shape: Any,
) -> ModelSource:
    """Start from random weights of a given shape.

    Args:
        activation_checkpointing, attention, products: as of `from_pretrained`.
        seed: of the weights; None for the run's own (`randomness`, --seed).
        family: of the model, by name: internlm2, llama, or a registered one (families/base.py).
        shape: fields of the family's `config.json`: vocab_size, hidden_size, intermediate_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, rope_theta, max_position_embeddings, …
    """
    _require_varlen(use_varlen_attn)
    its = FAMILIES.find(family, "model.family")
    unknown = sorted(set(shape) - its.fields)
    if unknown:
        raise ConfigError(
            f"from_scratch has no setting {unknown[0]!r}",
            where="model",
            do=f"it takes: {', '.join(sorted(its.fields))}",
        )
    config = read_config({"model_type": its.name, **its.defaults, **shape}, where="model.")
    return ModelSource(config, None, NATIVE, seed, activation_checkpointing, attention, products)


def _require_varlen(use_varlen_attn: bool) -> None:
    if not use_varlen_attn:
        raise ConfigError(
            "use_varlen_attn=False is not supported",
            where="use_varlen_attn",
            why="without it the documents of a pack see each other, and the model learns from what will not be there",
            do="set use_varlen_attn = True",
        )


def require_marks(config: DecoderConfig, where: str) -> None:
    """Raise ConfigError if what begins or ends a text is no token of the vocabulary, for who writes text.

    Args:
        where: stands before a key in the message.
    """
    for name in ("bos_token_id", "eos_token_id"):
        number = getattr(config, name)
        if number is None or not 0 <= number < config.vocab_size:
            what = f"{name} = {number} is not an id of the vocabulary, 0 … {config.vocab_size - 1}"
            raise ConfigError(what, where=f"{where}{name}")


def load_pretrained(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CausalLM:
    """A network with the weights of a folder or hub id, ready to call. See `CausalLM.forward`."""
    return from_pretrained(str(path)).build(device, dtype).eval()
