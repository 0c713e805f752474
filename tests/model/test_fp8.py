"""Products in fp8: exact where fp8 can hold the numbers, near elsewhere, and a model that learns alike."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from xtuner.core.errors import ConfigError
from xtuner.model import from_scratch
from xtuner.model.adapters.lora import build_lora, lora
from xtuner.model.decoder import apply_norm
from xtuner.model.linear import Linear
from xtuner.model.ops.autograd_functions import KEEP_ALL, KEEP_NONE
from xtuner.model.ops.elementwise import (
    rms_norm,
    rms_norm_backward,
    split_norm_rotate_backward,
    split_rotate_backward,
    swiglu,
    swiglu_backward,
)
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.model.ops.matmul import MATMULS, PLAIN, MatmulKind, quantize_columns, quantize_rows
from xtuner.model.ops.maxima import get_maxima, set_maxima
from xtuner.model.ops.prepared import PreparedColumns, PreparedRows, get_normed, stand_in, take_rows

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def whole_numbers(rows: int, columns: int, device: str) -> torch.Tensor:
    """-7 … 7, the largest of each row and column 7: e4m3 holds them times 64 exactly."""
    x = torch.randint(-7, 8, (rows, columns)).to(device, torch.bfloat16)
    x[:1], x[:, 0] = 7, 7
    return x


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Bit for bit; else the error says how many numbers differ, where and by how much."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def near(ours: torch.Tensor, exact: torch.Tensor, bounds: torch.Tensor) -> None:
    """No further from it than the bounds; else the error says where it is furthest from them."""
    excess = (ours - exact).abs() - bounds
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    assert excess[at] <= 0, f"{ours[at]} for {exact[at]}, bound {bounds[at]}, at {at}; {int((excess > 0).sum())} such"


def same(ours: PreparedRows | PreparedColumns, theirs: PreparedRows | PreparedColumns) -> None:
    """Bit for bit. Scales of no tokens do not matter."""
    assert ours.values.dtype == theirs.values.dtype
    assert ours.values.stride() == theirs.values.stride()
    equal(ours.values.float(), theirs.values.float())
    if ours.scale is None or theirs.scale is None:
        assert ours.scale is theirs.scale
    elif ours.values.numel():
        equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("device", DEVICES)
def test_products_in_fp8(device: str) -> None:
    torch.manual_seed(0)
    fp8, T, K, N = MATMULS["fp8"], 130, 96, 80  # sums of 13 bits, which are exact on Hopper too
    x, w, d = (whole_numbers(*shape, device) for shape in ((T, K), (N, K), (T, N)))
    add, bias = whole_numbers(T, N, device), whole_numbers(1, N, device)[0]
    expected = (x.float() @ w.float().T).bfloat16()
    equal(fp8.forward(fp8.prepare(x), w), expected)
    equal(fp8.forward(fp8.prepare(x), w, bias, add), expected + bias + add)
    exact = d.float() @ w.float()
    equal(fp8.backward(fp8.prepare(d), w), exact.bfloat16())
    # rounded once; cuBLASLt (CUDA 13.0, on Hopper) rounds the product to bf16 before it is added
    total = (exact + x).bfloat16() if device == "cpu" else exact.bfloat16() + x
    equal(fp8.backward(fp8.prepare(d), w, x.clone()), total)

    x, w = torch.randn(T, K, device=device).bfloat16(), torch.randn(N, K, device=device).bfloat16()
    x[3], x[4] = 0, 1e-37  # the latter counts as zeros
    x[4, 5] = 0
    x[:, 0] *= 2.0 ** torch.randint(-20, 20, (T,), device=device)  # rows of very different size
    for quantized, exact in ((quantize_rows(x), x.float()), (quantize_columns(w), w.float().T)):
        assert quantized.scale is not None
        largest = exact.abs().amax(1, keepdim=True)
        exact = torch.where(largest > 1e-30, exact, 0)
        # half a step of three bits, or of the smallest numbers, 2^-9 of 448
        bounds = torch.maximum(exact.abs() / 16, largest / 448 / 1024) * 1.001
        near(quantized.values.float() * quantized.scale, exact, bounds)
    rows, columns = MATMULS["fp8_full"].prepare_both(x)
    same(rows, quantize_rows(x))
    same(columns, quantize_columns(x))
    exact, ours = x.double() @ w.double().T, fp8.forward(fp8.prepare(x), w)
    assert (ours - exact).norm() < 0.04 * exact.norm()
    assert not ours[3].any()
    assert ours.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sums", [None, torch.float32, torch.bfloat16])
def test_gradients_in_fp8(device: str, sums: torch.dtype | None) -> None:
    """Exact, alone and added to a sum, also in a buffer that begins anywhere; at numbers of tokens that are no multiple
    of what a device copies at once. Hopper's sums of products in fp8 have 14 bits: with more, bf16 sums are exact."""
    torch.manual_seed(0)
    fp8, N, K = MATMULS["fp8_full"], 144, 272
    for T in (0, 1, 37, 96, 208):
        d, x = whole_numbers(T, N, device), whole_numbers(T, K, device)
        d[:, 3] = 0
        expected = d.float().T @ x.float()
        prepared = fp8.prepare_both(d)[1], fp8.prepare_columns(x)
        if sums is None:
            gradient = fp8.add_gradient(None, *prepared, torch.bfloat16)
            equal(gradient, expected.bfloat16())
            continue
        for offset in (0, 1):
            buffer = torch.full((N * K + offset,), torch.nan, dtype=sums, device=device)[offset:].view(N, K)
            into = GradientSum(buffer)
            assert fp8.add_gradient(into, *prepared, torch.bfloat16) is None
            if T == 208 and sums == torch.float32 and device == "cuda":
                near(buffer, expected, d.float().abs().T @ x.float().abs() / 2**13)
                continue
            equal(buffer, expected.to(sums))
            fp8.add_gradient(into, *prepared, torch.bfloat16)
            equal(buffer, (buffer.float() * 0 + expected.to(sums).float() + expected).to(sums))
    d[0, 0] = torch.nan
    assert fp8.add_gradient(None, fp8.prepare_both(d)[1], prepared[1], torch.bfloat16).isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_swiglu_in_fp8(device: str) -> None:
    """As its parts in bf16, converted one after another, also at numbers of tokens that fill no tile."""
    torch.manual_seed(0)
    fp8 = MATMULS["fp8_full"]
    for T, F in ((1, 16), (37, 528), (300, 144)):
        gate, up, d = (torch.randn(T, F, device=device).bfloat16() for _ in range(3))
        d[0] = 0
        found = [fp8.prepare_swiglu(gate, up)]
        gradients = fp8.prepare_swiglu_gradients(gate, up, d)
        assert gradients
        found += [*gradients.gate, *gradients.up, gradients.product]
        expected = [fp8.prepare(swiglu(gate, up))]
        d_gate, d_up, product = swiglu_backward(gate, up, d)
        expected += [*fp8.prepare_both(d_gate), *fp8.prepare_both(d_up), fp8.prepare_columns(product)]
        for ours, apart in zip(found, expected, strict=True):
            same(ours, apart)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fp8", "fp8_full"])
