"""`DecoderConfig`: the shapes and constants that describe a network."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions extend beyond the context of the first training (model/rope.py).

    Args:
        original_max_position_embeddings: that context; llama3 and yarn need it.
        low_freq_factor, high_freq_factor: llama3: frequencies with fewer rotations in that context than the first are
            divided by `factor`, those with more than the second are kept.
        beta_slow, beta_fast: the same for yarn.
        truncate: yarn: whether the borders are rounded to complete frequencies.
        mscale, mscale_all_dim, attention_factor: yarn: what cos and sin are multiplied by; see `cos_sin_factor`.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def growth(scale: float) -> float:
            return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        return growth(self.mscale) / growth(self.mscale_all_dim) if self.mscale and self.mscale_all_dim else growth(1.0)


@dataclass(frozen=True)
class AttentionPairs:
    """How many pairs of tokens attend to each other in a document, twice over and as a mean over layers.

    Args:
        window: sliding window of `layers` of the `of` layers; None for none.
    """

    window: int | None = None
    layers: int = 0
    of: int = 1

    def count(self, length: Any) -> Any:
        """Pairs of a document of this length, or of each of an array: len², less (len − window)² where a layer has a
        window."""
        if self.window is None or not self.layers:
            return length * length
        outside = ((length - self.window) * (length > self.window)) ** 2
        whole, rest = outside // self.of, outside % self.of  # separately, as the product may exceed 64 bits
        return length * length - whole * self.layers - rest * self.layers // self.of


ALL_PAIRS = AttentionPairs()  # of a network without sliding windows


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a model. Each family reads it from and writes it to a Hugging Face `config.json`.

    Args:
        qkv_bias, output_bias: biases of `wqkv` and `wo`.
        mlp_bias: of `w1`, `w2` and `w3`.
        qk_norm: whether every head's q and k are normalized before they are rotated.
        sliding_window: tokens of its document that a token attends to, itself included; None for all before it.
        sliding_layers: which layers have the window; None for all.
        tie_word_embeddings: whether the output layer multiplies with the embedding's weight.
    """

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
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2  # the first, if there are several
    pad_token_id: int | None = 2  # its embedding row gets no gradient, as in the original model
    # not properties of the network:
    family: str = field(default="internlm2", compare=False)
    eos_list: tuple[int, ...] = field(default=(), compare=False)  # `eos_token_id` of its config.json, if it is a list
    generation_eos: tuple[int, ...] = field(default=(), compare=False)  # of its generation_config.json

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All ids that end a text, by both files of the model."""
        found = (*self.generation_eos, *self.eos_list, self.eos_token_id)
        return tuple(dict.fromkeys(i for i in found if i is not None))

    @property
    def attention_bias(self) -> bool:
        """Whether attention has any bias."""
        return self.qkv_bias or self.output_bias

    @property
    def query_width(self) -> int:
        """N·D: columns of all query heads, and of attention's output."""
        return self.num_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """(N + 2K)·D: rows of the joint projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def vocabulary_parameters(self) -> int:
        """Weights of the embedding and the output layer."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def queries_per_kv_head(self) -> int:
        """G = N/K."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_windows(self) -> int:
        """Number of layers with a sliding window."""
        return sum(self.window(layer) is not None for layer in range(self.num_layers))

    @property
    def attention_pairs(self) -> AttentionPairs:
        return AttentionPairs(self.sliding_window, self.num_windows, self.num_layers)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, if any."""
        return self.sliding_window if self.sliding_layers is None or self.sliding_layers[layer] else None

    def special_features(self) -> dict[str, str]:
        """What this network has and not every family knows, in words, by the field that says so."""
        kind = self.rope_scaling.kind if self.rope_scaling else ""
        found = {
            "qkv_bias": ("biases of q, k and v alone", self.qkv_bias and not self.output_bias),
            "output_bias": ("a bias of attention's output alone", self.output_bias and not self.qkv_bias),
            "mlp_bias": ("biases in the MLP", self.mlp_bias),
            "qk_norm": ("norms of q and k", self.qk_norm),
            "sliding_window": ("sliding windows", self.sliding_window is not None),
            "tie_word_embeddings": ("one weight for embedding and output layer", self.tie_word_embeddings),
            "rope_scaling": (f"rope scaling {kind}", kind in ("llama3", "yarn")),
        }
        return {field: what for field, (what, is_there) in found.items() if is_there}
