"""What only a GPU can show: its attention backend, bf16 compute with fp32 masters. Skipped without one."""

import pytest
import torch
from conftest import reference

from xtuner.model import attention, load_pretrained

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 2, 128), (6, 1, 64)])
def test_varlen_attention_against_fp64(heads: int, kv_heads: int, dim: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = torch.tensor([17, 1, 300, 64, 128, 5])
    cu_seqlens = torch.cat((torch.zeros(1), lengths.cumsum(0))).int().cuda()
    shapes = [(int(lengths.sum()), n, dim) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, device="cuda", generator=generator).bfloat16().requires_grad_() for s in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attention.attend_varlen(*inputs, cu_seqlens, 300)
    expected = attention.attend_loop(*exact, cu_seqlens, 300)
    weight = torch.randn(out.shape, device="cuda", generator=generator)
    (out.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (out - expected).norm() < 1e-2 * expected.norm()
    for x, e in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert e.grad is not None
        assert (x.grad - e.grad).norm() < 1e-2 * e.grad.norm()


def test_logits_of_a_reference_model() -> None:
    import numpy as np

    folder = reference("models", "a_gqa")
    ref = np.load(folder / "reference.npz")
    ids, cu = (torch.from_numpy(ref[k]).cuda() for k in ("packed_input_ids", "packed_cu_seqlens"))
    with torch.no_grad():
        exact = load_pretrained(folder, device="cuda")(ids.long(), cu_seqlens=cu)
        assert (exact[ref["packed_logits_rows"]].cpu() - torch.from_numpy(ref["packed_logits"])).abs().max() < 1e-3
        half = load_pretrained(folder, dtype=torch.bfloat16, device="cuda")(ids.long(), cu_seqlens=cu)
        assert (half.float() - exact).abs().max() < 0.3
