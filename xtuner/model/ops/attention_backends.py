"""Variable-length attention on GPUs, by packages that compute it faster than a loop over documents.

Each function returns its backend, or None if the package is missing. All follow PyTorch's switch for deterministic
algorithms; FlashAttention-4 does not read it and gets it as an argument. The contract and the selection are in
`model/attention.py`. The GPU tests compare each backend with fp64, and two deterministic runs with each other.
"""

import inspect
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from xtuner.core.files import user_cache_dir

# (q, k, v, borders, longest), and `window` for layers with a sliding window
Attend = Callable[..., torch.Tensor]
# (q, k, v, borders of queries, borders of keys, most queries, most keys), and `window`: the queries of each fragment
# are the last of as many tokens as it has keys
AttendPrefixes = Callable[..., torch.Tensor]

BLOCK = 128  # tokens; FlexAttention skips blocks that are masked in full
# cuDNN builds a graph (0.2 s) for each number of documents and each longest length; both are rounded up so that few
# graphs are needed. It also builds one for each 64 tokens of a micro-batch's length: use it for packs that are not cut.
DOCUMENTS = 64  # the number of documents is rounded up to a multiple of this; the added ones are empty
SHORTEST = 1024  # longest lengths are rounded up to powers of two, at least this
SUMS = 2**30  # bytes of cuDNN's log-sums, padded to the longest document; above this varlen_attn is used instead
# Elements of q from which varlen_attn's gradients are wrong and FlexAttention's results differ (torch 2.11); the
# buffers of varlen_attn add a block for each document
TOO_MANY = 2**31


