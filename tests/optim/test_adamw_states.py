"""AdamW's forms of state: what is rounded is right in the mean, split loses nothing, all learn and resume exactly."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import CPU, LR, odd_model, train_iterations, uneven_packs

from xtuner.core.errors import ConfigError
from xtuner.data.loading.batch import Batch
from xtuner.engine import memory
from xtuner.engine.strategies import select
from xtuner.engine.strategies.local_optimizer import OwnAdamW
from xtuner.engine.strategies.sharded_strategy import ShardedStrategy
from xtuner.model import from_scratch
from xtuner.model.activation_memory import KEEP_ORDER, ActivationPlan, transient_bytes
from xtuner.model.ops.autograd_functions import KeepPolicy
from xtuner.optim import adamw
from xtuner.optim.adamw import FORMS, Rates
from xtuner.optim.optim_wrapper import OptimWrapper


def strategy(states: str) -> ShardedStrategy:
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=1.0), 4, states=states)
    return ShardedStrategy(odd_model(), optim, CPU)


def masters(s: ShardedStrategy) -> dict[str, torch.Tensor]:
    return {n: shard.master.read().clone() for n, shard in s._shards().items()}


def test_random_rounding_is_right_in_the_mean() -> None:
    """Over many draws the mean of what is kept comes to what was to be kept, for weights and 8-bit moments."""
    n, draws = 512, 4000
    values = torch.randn(n).abs() ** 4 + 1e-4  # four orders of magnitude
    weight = torch.nn.Parameter(torch.zeros(n))
    sums = {key: torch.zeros(n, dtype=torch.float64) for key in ("weight", "exp_avg", "exp_avg_sq")}
    state = adamw.new_state(weight, FORMS["8bit"])
    for seed in range(draws):
        adamw.write_master(weight, state, FORMS["8bit"], values, seed)
        bits = adamw.random_bits(n, seed, CPU)
        adamw._encode(state, "exp_avg", -values, bits >> 16 & 0xFF)
        adamw._encode(state, "exp_avg_sq", values, bits >> 24)
        sums["weight"] += weight.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            sums[key] += adamw._decode(state, key)
    assert weight.detach().equal(weight.detach().bfloat16().float())
    for key, bound in (("weight", 1e-3), ("exp_avg", 0.02), ("exp_avg_sq", 0.02)):
        error = (sums[key].abs() / draws - values).abs()
        scale = values if key == "weight" else values.view(2, 256).amax(1).repeat_interleave(256)
        assert (error <= bound * (values if key == "weight" else (values * scale).sqrt())).all(), key
    adamw._encode(state, "exp_avg_sq", torch.where(values > 1e-3, values, 1e-30), bits >> 24)
    assert (state["exp_avg_sq"] > 0).all()  # a second moment of 0 would make the next step enormous


def test_small_steps_are_not_lost() -> None:
    """A thousandth of bf16's spacing a step: rounded to the nearest, nothing would ever move."""
    weight, form = torch.nn.Parameter(torch.ones(4096)), FORMS["bf16"]
    state = adamw.new_state(weight, form)
    adamw.write_master(weight, state, form, torch.ones(4096))
    for step in range(1, 101):
        rates = Rates(4e-6, 0.9, 0.95, 1e-8, 0.0, step, torch.tensor(1.0))
        adamw.update("w", weight, torch.ones(4096).bfloat16(), state, form, rates)
    assert weight.mean().item() == pytest.approx(1 - 4e-4, abs=1e-4)


