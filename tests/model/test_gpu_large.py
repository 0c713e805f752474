"""Tensors of more than 2^31 elements on a GPU: no index overflows. Skipped without a GPU that has the memory.

Every function treats rows, or groups, independently: the last rows of a large input, a repeated block, have the result
of the block alone.
"""

from collections.abc import Sequence

import pytest
import torch

from xtuner.model import attention
from xtuner.model.ops import elementwise, matmul
from xtuner.model.ops.autograd_functions import Embed
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.optim import adamw

MANY = 2**31  # elements
DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def need(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def block(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


def repeats(width: int, rows: int) -> int:
    """Copies of [rows, width] that have more than MANY elements."""
    return MANY // (width * rows) + 2


def enlarge(x: torch.Tensor, copies: int) -> torch.Tensor:
    return x.repeat(copies, *[1] * (x.dim() - 1))


def same_end(large: Sequence[torch.Tensor], small: Sequence[torch.Tensor]) -> None:
    for a, b in zip(large, small, strict=True):
        assert b.isfinite().all()
        assert b.any()
        assert torch.equal(a[-len(b) :], b)


def test_norm() -> None:
    need(20)
    x, add, d, w = block(1000, 4096), block(1000, 4096), block(1000, 4096), block(4096)
    n = repeats(4096, 1000)
    same_end(elementwise.rms_norm(enlarge(x, n), w, 1e-5, enlarge(add, n)), elementwise.rms_norm(x, w, 1e-5, add))
    dx, dw = elementwise.rms_norm_backward(enlarge(d, n), enlarge(x, n), w, 1e-5, enlarge(add, n))
    dx_small, dw_small = elementwise.rms_norm_backward(d, x, w, 1e-5, add)
    same_end([dx], [dx_small])
    torch.testing.assert_close(dw / n, dw_small, rtol=1e-3, atol=1e-3)


def test_norm_in_fp8() -> None:
    need(24)
    kind = matmul.MATMULS["fp8_full"]
    if why := matmul.why_unsupported("fp8_full", (4096,), DEVICE, torch.bfloat16):
        pytest.skip(why)
    x, add, w = block(1000, 4096), block(1000, 4096), block(4096)
    n = repeats(4096, 1000)
    (total, large), (total_small, small) = (kind.add_norm(enlarge(x, k), w, 1e-5, enlarge(add, k)) for k in (n, 1))
    same_end([total, kind.prepare(large).values[-1000:].float()], [total_small, kind.prepare(small).values.float()])
    columns, columns_small = (kind.prepare_columns(m) for m in (large, small))
    assert torch.equal(columns.values[:, -1000:].float(), columns_small.values.float())


def test_rotation() -> None:
    need(20)
    kv_heads, groups, dim = 8, 4, 128
    qkv, angle = block(1000, kv_heads * (groups + 2) * dim), torch.randn(1000, dim // 2, device=DEVICE)
    n = repeats(kv_heads * groups * dim, 1000)  # q alone has more
    small = elementwise.split_rotate(qkv, angle.cos(), angle.sin(), kv_heads, dim)
    cos, sin = enlarge(angle.cos(), n), enlarge(angle.sin(), n)
    same_end(elementwise.split_rotate(enlarge(qkv, n), cos, sin, kv_heads, dim), small)
    back = elementwise.split_rotate_backward(*small, angle.cos(), angle.sin())
    same_end([elementwise.split_rotate_backward(*(enlarge(x, n) for x in small), cos, sin)], [back])


def test_swiglu() -> None:
    need(20)
    gate, up, d = (block(1000, 14336) for _ in range(3))
    n = repeats(14336, 1000)
    same_end([elementwise.swiglu(enlarge(gate, n), enlarge(up, n))], [elementwise.swiglu(gate, up)])
    large = elementwise.swiglu_backward(*(enlarge(x, n) for x in (gate, up, d)))
    same_end(large, elementwise.swiglu_backward(gate, up, d))


def test_loss() -> None:
    need(16)
    logits, targets = block(200, 92544), torch.randint(0, 92544, (200,), device=DEVICE)
    n = repeats(92544, 200)
    large = enlarge(logits, n)
    losses = elementwise.cross_entropy_(large, enlarge(targets, n), 0.3)
    same_end([losses, large], [elementwise.cross_entropy_(logits, targets, 0.3), logits])


@pytest.mark.parametrize("name", matmul.MATMULS)
def test_products(name: str) -> None:
    """With the kernels that round to fp8; also gradients of the weight and of the embedding."""
    need(26)
    if why := matmul.why_unsupported(name, (4096, 14336), DEVICE, torch.bfloat16):
        pytest.skip(why)
    kind, x, w = matmul.MATMULS[name], block(1000, 4096), block(14336, 4096)
    n = repeats(4096, 1000)
    rows = kind.prepare(enlarge(x, n))
    same_end([rows.values[-1000:].float()], [kind.prepare(x).values.float()])
    del rows
    n = repeats(14336, 1000)
    y, y_small = kind.forward(kind.prepare(enlarge(x, n)), w), kind.forward(kind.prepare(x), w)
    torch.testing.assert_close(y[-1000:], y_small, rtol=2e-2, atol=0.5)  # another split of the sum
    dw = GradientSum(torch.empty(14336, 4096, device=DEVICE))
    dw.add_product(y, enlarge(x, n))
    expected = y_small.float().T @ x.float()
    assert (dw.value() / n - expected).norm() < 1e-2 * expected.norm()
    del y, dw
    large = enlarge(w, repeats(4096, 14336))
    columns, columns_small = matmul.quantize_columns(large), matmul.quantize_columns(w)
    assert torch.equal(columns.values[:, -len(w) :].float(), columns_small.values.float())


def test_embedding() -> None:
    need(16)
    table = block(500, 4096).requires_grad_()
    T = 1000 * repeats(4096, 1000)
    ids = torch.full((T,), 3, device=DEVICE)
    ids[-10:] = torch.arange(7, 17, device=DEVICE)
    x = Embed.apply(ids, table, -1, None)
    same_end([x], [table[7:17]])
    d = torch.ones_like(x)
    d[-10:] = block(10, 4096)
    x.backward(d)
    assert table.grad is not None
    assert torch.equal(table.grad[7:17], d[-10:])
    assert not table.grad[17:].any()


@pytest.mark.parametrize("name", ["bf16", "8bit"])
def test_adamw(name: str) -> None:
    """The end of a large parameter is updated as if it were a shard of its own: the same random bits."""
    need(24)
    form, end = adamw.FORMS[name], 2**20
    weight = torch.randn(MANY + end, dtype=torch.bfloat16, device=DEVICE)
    gradient = torch.randn_like(weight)
    parts = {"whole": (weight, gradient, 0), "end": (weight[-end:].clone(), gradient[-end:], MANY)}
    updated = []
    for w, g, begin in parts.values():
        optimizer = adamw.AdamW({"w": torch.nn.Parameter(w)}, form, {}, {"w": begin})
        optimizer.step({"w": g}, 1e-2, torch.ones((), device=DEVICE))
        updated.append([w, *optimizer.state["w"].values()])
    same_end(*updated)


@pytest.mark.parametrize("name", [n for n in attention.BACKENDS if n != "loop"])
def test_attention(name: str) -> None:
    need(50)
    if why := attention.BACKENDS[name].why_unavailable(DEVICE, torch.bfloat16, 128, 4):
        pytest.skip(why)
    attend, length = attention.load_backend(name), 2000
    small = [block(length, heads, 128).requires_grad_() for heads in (32, 8, 8)]
    weight, n = block(length, 32, 128), repeats(32 * 128, length)
    large = [enlarge(x.detach(), n).requires_grad_() for x in small]
    outputs = []
    for inputs, copies in ((large, n), (small, 1)):
        borders = torch.arange(copies + 1, dtype=torch.int32, device=DEVICE) * length
        outputs.append(attend(*inputs, borders, length))
        outputs[-1].backward(enlarge(weight, copies))
    if name == "flex":  # its blocks of tokens do not begin where documents do, so that it adds in another order
        assert (outputs[0][-length:] - outputs[1]).float().norm() < 1e-2 * outputs[1].float().norm()
    else:
        same_end(outputs[:1], outputs[1:])
    for a, b in zip(large, small, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad[-length:] - b.grad).norm() < 1e-2 * b.grad.norm()  # sums in random order


@pytest.mark.parametrize("name", [n for n in attention.BACKENDS if n != "loop"])
def test_attention_of_a_document_of_128k(name: str) -> None:
    """Its last tokens and what they contribute to the gradients of all keys, against fp32."""
    need(30)
    if why := attention.BACKENDS[name].why_unavailable(DEVICE, torch.bfloat16, 128, 4):
        pytest.skip(why)
    length, last = 2**17, 128
    inputs = [block(length, heads, 128).requires_grad_() for heads in (32, 8, 8)]
    weight = block(length, 32, 128)
    weight[:-last] = 0
    out = attention.load_backend(name)(*inputs, torch.tensor([0, length], dtype=torch.int32, device=DEVICE), length)
    out.backward(weight)
    q, k, v = (x.detach().float().requires_grad_() for x in (inputs[0][-last:], *inputs[1:]))
    expected = attention.attend_cached(q, k, v)
    expected.backward(weight[-last:].float())
    assert (out[-last:] - expected).norm() < 1e-2 * expected.norm()
    for x, e in zip(inputs, (q, k, v), strict=True):
        assert x.grad is not None
        assert e.grad is not None
        assert (x.grad[-len(e) :] - e.grad).norm() < 1e-2 * e.grad.norm()
        assert not x.grad[: -len(e)].any()
