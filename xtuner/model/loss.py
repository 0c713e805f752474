"""Cross entropy of the output layer, computed in chunks so that all logits never exist at once.

The result is the sum over targets times a scale. The caller chooses the scale: a single call does not know the number
of targets of all ranks and micro-batches.
"""

from typing import Any

import torch

from xtuner.model.ops.elementwise import cross_entropy_
from xtuner.model.ops.gradient_sums import GradientSum

CHUNK = 2**28 + 2**27  # logits per chunk: 768 MiB in bf16; 4351 tokens at InternLM2's vocabulary


def chunk_tokens(vocabulary: int) -> int:
    return max(CHUNK // vocabulary, 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """scale · Σ −log softmax(x W^T)[target]. The forward computes gradients too, chunk by chunk, as it has the logits.

    Memory beyond inputs: one chunk of logits in x's dtype, dx [T, H], and dW [V, H] in fp32 if W has no gradient sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        w_VH: torch.Tensor,
        targets_T: torch.Tensor,
        scale: float,
        into: GradientSum | None,
    ) -> torch.Tensor:
        need_x, need_w, *_ = ctx.needs_input_grad
        dw = (into or GradientSum(torch.empty_like(w_VH, dtype=torch.float32))) if need_w else None
        dx_TH = torch.empty_like(x_TH) if need_x else None
        total = torch.zeros((), dtype=torch.float32, device=x_TH.device)
        chunks = -(-len(x_TH) // chunk_tokens(len(w_VH)))
        step = -(-len(x_TH) // max(chunks, 1))  # equal: each adds to all of dW, however few its tokens
        for begin in range(0, len(x_TH), max(step, 1)):
            x, targets = x_TH[begin : begin + step], targets_T[begin : begin + step]
            d = x @ w_VH.T  # logits, then their gradient
            total += cross_entropy_(d, targets, scale if need_x or need_w else None).sum()
            if dx_TH is not None:
                torch.mm(d, w_VH, out=dx_TH[begin : begin + step])
            if dw is not None:
                dw.add_product(d, x)
            del d  # before the next chunk is allocated
        ctx.save_for_backward(dx_TH, None if dw is None or into else dw.value())
        ctx.dtype = w_VH.dtype
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = grads
        dx_TH, dw_VH = ctx.saved_tensors
        dx = None if dx_TH is None else (dx_TH * factor).to(dx_TH.dtype)
        dw = None if dw_VH is None else (dw_VH * factor).to(ctx.dtype)
        return dx, dw, None, None, None


def linear_cross_entropy(
    x_TH: torch.Tensor,
    w_VH: torch.Tensor,
    targets_T: torch.Tensor,
    scale: float = 1.0,
    into: GradientSum | None = None,
) -> torch.Tensor:
    """Sum of the cross entropy over all positions with a target, times `scale`: an fp32 scalar in nats.

    With a gradient sum, the weight's gradient is added to it here, for a derivative of 1: call `backward` on this value
    itself, not on a multiple of it.

    Args:
        x_TH: hidden states after the last norm, [T, H].
        w_VH: output weights, [V, H].
        targets_T: int64 [T], −100 where there is no loss.
        into: where the gradient of the weights is added; None to return it to autograd.
    """
    if not torch.is_grad_enabled():  # `needs_input_grad` of a parameter is true even then
        x_TH, w_VH = x_TH.detach(), w_VH.detach()
    return _LinearCrossEntropy.apply(x_TH, w_VH, targets_T, scale, into)
