"""Causal attention inside documents laid end to end (variable-length attention), behind one contract.

    attend(q_TND, k_TKD, v_TKD, cu_seqlens, max_seqlen) -> o_TND

Token t attends to the tokens of its own document up to itself; in layers with a sliding window w, which have
`window=w` as a further argument, to itself and the w − 1 tokens before it. N is a multiple of K (grouped queries). The
backend is chosen once, when the model is built, by device, dtype and installed packages. Every backend is exact.

To add one, write a differentiable function with this contract and register it in a config or in a module that the
config imports; `model = dict(…, attention="mine")` then selects it:

    BACKENDS.register("mine", Backend("description for reports", lambda: attend, devices=("cuda",)))
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn import functional as F

from xtuner.core.errors import ConfigError
from xtuner.core.registry import Registry
from xtuner.model.ops import attention_backends
from xtuner.model.ops.attention_backends import Attend, AttendPrefixes

Name = Literal["flash4", "varlen", "cudnn", "flex", "loop"]  # the shipped backends
_SETTING, _REMEDY = "model.attention", "leave it out: then the fastest that runs is taken"
HALF = (torch.bfloat16, torch.float16)
MASK = 2**26  # elements of the mask of a prompt's later part; a longer part is computed in slices

SLICE = 128  # queries of a document with a smaller sliding window that are computed at once


@dataclass(frozen=True)
class Backend:
    """A way to compute attention, and what it supports; an empty collection means everything.

    Args:
        load: returns the function, or None if its package is missing.
        install: the command or package that provides it.
        majors: major CUDA compute capabilities.
        auto: whether it may be chosen without being named in a config.
        deterministic_gqa: whether it can be deterministic on a device where query heads share key-value heads.
        windows: whether its functions have the argument `window`.
        load_prefixes: `load` of attention for queries that are the last tokens of documents. With it, more ranks than
            query heads can share documents.
    """

    description: str
    load: Callable[[], Attend | None]
    install: str = "a newer PyTorch"
    devices: Collection[str] = ("cuda",)
    majors: Collection[int] = ()
    dtypes: Collection[torch.dtype] = HALF
    head_dims: Collection[int] = ()
    auto: bool = True
    deterministic_gqa: Callable[[torch.device], bool] = lambda device: True
    windows: bool = False
    load_prefixes: Callable[[], AttendPrefixes | None] = lambda: None

    def why_unavailable(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int = 1, has_windows: bool = False
    ) -> str | None:
        """Why it cannot run here, missing packages included; None if it can.

        Args:
            groups: query heads that share a key-value head.
            has_windows: whether layers have sliding windows.
        """
        return self.why_unsupported(device, dtype, head_dim, groups, has_windows) or (
            None if self.load() else f"it needs {self.install}"
        )

    def why_unsupported(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int = 1, has_windows: bool = False
    ) -> str | None:
        """Why it could not run here even if it were installed; None if it could."""
        if has_windows and not self.windows:
            return "it does not compute sliding windows"
        if self.devices and device.type not in self.devices:
            return f"it does not run on {device.type}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it does not compute in {str(dtype).removeprefix('torch.')}"
        if self.head_dims and head_dim not in self.head_dims:
            return f"heads of {head_dim} are not among {', '.join(map(str, self.head_dims))}"
        if groups > 1 and torch.are_deterministic_algorithms_enabled() and not self.deterministic_gqa(device):
            return "it sums gradients of shared key-value heads in random order, and randomness.deterministic is on"
        if self.majors and torch.cuda.get_device_capability(device)[0] not in self.majors:
            return f"it does not support a {torch.cuda.get_device_name(device)}"
        return None


def attend_loop(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
    window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Document by document with PyTorch's attention: any device, any dtype; the fastest exact backend on CPUs."""
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    outputs = [
        attend_cached(q, k, v, window)
        for q, k, v in zip(q_TND.split(lengths), k_TKD.split(lengths), v_TKD.split(lengths), strict=True)
    ]
    return torch.cat(outputs)


def attend_prefix_loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_borders: torch.Tensor, k_borders: torch.Tensor,
    most_queries: int, most_keys: int, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """`attend_loop` for queries that are the last tokens of documents."""
    keys = k_borders.diff().tolist()
    fragments = zip(q.split(q_borders.diff().tolist()), k.split(keys), v.split(keys), strict=True)
    return torch.cat([attend_cached(*fragment, window) for fragment in fragments])


def _complete(prefixes: AttendPrefixes | None) -> Attend | None:
    return prefixes and attention_backends.attend_complete(prefixes)


