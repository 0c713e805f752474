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


def multiply(
    a_MK: torch.Tensor,
    b_NK: torch.Tensor,
    scale_M: torch.Tensor,
    scale_N: torch.Tensor,
    add_MN: torch.Tensor | None,
    out_MN: torch.Tensor,
) -> None:
    """out = a b^T + add, each row of a and b times its scale, summed in fp32.

    Args:
        a_MK, b_NK: e4m3, rows a multiple of 16 bytes apart; K a multiple of 16.
        add_MN, out_MN: bf16 or fp32; may be the same tensor.

    Errors: RuntimeError if the library refuses.
    """
    (M, K), N, c_MN = a_MK.shape, len(b_NK), out_MN if add_MN is None else add_MN
    alpha, beta, void = ctypes.c_float(1.0), ctypes.c_float(0.0 if add_MN is None else 1.0), ctypes.c_void_p
    b, a, c, out = pointers = [void(x.data_ptr()) for x in (b_NK, a_MK, c_MN, out_MN)]
    with (
        torch.cuda.device(out_MN.device),
        _layout(b_NK.dtype, K, N, b_NK.stride(0)) as lay_b,
        _layout(a_MK.dtype, K, M, a_MK.stride(0)) as lay_a,
        _layout(c_MN.dtype, N, M, c_MN.stride(0)) as lay_c,
        _layout(out_MN.dtype, N, M, out_MN.stride(0)) as lay_out,
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
        for attribute, pointer in zip(ALIGNMENTS, pointers, strict=True):
            _set("MatmulPreference", limits, attribute, ctypes.c_uint32(math.gcd(pointer.value or 0, 256)))
        found, count, handle = _Algorithm(), ctypes.c_int(), _handle(torch.cuda.current_device())
        layouts = lay_b, lay_a, lay_c, lay_out
        _call("MatmulAlgoGetHeuristic", handle, product, *layouts, limits, 1, ctypes.byref(found), ctypes.byref(count))
        if not count.value:
            raise RuntimeError("cuBLASLt has no product for these sizes")
        space = torch.empty(max(found.workspace, 1), dtype=torch.uint8, device=out_MN.device)
        _call(
            "Matmul", handle, product, ctypes.byref(alpha), b, lay_b, a, lay_a, ctypes.byref(beta), c, lay_c, out,
            lay_out, ctypes.byref(found.algorithm), void(space.data_ptr()), ctypes.c_size_t(found.workspace),
            void(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip


@cache
def can_multiply(device: torch.device) -> bool:
    """Whether the library is there and can do all of this on the device: tried once, on small whole numbers."""
    a, b = (torch.randint(-3, 4, (32, 32), device=device).float() for _ in range(2))
    scale_a, scale_b = (torch.full((32,), scale, device=device) for scale in (2.0, 0.5))
    expected = a @ b.T + 1
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            out, add = (torch.full((32, 32), value, dtype=dtype, device=device) for value in (torch.nan, 1.0))
            multiply(a, b, scale_a, scale_b, add, out)
            if not torch.equal(out.float(), expected):
                return False
    except (OSError, AttributeError, RuntimeError):
        return False
    return True
