"""A model as a config describes it: nothing is in memory until a strategy builds the network on its device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from xtuner.model.adapters.base_identity import BaseModel, identify_base
from xtuner.model.adapters.folder import write_record
from xtuner.model.adapters.lora import LoRA, read_lora
from xtuner.model.decoder import CausalLM, DecoderConfig, initialize_parameter
from xtuner.model.flops import num_parameters, training_flops
from xtuner.model.linear import Linear
from xtuner.model.ops import matmul, quantized
from xtuner.model.ops.matmul import MatmulKind
from xtuner.model.ops.quantized import FORMATS, Dequantizer, WeightKind, round_trip
from xtuner.model.parameter_ranges import FlatRange, Receiver, RowNorms, make_range
from xtuner.model.weights import fill_weights, hf_shapes

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
class WeightBytes:
    """Bytes of weights as they are kept for computing: without masters.

    Args:
        ends: of the embedding and the output layer; block: of a block.
        read_back: of quantized weights, in the compute dtype, that exist at the same time.
    """

    total: float
    ends: float
    block: float
    read_back: int = 0


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
    frozen_weights: str = "own"  # or "nf4", "int8": how matrices of blocks that are not trained are kept
    name: str = ""  # of the weights, as the user gave it; of a folder, its absolute path
    added_rows: int = 0  # of the vocabulary, which the folder's weights lack: they begin as the mean of the others

    def __post_init__(self) -> None:
        if self.attention is not None:
            attention.find_backend(self.attention)

    @cached_property
    def base(self) -> BaseModel | None:
        """The model under an adapter, whose weights checkpoints do not contain; None if they contain all weights."""
        if not isinstance(self.adapter, LoRA) or self.folder is None:
            return None
        return BaseModel(self.name, identify_base(self.folder, self.layout, self.config))

    def adapter_record(self) -> dict[str, Any] | None:
        """What checkpoints record of an adapter and its base; None if they contain all weights."""
        if self.base is None or not isinstance(self.adapter, LoRA):
            return None
        return write_record(self.adapter, self.base, self.frozen_weights)

    def with_seed(self, seed: int) -> "ModelSource":
        """The same with the run's seed, unless it has one of its own."""
        adapter = replace(self.adapter, seed=seed) if isinstance(self.adapter, LoRA) else self.adapter
        return replace(self, seed=seed if self.seed is None else self.seed, adapter=adapter)

    def training_flops(self, tokens: int, attention_pairs: float) -> float:
        """`flops.training_flops` of this model as it is trained."""
        added = self.adapter.added_weights if isinstance(self.adapter, LoRA) else 0
        return training_flops(self.config, tokens, attention_pairs, self.frozen_products, added)

    @cached_property
    def frozen_products(self) -> int:
        """Weights that tokens are multiplied by and that are not trained."""
        if self.adapter is None and not self.frozen:
            return 0
        model = self.build_empty(torch.device("meta"), torch.float32)
        matrices = [m for m in model.modules() if isinstance(m, Linear)]
        return sum(math.prod(m.sizes) for m in matrices if not m.weight.requires_grad)

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
            if self.frozen_weights != "own":
                model.quantize_frozen(Dequantizer(self.frozen_weights, dtype))
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

    def count_weight_bytes(self, dtype: torch.dtype) -> WeightBytes:
        """Bytes of all weights in the compute dtype, or as they are kept."""
        c = self.config
        ends = dtype.itemsize * c.vocabulary_parameters
        if not isinstance(self.adapter, LoRA):
            total = dtype.itemsize * num_parameters(c)
            return WeightBytes(total, ends, (total - ends) / c.num_layers)
        if dtype not in self._bytes_with_adapter:
            model = self.build_empty(torch.device("meta"), dtype)
            self._bytes_with_adapter[dtype] = sum(p.nbytes for p in model.parameters())
        total = self._bytes_with_adapter[dtype]
        sides = max(c.qkv_width, c.intermediate_size) * c.hidden_size
        read_back = 2 * dtype.itemsize * sides if self.frozen_weights != "own" else 0
        return WeightBytes(total, ends, (total - ends) / c.num_layers, read_back)

    @cached_property
    def _bytes_with_adapter(self) -> dict[torch.dtype, int]:
        """By compute dtype; counted once: building the network takes 0.1 s, and a plan needs it for every strategy."""
        return {}

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
        self.require_weight_format(device)

    def require_weight_format(self, device: torch.device) -> None:
        """Raise ConfigError if frozen matrices cannot be kept on this device as `frozen_weights` says."""
        columns = sorted({self.config.hidden_size, self.config.query_width, self.config.intermediate_size})
        if why := quantized.why_unsupported(self.frozen_weights, columns, device):
            fitting = [f', or "{kind}"' for kind in FORMATS if not quantized.why_unsupported(kind, columns, device)]
            what = f"frozen_weights = {self.frozen_weights!r} cannot be used: {why}"
            raise ConfigError(what, where="model.frozen_weights", do=f'give "own", the default{"".join(fitting)}')

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
        terms = self.adapter if isinstance(self.adapter, LoRA) else None
        magnitudes = {m for n in own for m in terms.magnitudes_of(n)} if terms else set()
        if self.folder is not None:
            fill_weights(self._with_magnitudes(parts), self.folder, self.layout, self.config, self.added_rows)
        for name, part in parts.items():
            if self.folder is not None and (name in own or name in magnitudes):
                continue
            held, shape = part.values, own.get(name, shapes[name])  # not that of quantized rows
            full = torch.empty(shape, device=device)
            if type(part) is FlatRange and (len(held), held.device, held.dtype) == (full.numel(), device, full.dtype):
                full = held.view(shape)
            if name in own:
                initialize_parameter(name, full, self.config, self.seed or 0)
            else:
                assert self.adapter is not None
                self.adapter.initialize(name, full)
            if full.data_ptr() != held.data_ptr():
                part.copy_from(full)

    def _with_magnitudes(self, parts: Mapping[str, FlatRange]) -> Mapping[str, Receiver]:
        """`parts`, and the weights whose row norms are the first values of magnitudes in `parts`."""
        if not isinstance(self.adapter, LoRA) or not self.adapter.dora:
            return parts
        found: dict[str, Receiver] = dict(parts)
        for name in hf_shapes(self.config):
            held = {rows: parts[n] for n, rows in self.adapter.magnitudes_of(name).items() if n in parts}
            if held:
                found[name] = RowNorms(parts.get(name), held, lambda full: round_trip(full, self.frozen_weights))
        return found

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CausalLM:
        """The network with its weights."""
        device = torch.device(device)
        model = self.build_empty(device, dtype)
        parameters = dict(model.named_parameters())
        parts = {n: make_range(p.data.view(-1), 0, self.frozen_weights) for n, p in parameters.items()}
        self.fill_weights(parts, {n: p.shape for n, p in parameters.items()}, parts["model.norm.weight"].values.device)
        return model


