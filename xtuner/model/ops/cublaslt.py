"""Products in fp8 by cuBLASLt, added to what the result contains, which PyTorch's own call of it cannot do.

The library is the one that PyTorch has loaded. Constants are those of cublasLt.h. Its matrices are stored by columns:
c = a b^T is its c^T = b a^T.
"""

import ctypes
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch

WORKSPACE = 32 * 2**20  # bytes; NVIDIA's advice for Hopper
COMPUTE_FP32 = 68
TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
TRANSPOSE_A, FAST_SUM = 3, 25  # attributes of a product
SCALE_A, SCALE_B, SCALE_MODE_A, SCALE_MODE_B = 17, 18, 31, 32
SCALE_BY_ROW = 3  # one for each row of a, and one for each row of b
MAX_WORKSPACE, ALIGNMENTS = (
    1,
    (5, 6, 7, 8),
)  # attributes of a preference; of both factors, of what is added and of the result


class _Algorithm(ctypes.Structure):
    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@cache
def load() -> ctypes.CDLL:
    """The library. Errors: OSError if it is not found."""
    return ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '0').split('.')[0]}")


def _call(name: str, *args: object) -> None:
    if status := getattr(load(), f"cublasLt{name}")(*args):
        raise RuntimeError(f"cublasLt{name} failed: status {status}")


@cache
def _handle(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        _call("Create", ctypes.byref(handle))
    return handle


@contextmanager
def _created(kind: str, *args: object) -> Iterator[ctypes.c_void_p]:
    """A descriptor, for the time of a call."""
    found = ctypes.c_void_p()
    _call(f"{kind}Create", ctypes.byref(found), *args)
    try:
        yield found
    finally:
        _call(f"{kind}Destroy", found)


def _set(kind: str, descriptor: ctypes.c_void_p, attribute: int, value: "ctypes._SimpleCData[Any]") -> None:
    _call(f"{kind}SetAttribute", descriptor, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


def _layout(dtype: torch.dtype, rows: int, columns: int, stride: int) -> AbstractContextManager[ctypes.c_void_p]:
    sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride)
    return _created("MatrixLayout", TYPES[dtype], *sizes)


def add_product(
    total_MN: torch.Tensor,
    a_MK: torch.Tensor,
    b_NK: torch.Tensor,
    scale_M: torch.Tensor,
    scale_N: torch.Tensor,
    add: bool,
) -> None:
    """total = a b^T, each row of a and b times its scale; with `add`, plus what it contains. Summed in fp32.

    Args:
        total_MN: bf16 or fp32.
        a_MK, b_NK: e4m3, rows a multiple of 16 bytes apart; K a multiple of 16.

    Errors: RuntimeError if the library refuses.
    """
    (M, K), N, void = a_MK.shape, len(b_NK), ctypes.c_void_p
    alpha, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if add else 0.0)
    b, a, total = pointers = [void(x.data_ptr()) for x in (b_NK, a_MK, total_MN)]
    with (
        torch.cuda.device(total_MN.device),
        _layout(b_NK.dtype, K, N, b_NK.stride(0)) as lay_b,
        _layout(a_MK.dtype, K, M, a_MK.stride(0)) as lay_a,
        _layout(total_MN.dtype, N, M, total_MN.stride(0)) as lay_total,
        _created("MatmulDesc", COMPUTE_FP32, TYPES[torch.float32]) as product,
        _created("MatmulPreference") as limits,
    ):
        for attribute, value in (
            (TRANSPOSE_A, ctypes.c_int32(1)), (FAST_SUM, ctypes.c_int8(1)),
            (SCALE_MODE_A, ctypes.c_int32(SCALE_BY_ROW)), (SCALE_MODE_B, ctypes.c_int32(SCALE_BY_ROW)),
            (SCALE_A, void(scale_N.data_ptr())), (SCALE_B, void(scale_M.data_ptr())),
        ):  # fmt: skip
            _set("MatmulDesc", product, attribute, value)
        _set("MatmulPreference", limits, MAX_WORKSPACE, ctypes.c_size_t(WORKSPACE))
        for attribute, pointer in zip(ALIGNMENTS, (*pointers, total), strict=True):
            _set("MatmulPreference", limits, attribute, ctypes.c_uint32(math.gcd(pointer.value or 0, 256)))
        found, count, handle = _Algorithm(), ctypes.c_int(), _handle(torch.cuda.current_device())
        layouts = lay_b, lay_a, lay_total, lay_total
        _call("MatmulAlgoGetHeuristic", handle, product, *layouts, limits, 1, ctypes.byref(found), ctypes.byref(count))
        if not count.value:
            raise RuntimeError("cuBLASLt has no product for these sizes")
        space = torch.empty(max(found.workspace, 1), dtype=torch.uint8, device=total_MN.device)
        _call(
            "Matmul", handle, product, ctypes.byref(alpha), b, lay_b, a, lay_a, ctypes.byref(beta), total, lay_total,
            total, lay_total, ctypes.byref(found.algorithm), void(space.data_ptr()), ctypes.c_size_t(found.workspace),
            void(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip


@cache
def can_add_product(device: torch.device) -> bool:
    """Whether the library is there and can do this on the device: tried once, on small whole numbers."""
    a, b = (torch.randint(-3, 4, (32, 32), device=device).float() for _ in range(2))
    scale_a, scale_b = (torch.full((32,), scale, device=device) for scale in (2.0, 0.5))
    expected = a @ b.T + 1
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            total = torch.ones(32, 32, dtype=dtype, device=device)
            add_product(total, a, b, scale_a, scale_b, True)
            if not torch.equal(total.float(), expected):
                return False
    except (OSError, AttributeError, RuntimeError):
        return False
    return True
