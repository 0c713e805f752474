"""Which attention is chosen, and FlexAttention's mask; how exact each is, GPUs show (test_gpu.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from xtuner.core.errors import ConfigError
from xtuner.model import attention, from_scratch
from xtuner.model.ops import attention_backends
from xtuner.model.ops.attention_backends import BLOCK, TOO_MANY, divide_heads, document_mask

SHAPE = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "lengths", [[17, 1, 300, 64, 128, 5], [0, 700, 0, 3, 1], [1000], [128, 256, 1, 127, 384], [1] * 300 + [200]]
)
@pytest.mark.parametrize("window", [None, 1, 129, 256, 700])
def test_the_mask_of_documents_holds_the_blocks_that_are_seen(lengths: list[int], window: int | None) -> None:
    borders, total = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths)
    mask = document_mask(borders, total, window)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    token = torch.arange(total)
    seen = (document[:, None] == document) & (token[:, None] >= token)
    if window is not None:
        seen &= token[:, None] - token < window
    assert torch.equal(mask.mask_mod(0, 0, token[:, None], token[None]), seen)
    count = -(-total // BLOCK)
    square = torch.zeros(count * BLOCK, count * BLOCK, dtype=torch.bool)
    square[:total, :total] = seen
    blocks = square.view(count, BLOCK, count, BLOCK).transpose(1, 2).flatten(2)
    rows = square[:total].view(total, count, BLOCK).all(2)  # tokens that see all of a block

    def listed(numbers: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros(count, count, dtype=torch.bool)
        for row, (n, which) in enumerate(zip(numbers[0, 0].tolist(), indices[0, 0].long(), strict=True)):
            chosen[row, which[:n]] = True
        return chosen

    part, whole = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (part & whole).any()
    assert torch.equal(part | whole, blocks.any(2))
    for query, key in whole.nonzero().tolist():
        assert rows[query * BLOCK : (query + 1) * BLOCK, key].all()
    assert not (part & blocks.all(2)).any(), "a block that is seen whole needs no mask"


def test_the_fastest_that_runs_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        attention.choose_backend(CPU, torch.float32, 64) == attention.choose_backend(CPU, torch.bfloat16, 128) == "loop"
    )
    assert attention.choose_backend(CPU, torch.float32, 64, "loop") == "loop"
    for name in attention.BACKENDS:  # an engine's first look at the network, on no device
        from_scratch(attention=name, **SHAPE).build_empty(torch.device("meta"), torch.float32)
    assert get_args(attention.Name) == tuple(attention.BACKENDS)
    with pytest.raises(ConfigError, match=r"FlashAttention-4 cannot run here: it does not run on cpu"):
        attention.choose_backend(CPU, torch.bfloat16, 128, "flash4")
    with pytest.raises(ConfigError, match=r"no attention backend 'flash'") as error:
        attention.choose_backend(CPU, torch.bfloat16, 128, "flash")
    assert "flash4, varlen, cudnn, flex, loop" in error.value.do
    gpu, flash = torch.device("cuda"), attention.BACKENDS["flash4"]
    assert flash.why_unavailable(gpu, torch.float32, 128) == "it does not compute in float32"
    assert attention.BACKENDS["cudnn"].why_unsupported(gpu, torch.bfloat16, 128, has_windows=True) is not None
    assert attention.choose_backend(CPU, torch.float32, 64, has_windows=True) == "loop"
    torch.use_deterministic_algorithms(True)
    try:  # in older FlashAttention-4, and on Blackwell, gradients of shared key-value heads have no order
        for major, version, allowed in ((9, "4.0.0b36", True), (9, "4.0.0b10", False), (10, "4.0.0b36", False)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
            monkeypatch.setattr(attention_backends, "version", lambda name, version=version: version)
            for groups in (1, 4):
                why = flash.why_unsupported(gpu, torch.bfloat16, 128, groups=groups)
                assert (why is None) is (allowed or groups == 1)
            assert why is None or "randomness.deterministic is on" in why
        assert attention.BACKENDS["loop"].why_unsupported(CPU, torch.bfloat16, 128, groups=4) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash.why_unavailable(gpu, torch.bfloat16, 80) == "heads of 80 are not among 64, 96, 128"


@pytest.mark.parametrize("mask", [1, 600, 2**26])
@pytest.mark.parametrize("slices", [1, 128])
@pytest.mark.parametrize("window", [1, 9, 64, 300])
def test_sliding_windows(window: int, slices: int, mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of documents, and of their last tokens: what a mask of all pairs gives."""
    monkeypatch.setattr(attention, "MASK", mask)
    monkeypatch.setattr(attention, "SLICE", slices)
    q, k, v = (torch.randn(280, heads, 16) for heads in (4, 2, 2))
    borders = torch.tensor([0, 1, 180, 180, 280], dtype=torch.int32)
    token = torch.arange(280)
    document = torch.searchsorted(borders, token, right=True)
    seen = (document[:, None] == document) & (token[:, None] >= token) & (token[:, None] - token < window)
    expected = attention.attend_dense(q, k, v, causal=False, mask_QS=seen)
    torch.testing.assert_close(attention.load_backend("loop", window)(q, k, v, borders, 179), expected)
    prefixes = attention.load_prefixes("loop", window)
    assert prefixes is not None
    last = torch.cat((token[100:180], token[279:]))  # of the second document, and of the last
    keys = torch.cat((token[1:180], token[180:]))
    found = prefixes(q[last], k[keys], v[keys], torch.tensor([0, 80, 81]), torch.tensor([0, 179, 279]), 80, 179)
    torch.testing.assert_close(found, expected[last])


