"""Times of one H100 for one pack of 32,768 tokens, by part: a `KernelTimes` (xtuner/engine/kernel_times.py) and the
input of prediction.py.

Attention takes  a + b · Σ len²  over a pack's documents, fitted to packs of many documents and of one.
"""

from dataclasses import dataclass
from typing import Any

from benchlib.workloads import PACK, SHAPES

from xtuner.model import from_scratch
from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import num_parameters

GIB = 2**30
LONG = float(PACK**2)  # Σ len² of a pack that is one document
PROFILED = 66.5e6  # mean Σ len² of the packs of the profiled run


@dataclass(frozen=True)
class Measured:
    """One H100 80GB (700 W), torch 2.11.0+cu130, 2026-11-24: ms per pack of 32,768 tokens, by kind of kernel."""

    shape: str
    products: float
    attention: float  # of packs of PROFILED
    attention_long: float  # of a pack that is one document
    elementwise: float
    optimizer: float  # fp32 AdamW
    copies: float
    tokens_per_s: float  # of a full run on one GPU; time without kernels is idle
    squares: float  # Σ len² of a pack of that run, median
    parts: int  # micro-batches of a pack in that run

    @property
    def source(self) -> Any:
        return from_scratch(**SHAPES[self.shape].fields(), activation_checkpointing=True)

    @property
    def config(self) -> DecoderConfig:
        return self.source.config

    @property
    def parameters(self) -> int:
        return num_parameters(self.source.config)

    @property
    def ends(self) -> int:
        """Parameters of embedding and head."""
        return 2 * self.source.config.vocab_size * self.source.config.hidden_size

    @property
    def block(self) -> float:
        return (self.parameters - self.ends) / self.source.config.num_layers

    @property
    def b(self) -> float:
        return (self.attention_long - self.attention) / (LONG - PROFILED)

    @property
    def a(self) -> float:
        return self.attention - self.b * PROFILED

    @property
    def fixed(self) -> float:
        """ms of everything except attention."""
        return 1000 * PACK / self.tokens_per_s - self.a - self.b * self.squares

    @property
    def idle(self) -> float:
        return self.fixed - self.products - self.elementwise - self.optimizer_there - self.copies

    def attention_ms(self, squares: float) -> float:
        """Of a pack with so large a Σ len²."""
        return self.a + self.b * squares

    def launch_ms(self, parts: int) -> float:
        """Without kernels, in that number of micro-batches."""
        return self.idle * parts / self.parts

    @property
    def optimizer_there(self) -> float:
        """ms of the optimizer in the run of `tokens_per_s`: 7B fits one H100 only with 8-bit moments."""
        return 44.0 if self.shape == "7b" else self.optimizer


# A check of b: an fp8 run of 7B at Σ len² = 129.7e6 took 286 ms of attention; this formula gives 283.
MODELS = {
    "1.8b": Measured("1.8b", 466, 66, 643, 85, 22, 5, 48_495, 95.6e6, 1),
    "7b": Measured("7b", 2079, 182, 1795, 187, 22 * 7.738 / 1.889, 14, 12_618, 110.7e6, 4),  # fp32 AdamW: by parameters
}


@dataclass(frozen=True)
class Machine:
    free: float  # bytes of GPU memory that are free for a process
    slower: float = 1.0  # times of memory-bound kernels, relative to an H100


MACHINES = {"H100": Machine(78.7 * GIB), "H200": Machine(139 * GIB, 3.35 / 4.8)}
