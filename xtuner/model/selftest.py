"""Whether a device computes correctly: a tiny model on packed documents against the same documents one by one."""

import torch

from xtuner.model import attention
from xtuner.model.decoder import DecoderConfig
from xtuner.model.source import ModelSource

LENGTHS = (5, 1, 26, 32)  # tokens of the documents
TINY = DecoderConfig(
    vocab_size=128, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64
)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative; half precision rounds as it adds up gradients


def packed_error(device: torch.device, dtype: torch.dtype) -> tuple[str, float]:
    """(attention backend that training would use, relative error of its loss and gradients against the documents one
    by one)."""
    name = attention.choose_backend(device, dtype, TINY.head_dim, groups=TINY.queries_per_kv_head)
    model = ModelSource(TINY, None, seed=0).build(device, dtype)
    ids = torch.arange(sum(LENGTHS), device=device) * 7 % TINY.vocab_size
    targets = ids.roll(-1)
    borders = torch.tensor((0, *LENGTHS), device=device).cumsum(0).int()

    def gradients() -> torch.Tensor:
        found = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    packed = model(ids, borders, targets)
    packed.backward()
    ours = gradients()
    model.use_attention("loop")
    alone = torch.stack([model(i, None, t) for i, t in zip(ids.split(LENGTHS), targets.split(LENGTHS), strict=True)])
    alone.sum().backward()
    expected = gradients()
    loss_error = (packed - alone.sum()).detach().abs() / alone.sum().detach().abs()
    return name, max(float((ours - expected).norm() / expected.norm()), loss_error.item())


def matmul_error(device: torch.device) -> float:
    """Relative error of a bf16 matrix product against fp64; rounding alone gives 0.002."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).bfloat16() for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a.to(device) @ b.to(device)).cpu().double() - exact).norm() / exact.norm())
