"""The cases that are measured, for ours and for peers: shape, state of AdamW, documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from synthetic import documents

from xtuner.data import InternRepoSampler, build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.data.format.writer import write_bin
from xtuner.data.packing.pack import PackedDataset
from xtuner.model import from_scratch
from xtuner.model.decoder import DecoderConfig

PACK = 32768
PACKS = 64  # written for every case, so that all that is measured takes the same ones
MEDIAN = 700  # tokens of a document


@dataclass(frozen=True)
class Shape:
    template: str  # whose settings a case takes
    hidden: int
    layers: int
    heads: int
    ffn: int
    kv_heads: int = 8
    vocabulary: int = 92544

    def fields(self) -> dict[str, int]:
        """As `from_scratch` takes them."""
        return dict(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.ffn,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=PACK,
        )  # fmt: skip

    @property
    def config(self) -> DecoderConfig:
        return from_scratch(**self.fields()).config


SHAPES = {
    "1.8b": Shape("1_8b", 2048, 24, 16, 8192),
    "7b": Shape("7b", 4096, 32, 32, 14336),
    "20b": Shape("20b", 6144, 48, 48, 16384),
    "short": Shape("1_8b", 2048, 4, 16, 8192),  # 1.8B's width, 4 of its layers: for faults, not for speed
    "tiny": Shape("1_8b", 64, 2, 4, 128, 2, 512),  # for CPUs
}
VOCABULARY = SHAPES["7b"].vocabulary


@dataclass(frozen=True)
class Case:
    """`long`: every pack is one document; else lengths are lognormal."""

    name: str
    shape: str
    states: str  # bytes of AdamW's state a parameter: fp32 16 (gradients in fp32) or 18, bf16 8, 8bit 6
    long: bool = False


CASES = {
    case.name: case
    for case in (
        Case("7b", "7b", "8bit"),
        Case("7b-long", "7b", "8bit", long=True),
        Case("1.8b", "1.8b", "fp32"),
        Case("1.8b-long", "1.8b", "fp32", long=True),
    )
}


def write_data(folder: Path, packs: int, length: int = 0, pack: int = PACK, vocabulary: int = VOCABULARY) -> None:
    """Documents for so many packs, all of `length` tokens, or of lognormal lengths."""
    if length:
        texts = of_lengths([length] * (packs * pack // length), vocabulary)
    else:
        texts = documents(packs * pack, vocabulary, MEDIAN * pack // PACK, pack, 0)
    write_bin(folder / "synthetic.bin", texts)


def write_mixed(folder: Path, packs: int, pack: int = PACK, vocabulary: int = VOCABULARY) -> None:
    """A third of the tokens in documents of a quarter of a pack up to a pack, a sixth in documents of two packs, one of
    which fills a pack wherever it begins, the others of lognormal lengths."""
    draw, lengths = np.random.RandomState(1), [2 * pack] * (packs // 12)
    while sum(lengths) < packs * pack // 2:
        lengths.append(int(draw.randint(pack // 4, pack)))
    short = documents(packs * pack - sum(lengths), vocabulary, MEDIAN * pack // PACK, pack, 0)
    write_bin(folder / "synthetic.bin", [*of_lengths(lengths, vocabulary), *short])


def of_lengths(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Random documents."""
    draw = np.random.RandomState(0)
    return [draw.randint(3, vocabulary, size=length).tolist() for length in lengths]


def in_order(folder: Path, pack: int = PACK) -> tuple[PackedDataset, list[int]]:
    """The packs of a folder, and their numbers in the order in which `xtuner train` takes them."""
    described = dict(type=load_intern_repo_tokenized_dataset, folder=str(folder))
    packs = build_packed_dataset(described, pack, seed=1024)
    return packs, [int(n) for n in InternRepoSampler(packs, rank=0, world_size=1, seed=1024).permutation()]


def machine() -> dict[str, str]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"gpu": gpu, "torch": torch.__version__}
