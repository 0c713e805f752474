"""LoRA: low-rank terms on frozen matrices, `model.adapter = dict(type=lora, …)`.

    y = x W^T + scale · dropout(x) A^T B^T          (Hu et al., arXiv:2106.09685)

A begins as in PEFT and nn.Linear, B at zero: the first step starts from the base model. With `dora` the rows of
W + scale · B A are normalized and multiplied by trained magnitudes (arXiv:2402.09353). The products:
ops/low_rank.py.
"""

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from xtuner.config.build import build, resolve_type
from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.families import FAMILIES, NATIVE
from xtuner.families.base import Stored
from xtuner.families.llama import LLAMA
from xtuner.families.network import DecoderConfig
from xtuner.model.decoder import CausalLM
from xtuner.model.linear import Linear, LowRank, LowRankAdapter, RMSNorm
from xtuner.model.ops.low_rank import Dropout, Rows

WHERE = "model.adapter"
MATRICES = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
SHORT = {"attention.wo": "o", "feed_forward.w1": "gate", "feed_forward.w3": "up", "feed_forward.w2": "down"}
SCALINGS = {"alpha/rank": lambda alpha, rank: alpha / rank, "alpha/sqrt(rank)": lambda alpha, rank: alpha / rank**0.5}
TRAINABLE = ("norms", "embedding", "output")
OUTSIDE = {  # names of what no adapter is on → the part of TRAINABLE
    "lm_head": "output", "output": "output",
    "embed_tokens": "embedding", "tok_embeddings": "embedding", "embedding": "embedding",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A part of one kind of matrix, in every block."""

    matrix: str  # of MATRICES
    part: str  # its name in parameters
    rows: Rows


@dataclass(frozen=True)
class LoRA:
    """See `lora` for the settings; `targets` and `config` are those of one network.

    Args:
        seed: of A.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    config: DecoderConfig
    dropout: float = 0.0
    scaling: str = "alpha/rank"
    dora: bool = False
    train: tuple[str, ...] = ()
    seed: int = field(default=0, compare=False)

    @property
    def scale(self) -> float:
        return float(SCALINGS[self.scaling](self.alpha, self.rank))

    def describe(self) -> str:
        """One line for people."""
        kind = "DoRA" if self.dora else "LoRA"
        more = f", dropout {self.dropout:g}" if self.dropout else ""
        full = f", and {', '.join(self.train)} in full" if self.train else ""
        names = ", ".join(target.part for target in self.targets)
        return f"{kind} of rank {self.rank} on {names}{full} (B A times {self.scale:g}{more})"

    def apply(self, model: CausalLM) -> None:
        """Freeze the network and add the terms."""
        model.requires_grad_(False)
        for i, block in enumerate(model.model.layers):
            for j, matrix in enumerate(dict.fromkeys(t.matrix for t in self.targets)):
                linear: Any = block.get_submodule(matrix)
                parts = {t.part: self._factors(linear, t) for t in self.targets if t.matrix == matrix}
                dropout = Dropout(self.dropout, i * len(MATRICES) + j, model.dropout_seed) if self.dropout else None
                linear.adapter = LowRankAdapter(parts, self.scale, dropout)
        for name in self.train:
            for module in _trained_modules(model, name):
                module.requires_grad_(True)

    def _factors(self, linear: Linear, target: Target) -> LowRank:
        columns, rows = linear.sizes
        return LowRank(columns, self.rank, target.rows, count_rows(target.rows, rows), self.dora)

    def initialize(self, name: str, weight: torch.Tensor) -> None:
        """A as nn.Linear, drawn by name; B zero; magnitudes are set where the base is read (`ModelSource`)."""
        kind = name.rpartition(".")[2]
        if kind == "A":
            generator = torch.Generator(weight.device).manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        elif kind == "B":
            nn.init.zeros_(weight)

    def magnitudes_of(self, name: str) -> dict[str, Rows]:
        """Names of the magnitudes that begin as the row norms of the network's weight `name`, and which rows'."""
        if not self.dora:
            return {}
        matrix = name.removesuffix(".weight")
        kind = ".".join(matrix.split(".")[3:])
        return {f"{matrix}.adapter.{t.part}.magnitude": t.rows for t in self.targets if t.matrix == kind}

    @cached_property
    def added_weights(self) -> int:
        """Numbers in all A and B: weights that every token is multiplied by."""
        with torch.device("meta"):
            model = CausalLM(self.config)
            self.apply(model)
        return sum(p.numel() for n, p in model.named_parameters() if ".adapter." in n and p.dim() == 2)

    def activation_bytes(self, itemsize: int) -> int:
        """Bytes of a token that exist at the same time while terms are computed: products with A and B; with dropout or
        magnitudes also two tensors as wide as the widest input or output."""
        c, terms = self.config, max(Counter(t.matrix for t in self.targets).values())
        wide = max(c.intermediate_size, c.qkv_width) if self.dropout or self.dora else 0
        return itemsize * (4 * terms * self.rank + 2 * wide)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint records; `from_json` reads it."""
        names = [t.part for t in self.targets]
        return {"type": "lora", "rank": self.rank, "alpha": self.alpha, "targets": names, "dropout": self.dropout,
                "scaling": self.scaling, "dora": self.dora, "train": list(self.train)}  # fmt: skip


def lora(
    rank: int = 16,
    alpha: float = 32.0,
    targets: str | Sequence[str] = "all",
    dropout: float = 0.0,
    scaling: str = "alpha/rank",
    dora: bool = False,
    train: Sequence[str] = (),
) -> Mapping[str, Any]:
    """The settings of LoRA, checked as far as they do not depend on the network; see config/settings.py.

    Args:
        targets: which matrices: "all", or names: q, k, v, o, gate, up, down; the decoder's wqkv, wo, w1, w3, w2; or
            those of the model's family, such as q_proj.
        scaling: what B A is multiplied by; "alpha/sqrt(rank)" is rsLoRA (arXiv:2312.03732).
        train: further parts of the network that are trained in full: "norms", "embedding", "output".
    """
    given = dict(rank=rank, alpha=alpha, targets=targets, dropout=dropout, scaling=scaling, dora=dora, train=train)
    SCHEMA.require(WHERE, **given)
    return given


def read_lora(given: Any, c: DecoderConfig) -> LoRA:
    """The adapter of a config, `dict(type=lora, …)`. Raises: ConfigError."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind is None or resolve_type(kind, f"{WHERE}.type") is not lora:
        what = f"adapter = {given!r} is not one that xtuner knows"
        do = "write dict(type=lora, rank=…, …), with `from xtuner.model import lora`"
        raise ConfigError(what, where=WHERE, do=do)
    return build_lora(build(given, WHERE), c)


def build_lora(given: Mapping[str, Any], c: DecoderConfig) -> LoRA:
    """The adapter of a network. Raises: ConfigError for names and a rank that do not fit it."""
    targets = find_targets(given["targets"], c)
    for i, name in enumerate(given["train"]):
        if name not in TRAINABLE:
            raise ConfigError(
                f"train has no part {name!r}.{did_you_mean(str(name), list(TRAINABLE))}",
                where=f"{WHERE}.train.{i}",
                do=f"choose of {', '.join(TRAINABLE)}",
            )
        if name == "output" and c.tie_word_embeddings:
            raise ConfigError(
                "the output layer has no weight of its own",
                where=f"{WHERE}.train.{i}",
                why="this model multiplies with the embedding (tie_word_embeddings)",
                do='give "embedding", which trains both',
            )
    found = LoRA(
        **{**given, "alpha": float(given["alpha"]), "targets": targets, "train": tuple(given["train"])}, config=c
    )
    with torch.device("meta"):
        block = CausalLM(c).model.layers[0]
    for target in targets:
        linear: Any = block.get_submodule(target.matrix)
        smaller = min(linear.sizes[0], count_rows(target.rows, linear.sizes[1]))
        if found.rank > smaller:
            raise ConfigError(
                f"rank = {found.rank} is above the smaller side of {target.part}, {smaller}",
                where=f"{WHERE}.rank",
                why="a product of two factors has at most that rank: the rest would only cost memory and time",
                do=f"set rank to {smaller} or less, or leave {target.part} out of targets",
            )
    return found


def count_rows(rows: Rows, total: int) -> int:
    """Number of these rows in a matrix of `total`."""
    if rows.end is None:
        return total
    return (rows.end - rows.begin) * rows.groups


def find_targets(given: str | Sequence[str], c: DecoderConfig) -> tuple[Target, ...]:
    """The parts of matrices that are named, in the network's order.

    Raises: ConfigError for names that match nothing, or that name the same rows twice.
    """
    named = dict(name_targets(c))
    where = f"{WHERE}.targets"
    if given == "all":
        return _all_targets(c)
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise ConfigError("targets names no matrix", where=where, do='give "all", or a list of names')
    for i, name in enumerate(names):
        if name in OUTSIDE:
            raise ConfigError(
                f"there is no matrix {name!r} in a block",
                where=f"{where}.{i}" if not isinstance(given, str) else where,
                why="adapters are on those; what is outside of blocks is trained in full, or not at all",
                do=f'leave it out of targets, and give train=["{OUTSIDE[name]}"] to train it',
            )
        if name not in named:
            raise ConfigError(
                f"there is no matrix {name!r}.{did_you_mean(str(name), [*named, 'all'])}",
                where=f"{where}.{i}" if not isinstance(given, str) else where,
                why="nothing would be trained there",
                do=f'choose of {", ".join(named)}; or "all"',
            )
    found = {named[name]: name for name in names}
    for target, name in found.items():
        other = next(
            (n for t, n in found.items() if t.matrix == target.matrix and t.rows == Rows() != target.rows), None
        )
        if other:
            raise ConfigError(
                f"{other} contains {name}",
                where=where,
                why="the same rows would have two terms",
                do=f"leave one of them out: {other} has one pair of factors for all rows, q, k and v have one each",
            )
    return tuple(sorted(found, key=lambda t: (MATRICES.index(t.matrix), t.rows.begin)))


def name_targets(c: DecoderConfig) -> Iterator[tuple[str, Target]]:
    """All names of targets, and what each stands for."""
    families = dict.fromkeys((FAMILIES.get(c.family, NATIVE), LLAMA))  # Llama's names are those that people know
    for matrix in MATRICES:
        whole = Target(matrix, matrix.rpartition(".")[2], Rows())
        yield whole.part, whole
        yield SHORT.get(matrix, whole.part), whole
        parts = _split_qkv(c) if matrix == "attention.wqkv" else []
        yield from ((part.part, part) for part in parts)
        for stored in (s for family in families for s in family.stored(f"model.layers.0.{matrix}.weight", c)):
            same = (part for part in (whole, *parts) if part.rows == stored_rows(stored))
            if target := next(same, None):
                yield stored.name.split(".")[-2], target


def _all_targets(c: DecoderConfig) -> tuple[Target, ...]:
    """All matrices of blocks, divided as in the family's files."""
    family = FAMILIES.get(c.family, NATIVE)
    found = []
    for matrix in MATRICES:
        divided = matrix == "attention.wqkv" and len(family.stored(f"model.layers.0.{matrix}.weight", c)) > 1
        found += _split_qkv(c) if divided else [Target(matrix, matrix.rpartition(".")[2], Rows())]
    return tuple(found)


def _split_qkv(c: DecoderConfig) -> list[Target]:
    matrix = "attention.wqkv"
    stored = LLAMA.stored(f"model.layers.0.{matrix}.weight", c)
    return [Target(matrix, part, stored_rows(s)) for part, s in zip("qkv", stored, strict=True)]


def stored_rows(stored: Stored) -> Rows:
    """The rows of ours that a tensor of a family's files has."""
    return Rows(stored.groups, stored.begin, stored.end)


def _trained_modules(model: CausalLM, name: str) -> list[nn.Module]:
    if name == "norms":
        return [module for module in model.modules() if isinstance(module, RMSNorm)]
    return [model.model.tok_embeddings if name == "embedding" else model.output]
