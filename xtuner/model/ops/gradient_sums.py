"""Where gradients of weights are added up over the micro-batches of an iteration.

A module that owns sums (`model/linear.py`) has its gradients added there, by the matrix product itself: no copy of the
gradient, no pass over memory to add it. Autograd then sees none. Without a sum a parameter gets an ordinary gradient.
"""

import torch


class GradientSum:
    """The sum of one weight's gradients, in a buffer that is used again by every iteration.

    Args:
        buffer: of the weight's shape, fp32 or the weight's dtype; its first contents do not matter. Its memory may be
            freed (`storage.resize_(0)`) between iterations: the first addition takes it again.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.size = buffer.untyped_storage().nbytes()
        self.fresh = True  # nothing has been added yet: the next gradient replaces what is there

    def reset(self) -> None:
        self.fresh = True

    def _take_memory(self) -> None:
        storage = self.buffer.untyped_storage()
        if not storage.size():
            storage.resize_(self.size)

    def value(self) -> torch.Tensor:
        """The sum; zeros where nothing was added."""
        if self.fresh:
            self._take_memory()
            self.buffer.zero_()
            self.fresh = False
        return self.buffer

    def add(self, gradient: torch.Tensor) -> None:
        if self.fresh:
            self._take_memory()
            self.buffer.copy_(gradient)
        else:
            self.buffer.add_(gradient)
        self.fresh = False

    def take(self, parameter: torch.Tensor) -> None:
        """Add the gradient that autograd has given a parameter, and leave it none."""
        if parameter.grad is not None:
            self.add(parameter.grad)
            parameter.grad = None

    def add_product(self, d_TN: torch.Tensor, x_TM: torch.Tensor) -> None:
        """Add d^T x, [N, M]."""
        if self.fresh:
            self._take_memory()
        beta, self.fresh = 0.0 if self.fresh else 1.0, False
        if self.buffer.dtype == d_TN.dtype:
            torch.addmm(self.buffer, d_TN.T, x_TM, beta=beta, out=self.buffer)
        elif d_TN.is_cuda:  # bf16 factors, summed in fp32 by the product itself
            torch.addmm(self.buffer, d_TN.T, x_TM, out_dtype=self.buffer.dtype, beta=beta, out=self.buffer)
        elif beta:
            self.buffer.add_(d_TN.T @ x_TM)
        else:
            self.buffer.copy_(d_TN.T @ x_TM)


def give(into: GradientSum | None, gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Hand a gradient to a weight's sum, or return it, in the weight's dtype, for autograd."""
    if into is None:
        return gradient.to(dtype)
    into.add(gradient)
    return None


def give_product(into: GradientSum | None, d_TN: torch.Tensor, x_TM: torch.Tensor) -> torch.Tensor | None:
    """The same for the gradient d^T x of a matrix [N, M]."""
    if into is None:
        return d_TN.T @ x_TM
    into.add_product(d_TN, x_TM)
    return None