def test_every_form_learns_and_resumes(tmp_path: Path) -> None:
    """Split has the fp32 masters bit for bit; the leaner ones stay near; all go on from a checkpoint bit for bit."""
    lines = {}
    for states in FORMS:
        whole = strategy(states)
        if states == "fp32":  # as on a GPU; on CPUs it is PyTorch's own
            rows = {n: p.rows for n, p in whole._divided.parameters.items()}
            whole._optimizer = OwnAdamW(rows, OptimWrapper(dict(type=torch.optim.AdamW, lr=LR)), FORMS["fp32"])
            odd_model().fill_weights({n: s.master for n, s in whole._shards().items()}, whole._shapes, CPU)
        lines[states] = list(train_iterations(whole, range(5)))
        whole.snapshot(optimizer=True).write(tmp_path / states)
        if states != "fp32":
            again = strategy(states)
            again.load(tmp_path / states)
            assert masters(again).keys() == masters(whole).keys()
            assert all(m.equal(masters(again)[n]) for n, m in masters(whole).items())
            assert list(train_iterations(again, range(5, 8))) == list(train_iterations(whole, range(5, 8)))
            assert all(m.equal(masters(again)[n]) for n, m in masters(whole).items())
    torch_lines = list(train_iterations(strategy("fp32"), range(5)))
    for states, tolerance in (("fp32", 1e-5), ("split", 5e-3), ("bf16", 2e-2), ("8bit", 2e-2)):
        for (loss, norm, applied), (true_loss, true_norm, _) in zip(lines[states], torch_lines, strict=True):
            assert applied
            assert abs(loss - true_loss) < tolerance, states
            assert abs(norm - true_norm) < 10 * tolerance * true_norm, states


def test_split_is_the_fp32_master() -> None:
    draw = torch.Generator().manual_seed(0)
    start, weights, states = torch.randn(1000, generator=draw), [], []
    for name in ("fp32", "split"):
        weights.append(torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)))
        states.append(adamw.new_state(weights[-1], FORMS[name]))
        adamw.write_master(weights[-1], states[-1], FORMS[name], start)
    for step in range(1, 20):
        gradient = torch.randn(1000, generator=draw)
        for name, weight, state in zip(("fp32", "split"), weights, states, strict=True):
            adamw.update(
                "w", weight, gradient, state, FORMS[name], Rates(1e-3, 0.9, 0.95, 1e-8, 0.1, step, torch.ones(()))
            )
    fp32, split = (
        adamw.read_master(w, s, FORMS[n]) for n, w, s in zip(("fp32", "split"), weights, states, strict=True)
    )
    assert fp32.equal(split)
    assert not fp32.equal(start)


def test_forms_that_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"not one of fp32, split, bf16, 8bit. Did you mean '8bit'"):
        OptimWrapper(dict(type=torch.optim.AdamW, lr=1), states="8bits")
    with pytest.raises(ConfigError, match=r'"8bit" needs AdamW, not .*SGD'):
        OptimWrapper(dict(type=torch.optim.SGD, lr=1), states="8bit")
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), states="8bit")
    with pytest.raises(ConfigError, match="is not supported with DeepSpeed"):
        select.choose_strategy(odd_model(), optim, CPU, "deepspeed_zero1", None)