def test_norms_in_fp8(name: str, device: str) -> None:
    """As a norm in bf16, converted afterwards; what stands for it has no memory, and tiles of it convert alike."""
    torch.manual_seed(0)
    fp8 = MATMULS[name]
    for T, H in ((0, 32), (1, 16), (37, 528), (300, 144), (70, 4096)):
        x, add = (torch.randn(T, H, device=device).bfloat16() for _ in range(2))
        w = torch.randn(H, device=device).bfloat16()
        x[:1], x[-1:] = 0, 1e4
        for other in (None, add):
            expected, written = rms_norm(x, w, 1e-5, other)
            total, normed = fp8.add_norm(x, w, 1e-5, other)
            equal(total, expected)
            assert normed.untyped_storage().nbytes() == x.itemsize
            kept = get_normed(normed)
            assert kept
            again = stand_in(replace(kept, rows=None))  # as in a backward
            pairs = [(fp8.prepare(n), fp8.prepare(written)) for n in (normed, again)]
            pairs += [(fp8.prepare_columns(again), fp8.prepare_columns(written))]
            tile = slice(T // 3, T // 2)
            ours, theirs = take_rows(normed, tile), written[tile]
            pairs += [
                (fp8.prepare(ours), fp8.prepare(theirs)),
                (fp8.prepare_columns(ours), fp8.prepare_columns(theirs)),
            ]
            for found, apart in pairs:
                same(found, apart)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_carry_their_maxima(device: str) -> None:
    """As they are searched otherwise; and the gradients are the same. A change in place makes them invalid."""
    torch.manual_seed(0)
    fp8 = MATMULS["fp8_full"]
    for T, kv_heads, groups, dim in ((1, 1, 6, 64), (37, 3, 1, 32), (1200, 2, 4, 128)):

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).bfloat16()

        H = kv_heads * (groups + 2) * dim
        d, x, residual, w, wq, wk = (numbers(*s) for s in ((T, H), (T, H), (T, H), (H,), (dim,), (dim,)))
        heads = [numbers(T, n, dim) for n in (kv_heads * groups, kv_heads, kv_heads)]
        angle = torch.randn(T, dim // 2, device=device)
        rotation = angle.cos(), angle.sin()
        for function, given in (
            (rms_norm_backward, (d, x, w, 1e-5, residual)),
            (lambda *a: (split_rotate_backward(*a),), (*heads, *rotation)),
            (split_norm_rotate_backward, (*heads, x, wq, wk, 1e-5, *rotation)),
        ):
            maxima = fp8.new_maxima(T, H, torch.device(device))
            assert (maxima is None) is (device == "cpu")
            found, expected = function(*given, maxima), function(*given)
            for ours, theirs in zip(found, expected, strict=True):
                equal(ours, theirs)
            dx = found[0]
            set_maxima(dx, maxima)
            for factor in (1, -3):
                dx.mul_(factor) if factor != 1 else None
                assert (get_maxima(dx) is None) is (factor != 1 or device == "cpu")
                for prepared, apart in zip(fp8.prepare_both(dx), fp8.prepare_both(dx.clone()), strict=True):
                    same(prepared, apart)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fp8", "fp8_full"])
def test_maxima_of_weights_are_those_of_the_iteration(name: str, device: str) -> None:
    torch.manual_seed(0)
    fp8, w, d = (
        MATMULS[name],
        torch.randn(48, 80, device=device).bfloat16(),
        torch.ones(3, 48, device=device).bfloat16(),
    )
    into = GradientSum(torch.empty(48, 80, device=device))
    for _ in range(2):
        for _ in range(2):
            equal(fp8.backward(fp8.prepare(d), w, None, into), fp8.backward(fp8.prepare(d), w))
        w *= 1000
        into.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("products", ["fp8", "fp8_full"])
def test_norms_are_not_written_where_only_products_read_them(products: MatmulKind, device: str) -> None:
    """Bit for bit what they are with norms that are written, whatever is kept; adapters, hooks, overrides read written
    ones. On GPUs attention's backward adds in any order."""
    torch.manual_seed(0)
    shape = dict(vocab_size=503, hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ids = torch.randint(3, 503, (70,), device=device)
    plans = KEEP_ALL, replace(KEEP_ALL, qkv=False, residual=False), KEEP_NONE
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for adapter in (None, lora(rank=4, targets=["wqkv"])):
        source = from_scratch(products=products, num_key_value_heads=2, seed=0, **shape)
        model = (replace(source, adapter=build_lora(adapter, source.config)) if adapter else source).build(
            device, dtype
        )
        found: list[list[torch.Tensor]] = []
        block = model.model.layers[0]
        x = torch.randn(70, 256, device=device, dtype=dtype, requires_grad=True)
        for written in (False, True):
            if written:
                for layer in model.model.layers:
                    for reader in (layer.attention, layer.feed_forward):
                        reader.register_forward_pre_hook(lambda *_: None)
            for keep in plans:
                model.keep_activations(SimpleNamespace(choose_kept=lambda _, keep=keep: [keep] * 2))
                model.zero_grad()
                loss = model(ids, targets=ids.roll(-1), scale=1 / 70)
                loss.backward()
                found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
            for norm, reader in ((block.attention_norm, block.attention), (block.ffn_norm, block.feed_forward)):
                unwritten = get_normed(apply_norm(norm, reader, x)[1])
                has_adapter = adapter is not None and reader is block.attention
                assert bool(unwritten) is not (written or has_adapter)
                with torch.no_grad():
                    assert get_normed(apply_norm(norm, reader, x)[1]) is None
                everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
                assert get_normed(apply_norm(norm, reader, x)[1]) is None
                everywhere.remove()
                with pytest.MonkeyPatch.context() as patch:  # another function in the place of the reader's
                    patch.setattr(reader, "forward", lambda *_: None)
                    assert get_normed(apply_norm(norm, reader, x)[1]) is None
        for others in found[1:]:
            assert torch.equal(found[0][0], others[0])
            for ours, theirs in zip(found[0], others, strict=True):
                assert (ours - theirs).norm() <= (1e-2 * ours.norm() if device == "cuda" else 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_in_fp8_is_near_its_own(device: str) -> None:
    torch.manual_seed(0)
    shape = dict(
        vocab_size=503, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bias=True, seed=0,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    borders = torch.tensor([0, 100, 101, 300], dtype=torch.int32, device=device)
    ids, found = torch.randint(3, 503, (300,), device=device), {}
    for products in MATMULS:
        for recompute in (False, True):
            source = from_scratch(products=products, activation_checkpointing=recompute, **shape)
            model = source.build(device, dtype)
            loss = model(ids, borders, ids.roll(-1), scale=1 / 300)
            loss.backward()
            gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
            found[products, recompute] = loss.item(), gradients
    loss, gradients = found["own", False]
    for products, recompute in product(("fp8", "fp8_full"), (False, True)):
        ours, theirs = found[products, recompute]
        assert 0 < abs(ours - loss) < 2e-3 * loss
        for name, gradient in gradients.items():
            if gradient.dim() == 1:
                continue  # sums over tokens that nearly cancel: their error has no such bound
            # 0.037: of one product, whose factors are rounded to three bits; two blocks of four, forward and back
            assert 1e-4 < (theirs[name] - gradient).norm() / gradient.norm() < 0.037 * 16**0.5, name
    if device == "cpu":
        assert len({found[key][0] for key in found if key[0] != "own"}) == 1  # the forward is the same


def test_products_that_cannot_be_computed_are_refused() -> None:
    shape = dict(vocab_size=503, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ConfigError, match=r"products = 'int8' cannot be used: it is not one of own, fp8, fp8_full"):
        from_scratch(products="int8", hidden_size=256, intermediate_size=512, **shape).build()
    with pytest.raises(ConfigError, match=r"products = 'fp8' .* dimensions of weights, 256, 512, 256, 500, must be"):
        from_scratch(products="fp8", hidden_size=256, intermediate_size=500, **shape).build()
    assert get_args(MatmulKind) == tuple(MATMULS)
    model = from_scratch(hidden_size=256, intermediate_size=512, **shape).build()
    assert all(m.matmul is PLAIN for m in model.modules() if isinstance(m, Linear))
