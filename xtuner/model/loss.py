"""Cross entropy of the output layer without ever holding all logits.

The sum over targets is returned, not the mean: the caller divides by the number of targets of all ranks and
micro-batches, which no single call knows.
"""

from typing import Any

import torch

IGNORE = -100
CHUNK = 2**27  # logits a chunk: 512 MiB in fp32; 1450 tokens at InternLM2's vocabulary


def chunk_tokens(vocabulary: int) -> int:
    return max(CHUNK // vocabulary, 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(x W^T)[target]. Gradients are made chunk by chunk in the forward, while the logits are there.

    Memory beyond inputs: one chunk of logits in fp32 and twice in x's dtype, dx [T, H] and, in fp32, dW [V, H].
    """

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, w_VH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        need_x, need_w, _ = ctx.needs_input_grad
        dx_TH = torch.zeros_like(x_TH) if need_x else None
        dw_VH = torch.zeros_like(w_VH, dtype=torch.float32) if need_w else None
        total = torch.zeros((), dtype=torch.float32, device=x_TH.device)
        step = chunk_tokens(len(w_VH))
        for begin in range(0, len(x_TH), step):
            chunk = slice(begin, begin + step)
            x, targets = x_TH[chunk], targets_T[chunk]
            unlearned, target_column = targets == IGNORE, targets.clamp(min=0)[:, None]
            scores = (x @ w_VH.T).float()  # becomes exp(logits − largest), then the gradient, in place
            target_logit = scores.gather(1, target_column)
            largest = scores.amax(1, keepdim=True)
            total_weight = scores.sub_(largest).exp_().sum(1, keepdim=True)
            losses = (total_weight.log() + largest - target_logit)[:, 0]
            total += losses.masked_fill(unlearned, 0.0).sum()
            if not (need_x or need_w):
                continue
            # d loss / d logits = softmax − onehot(target), and nothing where there is no target
            scores.div_(total_weight).scatter_add_(1, target_column, -torch.ones_like(target_logit))
            d = scores.masked_fill_(unlearned[:, None], 0.0).to(x.dtype)
            if dx_TH is not None:
                dx_TH[chunk] = d @ w_VH
            if dw_VH is not None:
                dw_VH += (d.T @ x).float()
        ctx.save_for_backward(dx_TH, dw_VH)
        ctx.dtype = w_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (scale,) = grads
        dx_TH, dw_VH = ctx.saved_tensors
        dx = None if dx_TH is None else (dx_TH * scale).to(dx_TH.dtype)
        dw = None if dw_VH is None else (dw_VH * scale).to(ctx.dtype)
        return dx, dw, None


def linear_cross_entropy(x_TH: torch.Tensor, w_VH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropy over all positions with a target, fp32 scalar, in nats.

    Args:
        x_TH: hidden states after the last norm, [T, H].
        w_VH: output weights, [V, H].
        targets_T: int64 [T], −100 where there is no loss.
    """
    if not torch.is_grad_enabled():  # autograd asks for the gradient of a parameter all the same
        x_TH, w_VH = x_TH.detach(), w_VH.detach()
    return _LinearCrossEntropy.apply(x_TH, w_VH, targets_T)