OUTSIDE = """
import torch
from xtuner.model.attention import BACKENDS, Backend

calls = []


def attend(q, k, v, cu_seqlens, max_seqlen):
    token = torch.arange(len(q))
    document = torch.searchsorted(cu_seqlens, token, right=True)
    seen = (document[:, None] == document) & (token[:, None] >= token)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qnd,snd->nqs", q, k) * q.shape[-1] ** -0.5
    calls.append(len(q))
    return torch.einsum("nqs,snd->qnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


BACKENDS.register("masked", Backend("one mask for all", lambda: attend, devices=("cpu",), dtypes=()))
"""


@pytest.mark.processes
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the backend under test runs on CPUs alone, and training takes the GPU"
)
def test_a_backend_from_outside(
    tiny: Path, tmp_path: Path, xtuner: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered by a module that the config imports, chosen by name: it is what trains, and is named in the report."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "masked_attention.py").write_text(OUTSIDE)
    (tmp_path / "config.py").write_text("import masked_attention\n" + tiny.read_text())
    losses = []
    try:
        for name in ("loop", "masked"):
            words = ("--work-dir", tmp_path / name, "--cfg-options", "custom_hooks=[]", f"model.attention={name}")
            assert xtuner("train", tmp_path / "config.py", *words) == 0
            (record,) = (tmp_path / name).rglob("scalars.json")
            entries = [json.loads(line) for line in record.read_text().splitlines()]
            losses.append([entry["loss"] for entry in entries if "loss" in entry])
        import masked_attention

        assert len(masked_attention.calls) >= len(losses[1]) > 5
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[0] != losses[1]
        assert "one mask for all" in next((tmp_path / "masked").rglob("*.log")).read_text()
        with pytest.raises(ConfigError, match="one mask for all cannot run here: it does not run on cuda"):
            attention.choose_backend(torch.device("cuda"), torch.bfloat16, 64, "masked")
        with pytest.raises(ConfigError, match="xtuner already has the attention backend 'loop'"):
            attention.BACKENDS.register("loop", attention.BACKENDS["masked"])
    finally:
        attention.BACKENDS.pop("masked", None)


@pytest.mark.parametrize(("tokens", "documents", "calls"), [(500_000, 1, 1), (500_000, 700, 2), (2**20, 1, 3)])
def test_large_inputs_of_varlen_attn_are_divided_by_heads(tokens: int, documents: int, calls: int) -> None:
    q, k = (torch.empty(tokens, heads, 128, device="meta", dtype=torch.bfloat16) for heads in (32, 8))
    parts = divide_heads(q, k, k, documents)
    assert len(parts) == calls
    assert sum(part[0].shape[1] for part in parts) == 32
    for q_part, k_part, v_part in parts:
        assert q_part.shape[1] == 4 * k_part.shape[1] == 4 * v_part.shape[1]
        assert q_part.numel() + BLOCK * documents * q_part.shape[1] * 128 < TOO_MANY
