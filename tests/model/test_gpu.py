"""What only a GPU can show: attention backends, kernels against their definitions, bf16. Skipped without one."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.configs import with_hook
from helpers.paths import reference

from xtuner.cli.main import main
from xtuner.core.errors import ConfigError
from xtuner.core.log import logger
from xtuner.data.loading.batch import Batch
from xtuner.engine.strategies.sharded_strategy import ShardedStrategy
from xtuner.model import attention, from_scratch, load_pretrained
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.ops import elementwise
from xtuner.model.ops.attention_backends import Attend, flash_4_orders_shared_heads
from xtuner.model.ops.gradient_sums import GradientSum
from xtuner.model.ops.matmul import MatmulKind
from xtuner.optim import adamw
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.parameter_groups import ParameterGroup

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first use; for deterministic runs
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def attend_by(name: str, window: int | None = None) -> Attend:
    device, has_windows = torch.device("cuda"), window is not None
    if why := attention.BACKENDS[name].why_unavailable(device, torch.bfloat16, 128, has_windows=has_windows):
        pytest.skip(why)
    return attention.load_backend(name, window)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("lengths", [[17, 1, 300, 64, 128, 5], [0, 700, 0, 3, 1], [1000]])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 2, 128), (6, 1, 64)])
@pytest.mark.parametrize("name", [n for n in attention.BACKENDS if n != "loop"])
def test_attention_against_fp64(
    name: str, heads: int, kv_heads: int, dim: int, lengths: list[int], window: int | None
) -> None:
    attend = attend_by(name, window)
    generator = torch.Generator("cuda").manual_seed(0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    shapes = [(sum(lengths), n, dim) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(s, device="cuda", generator=generator).bfloat16().requires_grad_() for s in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attend(*inputs, cu_seqlens, max(lengths))
    expected = attention.attend_loop(*exact, cu_seqlens, max(lengths), window)
    weight = torch.randn(out.shape, device="cuda", generator=generator)
    (out.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (out - expected).norm() < 1e-2 * expected.norm()
    for x, e in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert e.grad is not None
        # with a window of one token the gradients of q and k are exactly 0
        assert (x.grad - e.grad).norm() < 1e-2 * max(e.grad.norm(), 1e-3 * weight.norm())


def compiled() -> int:
    """Kernels and graphs that this process has made so far."""
    from xtuner.model.ops import elementwise_kernels, fp8_kernels
    from xtuner.optim import adamw_kernels

    count = sum(torch._dynamo.utils.counters["stats"].values())
    for module in (elementwise_kernels, fp8_kernels, adamw_kernels):
        for function in vars(module).values():
            count += sum(len(caches[0]) for caches in getattr(function, "device_caches", {}).values())
    if flash := sys.modules.get("flash_attn.cute.interface"):
        kernels = [f.compile_cache.cache for f in vars(flash).values() if hasattr(f, "compile_cache")]
        assert len(kernels) >= 4  # forward, backward, and what comes before and after it
        count += sum(map(len, kernels))
    if cudnn := sys.modules.get("cudnn.sdpa.fwd.torch_op"):
        count += len(cudnn._graph_cache)
    return count


@pytest.mark.parametrize(
    ("name", "products"), [*((n, "own") for n in attention.BACKENDS if n != "loop"), ("varlen", "fp8_full")]
)
def test_nothing_is_compiled_again_when_borders_change(name: str, products: MatmulKind) -> None:
    """200 packs, or parts of some (cuDNN: packs of one length; it builds a graph for each length of 64 tokens)."""
    attend_by(name)
    source = from_scratch(
        activation_checkpointing=True, attention=name, products=products, seed=0, vocab_size=503, hidden_size=256,
        intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    strategy = ShardedStrategy(source, OptimWrapper(dict(type=torch.optim.AdamW, lr=1e-3)), torch.device("cuda"))
    draw, before = np.random.RandomState(0), 0
    for i in range(200):
        total = 4096 if name == "cudnn" else draw.randint(2000, 4097)
        borders = [0, *sorted(draw.choice(np.arange(1, total), draw.randint(1, 60), replace=False)), total]
        ids = torch.from_numpy(draw.randint(3, 503, total))
        positions = np.concatenate([np.arange(b - a) for a, b in pairwise(borders)])
        pack = Batch.from_item(dict(
            input_ids=ids, targets=ids, position_ids=torch.from_numpy(positions),
            cumulative_len=torch.tensor(borders, dtype=torch.int32),
        ))  # fmt: skip
        assert strategy.forward_backward([pack], pack.num_targets) > 0
        assert strategy.step(1e-3, 1.0)[1]
        if i == 9:
            before = compiled()
    assert before
    assert compiled() == before


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As `randomness.deterministic` has it; off again afterwards."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("name", list(attention.BACKENDS))
def test_deterministic_runs_are_equal_bit_for_bit(name: str, kv_heads: int, deterministic: None) -> None:
    """Two runs of 6 packs of 4,096 tokens in bf16, long documents and short ones: losses, gradients and weights."""
    device = torch.device("cuda")
    source = from_scratch(
        activation_checkpointing=True, attention=name, seed=0, vocab_size=503, hidden_size=1024, num_hidden_layers=2,
        intermediate_size=1024, num_attention_heads=8, num_key_value_heads=kv_heads,
    )  # fmt: skip
    if why := attention.BACKENDS[name].why_unavailable(device, torch.bfloat16, 128, 8 // kv_heads):
        if attention.BACKENDS[name].load() and "deterministic" in why:  # found here, but not for shared heads
            with pytest.raises(ConfigError, match=r"randomness\.deterministic"):
                source.attention_backend(device, torch.bfloat16)
            return
        pytest.skip(why)

    def run() -> tuple[list[float], dict[str, torch.Tensor]]:
        strategy = ShardedStrategy(source, OptimWrapper(dict(type=torch.optim.AdamW, lr=1e-3)), device)
        draw, numbers = np.random.RandomState(0), []
        for _ in range(6):
            borders = [0, 1500, *sorted(draw.choice(np.arange(1501, 4096), 20, replace=False)), 4096]
            ids = torch.from_numpy(draw.randint(3, 503, 4096))
            positions = np.concatenate([np.arange(b - a) for a, b in pairwise(borders)])
            pack = Batch.from_item(dict(
                input_ids=ids, targets=ids.roll(-1), position_ids=torch.from_numpy(positions),
                cumulative_len=torch.tensor(borders, dtype=torch.int32),
            ))  # fmt: skip
            numbers += [strategy.forward_backward([pack], pack.num_targets), *strategy.step(1e-3, 1.0)]
        return numbers, strategy.gradients | {f"weight {n}": p.detach() for n, p in strategy.model.named_parameters()}

    (first, kept), (second, again) = run(), run()
    assert first == second
    assert all(value.equal(again[key]) for key, value in kept.items())


def test_what_is_chosen_in_deterministic_runs(deterministic: None) -> None:
    """Never an attention whose gradients differ from run to run."""
    half = torch.bfloat16
    for groups in (1, 4):
        name = attention.choose_backend(torch.device("cuda"), half, 128, groups=groups)
        assert groups == 1 or name != "flash4" or flash_4_orders_shared_heads(torch.device("cuda"))


def test_a_deterministic_run_by_command(tiny: Path, tmp_path: Path) -> None:
    """Two processes of their own, from the config: the same weights."""
    weights = []
    for name in ("a", "b"):
        words = ["-m", "xtuner", "train", str(tiny), "--work-dir", str(tmp_path / name), "--cfg-options"]
        options = ["randomness.deterministic=True", "evaluation_inputs=[]", "save_steps=4", "max_epochs=1"]
        done = subprocess.run([sys.executable, *words, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        last = (tmp_path / name / "last_checkpoint").read_text().strip()
        weights.append((tmp_path / name / last / "weights" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "ASGD", "NAdam", "Adafactor"])
def test_optimizers_resume_on_a_gpu(name: str, tmp_path: Path) -> None:
    """Their scalars come back to where their kernels want them: on the CPU or on the GPU."""
    torch.use_deterministic_algorithms(False)
    source = from_scratch(
        activation_checkpointing=True, seed=0, vocab_size=503, hidden_size=256, intermediate_size=512,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip

    def strategy() -> ShardedStrategy:
        optim = OptimWrapper(dict(type=getattr(torch.optim, name), lr=1e-2))
        return ShardedStrategy(source, optim, torch.device("cuda"))

    def step(s: ShardedStrategy, seed: int) -> dict[str, torch.Tensor]:
        """With gradients that are the same each time, whatever the attention does."""
        s._has_targets = True
        for i, gradient in enumerate(p.sum for p in s._divided.parameters.values()):
            draw = torch.Generator("cuda").manual_seed(100 * seed + i)
            gradient.reset()
            gradient.add(torch.randn(gradient.buffer.shape, device="cuda", generator=draw))
        s._sum_over_ranks(torch.zeros(2, device="cuda"))
        assert s.step(1e-2, 1.0)[1]
        return {n: shard.master.read().clone() for n, shard in s._shards().items()}

    first = strategy()
    step(first, 0)
    first.snapshot(optimizer=True).write(tmp_path)
    again = strategy()
    again.load(tmp_path)
    for seed in (1, 2):
        expected, found = step(first, seed), step(again, seed)
        assert all(value.equal(found[key]) for key, value in expected.items())


def near(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert ours.isfinite().all()
    assert (ours.cpu().double() - exact.double()).norm() <= tolerance * exact.double().norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-3)])
def test_kernels_equal_their_definitions(dtype: torch.dtype, tolerance: float) -> None:
    """On the GPU and on the CPU; in bf16 the same roundings, so that few numbers differ by one of them."""
    torch.manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def both(function: object, *arguments: object) -> None:
        copies = [[a.clone() if torch.is_tensor(a) else a for a in arguments] for _ in range(2)]
        exact = function(*copies[0])  # type: ignore[operator]
        ours = function(*[a.cuda() if torch.is_tensor(a) else a for a in copies[1]])  # type: ignore[operator]
        for a, b in zip(ours, exact, strict=True):
            near(a, b, tolerance)

    T = 333
    for hidden in (96, 2048, 6144):
        x, d, other, w = numbers(T, hidden), numbers(T, hidden), numbers(T, hidden), numbers(hidden)
        for add in (None, other):
            both(elementwise.rms_norm, x, w, 1e-5, add)
            both(elementwise.rms_norm_backward, d, x, w, 1e-5, add)
    for kv_heads, groups, dim in ((8, 4, 128), (8, 2, 128), (1, 6, 64), (3, 1, 32)):
        angle = torch.randn(T, dim // 2)
        both(
            elementwise.split_rotate, numbers(T, kv_heads * (groups + 2) * dim), angle.cos(), angle.sin(), kv_heads, dim
        )
        shapes = [(T, n, dim) for n in (kv_heads * groups, kv_heads, kv_heads)]
        both(
            lambda *a: (elementwise.split_rotate_backward(*a),),
            *(numbers(*s) for s in shapes),
            angle.cos(),
            angle.sin(),
        )
        qkv, norms = numbers(T, kv_heads * (groups + 2) * dim), (numbers(dim), numbers(dim), 1e-5)
        both(elementwise.split_norm_rotate, qkv, *norms, angle.cos(), angle.sin(), kv_heads)
        both(
            elementwise.split_norm_rotate_backward,
            *(numbers(*s) for s in shapes),
            qkv,
            *norms,
            angle.cos(),
            angle.sin(),
        )
    gate, up, d = numbers(T, 1000), numbers(T, 1000), numbers(T, 1000)
    both(lambda *a: (elementwise.swiglu(*a),), gate, up)
    both(elementwise.swiglu_backward, gate, up, d)
    for vocabulary in (503, 92544):
        targets = torch.randint(0, vocabulary, (T,))
        targets[::5] = -100

        def losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return elementwise.cross_entropy_(logits, targets, 0.3), logits

        both(losses_and_gradient, 3 * numbers(T, vocabulary), targets)


def test_products_are_added_up_in_fp32() -> None:
    d, x = torch.randn(300, 40, device="cuda").bfloat16(), torch.randn(300, 56, device="cuda").bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        gradient = GradientSum(torch.full((40, 56), torch.nan, device="cuda", dtype=dtype))
        for times in (1, 2, 3):
            gradient.add_product(d, x)
            exact = times * (d.double().T @ x.double())
            near(gradient.buffer, exact.cpu(), 1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("sizes", [(3000, 1, 4096, 70_001), (256, 4096, 140_032)])
@pytest.mark.parametrize("name", adamw.FORMS)
def test_adamw_equals_its_definition(name: str, sizes: tuple[int, ...]) -> None:
    """Of parameters of several sizes, one the later part of a full parameter, one with a rate and decay of its own."""
    form, begins, groups = adamw.FORMS[name], {"0": 512}, {"1": ParameterGroup("1", 0.5, 1.0)}
    optimizers = []
    for device in map(torch.device, ("cpu", "cuda")):
        weights = {str(i): torch.nn.Parameter(torch.zeros(n).bfloat16().to(device)) for i, n in enumerate(sizes)}
        optimizers.append(adamw.AdamW(weights, form, {"betas": (0.9, 0.95), "weight_decay": 0.1}, begins, groups))
    starts = {name: torch.randn(w.numel()) for name, w in optimizers[0].weights.items()}
    for o in optimizers:
        for key, w in o.weights.items():
            adamw.write_master(w, o.state[key], form, starts[key].to(w.device))
    for _ in range(5):
        gradients = {key: torch.randn(len(start)).to(form.gradient) for key, start in starts.items()}
        for o in optimizers:
            clip = torch.tensor(0.7, device=o.weights["0"].device)
            o.step({key: g.to(clip.device) for key, g in gradients.items()}, 1e-2, clip)
    for parameter in starts:
        states = [o.state[parameter] for o in optimizers]
        exact, ours = (adamw.read_master(o.weights[parameter], o.state[parameter], form) for o in optimizers)
        near(ours, exact, 1e-6 if name in ("fp32", "split") else 1e-3)
        for key, value in states[0].items():
            if key == "low" or len(value) < 100:  # the last bits of the master, which has been compared
                continue
            differ = (states[1][key].cpu().float() - value.float()).abs() > 1e-5 * value.float().abs()
            assert differ.float().mean() < 0.02, (parameter, key)


@pytest.mark.parametrize("room", [None, 30, 15, 0])
def test_what_is_kept_changes_no_gradient(room: int | None) -> None:
    """A pack whole and in micro-batches, with everything, less and nothing kept; `room` in MiB."""
    source = from_scratch(
        activation_checkpointing=True, seed=0, vocab_size=503, hidden_size=512, intermediate_size=1024,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1e-3))
    lengths = [300, 1, 700, 23, 512, 512]
    ids = torch.randint(3, 503, (sum(lengths),))
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    targets = ids.roll(-1)
    targets[borders[1:].long() - 1] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    pack = Batch.from_item(dict(input_ids=ids, targets=targets, position_ids=positions, cumulative_len=borders))
    assert [b - a for a, b in pairwise(borders.tolist())] == lengths
    whole, cut = (ShardedStrategy(source, optim, torch.device("cuda")) for _ in range(2))
    loss = whole.forward_backward([pack], pack.num_targets)
    plan = ActivationPlan(source.config, 2, None if room is None else room * 2**20)
    cut.model.keep_activations(plan)
    parts = pack.split(pack.num_parts(1040))
    assert [p.num_tokens for p in parts] == [1024, 1024]
    assert abs(loss - cut.forward_backward(parts, pack.num_targets)) < 1e-3
    for name, gradient in whole.gradients.items():
        assert (cut.gradients[name] - gradient).norm() < 1e-2 * gradient.norm(), name


@pytest.mark.parametrize("scaling", [None, dict(type="dynamic", factor=2.0)])
def test_the_host_runs_ahead_of_the_gpu(scaling: dict[str, Any] | None) -> None:
    """Nothing of forward, backward and step waits for the device; an iteration does once, for loss and norm."""
    source = from_scratch(
        activation_checkpointing=True, seed=0, vocab_size=503, hidden_size=256, intermediate_size=512,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_scaling=scaling,
        max_position_embeddings=256,
    )  # fmt: skip
    s = ShardedStrategy(source, OptimWrapper(dict(type=torch.optim.AdamW, lr=1e-3)), torch.device("cuda"))
    ids, borders = torch.randint(3, 503, (1024,)), torch.tensor([0, 300, 1024], dtype=torch.int32)
    positions = torch.cat([torch.arange(300), torch.arange(724)])
    pack = Batch.from_item(dict(input_ids=ids, targets=ids, position_ids=positions, cumulative_len=borders))
    s.forward_backward([pack], 1024, [2])  # kernels are compiled, pinned memory is taken
    assert s.step(1e-3, 1.0)[1]
    try:
        torch.cuda.set_sync_debug_mode("error")
        total, failure = s._attempt(pack.split(2), 1024, 2)
        torch.cuda.set_sync_debug_mode("default")
        assert failure is None
        losses, failures = s._sum_over_ranks(total)
        assert losses[0] > 0
        assert failures == 0
        torch.cuda.set_sync_debug_mode("error")
        assert s.step(1e-3, 1.0)[1]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_logits_of_a_reference_model() -> None:
    folder = reference("models", "a_gqa")
    ref = np.load(folder / "reference.npz")
    ids, cu = (torch.from_numpy(ref[k]).cuda() for k in ("packed_input_ids", "packed_cu_seqlens"))
    with torch.no_grad():
        exact = load_pretrained(folder, device="cuda")(ids.long(), cu_seqlens=cu)
        assert (exact[ref["packed_logits_rows"]].cpu() - torch.from_numpy(ref["packed_logits"])).abs().max() < 1e-3
        half = load_pretrained(folder, dtype=torch.bfloat16, device="cuda")(ids.long(), cu_seqlens=cu)
        assert (half.float() - exact).abs().max() < 0.3


occupied: list[torch.Tensor] = []


def take_all_memory() -> list[torch.Tensor]:
    """What is free of the caching allocator, which may get no more of the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    held, size = [], 2**30
    while size >= 512:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return held


