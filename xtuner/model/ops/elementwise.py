"""What a block computes apart from matrix products and attention, forward and backward, defined in PyTorch.

On GPUs each function is one kernel that reads and writes memory once (elementwise_kernels.py); GPU tests compare both.
There, `maxima` are raised to those of the gradient that is computed (maxima.py).

    T tokens   H hidden   N query heads   K kv heads   G = N/K   D head dim   F ffn   V vocabulary
"""

from functools import cache

import torch
from torch.nn import functional as F

from xtuner.data.packing.raw_pack import IGNORE
from xtuner.model.ops.maxima import Maxima
from xtuner.model.rope import rotate


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _use_kernels(x: torch.Tensor) -> bool:
    return x.is_cuda and _has_triton()


def rms_norm(
    x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, add_TH: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + add, its norm times w). The mean square is computed in fp32, the product in x's dtype."""
    if _use_kernels(x_TH):
        from xtuner.model.ops import elementwise_kernels

        return elementwise_kernels.rms_norm(x_TH, w_H, eps, add_TH)
    if add_TH is not None:
        x_TH = x_TH + add_TH
    x32 = x_TH.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return x_TH, w_H * normed.to(x_TH.dtype)


def rms_norm_backward(
    d_TH: torch.Tensor, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None = None,
    maxima: Maxima | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(gradient of x, of w in fp32) from that of the norm; `residual`, x's gradient from its other use, is added."""
    if _use_kernels(x_TH):
        from xtuner.model.ops import elementwise_kernels

        return elementwise_kernels.rms_norm_backward(d_TH, x_TH, w_H, eps, residual_TH, maxima)
    x32, d32 = x_TH.float(), d_TH.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    normed = x32 * scale
    dw_H = (d32 * normed.to(x_TH.dtype)).sum(0)
    d32 = d32 * w_H
    dx = scale * (d32 - normed * (d32 * normed).mean(-1, keepdim=True))
    if residual_TH is not None:
        dx = dx + residual_TH
    return dx.to(x_TH.dtype), dw_H


def split_rotate(
    qkv: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T, K·(G+2)·D] → q [T, N, D], k and v [T, K, D], q and k rotated by each token's angles; all contiguous."""
    if _use_kernels(qkv):
        from xtuner.model.ops import elementwise_kernels

        return elementwise_kernels.split_rotate(qkv, cos_TD, sin_TD, kv_heads, head_dim)
    q_TND, k_TKD, v_TKD = _split_heads(qkv, kv_heads, head_dim)
    return rotate(q_TND, cos_TD, sin_TD), rotate(k_TKD, cos_TD, sin_TD), v_TKD


def split_rotate_backward(
    dq_TND: torch.Tensor, dk_TKD: torch.Tensor, dv_TKD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor,
    maxima: Maxima | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gradients of q, k and v → that of the joint projection [T, K·(G+2)·D]."""
    if _use_kernels(dq_TND):
        from xtuner.model.ops import elementwise_kernels

        return elementwise_kernels.split_rotate_backward(dq_TND, dk_TKD, dv_TKD, cos_TD, sin_TD, maxima)
    T, kv_heads, head_dim = dk_TKD.shape
    dq = rotate(dq_TND, cos_TD, -sin_TD).view(T, kv_heads, -1, head_dim)
    dk = rotate(dk_TKD, cos_TD, -sin_TD).view(T, kv_heads, 1, head_dim)
    return torch.cat((dq, dk, dv_TKD.view(T, kv_heads, 1, head_dim)), dim=2).view(T, -1)


def split_norm_rotate(
    qkv: torch.Tensor, wq_D: torch.Tensor, wk_D: torch.Tensor, eps: float, cos_TD: torch.Tensor, sin_TD: torch.Tensor,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`split_rotate` with the RMS norm of every head's q and k, times wq and wk, before the rotation."""
    if _use_kernels(qkv):
        from xtuner.model.ops import elementwise_kernels

        return elementwise_kernels.split_norm_rotate(qkv, wq_D, wk_D, eps, cos_TD, sin_TD, kv_heads)
    q_TND, k_TKD, v_TKD = _split_heads(qkv, kv_heads, len(wq_D))
    q_TND, k_TKD = (rms_norm(x.reshape(-1, len(w)), w, eps)[1].view(x.shape) for x, w in ((q_TND, wq_D), (k_TKD, wk_D)))
    return rotate(q_TND, cos_TD, sin_TD), rotate(k_TKD, cos_TD, sin_TD), v_TKD


def split_norm_rotate_backward(
    dq_TND: torch.Tensor, dk_TKD: torch.Tensor, dv_TKD: torch.Tensor, qkv: torch.Tensor, wq_D: torch.Tensor,
    wk_D: torch.Tensor, eps: float, cos_TD: torch.Tensor, sin_TD: torch.Tensor, maxima: Maxima | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(gradient of the joint projection, of wq and of wk in fp32)."""
    if _use_kernels(qkv):
        from xtuner.model.ops import elementwise_kernels

        args = (dq_TND, dk_TKD, dv_TKD, qkv, wq_D, wk_D, eps, cos_TD, sin_TD, maxima)
        return elementwise_kernels.split_norm_rotate_backward(*args)
    T, kv_heads, head_dim = dk_TKD.shape
    gradients, weights = [], []
    for d, x, w in zip((dq_TND, dk_TKD), _split_heads(qkv, kv_heads, head_dim), (wq_D, wk_D), strict=False):
        d = rotate(d, cos_TD, -sin_TD).view(-1, head_dim)
        dx, dw = rms_norm_backward(d, x.reshape(-1, head_dim), w, eps)
        gradients.append(dx.view(T, kv_heads, -1, head_dim))
        weights.append(dw)
    joint = torch.cat((*gradients, dv_TKD.view(T, kv_heads, 1, head_dim)), dim=2).view(T, -1)
    return joint, weights[0], weights[1]


def _split_heads(qkv: torch.Tensor, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T, K·(G+2)·D] → q [T, N, D], k and v [T, K, D]; k and v contiguous."""
    heads = qkv.view(len(qkv), kv_heads, -1, head_dim)
    q_TND = heads[:, :, :-2].reshape(len(qkv), -1, head_dim)
    return q_TND, heads[:, :, -2].contiguous(), heads[:, :, -1].contiguous()


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up."""
    if _use_kernels(gate_TF):
        from xtuner.model.ops import elementwise_kernels

        return elementwise_kernels.swiglu(gate_TF, up_TF)
    return F.silu(gate_TF) * up_TF


def swiglu_backward(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, d_TF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, of up, and silu(gate) · up recomputed); on GPUs in the memory of the three inputs."""
    if _use_kernels(gate_TF):
        from xtuner.model.ops import elementwise_kernels

        return elementwise_kernels.swiglu_backward_(gate_TF, up_TF, d_TF)
    sigmoid = torch.sigmoid(gate_TF.float())
    silu = (gate_TF * sigmoid).to(gate_TF.dtype)
    d_gate = d_TF.float() * up_TF * (sigmoid * (1 + gate_TF * (1 - sigmoid)))
    return d_gate.to(gate_TF.dtype), d_TF * silu, silu * up_TF


def cross_entropy_(logits_TV: torch.Tensor, targets_T: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Losses, fp32 [T], 0 where there is no target. The logits become scale · d(sum of losses)/d(logits) in place.

    Without a scale the gradient is not computed, and the logits stay unchanged.
    """
    if _use_kernels(logits_TV):
        from xtuner.model.ops import elementwise_kernels

        return elementwise_kernels.cross_entropy_(logits_TV, targets_T, scale)
    ignored, column = targets_T == IGNORE, targets_T.clamp(min=0)[:, None]
    scores = logits_TV.float()
    target_logit = scores.gather(1, column)
    largest = scores.amax(1, keepdim=True)
    scores = scores.sub(largest).exp_()
    total = scores.sum(1, keepdim=True)
    losses = (total.log() + largest - target_logit)[:, 0].masked_fill(ignored, 0.0)
    if scale is None:
        return losses
    scores.div_(total).scatter_add_(1, column, -torch.ones_like(target_logit))
    logits_TV.copy_(scores.masked_fill_(ignored[:, None], 0.0).mul_(scale))
    return losses
