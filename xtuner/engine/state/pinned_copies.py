"""Host memory for snapshots: allocated once in the background, and reused by every save."""

import threading
from collections.abc import Mapping

import torch

ARENA = 2**30  # bytes allocated at once; torch rounds pinned memory up to a power of two
ALIGNMENT = 64


class HostCopy:
    """Copies of tensors in host memory, pinned for GPUs so that copying runs at the link's speed.

    Pinning 20 GiB takes seconds; `reserve` does it in a thread while training continues.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: dict[str, torch.Tensor] = {}
        self._reserving: threading.Thread | None = None

    def reserve(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Start to allocate the memory for copies of such tensors, which may be on "meta"."""
        self._wait()
        missing = {n: torch.empty_like(t, device="meta") for n, t in tensors.items() if n not in self._buffers}
        self._reserving = threading.Thread(target=self._allocate, args=(missing,), name="xtuner-pin", daemon=True)
        self._reserving.start()

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of `tensors`, complete when this returns. They overwrite those of the last call."""
        self._wait()
        self._allocate({n: t for n, t in tensors.items() if n not in self._buffers})
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in tensors}

    def _wait(self) -> None:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def _allocate(self, tensors: Mapping[str, torch.Tensor]) -> None:
        left = {n: -(-t.nbytes // ALIGNMENT) * ALIGNMENT for n, t in tensors.items()}
        needed = sum(left.values())
        arena, used = torch.empty(0, dtype=torch.uint8), 0
        for name, tensor in tensors.items():
            if used + left[name] > len(arena):
                arena, used = self._arena(max(left[name], min(ARENA, needed))), 0
            self._buffers[name] = arena[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            used += left[name]
            needed -= left[name]

    def _arena(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
