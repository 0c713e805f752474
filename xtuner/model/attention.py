"""Causal attention inside documents that lie end to end (variable-length attention), behind one contract.

    attend(q_TND, k_TKD, v_TKD, cu_seqlens, max_seqlen) -> o_TND

Token t sees the tokens of its own document up to itself. N is a multiple of K (grouped queries). A backend is chosen
once, when the model is built, by device and torch version; each is exact for the documents it is given.
"""

import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from xtuner.core.files import user_cache

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name of the fastest backend that runs here."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "loop"
    if torch.cuda.get_device_capability(device)[0] in (9, 10) and head_dim in (64, 96, 128) and _flash_4() is not None:
        return "flash4"
    return "varlen" if _varlen_attn() is not None else "loop"


def backend(name: str) -> Attend:
    return {"flash4": attend_flash_4, "varlen": attend_varlen, "loop": attend_loop}[name]


def attend_loop(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Document by document with PyTorch's own attention: any device, any dtype; on CPUs the fastest exact way."""
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    outputs = [
        attend_dense(q, k, v, causal=True)
        for q, k, v in zip(q_TND.split(lengths), k_TKD.split(lengths), v_TKD.split(lengths), strict=True)
    ]
    return torch.cat(outputs)


def attend_dense(
    q_QND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, causal: bool, mask_QS: torch.Tensor | None = None
) -> torch.Tensor:
    """Q queries on S keys of one document, [Q, N, D]."""
    groups = q_QND.shape[1] // k_SKD.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1)[None] for x in (k_SKD, v_SKD))
    q = q_QND.transpose(0, 1)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QS, is_causal=causal)[0].transpose(0, 1)


def attend_cached(q_QND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor) -> torch.Tensor:
    """The last Q tokens of a document on all its S >= Q tokens: one step of generation, or a prompt."""
    queries, keys = len(q_QND), len(k_SKD)
    if queries == keys:
        return attend_dense(q_QND, k_SKD, v_SKD, causal=True)
    if queries == 1:
        return attend_dense(q_QND, k_SKD, v_SKD, causal=False)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q_QND.device).tril(keys - queries)
    return attend_dense(q_QND, k_SKD, v_SKD, causal=False, mask_QS=mask)


def attend_varlen(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """PyTorch's variable-length FlashAttention (CUDA, half precision)."""
    varlen_attn = _varlen_attn()
    assert varlen_attn is not None
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(
        q_TND, k_TKD, v_TKD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **grouped
    )


def attend_flash_4(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """FlashAttention-4 (package flash-attn-4; Hopper and Blackwell, half precision)."""
    flash = _flash_4()
    assert flash is not None
    borders: dict[str, Any] = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    lengths = dict(max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
    out = flash(q_TND, k_TKD, v_TKD, **borders, **lengths, causal=True)
    return out[0] if isinstance(out, tuple) else out


@cache
def _flash_4() -> Callable[..., Any] | None:
    """Its kernels are compiled at first use (18 s on an H100), then taken from the user's cache."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(user_cache() / "flash-attention-4"))
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _varlen_attn() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
