"""How much memory a micro-batch of T tokens needs, and which activations blocks keep for the backward so that it fits.

Recomputing costs time in proportion to what was not kept. For projections every kept byte saves the same time (H/2
multiplications); for attention it saves more, the longer the documents. So attention is kept first, then the others.
Where some layers would have to recompute attention, their inputs and attention's outputs are kept in host memory
instead, as many layers' as necessary: copying takes less time than recomputing, at any length. Where attention is kept,
some layers' factors of SwiGLU may be in host memory, as many as can be copied while blocks compute.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from xtuner.families.network import DecoderConfig
from xtuner.model.loss import chunk_tokens
from xtuner.model.ops.autograd_functions import KEEP_ALL, KEEP_NONE, KeepPolicy
from xtuner.model.ops.saved_tensors import FACTORS
from xtuner.model.ops.swiglu import TILE, split_tokens

KEEP_ORDER = ("attention", "qkv", "residual", "gate_up")  # fields of KeepPolicy, the most worthwhile first
ATTENTION_ONLY = replace(KEEP_NONE, attention=True)
ON_HOST = replace(ATTENTION_ONLY, on_host=frozenset(("input", "attention")))
INPUT_ON_HOST = replace(KEEP_NONE, on_host=frozenset(("input",)))
FACTORS_ON_HOST = replace(KEEP_NONE, gate_up=True, on_host=frozenset((FACTORS,)))  # where attention is kept as well


def kept_bytes_per_token(c: DecoderConfig, itemsize: int, sharers: int = 1) -> dict[str, int]:
    """Bytes per token that one block keeps for each field of `KeepPolicy`; "input" is always kept. If more ranks share
    a document than there are heads of keys, some keep copies of the same head."""
    copies = 2 * max(sharers - c.num_kv_heads, 0) * c.head_dim
    return {
        "input": itemsize * c.hidden_size,
        "attention": itemsize * c.query_width + 4 * c.num_heads,
        "qkv": itemsize * (c.qkv_width * (1 + c.qk_norm) + copies),  # also before the norms
        "residual": itemsize * c.hidden_size,
        "gate_up": 2 * itemsize * c.intermediate_size,
    }


def transient_bytes(
    c: DecoderConfig, itemsize: int, tokens: int, keep: KeepPolicy = KEEP_ALL, sharers: int = 1, converted: int = 0
) -> int:
    """Peak of all buffers in addition to what blocks keep on the GPU, as planned: `exact_bytes`, and a margin for what
    the allocator cannot reuse. The margin does not grow beyond a tile of tokens."""
    tile = min(tokens, TILE)
    h, f, queries, keys = c.hidden_size, c.intermediate_size, c.query_width, c.num_kv_heads * c.head_dim
    mlp = tile * (itemsize * (4 * h + f) + converted * f)
    attention = tile * (itemsize * (3 * h + 3 * queries + 4 * keys) + 4 * (queries + 2 * keys))
    loss = itemsize * (min(tile, chunk_tokens(c.vocab_size)) * c.vocab_size + 4 * tile * h)
    summed = max(loss, mlp, attention) + 4 * tile * c.head_dim
    size = {name: n * tile for name, n in kept_bytes_per_token(c, itemsize, sharers).items()}
    summed += sum(size[name] for name in KEEP_ORDER if not getattr(keep, name)) + sum(size[n] for n in keep.on_host)
    margin = max(summed - exact_bytes(c, itemsize, tile, keep, sharers, converted), 0)
    return exact_bytes(c, itemsize, tokens, keep, sharers, converted) + margin


def exact_bytes(
    c: DecoderConfig, itemsize: int, tokens: int, keep: KeepPolicy, sharers: int = 1, converted: int = 0
) -> int:
    """Peak of the buffers that exist at the same time: at the loss, or in a block, including what it recomputes or has
    fetched from the host.

    Args:
        sharers: ranks that share these documents.
        converted: bytes for each of a token's F that products need in SwiGLU's backward (matmul.py).
    """
    size = {name: n * tokens for name, n in kept_bytes_per_token(c, itemsize, sharers).items()}
    h, f, queries, keys = c.hidden_size, c.intermediate_size, c.query_width, c.num_kv_heads * c.head_dim
    tile = split_tokens(tokens)[0].stop
    fetched = sum(size[name] for name in keep.on_host) + size["input"] * (keep.on_host == INPUT_ON_HOST.on_host)
    sent = size[FACTORS] if FACTORS in keep.on_host else 0  # while the next block, or the loss, is computed
    # of tokens: gradients of the output and the normed input, and this input; of a tile: the product, its part
    mlp = 3 * itemsize * h * tokens + itemsize * tile * (f + h * (tile < tokens)) + converted * tile * f
    mlp += size["residual"] * (not keep.residual) + 2 * itemsize * f * tile * (not keep.gate_up)
    # gradients of the block's output, of o, and of q, k, v; FlashAttention sums dq (and dk, dv of shared heads) in fp32
    attention = tokens * (itemsize * (h + 2 * queries + 2 * keys) + 4 * (queries + 2 * keys))
    attention += size["qkv"] * (not keep.qkv)
    no_longer_needed = [name for name in ("residual", "gate_up") if getattr(keep, name) and name not in keep.on_host]
    attention -= sum(size[name] for name in no_longer_needed)
    if sharers > 1 and c.num_kv_heads <= sharers:  # heads are exchanged in one turn, those of keys with copies
        copies = max(sharers - c.num_kv_heads, 0) * c.head_dim * tokens
        attention += size["qkv"] + 2 * copies * (itemsize + 4)
    if not keep.attention:  # the block's forward is repeated; a single tile's input gradient comes after all else
        mlp += size["attention"] + size["qkv"] - itemsize * h * tokens * (tile == tokens)
        attention += size["attention"]
    # the last block's output, its norm, and the gradient of that; then a chunk of logits, or another gradient
    loss = itemsize * (3 * tokens * h + max(min(tokens, chunk_tokens(c.vocab_size)) * c.vocab_size, tokens * h))
    return max(loss + sent, max(mlp, attention) + fetched) + 4 * tokens * c.head_dim


@dataclass(frozen=True)
class ActivationPlan:
    """Keeps as many activations as fit into `room` bytes together with temporary buffers.

    Args:
        itemsize: bytes of a number in the compute dtype.
        room: bytes; None keeps everything, 0 only each block's input.
        host: bytes of host memory that activations may use.
        hosted_factors: in how many layers at most both factors of SwiGLU may be kept there.
        sharers: ranks that share each document (context parallelism).
        extra: bytes of a token that an adapter needs while it computes.
        converted: see `exact_bytes`.
    """

    config: DecoderConfig
    itemsize: int
    room: int | None = None
    host: int = 0
    sharers: int = 1
    extra: int = 0
    converted: int = 0
    hosted_factors: int = 0

    def choose_kept(self, tokens: int) -> list[KeepPolicy]:
        """What each layer keeps, for a micro-batch of so many tokens."""
        return list(_choose_kept(self, tokens))

    def peak_bytes(self, tokens: int) -> int:
        """Bytes that a micro-batch needs in addition to weights and optimizer state."""
        return self.bytes_with(self.choose_kept(tokens), tokens)

    def bytes_with(self, policies: Sequence[KeepPolicy], tokens: int) -> int:
        """Bytes on the GPU if layers keep this."""
        size = kept_bytes_per_token(self.config, self.itemsize, self.sharers)
        counts, distinct = Counter(map(id, policies)), {id(policy): policy for policy in policies}
        kept = sum(n * sum(size[name] for name in _kept_on_gpu(distinct[i])) for i, n in counts.items())
        # while a layer's MLP runs backward, which may recompute its factors, those of the layer before may arrive
        arriving = tokens * size[FACTORS] * any(FACTORS in policy.on_host for policy in distinct.values())
        transient = (self.transient_bytes(p, tokens) + arriving * (not p.gate_up) for p in distinct.values())
        return tokens * kept + max(transient)

    def transient_bytes(self, keep: KeepPolicy, tokens: int) -> int:
        needed = transient_bytes(self.config, self.itemsize, tokens, keep, self.sharers, self.converted)
        return needed + self.extra * tokens

    def host_bytes(self, tokens: int) -> int:
        """Bytes of host memory that a micro-batch needs."""
        size = kept_bytes_per_token(self.config, self.itemsize, self.sharers)
        return tokens * sum(size[name] for policy in self.choose_kept(tokens) for name in policy.on_host)

    def hosts_factors(self, tokens: int) -> bool:
        """Whether layers keep factors of SwiGLU in host memory."""
        return any(FACTORS in policy.on_host for policy in self.choose_kept(tokens))

    def largest_peak(self, longest: int) -> int:
        """Most bytes that a micro-batch of up to `longest` tokens needs: a larger one may need less than a smaller one,
        as less of it is kept."""
        step = max(longest // 128 // 256, 1) * 256
        return max(map(self.peak_bytes, (*range(step, longest, step), longest)))

    def keeps_everything(self, tokens: int) -> bool:
        """Whether nothing has to be recomputed."""
        return all(policy == KEEP_ALL for policy in self.choose_kept(tokens))

    def largest_micro_batch(self, at_most: int) -> int:
        """Most tokens, in steps of 256 up to `at_most`, for which nothing has to be recomputed; 0 if there are none."""
        low, high = 0, -(-at_most // 256)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.keeps_everything(middle * 256) else (low, middle - 1)
        return min(low * 256, at_most)


def limit_factors(c: DecoderConfig, itemsize: int, tokens: int, policies: Sequence[KeepPolicy]) -> list[int]:
    """For each layer, bytes that factors of SwiGLU may take in its forward while they are sent to the host: the memory
    of one layer's, and what later layers will keep on the GPU. Zeros if none are sent."""
    limits = [0] * len(policies)
    if not any(FACTORS in policy.on_host for policy in policies):
        return limits
    size = kept_bytes_per_token(c, itemsize)
    left = tokens * size[FACTORS]
    for i in reversed(range(len(policies))):
        limits[i] = left
        left += tokens * sum(size[name] for name in _kept_on_gpu(policies[i]))
    return limits


