"""A network with all that InternLM2 lacks, however it is sharded: one process, our own sharding, ZeRO; gloo, fp32."""

from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, before processes are forked
import pytest
import torch
from helpers.models import CPU, LR, MAX_NORM, PACKS, save_snapshot, sharded_strategy, train_iterations
from helpers.ranks import on_ranks
from safetensors.torch import load_file

from xtuner.dist import collectives
from xtuner.dist.collectives import Ranks
from xtuner.engine.memory import DIVISIONS
from xtuner.engine.strategies import select
from xtuner.families import read_model
from xtuner.families.network import DecoderConfig, RopeScaling
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper

NETWORK = DecoderConfig(
    vocab_size=401, hidden_size=48, intermediate_size=72, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=16), max_position_embeddings=128,
    qkv_bias=True, mlp_bias=True, qk_norm=True, tie_word_embeddings=True,
)  # fmt: skip
TOLERANCE, IDS = 1e-5, torch.arange(30)


def source(keep: bool = False) -> ModelSource:
    return ModelSource(NETWORK, None, seed=0, recompute=not keep)


def zero_strategy(name: str) -> Any:
    ranks = collectives.ALL.size
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=MAX_NORM), PACKS // ranks)
    return select.build_strategy(select.choose_strategy(source(), optim, CPU, name, None), source(), optim, CPU)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / "model.safetensors")


@pytest.mark.processes
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Losses, norms and weights; a checkpoint of one process resumes under all others, and has the tied weight once."""
    alone = sharded_strategy(model=source(keep=True))
    lines = [*train_iterations(alone, range(2))]
    save_snapshot(alone, tmp_path / "half")
    lines += train_iterations(alone, range(2, 4))
    save_snapshot(alone, tmp_path / "end")
    expected = weights(tmp_path / "end")
    with torch.no_grad():
        logits = alone.model(IDS)
    assert "output.weight" not in expected
    assert read_model(tmp_path / "half" / "weights")[1] == NETWORK
    resumed = sharded_strategy(model=source())
    resumed.load(tmp_path / "half")
    assert [*train_iterations(resumed, range(2, 4))] == lines[2:]

    def trained(_: Ranks, folder: Path) -> None:
        def check(strategy: Any, name: str) -> None:
            found = [*train_iterations(strategy, range(2))]
            if name in ("blocks", "deepspeed_zero3"):  # from another engine
                strategy.load(tmp_path / "half")
            found += train_iterations(strategy, range(2, 4))
            for (loss, norm, applied), (true_loss, true_norm, _) in zip(found, lines, strict=True):
                assert applied, name
                assert abs(loss - true_loss) < TOLERANCE, name
                assert abs(norm - true_norm) < TOLERANCE * true_norm, name
            end = weights(save_snapshot(strategy, folder / name))
            assert end.keys() == expected.keys()
            with torch.no_grad():
                assert (strategy.model(IDS) - logits).abs().max() < TOLERANCE, name
            for n, value in expected.items():
                assert (value - end[n]).abs().max() <= TOLERANCE, (name, n)

        for name, division in DIVISIONS.items():
            check(sharded_strategy(model=source(), division=division), name)
        for name in ("deepspeed_zero1", "deepspeed_zero2_offload", "deepspeed_zero3"):
            check(zero_strategy(name), name)

    assert on_ranks(2, trained, tmp_path / "ranks") == [0, 0]