def attend_complete(prefixes: AttendPrefixes) -> Attend:
    """Attention of complete documents by a function for queries that are the last tokens of documents."""

    def attend(
        q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
        window: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        return prefixes(q_TND, k_TKD, v_TKD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window)

    return attend


@cache
def flash_4() -> AttendPrefixes | None:
    """FlashAttention-4. Its kernels are compiled at first use (18 s on an H100) and cached in the user's directory."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(user_cache_dir() / "flash-attention-4"))
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:
        return None
    # cutlass-dsl, at each compilation, about an argument that is always empty here
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted to a JitArgument")

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_borders: torch.Tensor, k_borders: torch.Tensor,
        most_queries: int, most_keys: int, window: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        borders: dict[str, Any] = dict(cu_seqlens_q=q_borders, cu_seqlens_k=k_borders)
        lengths: dict[str, Any] = dict(max_seqlen_q=most_queries, max_seqlen_k=most_keys)
        if window is not None:  # tokens before each
            lengths["window_size"] = window - 1, 0
        exact = torch.are_deterministic_algorithms_enabled()
        out = flash_attn_varlen_func(q, k, v, **borders, **lengths, causal=True, deterministic=exact)
        return out[0] if isinstance(out, tuple) else out

    return attend


def flash_4_orders_shared_heads(device: torch.device) -> bool:
    """Whether the installed FlashAttention-4 can add the gradients of a shared key-value head in a fixed order: on
    Hopper, from 4.0.0b36 on. As if that were installed, if none is."""
    try:
        beta = re.fullmatch(r"4\.0\.0b(\d+)", version("flash-attn-4"))
    except PackageNotFoundError:
        beta = None
    return (beta is None or int(beta[1]) >= 36) and torch.cuda.get_device_capability(device)[0] == 9


@cache
def cudnn() -> Attend | None:
    """cuDNN's attention, through the operators that NVIDIA's Python front end registers."""
    try:
        import cudnn.sdpa.fwd.torch_op  # noqa: F401
    except ImportError:
        return None
    complete = varlen()
    fallback = complete and attend_complete(complete)

    def attend(
        q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        empty = -(len(cu_seqlens) - 1) % DOCUMENTS
        borders = torch.cat((cu_seqlens, cu_seqlens[-1:].expand(empty)))
        longest = max(SHORTEST, 1 << (max_seqlen - 1).bit_length())
        if fallback and 4 * len(borders) * q_TND.shape[1] * longest > SUMS:
            return fallback(q_TND, k_TKD, v_TKD, cu_seqlens, max_seqlen)
        out, _ = torch.ops.cudnn.sdpa_fwd(
            q_TND, k_TKD, v_TKD, q_TND.shape[-1] ** -0.5, is_causal=True, cu_seqlens_q=borders, cu_seqlens_kv=borders,
            max_seqlen_q=longest, max_seqlen_kv=longest,
        )  # fmt: skip
        return out

    return attend


@cache
def varlen() -> AttendPrefixes | None:
    """PyTorch's `varlen_attn`, based on FlashAttention-2."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    function: Callable[..., Any] = varlen_attn
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_borders: torch.Tensor, k_borders: torch.Tensor,
        most_queries: int, most_keys: int, window: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        borders, lengths = (q_borders, k_borders), (most_queries, most_keys)
        before = -1 if window is None else window - 1
        parts = [
            function(*heads, *borders, *lengths, window_size=(before, 0), **grouped)
            for heads in divide_heads(q, k, v, len(q_borders) - 1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    return attend


def divide_heads(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, documents: int
) -> list[tuple[torch.Tensor, ...]]:
    """q, k and v as views of as many heads as keep a backend's buffers below `TOO_MANY` elements."""
    kv_heads = k_TKD.shape[1]
    groups, dim = q_TND.shape[1] // kv_heads, q_TND.shape[2]
    each = (TOO_MANY - 1) // ((len(q_TND) + BLOCK * documents) * groups * dim)  # kv heads
    each = min(max(each, 1), kv_heads)
    if each == kv_heads:
        return [(q_TND, k_TKD, v_TKD)]
    return list(zip(q_TND.split(each * groups, 1), k_TKD.split(each, 1), v_TKD.split(each, 1), strict=True))


@cache
def flex() -> Attend | None:
    """FlexAttention, compiled by PyTorch at first use; for GPUs that the others do not support."""
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return None
    from torch.utils.weak import WeakIdKeyDictionary

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    masks = WeakIdKeyDictionary()  # by `cu_seqlens`, which all layers of a micro-batch share: by window, the mask

    def attend(
        q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
        window: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        known = masks.setdefault(cu_seqlens, {})
        if window not in known:
            known[window] = document_mask(cu_seqlens, len(q_TND), window)
        parts = [
            compiled(*(x.transpose(0, 1)[None] for x in heads), block_mask=known[window], enable_gqa=True)
            for heads in divide_heads(q_TND, k_TKD, v_TKD, 0)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return out[0].transpose(0, 1)

    return attend


def document_mask(cu_seqlens: torch.Tensor, num_tokens: int, window: int | None = None) -> Any:
    """FlexAttention's mask of causal documents, from borders int32 [n + 1], without enumerating pairs of tokens.

    A token's keys begin with its document, or later with its window. A block of BLOCK queries needs the key blocks from
    the first key of its first token up to itself. Of these, the ones that begin at or after the first key of its last
    token and lie before the query block are unmasked in full.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device = cu_seqlens.device
    document_T = torch.searchsorted(cu_seqlens[1:], torch.arange(num_tokens, device=device), right=True)
    begin_T = cu_seqlens[document_T]  # each token's first key
    if window is not None:
        begin_T = torch.maximum(begin_T, torch.arange(num_tokens, device=device, dtype=begin_T.dtype) - window + 1)
    block = torch.arange(-(-num_tokens // BLOCK), device=device)
    last = (BLOCK * (block + 1)).clamp(max=num_tokens) - 1
    query, key = block[:, None], block[None, :]
    needed = (key <= query) & (key >= begin_T[BLOCK * block, None] // BLOCK)
    full = (key < query) & (BLOCK * key >= begin_T[last, None])

    def list_blocks(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks each query block has, and their indices, in front of all others."""
        order = chosen.int().argsort(dim=1, descending=True, stable=True)
        return chosen.sum(1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *list_blocks(needed & ~full), *list_blocks(full), BLOCK_SIZE=BLOCK, seq_lengths=(num_tokens, num_tokens),
        mask_mod=lambda b, h, q, kv: (kv <= q) & (kv >= begin_T[q]),
    )  # fmt: skip