def _kept_on_gpu(policy: KeepPolicy) -> list[str]:
    names = ["input", *(name for name in KEEP_ORDER if getattr(policy, name))]
    return [name for name in names if name not in policy.on_host]


@lru_cache(maxsize=1024)
def _choose_kept(plan: ActivationPlan, tokens: int) -> tuple[KeepPolicy, ...]:
    if plan.room is None:
        return (KEEP_ALL,) * plan.config.num_layers
    on_gpu = _keep_on_gpu(plan, tokens, plan.room)
    if not plan.host:
        return on_gpu
    if not on_gpu[-1].attention:
        return _keep_on_host(plan, tokens, plan.room)
    return _keep_factors_on_host(plan, tokens, plan.room, on_gpu)


def _keep_factors_on_host(
    plan: ActivationPlan, tokens: int, room: int, on_gpu: tuple[KeepPolicy, ...]
) -> tuple[KeepPolicy, ...]:
    """In as few layers as it takes to recompute nothing, or in as many as are allowed; `on_gpu` without host memory."""

    def keep_with(count: int) -> tuple[KeepPolicy, ...]:
        return _keep_on_gpu(plan, tokens, room, spread_layers(count, plan.config.num_layers))

    if all(policy.gate_up for policy in on_gpu):
        return on_gpu
    each = tokens * kept_bytes_per_token(plan.config, plan.itemsize, plan.sharers)[FACTORS]
    fewest, count = 0, min(plan.hosted_factors, plan.host // each)
    if not count:
        return on_gpu
    found = keep_with(count)
    if not found[-1].attention or plan.bytes_with(found, tokens) > room:  # what is being copied takes memory as well
        return on_gpu
    while all(policy.gate_up for policy in found) and count - fewest > 1:
        middle = (fewest + count) // 2
        fewer = keep_with(middle)
        if all(policy.gate_up for policy in fewer):
            count, found = middle, fewer
        else:
            fewest = middle
    return found


def spread_layers(count: int, layers: int) -> frozenset[int]:
    """So many layers at equal distances, without the last if there is a choice: its backward begins at once."""
    return frozenset(i * layers // count for i in range(count))


def _keep_on_gpu(
    plan: ActivationPlan, tokens: int, room: int, hosted: frozenset[int] = frozenset()
) -> tuple[KeepPolicy, ...]:
    """Each kind in as many layers as fit, the first ones; no more than keep the kind before it. Factors of SwiGLU of
    the layers `hosted` are in host memory."""
    layers = most = plan.config.num_layers
    chosen = [FACTORS_ON_HOST if i in hosted else KEEP_NONE for i in range(layers)]
    size = kept_bytes_per_token(plan.config, plan.itemsize, plan.sharers)
    for name in KEEP_ORDER:
        distinct = {id(policy): policy for policy in chosen}
        keeping = {i: replace(policy, **{name: True}) for i, policy in distinct.items()}  # type: ignore[arg-type]
        everywhere = [keeping[id(policy)] for policy in chosen]
        if most == layers and plan.bytes_with(everywhere, tokens) <= room:
            chosen = everywhere
            continue
        left = max(room - plan.bytes_with(chosen, tokens), 0)
        most = min(most, left // (size[name] * tokens))
        added = set([i for i in range(layers) if not getattr(chosen[i], name)][:most])
        chosen = [everywhere[i] if i in added else policy for i, policy in enumerate(chosen)]
    return tuple(chosen)


def _keep_on_host(plan: ActivationPlan, tokens: int, room: int) -> tuple[KeepPolicy, ...]:
    """The fewest layers recompute attention, then the least is on the host. If nothing fits, what needs the least."""
    layers, size = plan.config.num_layers, kept_bytes_per_token(plan.config, plan.itemsize, plan.sharers)
    kinds = (INPUT_ON_HOST, KEEP_NONE, ON_HOST, ATTENTION_ONLY)  # the last layers, on the GPU, are needed first
    kept = [tokens * sum(size[name] for name in _kept_on_gpu(policy)) for policy in kinds]
    hosted = [tokens * sum(size[name] for name in policy.on_host) for policy in kinds]
    working = [plan.transient_bytes(policy, tokens) for policy in kinds]
    best, best_counts = (float("inf"), 0, 0), (0, layers, 0, 0)
    for recomputed in range(layers + 1):
        for inputs in range(recomputed + 1):
            for both in range(layers - recomputed + 1):
                counts = (inputs, recomputed - inputs, both, layers - recomputed - both)
                host = sum(n * each for n, each in zip(counts, hosted, strict=True))
                if host > plan.host:
                    break
                needed = sum(n * each for n, each in zip(counts, kept, strict=True))
                needed += max(each for n, each in zip(counts, working, strict=True) if n)
                rank = (max(needed - room, 0), recomputed, host)
                if rank < best:
                    best, best_counts = rank, counts
        if not best[0]:
            break
    return tuple(policy for policy, count in zip(kinds, best_counts, strict=True) for _ in range(count))
