"""How long an iteration of our own strategy takes, by arithmetic: to choose between ways to use the memory.

Figures are those of H100s (docs/performance.md). Only the ratio of compute to links decides, which other GPUs share
more or less. Attention that is not recomputed and the optimizer's step are the same for every way and left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from xtuner.dist.mesh import Mesh
from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import matmul_parameters, num_parameters
from xtuner.model.ops.functions import Keep

FLOPS = 700e12  # a second, of large bf16 products
LOST_TOKENS = 300  # a micro-batch of m tokens takes as long as m + 300: one more addition to gradients, shorter kernels
WITHIN_NODE = 300e9  # bytes a second and GPU, of collectives of 1 GiB by NVLink
BETWEEN_NODES = 45e9  # one 400 Gbit/s card a GPU
SLOWED = 0.3  # of a collective's time is lost by the products that run at the same time
UNEVEN = 0.02  # of compute, where ranks wait for each other in every micro-batch and not once an iteration
ATTENTION = 0.3  # of the time of a block's products: its attention's forward, where documents are long


@dataclass(frozen=True)
class Work:
    """What a rank does in an iteration, for one way to use the memory.

    Args:
        tokens: of all packs of this rank.
        micro_batches: that they are computed in.
        keeps: what each layer keeps between forward and backward.
        gathered: times that all weights are brought to every rank; reduced: that all gradients are summed over ranks.
        gradient: bytes of a number of gradient sums.
    """

    config: DecoderConfig
    tokens: int
    micro_batches: int
    keeps: Iterable[Keep]
    gathered: int
    reduced: int
    gradient: int
    weight: int = 2

    def seconds(self, mesh: Mesh) -> float:
        computing = self._products() + self._recomputed()
        moving = self._moved() * (1 - 1 / mesh.shard_size) / link(mesh)
        hidden = min(moving, computing)
        if mesh.dp_replicate > 1:  # each rank's rows, to all ranks that hold the same ones: after the last backward
            own = self.gradient * num_parameters(self.config) / mesh.shard_size
            moving += 2 * own * (1 - 1 / mesh.dp_replicate) / BETWEEN_NODES
        waiting = UNEVEN * computing if mesh.shard_size > 1 and max(self.gathered, self.reduced) > 1 else 0.0
        return computing + SLOWED * hidden + (moving - hidden) + waiting

    def _products(self) -> float:
        tokens = self.tokens + LOST_TOKENS * self.micro_batches
        return 6 * matmul_parameters(self.config) * tokens / FLOPS

    def _recomputed(self) -> float:
        c = self.config
        joint = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        qkv, output = c.hidden_size * joint, c.hidden_size * c.num_heads * c.head_dim
        gate_up = 2 * c.hidden_size * c.intermediate_size
        numbers = 0.0
        for keep in self.keeps:
            if keep.attention:
                numbers += qkv * (not keep.qkv) + output * (not keep.residual) + gate_up * (not keep.gate_up)
            else:
                numbers += (qkv + output + 1.5 * gate_up) * (1 + ATTENTION)
        return 2 * numbers * self.tokens / FLOPS

    def _moved(self) -> float:
        """Bytes of full weights and gradients."""
        return num_parameters(self.config) * (self.gathered * self.weight + self.reduced * self.gradient)


def link(mesh: Mesh) -> float:
    """Bytes a second that each rank sends in a collective over the ranks that share a state."""
    return WITHIN_NODE if mesh.shard_size <= mesh.local_size else BETWEEN_NODES