def test_memory_that_runs_out_ends_with_advice(tiny: Path, tmp_path: Path) -> None:
    """Nothing is free after the first iteration: exit code 2, and what to run instead."""
    limit = "import test_gpu; test_gpu.occupied = test_gpu.take_all_memory()"
    config = with_hook(tiny, tmp_path / "run.py", 1, limit)
    try:
        with pytest.raises(
            ConfigError, match=r"memory ran out in iteration 2 \(.* in use\): CUDA out of memory"
        ) as error:
            main(["train", str(config), "--work-dir", str(tmp_path / "w"), "--cfg-options", "evaluation_inputs=[]"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        occupied.clear()
    assert error.value.exit_code == 2
    assert "model.activation_checkpointing=True --resume auto" in error.value.do


def test_memory_that_runs_out_at_the_first_size_does_not_end_a_run() -> None:
    """The allocator gets 60 % of what a pack needs by arithmetic: the iteration is repeated until that is enough."""
    device, tokens = torch.device("cuda"), 32768
    source = from_scratch(
        activation_checkpointing=True, seed=0, vocab_size=503, hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1e-3))
    s, undisturbed = (ShardedStrategy(source, optim, device) for _ in range(2))

    def pack(documents: int) -> Batch:
        ids, borders = torch.randint(3, 503, (documents * 1024,)), torch.arange(documents + 1).int() * 1024
        positions = torch.arange(1024).repeat(documents)
        return Batch.from_item(
            dict(input_ids=ids, targets=ids.roll(-1), position_ids=positions, cumulative_len=borders)
        )

    one, small = pack(tokens // 1024), pack(4)
    assert s.memory.count_micro_batches(one) == 1
    for each in (s, undisturbed):  # kernels, libraries
        each.forward_backward([small], small.num_targets)
        assert each.step(1e-3, 1.0)[1]
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 0.6 * s.memory.activations.peak_bytes(tokens)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        loss = s.forward_backward([one], one.num_targets, iteration=7)
        norm, applied = s.step(1e-3, 1.0)
        assert logged[0].startswith(
            "iteration 7: memory ran out with micro-batches of up to 32,768 tokens; repeated with "
        )
        assert s.memory.max_tokens is not None
        assert s.memory.max_tokens < 0.8 * tokens
        count = len(logged)
        s.forward_backward([one], one.num_targets, iteration=8)
        assert len(logged) == count  # remembered
    finally:
        logger.removeHandler(handler)
        torch.cuda.set_per_process_memory_fraction(1.0)
    undisturbed.memory = s.memory
    undisturbed.model.keep_activations(s.memory.activations)
    assert loss == pytest.approx(undisturbed.forward_backward([one], one.num_targets), abs=1e-3)
    assert norm == pytest.approx(undisturbed.step(1e-3, 1.0)[0], rel=1e-2)
    assert applied
