"""The cases that are measured, for ours and for peers: shape, state of AdamW, documents."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from synthetic import documents

from xtuner.data.write import write_bin

PACK, VOCABULARY = 32768, 92544
SHAPES = {  # hidden, layers, heads, ffn; 8 kv heads of 128
    "1.8b": (2048, 24, 16, 8192),
    "7b": (4096, 32, 32, 14336),
}


@dataclass(frozen=True)
class Case:
    """`long`: every pack is one document; else lengths are lognormal with median 700."""

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


def write_data(folder: Path, packs: int, long: bool) -> None:
    if long:
        draw = np.random.RandomState(0)
        texts = [draw.randint(3, VOCABULARY, size=PACK).tolist() for _ in range(packs)]
    else:
        texts = documents(packs * PACK, VOCABULARY, 700, PACK, 0)
    write_bin(folder / "synthetic.bin", texts)


def machine() -> dict[str, str]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"gpu": gpu, "torch": torch.__version__}