def test_a_state_that_does_not_fit_is_told_with_what_would() -> None:
    shape = dict(vocab_size=92544, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    seven = from_scratch(**shape, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768)
    error = memory.too_large_error(seven, 18 * 7737708544, 79 * 2**30)
    assert error.what.startswith("weights, gradients and optimizer state need 129.71 GiB, and the GPU has 79.00 GiB")
    assert 'states = "bf16" (57.65 GiB on one GPU); or 2 or more such GPUs with --deepspeed deepspeed_zero3' in error.do
    assert error.exit_code == 2


@pytest.mark.parametrize("most", [1, 19, 20, 44, 63, 64, 1000])
def test_a_pack_in_parts(most: int) -> None:
    """Parts hold each fragment once, are no longer than requested or one fragment, and as few as they can be."""
    lengths = [20, 0, 3, 41, 0, 17, 44]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    T = sum(lengths)
    ids, positions = torch.arange(T) + 3, torch.cat([torch.arange(n) for n in lengths])
    targets = torch.where(torch.arange(T) % 3 > 0, ids, -100)
    pack = Batch.from_item(dict(input_ids=ids, targets=targets, position_ids=positions, cumulative_len=borders), 7)
    parts = pack.split(pack.num_parts(most))
    fragments = []
    for p in parts:
        sizes = p.cu_seqlens.diff().tolist()
        fragments += list(zip(*(t.split(sizes) for t in (p.input_ids, p.targets, p.position_ids)), strict=True))
        assert p.pack == 7
        assert p.num_tokens <= most or p.max_seqlen == p.num_tokens
        assert p.max_seqlen == max(sizes)
        assert p.num_targets == (p.targets != -100).sum()
        assert p.input_ids.equal(p.input_ids.sort().values)  # in a part, the pack's order
    fragments = sorted((f for f in fragments if len(f[0])), key=lambda f: int(f[0][0]))
    for i, key in enumerate(("input_ids", "targets", "position_ids")):
        assert torch.cat([f[i] for f in fragments]).equal(getattr(pack, key))
    assert [len(f[0]) for f in fragments] == [n for n in lengths if n]
    assert sum(p.num_targets for p in parts) == pack.num_targets
    assert sum(p.attention_pairs for p in parts) == pack.attention_pairs
    expected = {1: [44, 41, 20, 17, 3], 20: [44, 41, 20, 20], 44: [44, 41, 40], 64: [64, 61]}
    expected |= {19: expected[1], 63: expected[44]}
    if most >= T:
        assert parts == [pack]
    else:
        assert [p.num_tokens for p in parts] == expected[most]
    more = pack.split(9)  # than there are fragments: the last parts say nothing
    assert sum(p.num_targets for p in more) == pack.num_targets
    assert torch.cat([p.input_ids for p in more if p.num_targets]).sort().values.tolist() == ids.tolist()
    assert [p.num_targets for p in more[-4:]] == [0] * 4  # nor do empty documents make one
    assert (more[-1].targets == -100).all()
    assert all(p.num_tokens == p.max_seqlen == 16 for p in more[-4:])
    assert len(more) == 9


def test_parts_are_about_equal() -> None:
    """Of 32k tokens in documents of usual lengths; as few as there can be, the most attention first."""
    draw = np.random.RandomState(0)
    for count in (3, 4, 5):
        lengths = []
        while (left := 32768 - sum(lengths)) > 0:
            lengths.append(min(int(draw.lognormal(np.log(500), 0.8)) + 1, left))
        draw.shuffle(lengths)
        borders = torch.tensor([0, *lengths]).cumsum(0).int()
        ids = torch.arange(32768)
        pack = Batch.from_item(dict(input_ids=ids, targets=ids, position_ids=ids, cumulative_len=borders))
        parts = pack.split(count)
        sizes, pairs = [p.num_tokens for p in parts], [p.attention_pairs for p in parts]
        assert max(sizes) - min(sizes) <= 16
        assert pairs == sorted(pairs, reverse=True)
        assert pack.num_parts(max(sizes)) == count


def test_parts_and_what_is_kept_change_no_gradient() -> None:
    """Whole packs against parts, for every choice of what blocks keep."""
    these = uneven_packs()[:4]
    targets = sum(p.num_targets for p in these)
    whole = strategy("fp32")
    loss = whole.forward_backward(these, targets)
    for keep in [
        KeepPolicy(False, False, False, False),
        *(KeepPolicy(True, *kept) for kept in product((False, True), repeat=3)),
    ]:
        other = strategy("fp32")
        other.model.keep_activations(SimpleNamespace(choose_kept=lambda tokens, keep=keep: [keep] * 2))
        parts = [part for pack in these for part in pack.split(pack.num_parts(44))]
        assert len(parts) == 8
        assert other.forward_backward(parts, targets) == pytest.approx(loss, abs=1e-6)
        for name, gradient in whole.gradients.items():
            assert (other.gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), (name, keep)


def test_plans_fit_their_room() -> None:
    c = odd_model().config
    assert ActivationPlan(c, 4).keeps_everything(10**6)
    assert ActivationPlan(c, 4, 0).choose_kept(64) == [KeepPolicy(False, False, False, False)] * 2
    before = [0] * 4
    for room in range(0, 2**22, 2**15):
        plan = ActivationPlan(c, 4, room)
        keeps = plan.choose_kept(256)
        kept = [sum(getattr(k, name) for k in keeps) for name in KEEP_ORDER]
        assert kept >= before  # more room never keeps less of what comes first
        assert kept == sorted(kept, reverse=True)
        before = kept
        if kept[0]:
            assert plan.peak_bytes(256) <= room
        largest = plan.largest_micro_batch(4096)
        assert not largest or plan.keeps_everything(largest)
        assert largest == 4096 or not plan.keeps_everything(largest + 256)
        if largest:
            assert plan.peak_bytes(largest) <= room
    assert before == [2] * 4
    assert transient_bytes(c, 4, 512) > transient_bytes(c, 4, 256)