# Fastest first, as measured on an H100 (docs/performance.md).
_SHIPPED: dict[str, Backend] = {
    "flash4": Backend(
        "FlashAttention-4",
        lambda: _complete(attention_backends.flash_4()),
        load_prefixes=attention_backends.flash_4,
        install="pip install 'xtuner[flash]'",
        majors=(9, 10),
        head_dims=(64, 96, 128),
        deterministic_gqa=attention_backends.flash_4_orders_shared_heads,
        windows=True,
    ),
    "varlen": Backend(
        "PyTorch's varlen_attn",
        lambda: _complete(attention_backends.varlen()),
        load_prefixes=attention_backends.varlen,
        majors=(8, 9, 10, 11, 12),
        windows=True,
    ),
    "cudnn": Backend(
        "cuDNN",
        attention_backends.cudnn,
        install="pip install 'xtuner[cudnn]'",
        majors=(9, 10),
        head_dims=(64, 128),
        auto=False,
    ),
    "flex": Backend("FlexAttention", attention_backends.flex, windows=True),
    "loop": Backend(
        "PyTorch, document by document",
        lambda: attend_loop,
        devices=(),
        dtypes=(),
        windows=True,
        load_prefixes=lambda: attend_prefix_loop,
    ),
}
BACKENDS: Registry[Backend] = Registry("attention backend", _SHIPPED)


def choose_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, wanted: str | None = None, groups: int = 1,
    has_windows: bool = False,
) -> str:  # fmt: skip
    """Name of the fastest backend that runs here, or `wanted` if it does. Its gradients are deterministic while
    PyTorch's deterministic algorithms are on. Raises: ConfigError."""
    case = device, dtype, head_dim, groups, has_windows
    if wanted is None:
        return next(n for n, b in BACKENDS.items() if b.auto and b.why_unavailable(*case) is None)
    backend = find_backend(wanted)
    if why := backend.why_unavailable(*case):
        raise ConfigError(f"attention by {backend.description} cannot run here: {why}", where=_SETTING, do=_REMEDY)
    return wanted


def find_backend(name: str) -> Backend:
    """The backend that `model.attention` names. Raises: ConfigError."""
    return BACKENDS.find(name, _SETTING, _REMEDY)


def suggest_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend | None:
    """A backend worth installing: the one that would be chosen if all were installed; None if it is installed."""
    first = next(b for b in BACKENDS.values() if b.auto and b.why_unsupported(device, dtype, head_dim) is None)
    return None if first.load() else first


def load_backend(name: str, window: int | None = None) -> Attend:
    """The function of an installed backend, for layers with this sliding window or none."""
    attend = find_backend(name).load()
    assert attend is not None
    return attend if window is None else partial(attend, window=window)


def load_prefixes(name: str, window: int | None = None) -> AttendPrefixes | None:
    """`load_backend` for queries that are the last tokens of documents; None if the backend does not support them."""
    prefixes = find_backend(name).load_prefixes()
    return prefixes and (prefixes if window is None else partial(prefixes, window=window))


def attend_dense(
    q_QND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, causal: bool, mask_QS: torch.Tensor | None = None
) -> torch.Tensor:
    """Q queries attend to S keys of one document, [Q, N, D]."""
    groups = q_QND.shape[1] // k_SKD.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1)[None] for x in (k_SKD, v_SKD))
    q = q_QND.transpose(0, 1)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QS, is_causal=causal)[0].transpose(0, 1)


def attend_cached(
    q_QND: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """The last Q tokens of a document attend to its S >= Q tokens: a document, a step of generation, a prompt."""
    queries = len(q_QND)
    if window is not None:  # keys before the first query's window are not needed
        k_SKD, v_SKD = (x[-(queries + window - 1) :] for x in (k_SKD, v_SKD))
        window = None if window >= len(k_SKD) else window
    keys = len(k_SKD)
    if queries == keys and window is None:
        return attend_dense(q_QND, k_SKD, v_SKD, causal=True)
    if queries == 1:  # heads that share keys are queries of one head: nothing is copied
        q_GKD = q_QND.view(k_SKD.shape[1], -1, q_QND.shape[2]).transpose(0, 1)
        return attend_dense(q_GKD, k_SKD, v_SKD, causal=False).transpose(0, 1).reshape(q_QND.shape)
    most = MASK // keys
    if window is not None:  # slices as long as the window
        most = min(max(window, SLICE), MASK // (2 * max(window, SLICE)))
    outputs, most = [], max(most, 1)
    for begin in range(0, queries, most):
        q = q_QND[begin : begin + most]
        own = keys - queries + begin  # the first query's key
        first, end = max(own - window + 1, 0) if window else 0, own + len(q)
        mask = torch.ones(len(q), end - first, dtype=torch.bool, device=q.device).tril(own - first)
        mask = mask.triu(own - first - window + 1) if window else mask
        outputs.append(attend_dense(q, k_SKD[first:end], v_SKD[first:end], causal=False, mask_QS=mask))
    return torch.cat(outputs)
