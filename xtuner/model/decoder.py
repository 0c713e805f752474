"""The network: a decoder of pre-norm blocks with grouped-query attention, rotary positions and a SwiGLU MLP.

Readable top to bottom. One micro-batch is one row of T tokens: documents laid end to end, no padding, no batch axis.

    T tokens   H hidden   N query heads   K kv heads   G = N/K queries a kv head   D head dim   F ffn   V vocabulary

Parameter names are InternLM2's; `xtuner/families/` maps them to those of other families.
"""

import zlib
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from xtuner.families.network import DecoderConfig
from xtuner.model import attention
from xtuner.model.activation_memory import ActivationPlan, limit_factors
from xtuner.model.context_parallel.shared_documents import SharedDocuments
from xtuner.model.linear import Embedding, Head, Linear, RMSNorm, TiedHead, apply_linear, common_matmul, runs_only
from xtuner.model.ops import autograd_functions
from xtuner.model.ops.attention_backends import Attend, AttendPrefixes
from xtuner.model.ops.autograd_functions import KEEP_ALL, KeepPolicy, Recomputed
from xtuner.model.ops.low_rank import DropoutSeed
from xtuner.model.ops.matmul import MATMULS, Matmul
from xtuner.model.ops.quantized import Dequantizer
from xtuner.model.ops.saved_tensors import HostMemory, recompute_saved
from xtuner.model.ops.swiglu import TILE, SwiGLUFunction
from xtuner.model.rope import Rope, rotate


@dataclass
class DocumentLayout:
    """Borders of the documents in the row, and every token's angles: computed once, used by all layers."""

    cu_seqlens: torch.Tensor  # int32 [n + 1]
    max_seqlen: int
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    shared: SharedDocuments | None = None  # documents before these, of which the row has a piece


