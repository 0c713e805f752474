"""Every strategy trains, saves and resumes what one process does: real processes over gloo, fp32.

Ten iterations with accumulation 2 and clipping; packs have unequal numbers of targets, some none at all.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from safetensors.torch import load_file
from test_ranks import on_ranks

from xtuner.core import dist
from xtuner.core.dist import Ranks
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.data.batch import Batch
from xtuner.engine import choose, zero_config
from xtuner.engine.base import Strategy
from xtuner.engine.optim import OptimWrapper
from xtuner.model.source import ModelSource, from_scratch

ITERATIONS, PACKS, LR, MAX_NORM = 10, 4, 1e-3, 1.0
CPU = torch.device("cpu")
KINDS = {  # name → (ranks, --deepspeed, --fsdp)
    "zero0": (2, "zero0.json", None),
    "zero1": (2, "deepspeed_zero1", None),
    "zero2": (2, "deepspeed_zero2", None),
    "zero2_offload": (2, "deepspeed_zero2_offload", None),
    "zero3": (2, "deepspeed_zero3", None),
    "zero3_offload": (2, "deepspeed_zero3_offload", None),
    "fsdp": (2, None, "full"),
    "fsdp_hybrid": (4, None, "hybrid"),
}


def source() -> ModelSource:
    """An odd vocabulary and kv rows, so that nothing divides evenly over ranks."""
    return from_scratch(
        activation_checkpointing=True,
        seed=0,
        vocab_size=401,
        hidden_size=64,
        intermediate_size=120,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )


def packs() -> list[Batch]:
    """Of all iterations and ranks; each third has few targets, each fifth none."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for i in range(PACKS * ITERATIONS):
        ids = torch.randint(3, 401, (64,), generator=draw)
        targets = ids.roll(-1)
        targets[-1] = -100
        targets[10:60] = -100 if i % 3 == 1 else targets[10:60]
        targets[:] = -100 if i % 5 == 3 else targets
        borders = torch.tensor([0, 20, 64], dtype=torch.int32)
        positions = torch.cat((torch.arange(20), torch.arange(44)))
        found.append(Batch.of(dict(input_ids=ids, targets=targets, position_ids=positions, cumulative_len=borders), i))
    return found


def make(kind: str, folder: Path, ranks: int) -> Strategy:
    _, zero, fsdp = KINDS.get(kind, (1, None, None))
    if zero == "zero0.json":
        settings = {**zero_config.read("deepspeed_zero1"), "zero_optimization": {"stage": 0}}
        zero = str(folder / "zero0.json")
        Path(zero).write_text(json.dumps(settings))
    if kind == "zero3":  # else every weight of so small a model stays whole
        settings = zero_config.read(zero)
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1000}
        zero = str(folder / "zero3.json")
        Path(zero).write_text(json.dumps(settings))
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=MAX_NORM), PACKS // ranks)
    return choose.strategy(source(), optim, CPU, zero, fsdp)


def go(strategy: Strategy, iterations: range) -> Iterator[tuple[float, float, bool]]:
    everything, rank, ranks = packs(), dist.rank(), dist.world_size()
    for n in iterations:
        these = everything[PACKS * n : PACKS * (n + 1)]
        loss = strategy.forward_backward(these[rank::ranks], sum(p.num_targets for p in these))
        yield (loss, *strategy.step(LR, MAX_NORM))


def written(strategy: Strategy, folder: Path) -> Path:
    strategy.snapshot(optimizer=True).write(folder)
    dist.ALL.gather(None)
    return folder


