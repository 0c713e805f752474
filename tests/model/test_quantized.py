"""Frozen weights in 4 and 8 bits: values of bitsandbytes, in any layout of rows; merged as they were trained with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.lora import trained_checkpoint, with_lora, write_base
from helpers.paths import reference
from safetensors.torch import load_file

from xtuner.core.errors import ConfigError
from xtuner.dist.mesh import Mesh
from xtuner.engine import memory
from xtuner.engine.memory import DIVISIONS
from xtuner.export.hf import export_hf
from xtuner.model import from_pretrained, from_scratch, load_pretrained
from xtuner.model.adapters.lora import build_lora, lora
from xtuner.model.ops.quantized import FORMATS, Nf4, round_trip
from xtuner.optim.optim_wrapper import OptimWrapper

IDS = torch.arange(3, 60)


def test_values_are_those_of_bitsandbytes() -> None:
    known = load_file(reference("quantized", "bitsandbytes_0.50.2.safetensors"))
    weight = known["weight"]  # with a row and a block of zeros
    packed = FORMATS["nf4"].quantize(weight)
    assert packed.shape == (40, 112)
    assert torch.equal(FORMATS["nf4"].dequantize(packed, torch.bfloat16), known["nf4"])
    torch.testing.assert_close(round_trip(weight, "int8"), known["int8"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [64, 192, 2048, 4096, 14336, 16384 + 64])
def test_rows_have_all_that_reading_them_needs(columns: int) -> None:
    """Also where groups of blocks begin inside rows; bytes of a number as planned."""
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(0))
    form = FORMATS["nf4"]
    packed = form.quantize(weight)
    assert packed.shape[1] == form.row_bytes(columns)
    assert Nf4.columns(packed.shape[1]) == columns
    error = (form.dequantize(packed, torch.float32) - weight).abs()
    largest = weight.view(-1, 64).abs().amax(1)
    assert (error.view(-1, 64).amax(1) <= 0.1521 * largest + 0.02).all()  # half of the widest step, and the maximum's
    assert form.row_bytes(columns) / columns < 0.5333 or columns < 1024
    half = packed[:5].clone(), packed[5:].clone()  # as two ranks store them
    assert torch.equal(torch.cat(half), packed)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_as_trained(kind: str, tmp_path: Path) -> None:
    """A base that has been read back, with the adapter in it, computes the same; quantizing makes a difference."""
    base = write_base(tmp_path / "base", "internlm2")
    source = with_lora(base, frozen_weights=kind, dora=kind == "int8")
    saved, model = trained_checkpoint(source, tmp_path)
    weight = model.model.layers[0].attention.wqkv.weight
    assert weight.dtype == torch.uint8
    assert weight.shape[1] == FORMATS[kind].row_bytes(64)
    merged = export_hf(saved, tmp_path / "merged", None, None, torch.float32)
    with torch.no_grad():
        assert (load_pretrained(merged)(IDS) - model(IDS)).abs().max() < 1e-5
        assert (load_pretrained(base)(IDS) - model(IDS)).abs().max() > 1e-3


def test_formats_that_do_not_fit(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", hidden_size=72, num_attention_heads=2, num_key_value_heads=1, head_dim=36)
    term, device = dict(type=lora, rank=2), torch.device("cpu")
    with pytest.raises(ConfigError, match=r"nf4 needs rows of a multiple of 64 numbers, and the model has rows of 72"):
        from_pretrained(str(base), adapter=term, frozen_weights="nf4").require_supported(device, torch.float32)
    with pytest.raises(ConfigError, match="without an adapter"):
        from_pretrained(str(base), frozen_weights="nf4")


def test_memory_and_flops_of_seven_billion() -> None:
    """Bytes by hand; with packs of 8,192 the plan for a card of 12 GB fits."""
    seven = from_scratch(
        vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, activation_checkpointing=True,
    )  # fmt: skip
    c, gpu, mesh = seven.config, torch.device("cuda"), Mesh()
    source = replace(seven, adapter=build_lora(lora(rank=16), c), frozen_weights="nf4")
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16")
    matrices = 32 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    factors = 32 * 16 * ((4096 + 6144) + (4096 + 4096) + 3 * (4096 + 14336))
    rows = 32 * ((6144 + 4096 + 2 * 14336) * 2128 + 4096 * 7408)  # a row of 4,096 in 2,128 bytes, of 14,336 in 7,408
    norms = 65 * 4096
    held = source.count_weight_bytes(torch.bfloat16)
    assert held.total == rows + 2 * (2 * 92544 * 4096 + norms + factors)
    assert held.read_back == 2 * 2 * 14336 * 4096
    state = memory.state_bytes(source, optim, gpu, mesh, DIVISIONS["all"])
    assert state == held.total + held.read_back + (10 + 4) * factors  # moments and the masters' other half; gradients
    for free, most in ((11.6, 12), (15.6, 16)):
        plan = memory.plan_memory(source, optim, gpu, mesh, 8192, int(free * 2**30))
        assert plan.fits(plan.micro_batch_tokens(8192))
        assert plan.peak_bytes(8192) < most * 2**30
    own = memory.plan_memory(replace(source, frozen_weights="own"), optim, gpu, mesh, 8192, 16 * 2**30)
    assert not own.fits(own.micro_batch_tokens(8192))
    # MFU: 4 for each frozen weight, 6 for each factor; the output layer is frozen, too
    drawn = torch.get_rng_state()
    assert source.training_flops(10, 0) == 10 * (4 * (matrices + 92544 * 4096) + 6 * factors)
    assert torch.get_rng_state().equal(drawn), "factors were allocated to be counted"
    wider = source.count_weight_bytes(torch.float32).total
    assert wider == rows + 4 * (2 * 92544 * 4096 + norms + factors)
    assert source.count_weight_bytes(torch.bfloat16) == held
    trained = replace(source, adapter=build_lora(lora(train=["output"]), c))
    assert trained.training_flops(10, 0) == 10 * (4 * matrices + 6 * (92544 * 4096 + factors))
