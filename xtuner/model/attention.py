"""Causal attention inside documents that lie end to end (variable-length attention), behind one contract.

    attend(q_TND, k_TKD, v_TKD, cu_seqlens, max_seqlen) -> o_TND

Token t sees the tokens of its own document up to itself. N is a multiple of K (grouped queries). A backend is chosen
once, when the model is built, by device, dtype and what is installed; each is exact for the documents it is given.

One of your own is a function with this contract, whose result autograd can differentiate, and a line in a config or in
a module that it imports; `model = dict(…, attention="mine")` then chooses it:

    BACKENDS.register("mine", Backend("what it is, for reports", lambda: attend, devices=("cuda",)))
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from xtuner.core.errors import ConfigError
from xtuner.core.registry import Registry
from xtuner.model.ops import attention_backends
from xtuner.model.ops.attention_backends import Attend

Name = Literal["flash4", "varlen", "cudnn", "flex", "loop"]  # of a shipped backend
_SETTING, _OTHERWISE = "model.attention", "leave it out: then the fastest that runs is taken"
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention. `find` gives it, or None where its package is missing; `install` brings that."""

    about: str
    find: Callable[[], Attend | None]
    install: str = "a newer PyTorch"
    # what it knows; empty: everything
    devices: Collection[str] = ("cuda",)
    majors: Collection[int] = ()  # compute capabilities
    dtypes: Collection[torch.dtype] = HALF
    head_dims: Collection[int] = ()
    by_itself: bool = True  # whether it is chosen unless it is asked for
    repeats: bool = True  # whether its deterministic form covers key-value heads that query heads share

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int = 1) -> str | None:
        """What keeps it from running here.

        Args:
            groups: query heads to a key-value head.
        """
        return self.unfit(device, dtype, head_dim, groups) or (None if self.find() else f"it needs {self.install}")

    def unfit(self, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int = 1) -> str | None:
        """What would keep it from running here, were it installed."""
        if self.devices and device.type not in self.devices:
            return f"it does not run on {device.type}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it does not compute in {str(dtype).removeprefix('torch.')}"
        if self.head_dims and head_dim not in self.head_dims:
            return f"heads of {head_dim} are not among {', '.join(map(str, self.head_dims))}"
        if groups > 1 and not self.repeats and torch.are_deterministic_algorithms_enabled():
            return "it adds up gradients of shared key-value heads in any order, and randomness.deterministic is on"
        if self.majors and torch.cuda.get_device_capability(device)[0] not in self.majors:
            return f"it does not know a {torch.cuda.get_device_name(device)}"
        return None


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


# Fastest first, as measured on an H100 (docs/performance.md).
_SHIPPED: dict[str, Backend] = {
    "flash4": Backend(
        "FlashAttention-4",
        attention_backends.flash_4,
        "pip install 'xtuner[flash]'",
        majors=(9, 10),
        head_dims=(64, 96, 128),
        repeats=False,
    ),
    "varlen": Backend("PyTorch's varlen_attn", attention_backends.varlen, majors=(8, 9, 10, 11, 12)),
    "cudnn": Backend(
        "cuDNN",
        attention_backends.cudnn,
        "pip install 'xtuner[cudnn]'",
        majors=(9, 10),
        head_dims=(64, 128),
        by_itself=False,
    ),
    "flex": Backend("FlexAttention", attention_backends.flex),
    "loop": Backend("PyTorch, document by document", lambda: attend_loop, devices=(), dtypes=()),
}
BACKENDS: Registry[Backend] = Registry("attention backend", _SHIPPED)


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, wanted: str | None = None, groups: int = 1) -> str:
    """Name of the fastest backend that runs here, or the `wanted` one if it does. While PyTorch's deterministic
    algorithms are on, one that repeats its gradients bit for bit."""
    if wanted is None:
        fit = (n for n, b in BACKENDS.items() if b.by_itself and b.why_not(device, dtype, head_dim, groups) is None)
        return next(fit)
    backend = find(wanted)
    if why := backend.why_not(device, dtype, head_dim, groups):
        raise ConfigError(f"attention by {backend.about} cannot run here: {why}", where=_SETTING, do=_OTHERWISE)
    return wanted


def find(name: str) -> Backend:
    """The backend that `model.attention` names. Raises: ConfigError."""
    return BACKENDS.find(name, _SETTING, _OTHERWISE)


def to_install(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend | None:
    """The one that would be chosen if all were installed; None if it is."""
    first = next(b for b in BACKENDS.values() if b.by_itself and b.unfit(device, dtype, head_dim) is None)
    return None if first.find() else first


def attend_by(name: str) -> Attend:
    """The backend of that name; it has to be there."""
    attend = find(name).find()
    assert attend is not None
    return attend


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
