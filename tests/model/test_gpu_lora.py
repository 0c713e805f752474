"""Quantized weights and low-rank terms on a GPU: as on a CPU."""

from pathlib import Path

import pytest
import torch
from helpers.lora import with_lora, write_base

from xtuner.engine.strategies.sharded_strategy import ShardedStrategy
from xtuner.model.ops.quantized import FORMATS
from xtuner.optim.optim_wrapper import OptimWrapper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("columns", [64, 192, 4096, 14336])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_kernels_read_back_the_same(kind: str, columns: int) -> None:
    weight, form = torch.randn(37, columns), FORMATS[kind]
    packed = form.quantize(weight)
    assert torch.equal(form.quantize(weight.cuda()).cpu()[:, : columns // 2], packed[:, : columns // 2])
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(form.dequantize(packed.cuda(), dtype).cpu(), form.dequantize(packed, dtype))


@pytest.mark.parametrize("settings", [{}, {"frozen_weights": "nf4"}, {"dora": True, "dropout": 0.1}])
def test_a_run_in_bf16_learns_as_one_in_fp32(settings: dict[str, object], tmp_path: Path) -> None:
    from helpers.models import train_iterations

    source = with_lora(write_base(tmp_path / "base", head_dim=64), **settings)
    losses = {}
    for dtype in ("bf16", "fp32"):
        optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1e-2), dict(max_norm=1.0), 4, dtype)
        strategy = ShardedStrategy(source, optim, torch.device("cuda"))
        losses[dtype] = [loss for loss, _, _ in train_iterations(strategy, range(8))]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