def same(a: Path, b: Path, tolerance: float) -> None:
    first, second = (load_file(f / "weights" / "model.safetensors") for f in (a, b))
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: its losses, norms and checkpoints after 5 and 10 iterations."""
    folder = tmp_path_factory.mktemp("alone")
    strategy = make("single", folder, 1)
    lines = list(go(strategy, range(5)))
    written(strategy, folder / "half")
    lines += list(go(strategy, range(5, ITERATIONS)))
    written(strategy, folder / "end")
    (folder / "lines.json").write_text(json.dumps(lines))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_equals_one_process(kind: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json.loads((alone / "lines.json").read_text())
    ranks = KINDS[kind][0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def trained(_: Ranks, folder: Path) -> None:
        strategy = make(kind, folder, ranks)
        lines = list(go(strategy, range(5)))
        half = written(strategy, folder / "half")
        lines += go(strategy, range(5, ITERATIONS))
        for (loss, norm, applied), (true_loss, true_norm, _) in zip(lines, expected, strict=True):
            assert applied
            assert abs(loss - true_loss) < 1e-5
            assert abs(norm - true_norm) < 1e-5 * true_norm
        end = written(strategy, folder / "end")
        same(end, alone / "end", 1e-5)
        strategy.load(half)  # resumed: bit for bit what went on
        again = list(go(strategy, range(5, ITERATIONS)))
        assert again == lines[5:]
        same(written(strategy, folder / "resumed"), end, 0.0)
        strategy.load(alone / "half")  # begun by one process
        for (loss, norm, _), (true_loss, true_norm, _) in zip(go(strategy, range(5, 10)), expected[5:], strict=True):
            assert abs(loss - true_loss) < 1e-5
            assert abs(norm - true_norm) < 1e-5 * true_norm
        assert strategy.forward_backward(packs()[:1], 0) == 0.0  # nobody has a target: nothing changes
        assert strategy.step(LR, MAX_NORM)[1] is False
        same(written(strategy, folder / "after"), written(strategy, folder / "before"), 0.0)

    assert on_ranks(ranks, trained, tmp_path) == [0] * ranks
    files = sorted(p.name for p in (tmp_path / "end" / "optimizer").iterdir())
    parts = {"zero0": 1}.get(kind, 2)  # hybrid: one copy of two
    assert files == [f"rank_{r:05d}.safetensors" for r in range(parts)]
    strategy = make("single", tmp_path, 1)  # and one process goes on with what the ranks have saved
    strategy.load(tmp_path / "half")
    for (loss, _, _), (true_loss, _, _) in zip(go(strategy, range(5, 10)), expected[5:], strict=True):
        assert abs(loss - true_loss) < 1e-5


def test_any_number_of_ranks_and_any_strategy(alone: Path, tmp_path: Path) -> None:
    """2 ranks of ZeRO-3 → 4 of FSDP → 1; every step goes on as one process would."""
    expected = json.loads((alone / "lines.json").read_text())

    def on_two(_: Ranks, folder: Path) -> None:
        strategy = make("zero3", folder, 2)
        list(go(strategy, range(3)))
        written(strategy, folder.parent / "three")

    def on_four(_: Ranks, folder: Path) -> None:
        strategy = make("fsdp", folder, 4)
        strategy.load(folder.parent / "three")
        for line, true in zip(go(strategy, range(3, 5)), expected[3:5], strict=True):
            assert abs(line[0] - true[0]) < 1e-5
        written(strategy, folder.parent / "five")

    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]
    assert on_ranks(4, on_four, tmp_path / "four") == [0] * 4
    strategy = make("single", tmp_path, 1)
    strategy.load(tmp_path / "five")
    for line, true in zip(go(strategy, range(5, 10)), expected[5:], strict=True):
        assert abs(line[0] - true[0]) < 1e-5
    gone = sorted((tmp_path / "three" / "optimizer").iterdir())[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=r"elements of the optimizer state .* are missing"):
        strategy.load(tmp_path / "three")


def test_a_nan_on_one_rank_is_applied_on_none(tmp_path: Path) -> None:
    def poisoned(_: Ranks, folder: Path) -> None:
        for kind in ("zero1", "zero2", "zero3", "fsdp"):
            strategy = make(kind, folder, 2)
            list(go(strategy, range(2)))
            before = written(strategy, folder / f"{kind}_before")
            block = strategy.model.model.layers[1]
            hook = None
            if dist.rank() == 1:
                hook = block.register_forward_hook(lambda module, args, out: out * float("nan"))
            ((loss, _, applied),) = go(strategy, range(2, 3))
            assert loss != loss
            assert not applied
            if hook:
                hook.remove()
            same(written(strategy, folder / f"{kind}_after"), before, 0.0)
            ((loss, _, applied),) = go(strategy, range(2, 3))  # and it goes on
            assert loss == loss
            assert applied

    assert on_ranks(2, poisoned, tmp_path) == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8 .* by the config it is 2"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5 .* it is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True .* it is False"),
        ({"train_batch_size": 5}, "train_batch_size is 5 .* it is 4"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"optimizer": {"type": "Adam"}}, "section 'optimizer'"),
        ({"zero_optimisation": {}}, "no setting 'zero_optimisation'. Did you mean 'zero_optimization'"),
        ({"communication_data_type": "auto", "bf16": {"enabled": "auto"}, "seed": "auto"}, "no setting of the config"),
    ],
)
def test_settings_that_contradict_the_config(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**zero_config.read("deepspeed_zero2"), **change}))
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=1.0), 2)
    with pytest.raises(ConfigError, match=message):
        zero_config.resolve(zero_config.read(str(path)), optim, CPU, 2, str(path))
    with pytest.raises(ConfigError, match="Did you mean 'deepspeed_zero1'"):
        zero_config.read("deepspeed_zero_1")
