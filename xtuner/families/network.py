"""`DecoderConfig`: the shapes and constants that describe a network."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    kind: Literal["linear", "dynamic"]
    factor: float


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a model. Each family reads it from and writes it to a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int | None = 2  # its embedding row gets no gradient, as in the original model
    family: str = field(default="internlm2", compare=False)  # the model's family; not a property of the network

    @property
    def query_width(self) -> int:
        """N·D: columns of all query heads, and of attention's output."""
        return self.num_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """(N + 2K)·D: rows of the joint projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def queries_per_kv_head(self) -> int:
        """G = N/K."""
        return self.num_heads // self.num_kv_heads
