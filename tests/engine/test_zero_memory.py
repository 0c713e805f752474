"""What ZeRO is arranged like on GPUs of a size, by arithmetic: nothing here needs one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner.core.errors import ConfigError
from xtuner.dist.mesh import Mesh
from xtuner.engine.zero import deepspeed_config, zero_memory
from xtuner.engine.zero.zero_memory import ZeroMemoryPlan
from xtuner.model import from_scratch
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper

CPU, PACK, FREE = torch.device("cpu"), 32768, int(78.6 * 2**30)
SHAPES = {"1.8B": (2048, 24, 16, 8192), "7B": (4096, 32, 32, 14336)}


def source(name: str, recompute: bool = True) -> ModelSource:
    hidden, layers, heads, ffn = SHAPES[name]
    return from_scratch(
        activation_checkpointing=recompute, vocab_size=92544, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, intermediate_size=ffn,
    )  # fmt: skip


def wrapper(**given: Any) -> OptimWrapper:
    return OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16", **given)


def chosen(
    name: str, stage: int | str, ranks: int, free: int = FREE, recompute: bool = True, **given: Any
) -> ZeroMemoryPlan:
    model, optim = source(name, recompute), wrapper(**given)
    settings = deepspeed_config.prepare_settings(f"deepspeed_zero{stage}", model, optim, CPU, ranks)
    return zero_memory.plan_zero_memory(model, optim, CPU, Mesh(dp_shard=ranks, local_size=ranks), settings, PACK, free)


def test_gradients_are_summed_as_precisely_as_fits() -> None:
    assert [chosen("1.8B", stage, 4).summing for stage in (1, 2, 3)] == ["fp32", "fp32", "deepspeed"]
    assert [chosen("7B", stage, 4).summing for stage in (1, 2, 3)] == ["bf16", "deepspeed", "deepspeed"]
    assert [chosen("7B", stage, 4, recompute=False).summing for stage in (1, 2)] == ["bf16", "deepspeed"]
    assert [chosen("7B", stage, 8).summing for stage in (1, 2)] == ["fp32", "fp32"]
    assert [chosen("7B", stage, 4, int(0.75 * FREE)).summing for stage in (1, 2)] == ["deepspeed", "deepspeed"]
    assert chosen("7B", 2, 4, sums="bf16").summing == "bf16"
    assert chosen("7B", 2, 8, full="weights").summing == "deepspeed"
    assert chosen("7B", 1, 4, sums="fp32").summing == "deepspeed"  # over packs and ranks
    assert chosen("7B", 1, 4, full="all", sums="fp32").summing == "fp32"  # by name, though hardly anything is left


def test_micro_batches_are_of_the_size_that_takes_the_least_time() -> None:
    for stage in (1, 2, 3):
        found = chosen("7B", stage, 4)
        assert found.max_tokens
        assert 4096 <= found.max_tokens < PACK
        assert found.fits(found.max_tokens)
        others = [chosen("7B", stage, 4, micro_batch=most) for most in (PACK, 16896, 11520, 8704, 6144)]
        assert [m.max_tokens for m in others] == [PACK, 16896, 11520, 8704, 6144]
        assert all(found.seconds <= m.seconds for m in others)
        assert found.peak_bytes(PACK) <= FREE
    # what is sent with each micro-batch makes few large ones faster, of which more is recomputed
    once, each, small = (chosen(name, stage, 4).max_tokens or 0 for name, stage in (("7B", 1), ("7B", 3), ("1.8B", 3)))
    assert 0 < once < each < PACK <= small


def test_expected_peaks_are_what_four_gpus_measured() -> None:
    """GiB that the driver counted on four H100 (docs/performance.md), with the room for activations of those runs."""
    for name, stage, room, measured in (
        ("7B", 1, 23.96, 77.95),
        ("7B", 2, 29.30, 78.29),
        ("7B", 3, 34.27, 79.05),
        ("1.8B", 1, 58.57, 58.99),
        ("1.8B", 3, 61.51, 56.13),
    ):
        found = chosen(name, stage, 4)
        if name == "7B":  # memory was nearly used up
            assert (found.activations.room or 0) < (room - 0.3) * 2**30
        ran = replace(found, activations=replace(found.activations, room=int(room * 2**30)))
        assert ran.peak_bytes(PACK) / 2**30 == pytest.approx(measured, rel=0.02)
    # a document longer than a micro-batch keeps more than the micro-batch does
    once = chosen("7B", 1, 4)
    assert once.max_tokens
    assert once.peak_bytes(PACK) > once.peak_bytes(PACK, longest=once.max_tokens - 1) + 2**30
    assert once.peak_bytes(PACK) <= once.state + (once.activations.room or 0) + once.library_bytes


def test_our_own_sharding_is_mentioned_where_it_is_faster() -> None:
    for name, stage, told in (("7B", 3, True), ("7B", 2, True), ("7B", 1, False)):
        four = Mesh(dp_shard=4, local_size=4)
        found = chosen(name, stage, 4)
        text = zero_memory.suggest_own_sharding(found, source(name), wrapper(), CPU, four, "mine", PACK, FREE)
        assert ("--deepspeed mine: without it" in text) == told


def test_sizes_of_buckets_that_the_json_leaves_open(tmp_path: Path) -> None:
    model, path = source("7B"), tmp_path / "ds.json"
    three = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    for zero, expected in (
        (three, {"reduce_bucket_size": 200_000_000, "stage3_prefetch_bucket_size": 218_112_000}),
        ({**three, "stage3_prefetch_bucket_size": 7}, {"stage3_prefetch_bucket_size": 7}),
        ({"stage": 1, "reduce_bucket_size": 9}, {"reduce_bucket_size": 9, "allgather_bucket_size": 200_000_000}),
    ):
        path.write_text(json.dumps({"zero_optimization": zero}))
        found = deepspeed_config.prepare_settings(str(path), model, wrapper(), CPU, 4)
        assert found["zero_optimization"] == zero | found["zero_optimization"] | expected
        assert found["communication_data_type"] == "fp32"
    for stage in (2, 3):
        least, small, large = (
            zero_memory.zero_state_bytes(
                model, wrapper(), CPU, 4, {"zero_optimization": {"stage": stage, "reduce_bucket_size": n}}
            )
            for n in (10**3, 10**6, 10**9)
        )
        assert large - small > 8 * (10**9 - 10**6)
        assert small - least < 8 * (10**6 - 10**3), "embedding and head are sent as a whole in any case"


@pytest.mark.parametrize(
    ("stage", "full", "message"),
    [
        ("3", "all", "ZeRO-3 can do"),
        ("1", "weights", "one of all"),
        ("2", "blocks", "all, weights"),
        ("2_offload", "all", "ZeRO-2 can do with offload"),
    ],
)
def test_what_a_stage_cannot_keep_full(stage: str, full: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        chosen("7B", stage, 4, full=full)
    assert message in str(error.value)


def test_sums_of_micro_batches_that_deepspeed_sends_are_as_named(tmp_path: Path) -> None:
    def sums(stage: str, **given: Any) -> Any:
        settings = deepspeed_config.prepare_settings(stage, source("7B"), wrapper(**given), CPU, 4)
        return settings["data_types"]["grad_accum_dtype"]

    for stage in ("2", "2_offload", "3"):
        full = None if stage == "3" else "weights"
        assert sums(f"deepspeed_zero{stage}", full=full) == "fp32"
        assert sums(f"deepspeed_zero{stage}", full=full, sums="bf16") == "bf16"
    coarse = deepspeed_config.read_settings("deepspeed_zero2") | {"data_types": {"grad_accum_dtype": "bf16"}}
    (tmp_path / "coarse.json").write_text(json.dumps(coarse))
    assert sums(str(tmp_path / "coarse.json"), full="weights") == "bf16"
    with pytest.raises(ConfigError, match="with sums in bf16"):  # those of whole gradients are ours
        sums(str(tmp_path / "coarse.json"), full="all")
