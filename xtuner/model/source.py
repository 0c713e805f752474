"""A model as a config describes it: nothing is in memory until a strategy builds the network on its device."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from xtuner.core import hub, path_kinds
from xtuner.core.errors import ConfigError
from xtuner.families import FAMILIES, NATIVE, read_config, read_model
from xtuner.families.base import ModelFamily
from xtuner.model import attention
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.decoder import CausalLM, DecoderConfig, initialize_parameter
from xtuner.model.ops import matmul
from xtuner.model.ops.matmul import MatmulKind
from xtuner.model.weights import FlatRange, fill_weights, hf_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Adapter(Protocol):
    """Modules that are added to the network before training. Names of the network's own parameters must not change."""

    def apply(self, model: CausalLM) -> None:
        """Change modules of an uninitialized network, possibly on "meta", and freeze what is not trained."""

    def initialize(self, name: str, weight: torch.Tensor) -> None:
        """Set the initial values, in place, of a parameter that the adapter has added: the same on every rank."""


@dataclass(frozen=True)
class TrainedCounts:
    """Numbers of trained parameters."""

    total: int
    block: float  # in a block that has any, on average
    head: int  # in the output layer's matrix


@dataclass(frozen=True)
class ModelSource:
    """A model that is not in memory yet.

    `folder` has weights under the names of `layout`; None means random weights drawn from `seed` (None: the run's
    seed).
    """

    config: DecoderConfig
    folder: Path | None
    layout: ModelFamily = NATIVE
    seed: int | None = None
    recompute: bool = False
    attention: str | None = None  # a backend's name; None: the fastest
    products: str = "own"  # or "fp8", see ops/matmul.py
    adapter: "Adapter | None" = None
    frozen: frozenset[str] = frozenset()  # names of parameters that are not trained, whatever the adapter freezes
    added_rows: int = 0  # of the vocabulary, which the folder's weights lack: they begin as the mean of the others

    def __post_init__(self) -> None:
        if self.attention is not None:
            attention.find_backend(self.attention)

    def build_network(self) -> CausalLM:
        """The network as a strategy trains it."""
        model = CausalLM(self.config)
        if self.adapter is not None:
            self.adapter.apply(model)
        for name, parameter in model.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(False)
        return model

    def build_empty(self, device: torch.device, dtype: torch.dtype) -> CausalLM:
        """The network with uninitialized weights on `device`, configured; on "meta" neither allocated nor
        configured."""
        with torch.device("meta"):
            model = self.build_network().to(dtype)
        if device.type != "meta":
            model = model.to_empty(device=device)
            self.configure(model, device, dtype)
        return model

    @cached_property
    def trained_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the trained parameters, by name as in checkpoints."""
        model = self.build_empty(torch.device("meta"), torch.float32)
        return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}

    def trained_names(self) -> list[str]:
        return list(self.trained_shapes)

    def count_trained(self) -> "TrainedCounts":
        counts = {name: shape.numel() for name, shape in self.trained_shapes.items()}
        ends = {name: counts.get(name, 0) for name in ("model.tok_embeddings.weight", "output.weight")}
        blocks = {name.split(".")[2] for name in counts if name.startswith("model.layers.")}
        head = ends["model.tok_embeddings.weight" if self.config.tie_word_embeddings else "output.weight"]
        total = sum(counts.values())
        return TrainedCounts(total, (total - sum(ends.values())) / max(len(blocks), 1), head)

    def configure(self, model: CausalLM, device: torch.device, dtype: torch.dtype) -> None:
        """Choose the attention backend, the matrix product, and which activations are kept for the backward."""
        self.require_supported(device, dtype)
        model.use_attention(self.attention_backend(device, dtype))
        model.use_matmul(self.products)
        model.keep_activations(ActivationPlan(self.config, dtype.itemsize, 0 if self.recompute else None))

    def require_supported(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ConfigError for settings that cannot be trained with on this device."""
        self.attention_backend(device, dtype)
        c = self.config
        sides = (c.hidden_size, c.qkv_width, c.query_width, c.intermediate_size)
        if why := matmul.why_unsupported(self.products, sides, device, dtype):
            raise ConfigError(
                f"products = {self.products!r} cannot be used: {why}",
                where="model.products",
                do="leave it out: products are then computed in the dtype of everything else",
            )

    def attention_backend(self, device: torch.device, dtype: torch.dtype) -> str:
        """Name of the attention backend that training uses on this device."""
        c = self.config
        return attention.choose_backend(
            device, dtype, c.head_dim, self.attention, c.queries_per_kv_head, c.num_windows > 0
        )

    def fill_weights(
        self, parts: Mapping[str, FlatRange], shapes: Mapping[str, torch.Size], device: torch.device
    ) -> None:
        """Set the initial values of this process's `parts`. One full parameter is in memory at a time.

        Args:
            shapes: of all parameters, by name.
            device: where random values are drawn: the training device, even if `parts` are on another one, as each kind
                of device has its own random numbers.
        """
        own = hf_shapes(self.config)
        if self.folder is not None:
            fill_weights(parts, self.folder, self.layout, self.config, self.added_rows)
        for name, part in parts.items():
            if name in own and self.folder is not None:
                continue
            held, numel = part.values, shapes[name].numel()
            full = torch.empty(shapes[name], device=device)
            if type(part) is FlatRange and (len(held), held.device, held.dtype) == (numel, device, torch.float32):
                full = held.view(shapes[name])
            if name in own:
                initialize_parameter(name, full, self.config, self.seed or 0)
            else:
                assert self.adapter is not None
                self.adapter.initialize(name, full)
            if full.data_ptr() != held.data_ptr():
                part.copy_from(full)

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CausalLM:
        """The network with its weights."""
        device = torch.device(device)
        model = self.build_empty(device, dtype)
        parameters = dict(model.named_parameters())
        parts = {n: FlatRange.from_parameter(p) for n, p in parameters.items()}
        self.fill_weights(parts, {n: p.shape for n, p in parameters.items()}, parts["model.norm.weight"].values.device)
        return model