class LayerCache:
    """Keys and values of one layer for the document being generated, [S, K, D] each.

    They are the beginning of a buffer that grows by an eighth: a token does not copy all earlier ones, and a long
    document is not stored with as much unused memory.
    """

    def __init__(self) -> None:
        self.length = 0  # S
        self.buffer: torch.Tensor | None = None  # [2, room, K, D]

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of the next tokens; returns those of all."""
        before, self.length = self.length, self.length + len(k)
        if self.buffer is None or self.length > self.buffer.shape[1]:
            larger = k.new_empty(2, self.length + max(self.length // 8, 64), *k.shape[1:])
            if self.buffer is not None:
                larger[:, :before] = self.buffer[:, :before]
            self.buffer = larger
        self.buffer[0, before : self.length], self.buffer[1, before : self.length] = k, v
        return self.buffer[0, : self.length], self.buffer[1, : self.length]


class Attention(nn.Module):
    """Rows of `wqkv`: for each kv head its G query heads, then k, then v, D rows each. `q_norm` and `k_norm` exist in
    networks that normalize every head's q and k before the rotation."""

    def __init__(self, c: DecoderConfig, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.num_kv_heads, self.groups, self.head_dim = c.num_kv_heads, c.queries_per_kv_head, c.head_dim
        self.wqkv = Linear(c.hidden_size, c.qkv_width, bias=c.qkv_bias)
        self.wo = Linear(c.query_width, c.hidden_size, bias=c.output_bias)
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None for _ in range(2))
        self.attend: Attend
        self.attend_prefixes: AttendPrefixes | None
        self.use_backend("loop")

    def use_backend(self, name: str) -> None:
        """Choose the attention backend."""
        self.attend = attention.load_backend(name, self.window)
        self.attend_prefixes = attention.load_prefixes(name, self.window)

    def forward(
        self, x_TH: torch.Tensor, layout: DocumentLayout, cache: LayerCache | None = None, keep: KeepPolicy = KEEP_ALL
    ) -> torch.Tensor:
        recomputed = Recomputed()
        q_TND, k_TKD, v_TKD = self.split_heads(self.wqkv(x_TH), layout, keep.qkv, recomputed)
        if cache is not None:
            o_TND = attention.attend_cached(q_TND, *cache.extend(k_TKD, v_TKD), self.window)
        else:
            recipe = autograd_functions.get_recipe(x_TH)
            inputs, compute = recipe.tensors, recipe.compute  # apart: the backward must not keep these inputs alive

            def recompute(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                qkv = self.wqkv(compute(*inputs))
                if self.q_norm is not None:
                    recomputed.value = qkv.detach()
                return self.split_heads(qkv, layout, False, Recomputed())

            heads = q_TND, k_TKD, v_TKD
            if layout.shared:
                borders, project = (layout.cu_seqlens, layout.max_seqlen), None if keep.qkv else recompute
                attend = self.attend, self.attend_prefixes
                return self.wo(layout.shared.attend(*attend, *heads, *borders, project, inputs, keep.saver))
            with nullcontext() if keep.qkv else recompute_saved(heads, inputs, recompute, keep.saver):
                o_TND = self.attend(q_TND, k_TKD, v_TKD, layout.cu_seqlens, layout.max_seqlen)
        return self.wo(o_TND.reshape(len(x_TH), -1))

    def input_matmul(self) -> Matmul:
        """How products read the input, if nothing else does."""
        return common_matmul((self.wqkv,))

    def split_heads(
        self, qkv: torch.Tensor, layout: DocumentLayout, keep: bool, recomputed: Recomputed
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, N, D], k and v [T, K, D]; q and k rotated by each token's angles.

        Args:
            keep: whether norms of q and k keep their inputs.
            recomputed: where a norm's backward finds these inputs if something else has recomputed them.
        """
        angles = layout.cos_TD, layout.sin_TD
        matmul, shape = self.input_matmul(), (self.num_kv_heads, self.head_dim)
        if self.q_norm is None or self.k_norm is None:
            return autograd_functions.SplitRotate.apply(qkv, *angles, *shape, matmul)
        norms = self.q_norm, self.k_norm
        if not all(isinstance(norm, RMSNorm) and norm.is_plain() for norm in norms) or norms[0].eps != norms[1].eps:
            return self._normalize_by_modules(qkv, angles)
        recipe = autograd_functions.keep_tensor(qkv) if keep else autograd_functions.get_recipe(qkv)
        weights, into = [n.weight for n in norms], tuple(n.gradient_sums.get("weight") for n in norms)
        return autograd_functions.SplitNormRotate.apply(
            qkv, *weights, norms[0].eps, angles, self.num_kv_heads, recipe, recomputed, into, matmul
        )

    def _normalize_by_modules(
        self, qkv: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For norms with hooks, and other modules in their place."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        heads = qkv.view(len(qkv), self.num_kv_heads, -1, self.head_dim)
        q_TND, k_TKD = heads[:, :, :-2].reshape(len(qkv), -1, self.head_dim), heads[:, :, -2]
        rotated = (
            rotate(norm(x.reshape(-1, self.head_dim))[1].view(x.shape), *angles)
            for norm, x in ((self.q_norm, q_TND), (self.k_norm, k_TKD))
        )
        return *rotated, heads[:, :, -1].contiguous()  # type: ignore[return-value]


class FeedForward(nn.Module):
    """w2(silu(w1 x) · w3 x) + add."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.w1 = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.w3 = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.w2 = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x_TH: torch.Tensor, add_TH: torch.Tensor, keep: KeepPolicy = KEEP_ALL) -> torch.Tensor:
        """One fused function, unless a projection is more than a product: another class, a hook, a foreign adapter."""
        parts = [w for w in (self.w1, self.w3, self.w2) if isinstance(w, Linear) and w.is_fusable()]
        if len(parts) < 3 or any(w.current_matmul() is not parts[0].current_matmul() for w in parts):
            return apply_linear(self.w2, F.silu(self.w1(x_TH)) * self.w3(x_TH), add_TH)
        weights, biases = [w.weight for w in parts], [w.bias for w in parts]
        into = tuple(w.gradient_sums.get(key) for key in ("weight", "bias") for w in parts)
        recipe, matmul = autograd_functions.get_recipe(x_TH), parts[0].current_matmul()
        terms, of_terms = zip(*(w.low_rank_term() for w in parts), strict=True)
        kept = keep.gate_up, keep.output, keep.saver
        tensors = [tensor for held in of_terms for tensor in held]
        return SwiGLUFunction.apply(x_TH, add_TH, *weights, *biases, recipe, matmul, into, *kept, terms, *tensors)

    def input_matmul(self) -> Matmul:
        """How products read the input, if nothing else does."""
        return common_matmul((self.w1, self.w3))


class Block(nn.Module):
    """Attention and MLP, each applied to the norm of the residual stream and added to it.

    Args:
        host: memory for what is kept there; shared by all blocks.
        window: the layer's sliding window, if any.
    """

    def __init__(self, c: DecoderConfig, host: HostMemory, window: int | None = None) -> None:
        super().__init__()
        self.host = host
        self.attention_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(c, window)
        self.ffn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(
        self, x_TH: torch.Tensor, layout: DocumentLayout, cache: LayerCache | None = None, keep: KeepPolicy = KEEP_ALL
    ) -> torch.Tensor:
        with self.host.save(x_TH, keep) as keep:
            if keep.attention:
                return self.compute(x_TH, layout, cache, keep)
            recomputed, calls = (
                replace(KEEP_ALL, gate_up=len(x_TH) <= TILE),
                iter((True,)),
            )  # the forward's, then others

            def compute(x_TH: torch.Tensor) -> torch.Tensor:
                return self.compute(x_TH, layout, None, replace(recomputed, output=next(calls, False)))

            return checkpoint(compute, x_TH, use_reentrant=False, preserve_rng_state=False)

    def compute(
        self, x_TH: torch.Tensor, layout: DocumentLayout, cache: LayerCache | None, keep: KeepPolicy
    ) -> torch.Tensor:
        x_TH, normed_TH = apply_norm(self.attention_norm, self.attention, x_TH)
        attended_TH = self.attention(normed_TH, layout, cache, keep)
        x_TH, normed_TH = apply_norm(self.ffn_norm, self.feed_forward, x_TH, attended_TH, keep.residual)
        return self.feed_forward(normed_TH, x_TH, keep)


def apply_norm(
    norm: RMSNorm, reader: Attention | FeedForward, x_TH: torch.Tensor, *args: torch.Tensor | bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x, …), in the form that its only reader needs: its products if both are as defined here."""
    ours = runs_only(norm, RMSNorm.forward) and runs_only(reader, Attention.forward, FeedForward.forward)
    if ours and not _has_any_global_hook():
        return norm(x_TH, *args, matmul=reader.input_matmul())
    return norm(x_TH, *args)


class Decoder(nn.Module):
    """Token ids → hidden states after the last norm."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.config = c
        self.rope = Rope(c.head_dim, c.rope_theta, c.max_position_embeddings, c.rope_scaling)
        self.tok_embeddings = Embedding(c.vocab_size, c.hidden_size, c.pad_token_id)
        self.host = HostMemory()
        self.layers = nn.ModuleList(Block(c, self.host, c.window(layer)) for layer in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.activation_plan = ActivationPlan(c, itemsize=4)  # keeps everything

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        caches: list[LayerCache] | None = None,
        shared: SharedDocuments | None = None,
    ) -> torch.Tensor:
        borders, lengths, longest = cu_seqlens, None, max_seqlen
        if shared:
            borders, lengths = shared.tokens.row_borders, shared.tokens.row_lengths
            longest = max(longest, shared.tokens.max_seqlen)
        cos_TD, sin_TD = self.rope.table(position_ids, borders, longest, lengths)
        layout = DocumentLayout(cu_seqlens, max_seqlen, cos_TD, sin_TD, shared)
        x_TH = self.tok_embeddings(input_ids)
        trains, tokens = torch.is_grad_enabled(), shared.tokens.largest_row if shared else len(input_ids)
        policies, limits = [KEEP_ALL] * len(self.layers), [0] * len(self.layers)
        if trains:
            policies = self.activation_plan.choose_kept(tokens)
            limits = limit_factors(self.config, x_TH.itemsize, tokens, policies)
        for i, block in enumerate(self.layers):
            self.host.limit = limits[i]
            x_TH = block(x_TH, layout, caches[i] if caches else None, policies[i])
        return self.norm(x_TH)[1]


class CausalLM(nn.Module):
    """The language model; see `forward` for its contract."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.dropout_seed = DropoutSeed()
        tied = config.tie_word_embeddings
        self.output = TiedHead(self.model.tok_embeddings) if tied else Head(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        caches: list[LayerCache] | None = None,
        scale: float = 1.0,
        shared: SharedDocuments | None = None,
    ) -> torch.Tensor:
        """Logits [T, V], or with `targets` the summed cross entropy times `scale` (fp32 scalar, nats).

        Args:
            input_ids: int64 [T], documents laid end to end.
            cu_seqlens: int32 [n + 1], their borders from 0 to T; None for one document.
            targets: int64 [T], already shifted, −100 where there is no loss.
            position_ids: int64 [T], from 0 in each document; None to derive them.
            max_seqlen: longest document; None to derive it (waits for the GPU).
            caches: one a layer, to continue a document: `input_ids` are its next tokens, and the logits are those after
                the last one, [1, V].
            shared: documents of which the first tokens are this rank's piece; `cu_seqlens` has the tokens after it.
        """
        if caches is not None:
            return self.output(self.hidden(input_ids, cu_seqlens, position_ids, max_seqlen, caches)[-1:])
        hidden_TH = self.hidden(input_ids, cu_seqlens, position_ids, max_seqlen, shared=shared)
        return self.output(hidden_TH, targets, scale)

    def hidden(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        caches: list[LayerCache] | None = None,
        shared: SharedDocuments | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm, [T, H]."""
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, len(input_ids)], dtype=torch.int32, device=input_ids.device)
        if position_ids is None:
            position_ids = make_positions(cu_seqlens, len(input_ids))
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        return self.model(input_ids, position_ids, cu_seqlens, max_seqlen, caches, shared)

    @property
    def attends_prefixes(self) -> bool:
        """Whether attention supports queries that are a part of a document."""
        return all(block.attention.attend_prefixes is not None for block in self.model.layers)  # type: ignore[union-attr]

    def keep_activations(self, plan: ActivationPlan) -> None:
        """Choose what each layer keeps between forward and backward."""
        self.model.activation_plan = plan

    def use_matmul(self, name: str) -> None:
        """Choose how training multiplies with the weights of all layers (ops/matmul.py)."""
        for module in self.model.layers.modules():
            if isinstance(module, Linear):
                module.matmul = MATMULS[name]

    def quantize_frozen(self, kept: Dequantizer) -> None:
        """Keep the matrices of all layers that are not trained in another format, uninitialized."""
        for module in self.model.layers.modules():
            if isinstance(module, Linear) and not module.weight.requires_grad:
                module.quantize(kept)

    def use_attention(self, name: str) -> None:
        """Choose the attention backend for all layers."""
        for block in self.model.layers:
            block.attention.use_backend(name)  # type: ignore[union-attr, operator]


@torch.no_grad()
def initialize_parameter(name: str, weight: torch.Tensor, c: DecoderConfig, seed: int) -> None:
    """Initial values of one parameter: normal(0, initializer_range); norms one, biases and the padding row zero.

    Each parameter has its own generator, seeded by `seed` and its name, so that the order of parameters does not
    matter.
    """
    if weight.dim() == 1:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        weight.normal_(0.0, c.initializer_range, generator=generator)
    if c.pad_token_id is not None and name == "model.tok_embeddings.weight":
        weight[c.pad_token_id].zero_()


def make_positions(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """int64 [T], counted from 0 in every document."""
    begins = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) - begins
