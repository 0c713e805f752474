"""Workloads for ours and for peers: model shapes, cases, documents and packs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtuner.data import InternRepoSampler, build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.data.format.writer import write_bin
from xtuner.data.packing.pack import PackedDataset
from xtuner.model import from_scratch
from xtuner.model.decoder import DecoderConfig

BENCHMARKS = Path(__file__).resolve().parents[1]
PACK = 32768
PACKS = 64  # written for every case, so that all measurements use the same ones
TINY_PACK = 512  # for CPUs
MEDIAN = 700  # tokens of a document


@dataclass(frozen=True)
class Shape:
    template: str  # the shipped config
    hidden: int
    layers: int
    heads: int
    ffn: int
    kv_heads: int = 8
    vocabulary: int = 92544
    family: str = "internlm2"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def fields(self) -> dict[str, Any]:
        """Arguments of `from_scratch`."""
        return dict(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.ffn,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=PACK, family=self.family, eos_token_id=2,
        )  # fmt: skip

    @property
    def config(self) -> DecoderConfig:
        return from_scratch(**self.fields()).config


SHAPES = {
    "1.8b": Shape("1_8b", 2048, 24, 16, 8192),
    "7b": Shape("7b", 4096, 32, 32, 14336),
    "20b": Shape("20b", 6144, 48, 48, 16384),
    "llama3.1-8b": Shape("7b", 4096, 32, 32, 14336, 8, 128256, "llama"),
    "qwen3-8b": Shape("7b", 4096, 36, 32, 12288, 8, 151936, "qwen3"),
    "short": Shape("1_8b", 2048, 4, 16, 8192),  # 1.8B's width, 4 of its layers: for faults, not for speed
    "demo": Shape("tiny", 256, 4, 4, 768, 2, 2048),  # learns on a CPU in minutes
    "tiny": Shape("1_8b", 64, 2, 4, 128, 2, 512),  # for CPUs
}
VOCABULARY = SHAPES["7b"].vocabulary


@dataclass(frozen=True)
class Terms:
    """LoRA on all seven matrices of every block; the matrices themselves are frozen, as embedding and output layer are.

    Args:
        weights: how frozen matrices of blocks are kept: "own" (bf16) or "nf4" (QLoRA, with double quantization).
    """

    weights: str
    rank: int = 16

    TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

    @property
    def alpha(self) -> int:
        return 2 * self.rank

    @property
    def name(self) -> str:
        return ADAPTERS[self.weights] + (f" r{self.rank}" if self.rank != Terms.rank else "")


ADAPTERS = {"own": "lora", "nf4": "qlora"}  # Terms.weights → the name of the method


@dataclass(frozen=True)
class Case:
    """`long`: every pack is one document; else document lengths are lognormal. `pack`: tokens of one."""

    name: str
    shape: str
    states: str  # bytes of AdamW's state a parameter: fp32 16 (gradients in fp32) or 18, bf16 8, 8bit 6
    long: bool = False
    pack: int = PACK
    terms: Terms | None = None

    def write_data(self, folder: Path, packs: int = PACKS, vocabulary: int = 0) -> None:
        """Its documents: the same for all sizes of packs, unless a pack is one document."""
        write_data(folder, packs, self.pack if self.long else 0, vocabulary=vocabulary or VOCABULARY)


CASES = {
    case.name: case
    for case in (
        Case("7b", "7b", "8bit"),
        Case("7b-long", "7b", "8bit", long=True),
        Case("20b", "20b", "8bit"),
        Case("1.8b", "1.8b", "fp32"),
        Case("1.8b-long", "1.8b", "fp32", long=True),
        Case("llama3.1-8b", "llama3.1-8b", "8bit"),
        Case("qwen3-8b", "qwen3-8b", "8bit"),
    )
}


def draw_documents(tokens: int, vocabulary: int, median: int, longest: int, seed: int) -> list[list[int]]:
    """Random documents of about `tokens` tokens in all."""
    draw = np.random.RandomState(seed)
    found, total = [], 0
    while total < tokens:
        length = int(min(max(draw.lognormal(np.log(median), 1.0), 2), longest))
        found.append(draw.randint(3, vocabulary, size=length).tolist())
        total += length
    return found


def write_data(folder: Path, packs: int, length: int = 0, pack: int = PACK, vocabulary: int = VOCABULARY) -> None:
    """Write documents for that number of packs: all of `length` tokens, or of lognormal lengths."""
    if length:
        texts = draw_documents_of([length] * (packs * pack // length), vocabulary)
    else:
        texts = draw_documents(packs * pack, vocabulary, MEDIAN * pack // PACK, pack, 0)
    write_bin(folder / "synthetic.bin", texts)


def write_mixed(folder: Path, packs: int, pack: int = PACK, vocabulary: int = VOCABULARY) -> None:
    """Write documents of mixed lengths. A third of the tokens is in documents of a quarter to one pack, a sixth in
    documents of two packs (each fills at least one pack), the rest in documents of lognormal lengths."""
    draw, lengths = np.random.RandomState(1), [2 * pack] * (packs // 12)
    while sum(lengths) < packs * pack // 2:
        lengths.append(int(draw.randint(pack // 4, pack)))
    short = draw_documents(packs * pack - sum(lengths), vocabulary, MEDIAN * pack // PACK, pack, 0)
    write_bin(folder / "synthetic.bin", [*draw_documents_of(lengths, vocabulary), *short])


def draw_documents_of(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Random documents of the given lengths."""
    draw = np.random.RandomState(0)
    return [draw.randint(3, vocabulary, size=length).tolist() for length in lengths]


def packs_in_training_order(folder: Path, pack: int = PACK) -> tuple[PackedDataset, list[int]]:
    """The packs of a folder, and their numbers in the order in which `xtuner train` uses them."""
    described = dict(type=load_intern_repo_tokenized_dataset, folder=str(folder))
    packs = build_packed_dataset(described, pack, seed=1024)
    return packs, [int(n) for n in InternRepoSampler(packs, rank=0, world_size=1, seed=1024).permutation()]


def add_to_python_path(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables with which another process can import benchlib."""
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(BENCHMARKS), environ.get("PYTHONPATH")]))}


def describe_machine() -> dict[str, str]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"gpu": gpu, "torch": torch.__version__}
