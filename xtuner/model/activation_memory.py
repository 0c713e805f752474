"""What a micro-batch of T tokens needs of memory, and what blocks keep between forward and backward so that it fits.

Computing again costs time in proportion to what was not kept: for projections a byte costs the same everywhere (H/2
multiplications), for attention the more the longer documents are. So attention is kept first, then the others.
"""

from dataclasses import dataclass, replace

from xtuner.model.decoder import DecoderConfig
from xtuner.model.loss import chunk_tokens
from xtuner.model.ops.functions import EVERYTHING, NOTHING, Keep

ORDER = ("attention", "qkv", "residual", "gate_up")


def kept_bytes(c: DecoderConfig, itemsize: int) -> dict[str, int]:
    """Bytes a token that one block keeps for each choice (see ops/functions.py); "input" is always kept."""
    queries, joint = c.num_heads * c.head_dim, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    return {
        "input": itemsize * c.hidden_size,
        "attention": itemsize * queries + 4 * c.num_heads,
        "qkv": itemsize * joint,
        "residual": itemsize * c.hidden_size,
        "gate_up": 2 * itemsize * c.intermediate_size,
    }


def passing_bytes(c: DecoderConfig, itemsize: int, tokens: int) -> int:
    """The most that is held beside what blocks keep: at the loss, or in the backward of one block."""
    h, f, queries, joint = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    loss = itemsize * (min(tokens, chunk_tokens(c.vocab_size)) * c.vocab_size + 4 * tokens * h)
    mlp = itemsize * tokens * (4 * h + f)
    # gradients of q, k, v apart and joined, of o; FlashAttention sums dq (and dk, dv for shared heads) in fp32
    attention = tokens * (itemsize * (3 * h + 3 * queries + 4 * joint) + 4 * (queries + 2 * joint))
    angles = 4 * tokens * c.head_dim
    return max(loss, mlp, attention) + angles


@dataclass(frozen=True)
class Plan:
    """Keep as much as fits into `room` bytes beside what passes; None: everything, 0: nothing."""

    config: DecoderConfig
    itemsize: int  # bytes of a number in the compute dtype
    room: int | None = None

    def keeps(self, tokens: int) -> list[Keep]:
        """Of each layer, for a micro-batch of so many tokens."""
        layers = self.config.num_layers
        if self.room is None:
            return [EVERYTHING] * layers
        size = {name: n * tokens for name, n in kept_bytes(self.config, self.itemsize).items()}
        left = self.room - passing_bytes(self.config, self.itemsize, tokens) - layers * size["input"]
        again = sum(size.values()) - size["input"]  # a block that is computed again is held whole, once
        chosen, most = [NOTHING] * layers, layers
        for name in ORDER:
            if left < layers * size[name]:
                left -= again if name == "attention" else size[name]
            most = min(most, max(left, 0) // size[name])
            chosen[:most] = [replace(k, **{name: True}) for k in chosen[:most]]
            left -= most * size[name]
        return chosen

    def peak(self, tokens: int) -> int:
        """Bytes a micro-batch needs beside the state."""
        size = kept_bytes(self.config, self.itemsize)
        kept = sum(size["input"] + sum(size[name] for name in ORDER if getattr(k, name)) for k in self.keeps(tokens))
        return tokens * kept + passing_bytes(self.config, self.itemsize, tokens)

    def fits(self, tokens: int) -> bool:
        """Whether nothing has to be computed again."""
        return all(keep == EVERYTHING for keep in self.keeps(tokens))

    def largest(self, at_most: int) -> int:
        """Most tokens, in steps of 256 up to `at_most`, of which everything can be kept; 0 if there are none."""
        low, high = 0, -(-at_most // 256)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(middle * 256) else (low, middle - 1)
        return min(low * 256, at_most)
