"""Memory that tensors take, counted at every operator."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have returned and that still exist, but for those `known`."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dtype != torch.uint8:  # chunks of host memory
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.remove(key)
        self.now -= size


class FlashBytes(torch.autograd.Function):
    """Allocates what FlashAttention does, with sums of gradients in fp32, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, *qkv: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(qkv[0])
        ctx.save_for_backward(*qkv, out, out.new_empty(out.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, out, log_sums = ctx.saved_tensors
        sums = [torch.empty_like(t, dtype=torch.float32) for t in (q, k, v)]
        found = tuple(torch.empty_like(t) for t in (q, k, v))
        del sums, out, log_sums
        return found
