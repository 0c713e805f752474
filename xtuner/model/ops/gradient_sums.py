"""Accumulation of weight gradients over the micro-batches of an iteration.

A module with gradient sums (`model/linear.py`) adds its gradients to them, matrices inside the matrix product itself,
which saves a copy of the gradient and a pass over memory. Autograd then gets no gradient. A parameter without a sum
gets an ordinary gradient.
"""

import torch


class GradientSum:
    """The sum of one weight's gradients, in a buffer that every iteration reuses.

    Args:
        buffer: of the weight's shape, fp32 or the weight's dtype; its initial contents do not matter. Its memory may be
            freed (`storage.resize_(0)`) between iterations: the first addition allocates it again.

    Attributes:
        weight_maxima: largest magnitudes of the weight's columns, if a product has searched them since the last reset:
            the weight changes between iterations only.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.size = buffer.untyped_storage().nbytes()
        self.reset()

    def reset(self) -> None:
        self.fresh = True  # nothing has been added yet: the next gradient overwrites the buffer
        self.weight_maxima: torch.Tensor | None = None

    def _allocate(self) -> None:
        storage = self.buffer.untyped_storage()
        if not storage.size():
            storage.resize_(self.size)

    def value(self) -> torch.Tensor:
        """The sum; zeros if nothing was added."""
        if self.fresh:
            self._allocate()
            self.buffer.zero_()
            self.fresh = False
        return self.buffer

    def add(self, gradient: torch.Tensor) -> None:
        if self.fresh:
            self._allocate()
            self.buffer.copy_(gradient)
        else:
            self.buffer.add_(gradient)
        self.fresh = False

    def take_gradient(self, parameter: torch.Tensor) -> None:
        """Move a parameter's gradient from autograd to this sum."""
        if parameter.grad is not None:
            self.add(parameter.grad)
            parameter.grad = None

    def begin(self) -> bool:
        """The buffer is about to be written. Returns whether its contents are part of the sum."""
        if self.fresh:
            self._allocate()
        added, self.fresh = not self.fresh, False
        return added

    def add_product(self, d_TN: torch.Tensor, x_TM: torch.Tensor) -> None:
        """Add d^T x, [N, M]."""
        beta = 1.0 if self.begin() else 0.0
        if self.buffer.dtype == d_TN.dtype:
            torch.addmm(self.buffer, d_TN.T, x_TM, beta=beta, out=self.buffer)
        elif d_TN.is_cuda:  # bf16 factors; the product accumulates in fp32
            torch.addmm(self.buffer, d_TN.T, x_TM, out_dtype=self.buffer.dtype, beta=beta, out=self.buffer)
        elif beta:
            self.buffer.add_(d_TN.T @ x_TM)
        else:
            self.buffer.copy_(d_TN.T @ x_TM)


def add_gradient(into: GradientSum | None, gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Add a gradient to a weight's sum; without a sum, return it to autograd in the weight's dtype."""
    if into is None:
        return gradient.to(dtype)
    into.add(gradient)
    return None


def add_gradient_product(into: GradientSum | None, d_TN: torch.Tensor, x_TM: torch.Tensor) -> torch.Tensor | None:
    """`add_gradient` for the gradient d^T x of a matrix [N, M]."""
    if into is None:
        return d_TN.T @ x_TM
    into.add_product(d_TN, x_TM)
    return None
