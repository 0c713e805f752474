"""Products in fp8 by cuBLASLt, added to what the result contains, which PyTorch's own call of it cannot do.

The library is the one that PyTorch has loaded. Constants are those of cublasLt.h. Its matrices are stored by columns:
c = a b^T is its c^T = b a^T.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch

from xtuner.core.log import logger

ALIGNMENT = 16  # bytes: sums, and rows in fp8, begin at multiples of it
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


def _destroy(created: Sequence[tuple[str, ctypes.c_void_p]]) -> None:
    for kind, descriptor in created:
        _call(f"{kind}Destroy", descriptor)


class _Product:
    """A product of matrices of these sizes and strides: what the library needs to know, and the kernel that it chose.

    Args:
        strides: between rows, of a, b and the total.
        alignments: of their addresses, in bytes.
    """

    def __init__(
        self,
        device: int,
        sizes: tuple[int, int, int],
        strides: tuple[int, int, int],
        dtype: torch.dtype,
        alignments: tuple[int, int, int],
    ) -> None:
        self._created: list[tuple[str, ctypes.c_void_p]] = []
        weakref.finalize(self, _destroy, self._created)
        (M, N, K), (of_a, of_b, of_total) = sizes, strides
        e4m3 = TYPES[torch.float8_e4m3fn]
        self._product = self._create("MatmulDesc", COMPUTE_FP32, TYPES[torch.float32])
        for attribute, value in ((TRANSPOSE_A, ctypes.c_int32(1)), (FAST_SUM, ctypes.c_int8(1))):
            self._set("MatmulDesc", self._product, attribute, value)
        for attribute in (SCALE_MODE_A, SCALE_MODE_B):
            self._set("MatmulDesc", self._product, attribute, ctypes.c_int32(SCALE_BY_ROW))
        for attribute in (SCALE_A, SCALE_B):  # the choice of a kernel may depend on there being scales, but reads none
            self._set("MatmulDesc", self._product, attribute, ctypes.c_void_p(256))
        self._a, self._b, self._total = (
            self._create("MatrixLayout", kind, *map(ctypes.c_uint64, shape), ctypes.c_int64(stride))
            for kind, shape, stride in ((e4m3, (K, M), of_a), (e4m3, (K, N), of_b), (TYPES[dtype], (N, M), of_total))
        )
        limits = self._create("MatmulPreference")
        self._set("MatmulPreference", limits, MAX_WORKSPACE, ctypes.c_size_t(WORKSPACE))
        a, b, total = alignments
        for attribute, alignment in zip(ALIGNMENTS, (b, a, total, total), strict=True):
            self._set("MatmulPreference", limits, attribute, ctypes.c_uint32(alignment))
        self._found, count, self._handle = _Algorithm(), ctypes.c_int(), _handle(device)
        layouts = self._b, self._a, self._total, self._total
        results = ctypes.byref(self._found), ctypes.byref(count)
        _call("MatmulAlgoGetHeuristic", self._handle, self._product, *layouts, limits, 1, *results)
        if not count.value:
            raise RuntimeError("cuBLASLt has no product for these sizes")

    def _create(self, kind: str, *args: object) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        _call(f"{kind}Create", ctypes.byref(found), *args)
        self._created.append((kind, found))
        return found

    def _set(self, kind: str, descriptor: ctypes.c_void_p, attribute: int, value: "ctypes._SimpleCData[Any]") -> None:
        _call(f"{kind}SetAttribute", descriptor, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))

    def add(
        self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scales: Sequence[torch.Tensor], add: bool
    ) -> None:
        """total = a b^T, plus its contents with `add`. Args: scales: of rows of a and of b."""
        pointer = ctypes.c_void_p
        for attribute, scale in zip((SCALE_B, SCALE_A), scales, strict=True):
            self._set("MatmulDesc", self._product, attribute, pointer(scale.data_ptr()))
        space = torch.empty(self._found.workspace, dtype=torch.uint8, device=total.device)
        into = pointer(total.data_ptr()), self._total
        _call(
            "Matmul", self._handle, self._product, ctypes.byref(ctypes.c_float(1.0)), pointer(b.data_ptr()), self._b,
            pointer(a.data_ptr()), self._a, ctypes.byref(ctypes.c_float(add)), *into, *into,
            ctypes.byref(self._found.algorithm), pointer(space.data_ptr()), ctypes.c_size_t(self._found.workspace),
            pointer(torch.cuda.current_stream(total.device).cuda_stream),
        )  # fmt: skip


_product = lru_cache(256)(_Product)  # a micro-batch has the same few in every layer


def add_product(
    total_MN: torch.Tensor,
    a_MK: torch.Tensor,
    b_NK: torch.Tensor,
    scale_M: torch.Tensor,
    scale_N: torch.Tensor,
    add: bool,
) -> None:
    """total = a b^T, each row of a and b times its scale; with `add`, plus what it contains. Summed in fp32, but the
    product is rounded to the total's dtype before it is added.

    Args:
        total_MN: bf16 or fp32.
        a_MK, b_NK: e4m3, rows a multiple of 16 bytes apart; K a multiple of 16.

    Errors: RuntimeError if the library refuses.
    """
    tensors = a_MK, b_NK, total_MN
    sizes, strides = (len(a_MK), len(b_NK), a_MK.shape[1]), tuple(x.stride(0) for x in tensors)
    alignments = tuple(math.gcd(x.data_ptr(), 256) for x in tensors)
    with torch.cuda.device(total_MN.device):
        product = _product(torch.cuda.current_device(), sizes, strides, total_MN.dtype, alignments)
        product.add(total_MN, a_MK, b_NK, (scale_M, scale_N), add)


@cache
def can_add_product(device: torch.device) -> bool:
    """Whether the library is there and can do this on the device: tried once, on small whole numbers. If not, it is
    logged why."""
    a, b = ((torch.arange(1024, device=device) % n - n // 2).view(32, 32).float() for n in (7, 5))
    scale_a, scale_b = (torch.full((32,), scale, device=device) for scale in (2.0, 0.5))
    expected = a @ b.T + 1
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            total = torch.ones(32, 32, dtype=dtype, device=device)
            add_product(total, a, b, scale_a, scale_b, True)
            if not torch.equal(total.float(), expected):
                raise RuntimeError("cuBLASLt computed something else")
    except (OSError, AttributeError, RuntimeError) as e:
        logger.warning("products in fp8 are added to their sums in a second pass, which is slower: %s", e)
        return False
    return True