def from_pretrained(
    pretrained_model_name_or_path: str,
    use_varlen_attn: bool = True,
    activation_checkpointing: bool = False,
    attention: str | None = None,
    products: MatmulKind = "own",
    adapter: Mapping[str, Any] | None = None,
    frozen_weights: WeightKind = "own",
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
        adapter: None to train all weights; `dict(type=lora, …)` to train low-rank terms alone (model/adapters/lora.py).
        frozen_weights: with an adapter, how the matrices of blocks are kept: "own", in the dtype of everything else;
            "nf4" in 4 bits (QLoRA), or "int8" (ops/quantized.py).
    """
    _require_varlen(use_varlen_attn)
    folder = hub.resolve(str(pretrained_model_name_or_path))
    path_kinds.require_kind(
        folder, (path_kinds.HF, path_kinds.BARE, path_kinds.UNKNOWN), "pretrained_model_name_or_path", "give {} there"
    )
    layout, config = read_model(folder)
    given = str(pretrained_model_name_or_path)
    name = str(folder.resolve()) if Path(given).expanduser().exists() else given
    terms = None if adapter is None else read_lora(adapter, config)
    if frozen_weights != "own" and terms is None:
        raise ConfigError(
            f'frozen_weights = "{frozen_weights}" without an adapter',
            where="model.frozen_weights",
            why="all weights would be trained, and weights of so few bits cannot take small updates",
            do="add adapter=dict(type=lora, …), or leave frozen_weights out",
        )
    how = (activation_checkpointing, attention, products)
    return ModelSource(config, folder, layout, None, *how, terms, frozen_weights=frozen_weights, name=name)


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
    if "adapter" in shape or "frozen_weights" in shape:
        raise ConfigError(
            "an adapter needs a pretrained model",
            where="model.adapter",
            why="low-rank terms on random weights learn nothing of use, and checkpoints do not contain the base",
            do="use from_pretrained, or leave adapter out",
        )
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


def load_pretrained(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CausalLM:
    """A network with the weights of a folder or hub id, ready for evaluation. See `CausalLM.forward`."""
    return from_pretrained(str(path)).build(device, dtype).eval()
