"""The network: a decoder of pre-norm blocks with grouped-query attention, rotary positions and a SwiGLU MLP.

Readable top to bottom. One micro-batch is one row of T tokens: documents laid end to end, no padding, no batch axis.

    T tokens   H hidden   N query heads   K kv heads   G = N/K queries a kv head   D head dim   F ffn   V vocabulary

Parameter names are InternLM2's own; `families.py` knows the others'.
"""

import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xtuner.core.errors import ConfigError
from xtuner.model import attention
from xtuner.model.loss import linear_cross_entropy
from xtuner.model.ops import functions
from xtuner.model.ops.functions import EVERYTHING, Keep
from xtuner.model.ops.products import KINDS, OWN, Products
from xtuner.model.rope import Rope, RopeScaling, rotate


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a model. `families.py` reads it from and writes it to a Hugging Face `config.json`."""

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
    pad_token_id: int | None = 2  # its embedding row gets no gradient, as in the original

    def __post_init__(self) -> None:
        """Raises: ConfigError for a shape that cannot be computed."""
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} kv heads",
                where="num_attention_heads, num_key_value_heads",
                why="each kv head serves an equal number of query heads",
            )
        where = "head_dim (hidden_size / num_attention_heads where it is not given)"
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim {self.head_dim} is odd", where=where, why="rotary positions turn pairs of numbers"
            )
        if self.head_dim < 4 and self.rope_scaling and self.rope_scaling.kind == "dynamic":
            why = "the base grows by the power head_dim / (head_dim - 2)"
            raise ConfigError(f"dynamic rope scaling cannot turn heads of {self.head_dim}", where=where, why=why)

    @property
    def rope(self) -> Rope:
        return Rope(self.head_dim, self.rope_theta, self.max_position_embeddings, self.rope_scaling)


class RMSNorm(nn.Module):
    """x / rms(x) · weight; the mean square in fp32, the product in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functions.norm(x, self.weight, self.eps)


@dataclass
class Layout:
    """Where documents lie in the row, and every token's angles: computed once, used by all layers."""

    cu_seqlens: torch.Tensor  # int32 [n + 1]
    max_seqlen: int
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor


class LayerCache:
    """Keys and values of one layer for the document that is being generated, [S, K, D] each."""

    def __init__(self) -> None:
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.k = k if self.k is None else torch.cat((self.k, k))
        self.v = v if self.v is None else torch.cat((self.v, v))
        return self.k, self.v


class Attention(nn.Module):
    """Rows of `wqkv`: for each kv head its G query heads, then k, then v, D rows each."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.num_kv_heads, self.groups, self.head_dim = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
        self.wqkv = nn.Linear(c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, bias=c.attention_bias)
        self.wo = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)
        self.attend = attention.attend_loop

    def forward(self, x_TH: torch.Tensor, layout: Layout, cache: LayerCache | None = None) -> torch.Tensor:
        T = len(x_TH)
        qkv = self.wqkv(x_TH).view(T, self.num_kv_heads, self.groups + 2, self.head_dim)
        q_TND = qkv[:, :, : self.groups].reshape(T, -1, self.head_dim)
        k_TKD, v_TKD = qkv[:, :, self.groups], qkv[:, :, self.groups + 1]
        q_TND = rotate(q_TND, layout.cos_TD, layout.sin_TD)
        k_TKD = rotate(k_TKD, layout.cos_TD, layout.sin_TD)
        if cache is None:
            o_TND = self.attend(q_TND, k_TKD, v_TKD, layout.cu_seqlens, layout.max_seqlen)
        else:
            o_TND = attention.attend_cached(q_TND, *cache.extend(k_TKD, v_TKD))
        return self.wo(o_TND.reshape(T, -1))


class FeedForward(nn.Module):
    """w2(silu(w1 x) · w3 x)."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w3 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w2 = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x_TH)) * self.w3(x_TH))


