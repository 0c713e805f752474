"""Estimated time of an iteration of our own strategy, to choose among memory plans.

The constants are those of H100s (docs/performance.md). Only the ratio of compute to link speed matters, which is
similar on other GPUs. Attention that is not recomputed and the optimizer's step are the same for every plan and left
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from xtuner.data.loading.document_groups import ContextCosts
from xtuner.dist.mesh import Mesh
from xtuner.model.activation_memory import kept_bytes_per_token
from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import matmul_parameters, num_parameters
from xtuner.model.ops.autograd_functions import KeepPolicy
from xtuner.model.ops.saved_tensors import FACTORS

FLOPS = 700e12  # per second, in large bf16 products
PRODUCT_SHARES = {"own": 1.0, "fp8": 0.786, "fp8_full": 0.68}  # of the time of products in bf16, with the rounding
OVERHEAD_TOKENS = 300  # a micro-batch of m tokens takes as long as m + 300: gradient additions, short kernels
WITHIN_NODE = 300e9  # bytes per second and GPU, in collectives of 1 GiB over NVLink
BETWEEN_NODES = 45e9  # bytes per second and GPU, with one 400 Gbit/s card per GPU
EXCHANGE = 250e9  # bytes per second and GPU, in all-to-all exchanges over NVLink
ATTENTION_FLOPS = 550e12  # per second, forward and backward
OVERLAP_LOSS = 0.3  # concurrent products take longer by this share of a collective's time
WAIT_SHARE = 0.02  # of compute time: waits between ranks, if they synchronize in every micro-batch
ATTENTION_SHARE = 0.3  # time of attention's forward relative to a block's products, at least, for long documents
ATTENTION_FORWARD = 600e12  # FLOPs per second of attention's forward alone
HOST_LINK = 50e9  # bytes per second and GPU, to or from pinned host memory
HIDDEN_SHARE = 0.9  # of what is computed meanwhile, so that estimated copies are not the last to end


@dataclass(frozen=True)
class StepCost:
    """What a rank computes and communicates in an iteration under one memory plan.

    Args:
        tokens: of all packs of this rank.
        micro_batches: of all packs of this rank.
        policies: what each layer keeps between forward and backward.
        num_gathers: how often all weights are gathered.
        num_reduces: how often all gradients are reduced.
        gradient_bytes, weight_bytes: of one element; of gradients on average, where not all weights have one.
        sent_weights: bytes of all weights, if that is not `weight_bytes` of each.
        frozen: weights that tokens are multiplied by and that have no gradient.
        length: tokens of a document, for attention that is recomputed, or computed while copies run.
        products: kind of products of blocks.
    """

    config: DecoderConfig
    tokens: int
    micro_batches: int
    policies: Sequence[KeepPolicy]
    num_gathers: int
    num_reduces: int
    gradient_bytes: float
    weight_bytes: int = 2
    length: int = 0
    sent_weights: float | None = None
    frozen: int = 0
    products: str = "own"

    def seconds(self, mesh: Mesh) -> float:
        compute = self._matmul_seconds() + self._recompute_seconds() + self._fetch_seconds() + self._factor_seconds()
        communication = self._sent_bytes() * (1 - 1 / mesh.shard_size) / link_speed(mesh)
        overlapped = min(communication, compute)
        if mesh.dp_replicate > 1:  # after the last backward: all-reduce of each rank's rows over the replicas
            own = self.gradient_bytes * num_parameters(self.config) / mesh.shard_size
            communication += 2 * own * (1 - 1 / mesh.dp_replicate) / BETWEEN_NODES
        synchronizes = mesh.shard_size > 1 and max(self.num_gathers, self.num_reduces) > 1
        waiting = WAIT_SHARE * compute if synchronizes else 0.0
        return compute + OVERLAP_LOSS * overlapped + (communication - overlapped) + waiting

    def _matmul_seconds(self) -> float:
        tokens = self.tokens + OVERHEAD_TOKENS * self.micro_batches
        return (6 * matmul_parameters(self.config) - 2 * self.frozen) * tokens / FLOPS

    def _recompute_seconds(self) -> float:
        c = self.config
        qkv, output = c.hidden_size * c.qkv_width, c.hidden_size * c.query_width
        gate_up = 2 * c.hidden_size * c.intermediate_size
        attention = 2 * c.query_width * self.length / ATTENTION_FORWARD * FLOPS / 2  # as weights
        share, weights = PRODUCT_SHARES[self.products], 0.0
        for kept in self.policies:
            if kept.attention:
                weights += share * (qkv * (not kept.qkv) + output * (not kept.residual) + gate_up * (not kept.gate_up))
            else:
                projections = qkv + output + gate_up
                weights += share * projections + max(ATTENTION_SHARE * projections, attention)
        return 2 * weights * self.tokens / FLOPS

    def _fetch_seconds(self) -> float:
        """Input and attention's output arrive while the block behind multiplies with `wqkv`."""
        c, size = self.config, kept_bytes_per_token(self.config, self.weight_bytes)
        hidden = 4 * c.hidden_size * c.qkv_width / FLOPS
        fetched = (sum(size[name] for name in kept.on_host - {FACTORS}) / HOST_LINK for kept in self.policies)
        return self.tokens * sum(max(seconds - hidden, 0.0) for seconds in fetched)

    def _factor_seconds(self) -> float:
        """Factors of SwiGLU are sent while all blocks compute forward; they arrive during the backward of attention of
        the block behind, or of blocks that have theirs on the GPU."""
        c, layers = self.config, len(self.policies)
        hosted = sum(FACTORS in kept.on_host for kept in self.policies)
        copied = hosted * kept_bytes_per_token(c, self.weight_bytes)[FACTORS] / HOST_LINK
        speed = FLOPS / PRODUCT_SHARES[self.products]
        attention = 2 * c.query_width * self.length / ATTENTION_FORWARD
        projections, mlp = c.hidden_size * (c.qkv_width + c.query_width), 3 * c.hidden_size * c.intermediate_size
        forward = 2 * (projections + mlp) / speed + attention
        around_mlp = 4 * projections / speed + 2.5 * attention
        backward = layers * around_mlp + (layers - hosted) * 4 * mlp / speed
        return self.tokens * sum(max(copied - HIDDEN_SHARE * time, 0.0) for time in (layers * forward, backward))

    def _sent_bytes(self) -> float:
        """Bytes of full weights and gradients."""
        parameters = num_parameters(self.config)
        weights = self.weight_bytes * parameters if self.sent_weights is None else self.sent_weights
        return self.num_gathers * weights + self.num_reduces * self.gradient_bytes * parameters


def context_costs(c: DecoderConfig, mesh: Mesh, itemsize: int) -> ContextCosts:
    """Costs by which documents are divided among the ranks that share a pack."""
    speed = EXCHANGE if mesh.cp <= mesh.local_size else BETWEEN_NODES
    heads = c.qkv_width + c.query_width  # of a token: q, k and v are sent, the output returns
    return ContextCosts(
        token=6 * matmul_parameters(c) / FLOPS,
        pair=7 * c.num_layers * c.query_width / ATTENTION_FLOPS,
        exchanged=itemsize * c.num_layers * (2 * heads + c.query_width) / speed,  # the output once more in the backward
        pairs=c.attention_pairs,
    )


def link_speed(mesh: Mesh) -> float:
    """Bytes per second that each rank sends in a collective over the shard ranks."""
    if mesh.shard_size <= mesh.local_size:
        return WITHIN_NODE
    return speed_over_nodes(WITHIN_NODE, BETWEEN_NODES, mesh.local_size)


def speed_over_nodes(within: float, between: float, node: int) -> float:
    """Bytes per second that each rank sends in a collective over all `node` ranks of several nodes: its rings go
    through the links of all ranks of a node, and the cards of all of them."""
    return min(within, between * node)
