"""Activations in pinned host memory, copied on a stream of their own. Skipped without a GPU."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from xtuner.model import attention, from_scratch
from xtuner.model.activation_memory import ATTENTION_ONLY, FACTORS_ON_HOST, INPUT_ON_HOST, ON_HOST
from xtuner.model.ops.autograd_functions import KEEP_ALL, KEEP_NONE, KeepPolicy

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first use; for deterministic runs
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE, TOKENS, LAYERS, HIDDEN = torch.device("cuda"), 8192, 8, 1024


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("on_gpu", "on_host", "tensors"),  # of HIDDEN
    [
        (ATTENTION_ONLY, ON_HOST, 2),
        (KEEP_NONE, INPUT_ON_HOST, 1),
        (KEEP_ALL, KeepPolicy(on_host=FACTORS_ON_HOST.on_host), 8),
    ],
)
def test_copies_change_no_bit_and_wait_for_nothing(
    on_gpu: KeepPolicy, on_host: KeepPolicy, tensors: int, deterministic: None
) -> None:
    """Several iterations in which the host runs ahead: memory is reused before its copies would have ended without
    waits between streams."""
    source = from_scratch(
        seed=0, vocab_size=503, hidden_size=HIDDEN, intermediate_size=4096, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model = source.build(DEVICE, torch.bfloat16)
    model.use_attention(attention.choose_backend(DEVICE, torch.bfloat16, 128))
    ids = torch.randint(3, 503, (TOKENS,), device=DEVICE)
    borders, positions = torch.tensor([0, TOKENS], device=DEVICE).int(), torch.arange(TOKENS, device=DEVICE)

    def run(keep: KeepPolicy, wait: bool) -> tuple[list[torch.Tensor], int]:
        model.keep_activations(SimpleNamespace(choose_kept=lambda _: [keep] * LAYERS))  # type: ignore[arg-type]
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # the model, and results that the test holds
        torch.cuda.set_sync_debug_mode("default" if wait else "error")
        try:
            for _ in range(3):
                model(ids, borders, ids, positions, TOKENS, scale=1 / TOKENS).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        peak = torch.cuda.max_memory_allocated() - before
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], peak

    run(on_gpu, wait=True)  # kernels
    run(on_host, wait=True)  # pins host memory
    allocated = model.model.host.allocated
    expected, most = run(on_gpu, wait=False)
    for _ in range(3):
        found, peak = run(on_host, wait=False)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
        assert peak < most - (LAYERS - 3) * tensors * 2 * TOKENS * HIDDEN
    assert model.model.host.allocated == allocated >= LAYERS * tensors * 2 * TOKENS * HIDDEN
