"""What autograd saves of a block, elsewhere than in GPU memory: recomputed, or kept in pinned host memory.

    forward    block i            │ copied to the host meanwhile: its input, then its attention's output
               block i + 1, …     │ both factors of block i's SwiGLU, as long as the memory lasts
    backward   block i, MLP       │
               block i, attention │ copied back meanwhile: both factors of block i − 1
               block i, the rest  │ input and attention's output of block i − 1

The latter wait for attention's backward, which needs the most memory; both factors take longer than the rest of a
block. What is computed is bit for bit the same. Copies run on a stream of their own; on CPUs they are plain copies.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from xtuner.core.log import human_bytes, logger
from xtuner.model.ops.autograd_functions import KeepPolicy, Tensors

FACTORS = "gate_up"
CHUNK = 2**24  # bytes; host memory is handed out in chunks, so that tensors of any size reuse it
ARENA = 2**28  # bytes allocated at once: pinning takes milliseconds for each call


class HostMemory:
    """Host memory for a model's activations, pinned if they are a GPU's. It grows to what is used at the same time,
    which the plan of activations limits, and is reused from then on.

    Attributes:
        limit: bytes of GPU memory that factors of SwiGLU may take while they are sent, with those that come next.
    """

    def __init__(self) -> None:
        self.allocated = self.limit = 0
        self._is_exhausted = False
        self._free: list[torch.Tensor] = []
        self._stream: Any = None
        self._sending: list[tuple[str, torch.Tensor, Any]] = []  # kind, tensor, end of the copy
        self._last: Callable[[], BlockTensors | None] = lambda: None  # of the block that computed last

    @property
    def most_bytes(self) -> int | None:
        """How much there can be, if less than was requested."""
        return self.allocated if self._is_exhausted else None

    @contextmanager
    def save(self, x_TH: torch.Tensor, keep: KeepPolicy) -> Iterator[KeepPolicy]:
        """Inside, a block with this input saves tensors as `keep` says, if it passes on what this yields."""
        before = self._last()
        self.finish_sending(factors=before is None)  # with none before, those are of a graph that an error has dropped
        self.finish_factors(self.limit)
        if not (keep.on_host or before) or not torch.is_grad_enabled():
            yield keep
            return
        block = BlockTensors(self, keep.on_host, before)
        self._last = weakref.ref(block)
        try:
            if "input" in keep.on_host:
                block.put_on_host(x_TH, "input")
            with torch.autograd.graph.saved_tensors_hooks(block.pack, block.unpack):
                yield replace(keep, saver=block)
        finally:
            block.forget_addresses()

    def put(self, tensor: torch.Tensor, kind: str) -> "HostTensor | None":
        """Start to copy a contiguous tensor; None if there is no memory for it."""
        chunks = self._take_chunks(-(-tensor.nbytes // CHUNK), pinned=tensor.is_cuda)
        if chunks is None:
            return None
        found = HostTensor(self, tensor, chunks)
        with self.on_stream(tensor.device) as done:
            for piece, chunk in zip(_bytes(tensor).split(CHUNK), chunks, strict=True):
                chunk[: len(piece)].copy_(piece, non_blocking=True)
        if done:
            self._sending.append((kind, tensor.detach(), done))
        return found

    @contextmanager
    def on_stream(self, device: torch.device) -> Iterator[Any]:
        """Inside, copies run on the stream for copies, after all that has been started; yields the event of their end,
        or None on a CPU."""
        if device.type != "cuda":
            yield None
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield done
            done.record()

    def finish_sending(self, factors: bool = True) -> None:
        """Release the tensors that have been sent, with or without factors of SwiGLU. Their memory is reused on this
        stream: it waits for the copies."""
        sending, self._sending = self._sending, []
        for kind, tensor, done in sending:
            if kind == FACTORS and not factors:
                self._sending.append((kind, tensor, done))
            else:
                done.wait()

    def finish_factors(self, limit: int, own: int = 0) -> None:
        """Release the factors of SwiGLU that were sent first, until the others take at most `limit` bytes or are the
        last `own`."""
        factors = [sent for sent in self._sending if sent[0] == FACTORS]
        size = sum(tensor.nbytes for _, tensor, _ in factors)
        for sent in factors[: len(factors) - own]:
            if size <= limit:
                return
            _, tensor, done = sent
            size -= tensor.nbytes
            self._sending = [other for other in self._sending if other is not sent]
            done.wait()

    def give_back(self, chunks: list[torch.Tensor]) -> None:
        self._free += chunks

    def _take_chunks(self, count: int, pinned: bool) -> list[torch.Tensor] | None:
        while len(self._free) < count:
            if self._is_exhausted:
                return None
            try:
                arena = self._allocate_arena(pinned)
            except RuntimeError as e:
                self._is_exhausted = True
                used = human_bytes(self.allocated)
                logger.warning(f"no more host memory for activations than {used}: the others stay on the GPU ({e})")
                return None
            self._free += arena.split(CHUNK)
            self.allocated += ARENA
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    @staticmethod
    def _allocate_arena(pinned: bool) -> torch.Tensor:
        return torch.empty(ARENA, dtype=torch.uint8, pin_memory=pinned)


class HostTensor:
    """A tensor in host memory. It is copied back once, and exists on its device as long as this object."""

    def __init__(self, memory: HostMemory, tensor: torch.Tensor, chunks: list[torch.Tensor]) -> None:
        self._memory, self._chunks = memory, chunks
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._copy: torch.Tensor | None = None
        self._arrived: Any = None  # event; None once this stream waits for it

    def start_fetch(self) -> None:
        """Start to copy it to its device, if that has not been done."""
        if self._copy is not None:
            return
        self._memory.finish_sending()
        self._copy = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        with self._memory.on_stream(self._copy.device) as self._arrived:
            for piece, chunk in zip(_bytes(self._copy).split(CHUNK), self._chunks, strict=True):
                piece.copy_(chunk[: len(piece)], non_blocking=True)

    def fetch(self) -> torch.Tensor:
        self.start_fetch()
        self._wait()
        assert self._copy is not None
        return self._copy

    def _wait(self) -> None:
        if self._arrived is not None:
            self._arrived.wait()
            self._arrived = None

    def __del__(self) -> None:
        self._wait()  # the memory of a copy that nothing has read is reused as well
        self._memory.give_back(self._chunks)


class BlockTensors:
    """Hooks of autograd for one forward of a block and its backward.

    Args:
        on_host: kinds of tensors, as in `KeepPolicy`; none for a block whose backward only starts copies for the next.
        before: those of the block before, whose backward is next.
    """

    def __init__(self, memory: HostMemory, on_host: frozenset[str], before: "BlockTensors | None") -> None:
        self._memory, self._on_host = memory, on_host
        self._before: Callable[[], BlockTensors | None] = weakref.ref(before) if before else lambda: None
        # strong references while the block computes, so that no address is used again
        self._known: dict[int, tuple[torch.Tensor, HostTensor]] = {}
        self._tensors: dict[str, list[weakref.ref[HostTensor]]] = {}

    def put_on_host(self, tensor: torch.Tensor, kind: str) -> None:
        """Keep this tensor, and views of all of it, on the host instead of its device."""
        if tensor.numel() and tensor.is_contiguous() and (found := self._memory.put(tensor, kind)):
            self._known[address(tensor)] = tensor, found
            self._tensors.setdefault(kind, []).append(weakref.ref(found))

    @property
    def sends_factors(self) -> bool:
        return FACTORS in self._on_host

    def make_room_for_factor(self, size: int) -> None:
        """Wait for copies of blocks before, as many as it takes so that a factor of so many bytes fits."""
        self._memory.finish_factors(self._memory.limit - size, own=len(self._tensors.get(FACTORS, ())))

    def forget_addresses(self) -> None:
        self._known.clear()

    def pack(self, tensor: torch.Tensor) -> Any:
        known, found = self._known.get(address(tensor), (None, None))
        if known is None or known.numel() != tensor.numel():
            return pack_plain(tensor)
        return found, tensor.shape, tensor.stride()

    def pack_of_attention(self, tensor: torch.Tensor) -> Any:
        """`pack` for what attention saves in addition to q, k and v."""
        if "attention" in self._on_host and tensor.is_floating_point() and address(tensor) not in self._known:
            self._memory.finish_sending(factors=False)  # of the block's input
            self.put_on_host(tensor, "attention")
        return self.pack(tensor)

    def unpack(self, packed: Any) -> torch.Tensor:
        before = self._before()
        if before and not self._has(FACTORS):
            before.start_fetch(factors=True)
        if isinstance(packed, torch.Tensor):
            return packed
        found, shape, stride = packed
        tensor: torch.Tensor = found.fetch().as_strided(shape, stride)
        if before and not self._has("attention"):
            before.start_fetch(factors=False)
        return tensor

    def start_fetch(self, factors: bool) -> None:
        for kind, refs in self._tensors.items():
            for ref in refs if (kind == FACTORS) == factors else ():
                if tensor := ref():
                    tensor.start_fetch()

    def _has(self, kind: str) -> bool:
        """Whether the backward still needs a tensor of this kind."""
        return any(ref() for ref in self._tensors.get(kind, []))


@contextmanager
def recompute_saved(
    tensors: Tensors,
    inputs: Sequence[torch.Tensor | None],
    compute: Callable[..., Tensors],
    saver: BlockTensors | None = None,
) -> Iterator[Callable[..., None]]:
    """Inside, attention does not save `tensors` (contiguous) or views of a full one: the backward computes them all
    from `inputs`, once. What else it saves is packed by `saver`. Yields a function that adds more tensors: the next
    ones that `compute` returns."""
    known: dict[int, tuple[int, int]] = {}
    recomputed: list[torch.Tensor] = []
    count = 0

    def add(*more: torch.Tensor) -> None:
        nonlocal count
        for tensor in more:
            if tensor.numel():
                known[address(tensor)] = count, tensor.numel()
            count += 1

    add(*tensors)
    pack_input, pack_other = (saver.pack, saver.pack_of_attention) if saver else (pack_plain, pack_plain)
    unpack_other = saver.unpack if saver else lambda packed: packed
    packed_inputs = [None if t is None else pack_input(t) for t in inputs]

    def pack(tensor: torch.Tensor) -> Any:
        i, numel = known.get(address(tensor), (0, -1))
        return (i, tensor.shape, tensor.stride()) if tensor.numel() == numel else (None, pack_other(tensor))

    def unpack(packed: Any) -> torch.Tensor:
        if packed[0] is None:
            return unpack_other(packed[1])
        if not recomputed:
            with torch.enable_grad():  # which selects the products of training
                found = compute(*(None if p is None else unpack_other(p) for p in packed_inputs))
            recomputed.extend(t.detach() for t in found)
        i, shape, stride = packed
        return recomputed[i].as_strided(shape, stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield add


def pack_plain(tensor: torch.Tensor) -> torch.Tensor:
    """An output that refers to its own node would keep the graph alive after an error; a parameter has none."""
    return tensor if tensor.is_leaf and tensor.requires_grad else tensor.detach()


def address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
