"""How much memory a micro-batch of T tokens needs, and which activations blocks keep for the backward so that it fits.

Recomputing costs time in proportion to what was not kept. For projections every kept byte saves the same time (H/2
multiplications); for attention it saves more, the longer the documents. So attention is kept first, then the others.
"""

from dataclasses import dataclass, replace

from xtuner.families.network import DecoderConfig
from xtuner.model.loss import chunk_tokens
from xtuner.model.ops.autograd_functions import KEEP_ALL, KEEP_NONE, KeepPolicy

KEEP_ORDER = ("attention", "qkv", "residual", "gate_up")  # fields of KeepPolicy, the most worthwhile first


def kept_bytes_per_token(c: DecoderConfig, itemsize: int) -> dict[str, int]:
    """Bytes per token that one block keeps for each field of `KeepPolicy`; "input" is always kept."""
    return {
        "input": itemsize * c.hidden_size,
        "attention": itemsize * c.query_width + 4 * c.num_heads,
        "qkv": itemsize * c.qkv_width,
        "residual": itemsize * c.hidden_size,
        "gate_up": 2 * itemsize * c.intermediate_size,
    }


def transient_bytes(c: DecoderConfig, itemsize: int, tokens: int) -> int:
    """Peak of temporary buffers, in addition to what blocks keep: at the loss, or in the backward of one block."""
    h, f, queries, keys = c.hidden_size, c.intermediate_size, c.query_width, c.num_kv_heads * c.head_dim
    loss = itemsize * (min(tokens, chunk_tokens(c.vocab_size)) * c.vocab_size + 4 * tokens * h)
    mlp = itemsize * tokens * (4 * h + f)
    # gradients of q, k, v, separate and joined, and of o; FlashAttention sums dq (and dk, dv of shared heads) in fp32
    attention = tokens * (itemsize * (3 * h + 3 * queries + 4 * keys) + 4 * (queries + 2 * keys))
    angles = 4 * tokens * c.head_dim
    return max(loss, mlp, attention) + angles


@dataclass(frozen=True)
class ActivationPlan:
    """Keeps as many activations as fit into `room` bytes together with temporary buffers.

    Args:
        itemsize: bytes of a number in the compute dtype.
        room: bytes; None keeps everything, 0 only each block's input.
    """

    config: DecoderConfig
    itemsize: int
    room: int | None = None

    def choose_kept(self, tokens: int) -> list[KeepPolicy]:
        """What each layer keeps, for a micro-batch of so many tokens."""
        layers = self.config.num_layers
        if self.room is None:
            return [KEEP_ALL] * layers
        size = {name: n * tokens for name, n in kept_bytes_per_token(self.config, self.itemsize).items()}
        left = self.room - transient_bytes(self.config, self.itemsize, tokens) - layers * size["input"]
        recomputed = sum(size.values()) - size["input"]  # a recomputed block exists in full, one at a time
        chosen, most = [KEEP_NONE] * layers, layers
        for name in KEEP_ORDER:
            if left < layers * size[name]:
                left -= recomputed if name == "attention" else size[name]
            most = min(most, max(left, 0) // size[name])
            chosen[:most] = [replace(k, **{name: True}) for k in chosen[:most]]
            left -= most * size[name]
        return chosen

    def peak_bytes(self, tokens: int) -> int:
        """Bytes that a micro-batch needs in addition to weights and optimizer state."""
        size = kept_bytes_per_token(self.config, self.itemsize)
        kept = 0
        for policy in self.choose_kept(tokens):
            kept += size["input"] + sum(size[name] for name in KEEP_ORDER if getattr(policy, name))
        return tokens * kept + transient_bytes(self.config, self.itemsize, tokens)

    def largest_peak(self, longest: int) -> int:
        """Most bytes that a micro-batch of up to `longest` tokens needs: a larger one may need less than a smaller one,
        as less of it is kept."""
        return max(map(self.peak_bytes, (*range(256, longest, 256), longest)))

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