class Block(nn.Module):
    """Attention and MLP, each on the norm of a sum that both add to.

    `forward` without gradients is the definition; with gradients the same is computed by `ops/functions.py`.
    """

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.feed_forward = FeedForward(c)
        self.products: Products = OWN

    def forward(
        self, x_TH: torch.Tensor, layout: Layout, cache: LayerCache | None = None, keep: Keep = EVERYTHING
    ) -> torch.Tensor:
        if cache is None and torch.is_grad_enabled():
            return self._train(x_TH, layout, keep)
        x_TH = x_TH + self.attention(self.attention_norm(x_TH), layout, cache)
        return x_TH + self.feed_forward(self.ffn_norm(x_TH))

    def _train(self, x_TH: torch.Tensor, layout: Layout, keep: Keep) -> torch.Tensor:
        if not keep.attention:
            return checkpoint(self._train, x_TH, layout, EVERYTHING, use_reentrant=False, preserve_rng_state=False)
        a, mlp = self.attention, self.feed_forward

        def inputs() -> tuple[Any, ...]:
            return (x_TH, self.attention_norm.weight, a.wqkv.weight, a.wqkv.bias, layout.cos_TD, layout.sin_TD,
                    self.attention_norm.eps, a.num_kv_heads, a.head_dim, self.products)  # fmt: skip

        q_TND, k_TKD, v_TKD, x = functions.AttentionInputs.apply(*inputs())
        forget = functions.forgetting((q_TND, k_TKD, v_TKD), lambda: functions.heads_of(*inputs()))
        with nullcontext() if keep.qkv else forget:
            o_TND = a.attend(q_TND, k_TKD, v_TKD, layout.cu_seqlens, layout.max_seqlen)
        return functions.BlockOutputs.apply(
            x, o_TND.reshape(len(x), -1), a.wo.weight, a.wo.bias, self.ffn_norm.weight,
            mlp.w1.weight, mlp.w3.weight, mlp.w2.weight, self.ffn_norm.eps, keep, self.products,
        )  # fmt: skip


class Embedding(nn.Embedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return functions.embed(input_ids, self.weight, self.padding_idx)


class Decoder(nn.Module):
    """Token ids → hidden states after the last norm."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.rope = c.rope
        self.tok_embeddings = Embedding(c.vocab_size, c.hidden_size, padding_idx=c.pad_token_id)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.keeps: Callable[[int], list[Keep]] = lambda tokens: [EVERYTHING] * c.num_layers  # chosen by plan.py

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        caches: list[LayerCache] | None = None,
    ) -> torch.Tensor:
        cos_TD, sin_TD = self.rope.table(position_ids, cu_seqlens)
        layout = Layout(cu_seqlens, max_seqlen, cos_TD, sin_TD)
        x_TH = self.tok_embeddings(input_ids)
        keeps = self.keeps(len(input_ids)) if torch.is_grad_enabled() else [EVERYTHING] * len(self.layers)
        for i, block in enumerate(self.layers):
            x_TH = block(x_TH, layout, caches[i] if caches else None, keeps[i])
        return self.norm(x_TH)


class Head(nn.Linear):
    """The output layer: logits, or the summed loss of targets without holding all logits."""

    def forward(self, x_TH: torch.Tensor, targets_T: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        if targets_T is None:
            return super().forward(x_TH)
        return linear_cross_entropy(x_TH, self.weight, targets_T, scale)


class CausalLM(nn.Module):
    """The language model. See `forward` for its one contract."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.output = Head(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        caches: list[LayerCache] | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Logits [T, V], or with `targets` the summed cross entropy times `scale` (fp32 scalar, nats).

        Args:
            input_ids: int64 [T], documents laid end to end.
            cu_seqlens: int32 [n + 1], their borders from 0 to T; None for one document.
            targets: int64 [T], already shifted, −100 where there is no loss.
            position_ids: int64 [T], from 0 in each document; None to derive them.
            max_seqlen: longest document; None to derive it (waits for the GPU).
            caches: of the layers, for one document that grows: `input_ids` are its next tokens, the logits those
                after the last, [1, V].
        """
        if caches is not None:
            return self.output(self.hidden(input_ids, cu_seqlens, position_ids, max_seqlen, caches)[-1:])
        return self.output(self.hidden(input_ids, cu_seqlens, position_ids, max_seqlen), targets, scale)

    def hidden(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        caches: list[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm, [T, H]."""
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, len(input_ids)], dtype=torch.int32, device=input_ids.device)
        if position_ids is None:
            position_ids = positions(cu_seqlens, len(input_ids))
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        return self.model(input_ids, position_ids, cu_seqlens, max_seqlen, caches)

    def use_products(self, name: str) -> None:
        """Choose how training multiplies with the weights of all layers (ops/products.py)."""
        for block in self.model.layers:
            block.products = KINDS[name]  # type: ignore[assignment]

    def use_attention(self, name: str) -> None:
        """Choose the attention backend for all layers."""
        for block in self.model.layers:
            block.attention.attend = attention.attend_by(name)  # type: ignore[union-attr]


@torch.no_grad()
def initialize(name: str, weight: torch.Tensor, c: DecoderConfig, seed: int) -> None:
    """Random values for one parameter: normal(0, initializer_range), norms one, biases and the padding row zero.

    Each has a generator of its own, seeded by `seed` and its name, so that parts can be made in any order.
    """
    if weight.dim() == 1:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        weight.normal_(0.0, c.initializer_range, generator=generator)
    if c.pad_token_id is not None and name == "model.tok_embeddings.weight":
        weight[c.pad_token_id].zero_()


def positions(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """int64 [T], counted from 0 in every document."""
    begins = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) - begins