def from_pretrained(
    pretrained_model_name_or_path: str,
    use_varlen_attn: bool = True,
    activation_checkpointing: bool = False,
    attention: str | None = None,
    products: MatmulKind = "own",
) -> ModelSource:
    """Start from weights in a folder, in the Hugging Face cache, or on a hub.

    Args:
        pretrained_model_name_or_path: a folder with config.json and weights, or a hub id such as
            `internlm/internlm2-7b`. HF_ENDPOINT and HF_HUB_OFFLINE are honoured. No code of the hub is run.
        use_varlen_attn: must be True; documents of a pack do not see each other.
        activation_checkpointing: recompute in the backward what does not fit into memory; on CPUs everything but each
            block's input.
        attention: name of a backend: flash4, varlen, cudnn, flex, loop, or a registered one (model/attention.py); None
            for the fastest that runs.
        products: in what training multiplies with the weights of blocks: "own", the dtype of everything else, or "fp8"
            (Hopper and later GPUs; see ops/matmul.py).
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
    products: MatmulKind = "own",
    seed: int | None = None,
    family: str = NATIVE.name,
    **shape: Any,
) -> ModelSource:
    """Start from random weights of a given shape.

    Args:
        activation_checkpointing, attention, products: see `from_pretrained`.
        seed: of the weights; None for the run's seed (`randomness`, --seed).
        family: name of the model's family: internlm2, llama, or a registered one (families/base.py).
        shape: fields of the family's `config.json`: vocab_size, hidden_size, intermediate_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, rope_theta, max_position_embeddings, …
    """
    _require_varlen(use_varlen_attn)
    found = FAMILIES.find(family, "model.family")
    unknown = sorted(set(shape) - found.fields)
    if unknown:
        raise ConfigError(
            f"from_scratch has no setting {unknown[0]!r}",
            where="model",
            do=f"it takes: {', '.join(sorted(found.fields))}",
        )
    config = read_config({"model_type": found.name, **found.defaults, **shape}, where="model.")
    return ModelSource(config, None, NATIVE, seed, activation_checkpointing, attention, products)


def _require_varlen(use_varlen_attn: bool) -> None:
    if not use_varlen_attn:
        raise ConfigError(
            "use_varlen_attn=False is not supported",
            where="use_varlen_attn",
            why="documents of a pack would attend to each other: the model would learn from unrelated context",
            do="set use_varlen_attn = True",
        )


def require_special_tokens(config: DecoderConfig, where: str) -> None:
    """Raise ConfigError unless the ids that begin and end a text are in the vocabulary: generation needs them.

    A model may have no begin token.

    Args:
        where: prefix of the key in the message.
    """
    for name in ("bos_token_id", "eos_token_id"):
        number = getattr(config, name)
        if number is None and name == "bos_token_id":
            continue  # texts begin without a token
        if number is None or not 0 <= number < config.vocab_size:
            what = f"{name} = {number} is not an id of the vocabulary, 0 … {config.vocab_size - 1}"
            raise ConfigError(what, where=f"{where}{name}")


def load_pretrained(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CausalLM:
    """A network with the weights of a folder or hub id, ready for evaluation. See `CausalLM.forward`."""
    return from_pretrained(str(path)).build(device, dtype).eval()
