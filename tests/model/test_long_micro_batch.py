"""One long micro-batch: tiles of tokens, activations in host memory, and the bytes that all of it takes."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.live_bytes import FlashBytes, LiveBytes
from helpers.models import odd_model

from xtuner.engine.strategies.out_of_memory import drop_graph
from xtuner.model import loss
from xtuner.model.activation_memory import ActivationPlan, exact_bytes, kept_bytes_per_token, limit_factors
from xtuner.model.attention import attend_dense
from xtuner.model.decoder import CausalLM
from xtuner.model.linear import GradientSumModule
from xtuner.model.ops import elementwise, saved_tensors, swiglu
from xtuner.model.ops.autograd_functions import KEEP_ALL, KEEP_NONE, KeepPolicy
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.model.source import from_scratch

TOKENS = 520
HOST, FACTORS = frozenset(("input", "attention")), frozenset(("gate_up",))
POLICIES = [
    KEEP_ALL,
    KEEP_NONE,
    replace(KEEP_ALL, gate_up=False),
    replace(KEEP_NONE, on_host=frozenset(("input",))),
    replace(KEEP_ALL, on_host=frozenset(("input",))),
    KeepPolicy(qkv=False, on_host=frozenset(("attention",))),
    KeepPolicy(qkv=False, on_host=HOST),
    KeepPolicy(qkv=False, residual=False, gate_up=False, on_host=HOST),
    KeepPolicy(on_host=FACTORS),
    KeepPolicy(qkv=False, residual=False, on_host=FACTORS),
]


class FlashLike(torch.autograd.Function):
    """Causal attention of one document; like FlashAttention it saves q, k, v, its output and log-sums."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend_dense(q, k, v, causal=True).contiguous()
        ctx.save_for_backward(q, k, v, out, q.new_ones(q.shape[1], len(q), dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _, sums = ctx.saved_tensors
        assert (sums == 1).all()
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(attend_dense(*inputs, causal=True).contiguous(), inputs, grads)


def flash_like(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return FlashLike.apply(q, k, v)


def gradients(
    model: CausalLM, keep: KeepPolicy | list[KeepPolicy], tokens: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients; `keep` of both layers, or of each."""
    ids = torch.randint(3, 401, (tokens,), generator=torch.Generator().manual_seed(tokens))
    policies = keep if isinstance(keep, list) else [keep] * 2
    model.keep_activations(SimpleNamespace(choose_kept=lambda _: policies))  # type: ignore[arg-type]
    loss = model(ids, targets=ids.roll(-1), scale=1 / tokens)
    model.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("products", ["own", "fp8"])
def test_tiles_and_host_memory_change_no_number(products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit in one tile; in several, sums over tokens are added in another order."""
    model = odd_model(products).build()
    for block in model.model.layers:
        block.attention.attend = flash_like  # type: ignore[union-attr]
    whole = gradients(model, KEEP_ALL, TOKENS)
    for tile in (TOKENS, 256):
        monkeypatch.setattr(swiglu, "TILE", tile)
        monkeypatch.setattr("xtuner.model.decoder.TILE", tile)
        expected = gradients(model, KEEP_ALL, TOKENS)
        assert expected[0] == pytest.approx(whole[0], rel=1e-6)
        for name, gradient in expected[1].items():
            assert (gradient - whole[1][name]).norm() <= 1e-6 * gradient.norm(), name
        for keep in POLICIES:
            found = gradients(model, keep, TOKENS)
            assert found[0] == expected[0]
            assert all(g.equal(expected[1][n]) for n, g in found[1].items()), keep
    host = model.model.host  # reused by all of these
    assert host.allocated == saved_tensors.ARENA
    assert len(host._free) == saved_tensors.ARENA // saved_tensors.CHUNK


def test_copies_return_before_they_are_needed_and_survive_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's tensors are fetched while the block behind it computes, after that one's attention. An error in the
    backward frees all host memory."""
    model, events = odd_model().build(), []
    start_fetch, backward = saved_tensors.HostTensor.start_fetch, FlashLike.backward
    norm_backward = elementwise.rms_norm_backward

    def log_fetch(self: Any) -> None:
        events.extend(["fetch"] * (self._copy is None))
        start_fetch(self)

    def log_attention(ctx: Any, *grads: torch.Tensor) -> Any:
        found = backward(ctx, *grads)
        events.append("attention")
        return found

    def log_norm(*arguments: Any) -> Any:
        events.append("norm")
        return norm_backward(*arguments)

    monkeypatch.setattr(saved_tensors.HostTensor, "start_fetch", log_fetch)
    monkeypatch.setattr(elementwise, "rms_norm_backward", log_norm)
    monkeypatch.setattr(FlashLike, "backward", staticmethod(log_attention))
    for block in model.model.layers:
        block.attention.attend = flash_like  # type: ignore[union-attr]
    keep = KeepPolicy(qkv=False, on_host=HOST)
    expected = gradients(model, KEEP_ALL, 100)
    events.clear()
    assert gradients(model, keep, 100)[1]["output.weight"].equal(expected[1]["output.weight"])
    fetched = ["fetch"] * 3  # input, attention's output and log-sums
    assert events == ["norm", "norm", *fetched, "attention", *fetched, "norm", "norm", "attention", "norm"]
    for policies, expected_events in (
        ([KeepPolicy(on_host=FACTORS)] * 2, "norm fetch fetch fetch fetch norm attention norm norm attention norm"),
        ([KeepPolicy(on_host=FACTORS), KEEP_ALL], "norm fetch fetch norm attention norm norm attention norm"),
    ):  # both factors; of a block behind one that has them on the GPU, as soon as its backward begins
        events.clear()
        found = gradients(model, policies, 100)
        assert all(g.equal(expected[1][n]) for n, g in found[1].items())
        assert " ".join(events) == expected_events

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.model.layers[0].feed_forward.register_full_backward_pre_hook(fail)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, keep, 100)
        drop_graph()
        host = model.model.host
        assert len(host._free) * saved_tensors.CHUNK == host.allocated == saved_tensors.ARENA
    hook.remove()
    found = gradients(model, keep, 100)
    assert all(g.equal(expected[1][n]) for n, g in found[1].items())
    hook = model.model.norm.register_forward_pre_hook(fail)
    with monkeypatch.context() as patch:  # as on GPUs: what is sent exists until a copy's end is waited for
        patch.setattr(host, "on_stream", lambda device: nullcontext(SimpleNamespace(wait=lambda: None)))
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, KeepPolicy(on_host=FACTORS), 100)
        drop_graph()
    hook.remove()
    assert host._sending
    gradients(model, KEEP_ALL, 100)
    assert not host._sending, "factors of a graph that does not exist stay on the GPU"

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    model = odd_model().build()  # where no host memory can be pinned, tensors stay on the GPU
    with monkeypatch.context() as patch:
        patch.setattr(saved_tensors.HostMemory, "_allocate_arena", refuse)
        found = gradients(model, keep, 100)
    assert not model.model.host.allocated
    assert found[0] == expected[0]


def test_factors_are_waited_for_where_memory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor takes the memory of one whose copy it waits for; those of more blocks may be on their way while what
    later blocks will keep is not there yet."""
    events, sent = [], itertools.count()

    @contextmanager
    def on_stream(self: Any, device: torch.device) -> Iterator[Any]:
        n = next(sent)
        events.append(f"send {n}")
        yield SimpleNamespace(wait=lambda: events.append(f"wait {n}"))

    monkeypatch.setattr(saved_tensors.HostMemory, "on_stream", on_stream)
    two = odd_model().build()
    for tile, factors in ((TOKENS, 2), (300, 4)):
        monkeypatch.setattr(swiglu, "TILE", tile)
        events.clear()
        sent = itertools.count()
        gradients(two, KeepPolicy(on_host=FACTORS), TOKENS)
        expected = [f"send {n}" for n in range(factors)]
        for n in range(factors):
            expected += [f"wait {n}", f"send {factors + n}"]
        assert events[: len(expected)] == expected

    source = from_scratch(
        seed=0, vocab_size=401, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    # of a token: factors 2 · 384; in a block 256 each for input, attention (and 16), residual, 512 for q, k and v
    limits = limit_factors(source.config, 4, 10, [KeepPolicy(on_host=FACTORS)] * 4)
    assert limits == [10 * (768 + n * 1296) for n in (3, 2, 1, 0)]
    monkeypatch.setattr(swiglu, "TILE", TOKENS)
    events.clear()
    sent = itertools.count()
    gradients(source.build(), [KeepPolicy(on_host=FACTORS)] * 4, 100)
    forward = "send 0 send 1 send 2 send 3 send 4 wait 0 send 5 wait 1 wait 2 wait 3 wait 4 send 6 wait 5 send 7"
    assert " ".join(events).startswith(forward)


def allocate_like_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elementwise functions that allocate their results only, as on GPUs; tensors on "meta" have no addresses."""

    def split_rotate(qkv: torch.Tensor, cos: Any, sin: Any, kv_heads: int, head_dim: int) -> Any:
        queries = qkv.shape[1] // head_dim - 2 * kv_heads
        return tuple(qkv.new_empty(len(qkv), n, head_dim) for n in (queries, kv_heads, kv_heads))

    def join(dq: torch.Tensor, dk: torch.Tensor, *_: Any) -> torch.Tensor:
        return dq.new_empty(len(dq), (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2])

    def norm(x: torch.Tensor, w: Any, eps: Any, add: torch.Tensor | None = None) -> Any:
        return (x if add is None else torch.empty_like(x)), torch.empty_like(x)

    def norm_backward(d: Any, x: torch.Tensor, w: torch.Tensor, *_: Any) -> Any:
        return torch.empty_like(x), torch.empty_like(w, dtype=torch.float32)

    for name, function in {
        "rms_norm": norm,
        "rms_norm_backward": norm_backward,
        "split_rotate": split_rotate,
        "split_rotate_backward": join,
        "swiglu": lambda gate, up: torch.empty_like(gate),
        "swiglu_backward": lambda *in_place: in_place,
    }.items():
        monkeypatch.setattr(elementwise, name, function)
    monkeypatch.setattr(loss, "cross_entropy_", lambda logits, targets, scale: logits[:, 0].float())
    monkeypatch.setattr(saved_tensors, "address", lambda t: 2**20 * t.untyped_storage()._cdata + t.storage_offset())
    event = SimpleNamespace(wait=lambda: None)  # as on GPUs: what is sent exists until a copy's end is waited for
    monkeypatch.setattr(saved_tensors.HostMemory, "on_stream", lambda self, device: nullcontext(event))
    chunks = torch.empty(2**34, dtype=torch.uint8, device="meta").split(saved_tensors.CHUNK)
    monkeypatch.setattr(saved_tensors.HostMemory, "_take_chunks", lambda self, count, pinned: list(chunks[:count]))


def test_buffers_take_the_bytes_that_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """7B with three layers, on "meta": every buffer of forward and backward is counted, nothing is computed."""
    allocate_like_kernels(monkeypatch)
    shape = dict(vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=3)
    source = from_scratch(**shape, num_attention_heads=32, num_key_value_heads=8)
    model = source.build_empty(torch.device("meta"), torch.bfloat16)
    known = []
    for module in model.modules():
        if isinstance(module, GradientSumModule):
            weights = dict(module.named_parameters(recurse=False))
            module.gradient_sums = {n: GradientSum(torch.empty_like(p)) for n, p in weights.items()}
            known += [*weights.values(), *(s.buffer for s in module.gradient_sums.values())]
    for block in model.model.layers:
        block.attention.attend = lambda q, k, v, *_: FlashBytes.apply(q, k, v)  # type: ignore[union-attr]
    plan, size = ActivationPlan(source.config, 2, 0), kept_bytes_per_token(source.config, 2)
    for tokens in (8192, 32768, 131072):
        row = torch.empty(tokens, dtype=torch.int64, device="meta")
        borders = torch.empty(2, dtype=torch.int32, device="meta")
        for keep in POLICIES:
            policies = [keep] * 3
            model.keep_activations(SimpleNamespace(choose_kept=lambda _, p=policies: p))  # type: ignore[arg-type]
            with LiveBytes([*known, row, borders]) as live:
                model(row, borders, row, row, tokens).backward()
            kinds = {"input", *(n for n in size if getattr(keep, n, False))} - keep.on_host
            kept = 3 * tokens * sum(size[name] for name in kinds)
            assert live.peak == pytest.approx(kept + exact_bytes(source.config, 2, tokens, keep), rel=0.03), keep
            assert live.peak <= plan.bytes_with(policies, tokens)
            assert live.now <= 2 * row.nbytes
        # factors arrive for a layer while the one behind, which also recomputes q, k and v, recomputes its own
        mixed = [KeepPolicy(qkv=False, on_host=FACTORS), *[KeepPolicy(qkv=False, gate_up=False)] * 2]
        model.keep_activations(SimpleNamespace(choose_kept=lambda _, p=mixed: p))  # type: ignore[arg-type]
        with LiveBytes([*known, row, borders]) as live:
            model(row, borders, row, row, tokens).backward()
        assert live.peak <= plan.bytes_with(mixed, tokens)
