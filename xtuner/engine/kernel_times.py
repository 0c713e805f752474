"""How long one GPU computes for an iteration, by kind of kernel: of any shape, from what one H100 took for 1.8B and 7B.

Each constant is the mean of both shapes' (docs/performance.md, "Where each millisecond goes"); for both, the sum of all
parts is within 2 % of what was measured. Other GPUs: products and attention by their bf16 peak, what moves bytes by
their memory's bandwidth.
"""

from dataclasses import dataclass
from typing import Protocol

from xtuner.engine.gpu_kinds import MEASURED, GpuKind
from xtuner.engine.step_time import OVERHEAD_TOKENS, PRODUCT_SHARES
from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import matmul_parameters, num_parameters

PRODUCT_FLOPS = 722e12  # per second, without what step_time.py counts for each micro-batch
ATTENTION_TOKEN = 1.75e-11  # seconds for each token, layer and query channel; in addition
ATTENTION_PAIR = 1.2e-14  # for each of the Σ len² of documents, layer and query channel
ELEMENTWISE = 5.7e-12  # seconds for each token and each of L·(4H + F) + V numbers, with copies
OPTIMIZER = 0.73e-12  # seconds for each parameter and byte of its state
LAUNCHES = 10e-3  # seconds without kernels in an iteration
LAUNCHES_EACH = 4e-3  # and for each micro-batch


class KernelTimes(Protocol):
    """What prediction.py reads: ms of one rank's iteration on an H100, before what several ranks add."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def parameters(self) -> int: ...
    @property
    def ends(self) -> int:
        """Parameters of embedding and head."""

    @property
    def block(self) -> float: ...
    @property
    def products(self) -> float: ...
    @property
    def attention(self) -> float:
        """Of usual packs."""

    @property
    def elementwise(self) -> float: ...
    @property
    def copies(self) -> float: ...
    @property
    def optimizer(self) -> float:
        """Of all parameters on one GPU."""

    def attention_ms(self, squares: float) -> float:
        """Of packs with so large a Σ len²."""

    def launch_ms(self, parts: int) -> float:
        """Without kernels, in that number of micro-batches."""


@dataclass(frozen=True)
class EstimatedTimes:
    """By arithmetic.

    Args:
        tokens, parts: of a rank in an iteration: tokens, micro-batches.
        squares: Σ len² of the documents of these tokens; of shared packs, a rank's part.
        state_bytes: of AdamW's state, a parameter on average.
        kind_of_products: of blocks, `model.products`.
        needed: share of the products of a model whose weights are all trained.
    """

    config: DecoderConfig
    kind: GpuKind
    tokens: int
    parts: int
    squares: float
    state_bytes: float
    kind_of_products: str = "own"
    needed: float = 1.0

    @property
    def parameters(self) -> int:
        return num_parameters(self.config)

    @property
    def ends(self) -> int:
        return self.config.vocabulary_parameters

    @property
    def block(self) -> float:
        return (self.parameters - self.ends) / self.config.num_layers

    @property
    def slower(self) -> float:
        """Factor of times that FLOPs bound."""
        return MEASURED.flops / self.kind.flops

    @property
    def products(self) -> float:
        share = PRODUCT_SHARES[self.kind_of_products]
        tokens = self.tokens + OVERHEAD_TOKENS * self.parts
        return 1000 * 6 * matmul_parameters(self.config) * tokens / PRODUCT_FLOPS * share * self.needed * self.slower

    @property
    def attention(self) -> float:
        return self.attention_ms(self.squares)

    def attention_ms(self, squares: float) -> float:
        channels = self.config.num_layers * self.config.query_width
        seconds = channels * (ATTENTION_TOKEN * self.tokens + ATTENTION_PAIR * squares)
        return 1000 * seconds * self.slower

    @property
    def elementwise(self) -> float:
        """On an H100: what memory bounds is scaled in prediction.py."""
        c = self.config
        numbers = c.num_layers * (4 * c.hidden_size + c.intermediate_size) + c.vocab_size
        return 1000 * ELEMENTWISE * numbers * self.tokens

    @property
    def copies(self) -> float:
        return 0.0

    @property
    def optimizer(self) -> float:
        return 1000 * OPTIMIZER * self.state_bytes * self.parameters

    def launch_ms(self, parts: int) -> float:
        return 1000 * (LAUNCHES + LAUNCHES_EACH * parts)
