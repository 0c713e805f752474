"""Every strategy trains, saves and resumes what one process does: real processes over gloo, fp32.

Ten iterations with accumulation 2 and clipping; packs have unequal numbers of targets, some none at all.
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed  # once, before processes are forked
import pytest
import torch
from helpers.corpus import write_corpus
from helpers.models import (
    CPU,
    ITERATIONS,
    LR,
    MAX_NORM,
    PACKS,
    large_model,
    odd_model,
    save_snapshot,
    train_iterations,
    uneven_packs,
)
from helpers.ranks import on_ranks
from safetensors.torch import load_file, save_file

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.data import load_intern_repo_tokenized_dataset
from xtuner.dist import collectives
from xtuner.dist.collectives import Ranks
from xtuner.engine.base import Strategy
from xtuner.engine.strategies import select
from xtuner.engine.zero import deepspeed_config, supported_settings
from xtuner.families import INTERNLM2
from xtuner.model.generate import generate
from xtuner.model.ops.matmul import MatmulKind
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.train import evaluate

KINDS = {  # name → (ranks, --deepspeed, --fsdp)
    "zero0": (2, "zero0.json", None),
    "zero1": (2, "deepspeed_zero1", None),
    "zero2": (2, "deepspeed_zero2", None),
    "zero2_offload": (2, "deepspeed_zero2_offload", None),
    "zero3": (2, "deepspeed_zero3", None),
    "zero3_offload": (2, "deepspeed_zero3_offload", None),
    "zero2_other": (2, "deepspeed_zero2", None),
    "zero3_other": (2, "deepspeed_zero3", None),
    "fsdp": (2, None, "full"),
    "fsdp_hybrid": (4, None, "hybrid"),
}


OTHER = {  # name → zero_optimization otherwise than shipped
    "zero1": {"reduce_bucket_size": 999},  # a bucket is a part of a parameter
    "zero3": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1000},  # else nothing is cut
    "zero2_other": {
        "contiguous_gradients": False, "overlap_comm": False, "reduce_scatter": False, "parameter_alignment": True,
        "allgather_partitions": False, "use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000, "ignore_unused_parameters": False,
    },
    "zero3_offload": {  # parameters are gathered and sent one by one, and a block is prefetched
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 10_000, "reduce_bucket_size": 1,
        "stage3_allgather_sequential": True, "stage3_prefetch_bucket_size": 3000,
    },
    "zero3_other": {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1000, "contiguous_gradients": False,
        "overlap_comm": False, "reduce_scatter": False, "stage3_use_all_reduce_for_fetch_params": True,
        "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "sub_group_size": 5000,
        "memory_efficient_linear": False, "stage3_module_granularity_threshold": 1000, "enable_sanity_checks": True,
        "offload_optimizer": {"device": "cpu", "fast_init": True}, "stage3_model_persistence_threshold": 0,
    },
}  # fmt: skip


def make(kind: str, folder: Path, ranks: int, products: MatmulKind = "own") -> Strategy:
    _, zero, fsdp = KINDS.get(kind, (1, None, None))
    if zero == "zero0.json":
        settings = {**deepspeed_config.read_settings("deepspeed_zero1"), "zero_optimization": {"stage": 0}}
        zero = str(folder / f"zero0_{collectives.rank()}.json")  # each rank its own: another may read it half written
        Path(zero).write_text(json.dumps(settings))
    if kind in OTHER:
        settings = deepspeed_config.read_settings(zero)
        settings["zero_optimization"] |= OTHER[kind]
        zero = str(folder / f"{kind}_{collectives.rank()}.json")
        Path(zero).write_text(json.dumps(settings))
    full = "weights" if kind == "zero2_other" else None  # DeepSpeed's own reduction
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=MAX_NORM), PACKS // ranks, full=full)
    model = odd_model(products)
    strategy: Any = select.build_strategy(select.choose_strategy(model, optim, CPU, zero, fsdp), model, optim, CPU)
    if size := OTHER.get(kind, {}).get("stage3_prefetch_bucket_size"):
        assert strategy._zero.prefetch_elements == size
    if (
        kind in ("fsdp_hybrid", "zero1", "zero2_other", "zero3") and collectives.rank() % 2
    ):  # these cut packs in two: the others have to follow
        strategy.memory = replace(strategy.memory, max_tokens=44)
    return strategy


def same(a: Path, b: Path, tolerance: float) -> None:
    first, second = (load_file(f / "weights" / "model.safetensors") for f in (a, b))
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: its losses, norms and checkpoints after 5 and 10 iterations."""
    folder = tmp_path_factory.mktemp("alone")
    strategy = make("single", folder, 1)
    lines = list(train_iterations(strategy, range(5)))
    save_snapshot(strategy, folder / "half")
    lines += list(train_iterations(strategy, range(5, ITERATIONS)))
    save_snapshot(strategy, folder / "end")
    (folder / "lines.json").write_text(json.dumps(lines))
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_equals_one_process(kind: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json.loads((alone / "lines.json").read_text())
    ranks = KINDS[kind][0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def trained(_: Ranks, folder: Path) -> None:
        strategy = make(kind, folder, ranks)
        lines = list(train_iterations(strategy, range(5)))
        half = save_snapshot(strategy, folder / "half")
        lines += train_iterations(strategy, range(5, ITERATIONS))
        for (loss, norm, applied), (true_loss, true_norm, _) in zip(lines, expected, strict=True):
            assert applied
            assert abs(loss - true_loss) < 1e-5
            assert abs(norm - true_norm) < 1e-5 * true_norm
        end = save_snapshot(strategy, folder / "end")
        same(end, alone / "end", 1e-5)
        strategy.snapshot(optimizer=False).write(folder / "light")
        collectives.ALL.gather(None)
        same(folder / "light", end, 0.0)
        assert not (folder / "light" / "optimizer").exists()
        strategy.load(half)  # resumed: bit for bit what went on
        again = list(train_iterations(strategy, range(5, ITERATIONS)))
        assert again == lines[5:]
        same(save_snapshot(strategy, folder / "resumed"), end, 0.0)
        strategy.load(alone / "half")  # begun by one process
        for (loss, norm, _), (true_loss, true_norm, _) in zip(
            train_iterations(strategy, range(5, 10)), expected[5:], strict=True
        ):
            assert abs(loss - true_loss) < 1e-5
            assert abs(norm - true_norm) < 1e-5 * true_norm
        assert strategy.forward_backward(uneven_packs()[:1], 0) == 0.0  # nobody has a target: nothing changes
        assert strategy.step(LR, MAX_NORM)[1] is False
        same(save_snapshot(strategy, folder / "after"), save_snapshot(strategy, folder / "before"), 0.0)

    assert on_ranks(ranks, trained, tmp_path) == [0] * ranks
    files = sorted(p.name for p in (tmp_path / "end" / "optimizer").iterdir())
    parts = {"zero0": 1}.get(kind, 2)  # hybrid: one copy of two
    assert files == [f"rank_{r:05d}.safetensors" for r in range(parts)]
    strategy = make("single", tmp_path, 1)  # and one process goes on with what the ranks have saved
    strategy.load(tmp_path / "half")
    for (loss, _, _), (true_loss, _, _) in zip(train_iterations(strategy, range(5, 10)), expected[5:], strict=True):
        assert abs(loss - true_loss) < 1e-5


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "products"), [("zero2", "fp8"), ("zero3", "fp8"), ("fsdp", "fp8"), ("fsdp", "fp8_full")]
)
def test_engines_multiply_in_fp8_as_one_process_does(kind: str, products: str, tmp_path: Path) -> None:
    """One iteration; after it, weights that differ in their last bits are rounded to other numbers of 8 bits. fp8_full
    has scales of micro-batches, which must be those of one process."""
    ((expected, norm, _),) = train_iterations(make("single", tmp_path, 1, products), range(1))

    def trained(_: Ranks, folder: Path) -> None:
        ((loss, their_norm, applied),) = train_iterations(make(kind, folder, 2, products), range(1))
        assert applied
        assert abs(loss - expected) < 1e-5
        assert abs(their_norm - norm) < 1e-5 * norm

    assert on_ranks(2, trained, tmp_path) == [0, 0]


@pytest.mark.processes
def test_any_number_of_ranks_and_any_strategy(alone: Path, tmp_path: Path) -> None:
    """2 ranks of ZeRO-3 → 4 of FSDP → 1; every step goes on as one process would."""
    expected = json.loads((alone / "lines.json").read_text())

    def on_two(_: Ranks, folder: Path) -> None:
        strategy = make("zero3", folder, 2)
        list(train_iterations(strategy, range(3)))
        save_snapshot(strategy, folder.parent / "three")

    def on_four(_: Ranks, folder: Path) -> None:
        strategy = make("fsdp", folder, 4)
        strategy.load(folder.parent / "three")
        for line, true in zip(train_iterations(strategy, range(3, 5)), expected[3:5], strict=True):
            assert abs(line[0] - true[0]) < 1e-5
        save_snapshot(strategy, folder.parent / "five")

    assert on_ranks(2, on_two, tmp_path / "two") == [0, 0]
    assert on_ranks(4, on_four, tmp_path / "four") == [0] * 4
    strategy = make("single", tmp_path, 1)
    strategy.load(tmp_path / "five")
    for line, true in zip(train_iterations(strategy, range(5, 10)), expected[5:], strict=True):
        assert abs(line[0] - true[0]) < 1e-5
    gone = sorted((tmp_path / "three" / "optimizer").iterdir())[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=r"elements of the optimizer state .* are missing"):
        strategy.load(tmp_path / "three")


@pytest.mark.processes
def test_a_nan_on_one_rank_is_applied_on_none(tmp_path: Path) -> None:
    def poisoned(_: Ranks, folder: Path) -> None:
        for kind in ("zero1", "zero2", "zero2_other", "zero3", "fsdp"):
            strategy = make(kind, folder, 2)
            list(train_iterations(strategy, range(2)))
            before = save_snapshot(strategy, folder / f"{kind}_before")
            block = strategy.model.model.layers[1]
            hook = None
            if collectives.rank() == 1:  # in the first micro-batch alone
                once = itertools.chain([float("nan")], itertools.repeat(1.0))
                hook = block.register_forward_hook(lambda module, args, out, once=once: out * next(once))
            ((loss, _, applied),) = train_iterations(strategy, range(2, 3))
            assert loss != loss
            assert not applied
            if hook:
                hook.remove()
            same(save_snapshot(strategy, folder / f"{kind}_after"), before, 0.0)
            ((loss, _, applied),) = train_iterations(strategy, range(2, 3))  # and it continues
            assert loss == loss
            assert applied

    assert on_ranks(2, poisoned, tmp_path) == [0, 0]


@pytest.mark.processes
def test_ranks_share_validation_and_give_one_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process: the loss, in as many passes on each of three ranks; and a reply, though their logits differ."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 64)
    held_out = load_intern_repo_tokenized_dataset(str(write_corpus(tmp_path / "held_out", 7)))
    few = load_intern_repo_tokenized_dataset(str(write_corpus(tmp_path / "few", 1, types=("en",))))  # 2 of 3 ranks
    passes: list[int] = []
    one_pass = evaluate._loss
    monkeypatch.setattr(evaluate, "_loss", lambda *words: passes.append(len(words[1])) or one_pass(*words))
    model = make("single", tmp_path, 1).model
    expected = [evaluate.evaluate(model, documents, 24, quiet=True) for documents in (held_out, few)]
    groups, parts = len(passes), sum(passes)
    reply = list(generate(model, [1, 7, 9], 12))

    def together(ranks: Ranks, folder: Path) -> None:
        for kind in ("zero3", "fsdp"):
            passes.clear()
            model = make(kind, folder, 3).model
            found = [evaluate.evaluate(model, documents, 24, quiet=True) for documents in (held_out, few)]
            shares = ranks.gather([len(passes), sum(passes), repr(found)])
            assert len({(count, text) for count, _, text in shares}) == 1
            assert groups <= 3 * len(passes) < groups + 6
            assert sum(share for _, share, _ in shares) == parts + 3 * len(passes) - groups  # and the empty passes
            for mine, true in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
                assert (mine.name, mine.tokens) == (true.name, true.tokens)
                assert mine.loss == pytest.approx(true.loss, rel=1e-6)
            if ranks.rank == 1:  # alone, it would say other tokens
                model.output.register_forward_hook(lambda module, args, out: out.roll(1, -1))
            stops = [reply[0] + 1] if ranks.rank == 1 else []  # and stop at once
            assert list(generate(model, [1, 7, 9], 12, stops, agree=ranks.broadcast_int)) == reply

    assert on_ranks(3, together, tmp_path / "ranks") == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8 .* by the config it is 2"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5 .* it is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True .* it is False"),
        ({"train_micro_batch_size_per_gpu": 3}, "is 3 .* it is 1\n.*_gpu\n.*one pack at a time\n.*in the JSON$"),
        ({"train_batch_size": 5}, "train_batch_size is 5 .* it is 4"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"optimizer": {"type": "Adam"}}, "section 'optimizer'"),
        ({"zero_optimisation": {}}, "no setting 'zero_optimisation'. Did you mean 'zero_optimization'"),
        *[
            ({"zero_optimization": {"stage": 2, **zero}}, message)
            for zero, message in (
                ({"overlap_com": True}, "no setting 'zero_optimization.overlap_com'. Did you mean 'overlap_comm'"),
                ({"stage": 7}, "zero_optimization.stage = 7: Input should be 0, 1, 2 or 3\n"),
                ({"stage": "two"}, 'zero_optimization.stage = "two": '),
                ({"offload_optimizer": {"devise": "cpu"}}, "no setting 'zero_optimization.offload_optimizer.devise'"),
                ({"offload_optimizer": {"device": "nvme"}}, "offload to NVMe is not supported"),
                ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio = 0.5 is not"),
                ({"offload_param": {"device": "cpu"}}, "offload_param needs stage 3"),
                ({"round_robin_gradients": True}, "round_robin_gradients = true is not supported"),
                ({"mics_shard_size": 2}, "mics_shard_size = 2 is not supported"),
                ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size = 2 is not supported"),
                ({"zero_quantized_gradients": True}, "zero_quantized_gradients = true is not supported"),
                ({"compute_grad_norm": False}, "compute_grad_norm = false is not supported"),
                ({"cpu_offload": True}, "cpu_offload = true is not supported"),
                ({"leaf_module": {"classes": ["Block"]}}, "section 'zero_optimization.leaf_module' is not supported"),
            )
        ],
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow = false is not supported"),
        ({"bfloat16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow = false is not supported"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads = true is not"),
        ({"bf16": True}, "bf16 = true is not a section"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, 'grad_accum_dtype = "fp16" is not fp32'),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype is not supported"),
        ({"data_types": {"param_dtype": "bf16"}}, 'data_types.param_dtype = "bf16" is not supported'),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer = true is not supported"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op = "sum" is not supported'),
        ({"prescale_gradients": True}, "prescale_gradients = true is not supported"),
        ({"tensor_parallel": {"autotp_size": 2}}, "section 'tensor_parallel' is not supported"),
        ({"amp": {"enabled": True}}, "section 'amp' is not supported"),
        ({"bf16": {"enable": False}}, "no setting 'bf16.enable'. Did you mean 'enabled'"),
        ({"bf16": {"enabled": "auto"}, "steps_per_print": "auto"}, "no setting of the config"),
    ],
)
def test_settings_that_contradict_the_config(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**deepspeed_config.read_settings("deepspeed_zero2"), **change}))
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dict(max_norm=1.0), 2)
    with pytest.raises(ConfigError, match=message):
        deepspeed_config.resolve_auto(deepspeed_config.read_settings(str(path)), optim, CPU, 2, str(path))
    with pytest.raises(ConfigError, match="Did you mean 'deepspeed_zero1'"):
        deepspeed_config.read_settings("deepspeed_zero_1")


def test_an_older_deepspeed_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"deepspeed>={deepspeed_config.OLDEST},<' in project
    assert deepspeed_config.import_deepspeed() is deepspeed
    monkeypatch.setattr(deepspeed, "__version__", "0.19.7")
    with pytest.raises(ConfigError, match=r"DeepSpeed 0\.19\.7 is older than"):
        deepspeed_config.import_deepspeed()


def test_every_setting_of_deepspeed_has_its_place() -> None:
    """DeepSpeed's own descriptions against our tables; what is off or without effect hinders nobody."""
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config

    for section, form in (
        ("zero_optimization", zero.DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.offload_param", offload_config.DeepSpeedZeroOffloadParamConfig),
        ("bf16", precision_config.DeepSpeedBF16Config),
    ):
        for name, field in form.model_fields.items():
            assert f"{section}.{field.alias or name}" in supported_settings.KNOWN
    removed = [
        *config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
        *(f"zero_optimization.{k}" for k in config._REMOVED_ZERO_CONFIG_KEYS),
    ]
    assert set(removed) <= supported_settings.REJECTED.keys()
    tables = (
        supported_settings.PASSED_ON,
        supported_settings.IGNORED.keys(),
        supported_settings.REJECTED.keys(),
    )
    assert sum(map(len, tables)) == len(supported_settings.KNOWN)
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dtype="bf16")
    usual = {  # as in JSONs of other projects
        "fp16": {"enabled": False, "initial_scale_power": 16}, "bf16": {"enabled": True}, "optimizer": None,
        "tensorboard": {"enabled": False}, "flops_profiler": {"enabled": False}, "amp": None,
        "activation_checkpointing": {"profile": True},
        "train_batch_size": "auto", "gradient_predivide_factor": 1.0, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "zero_hpz_partition_size": 1,
            "round_robin_gradients": False, "offload_optimizer": {"device": "none"}, "offload_param": None,
        },
    }  # fmt: skip
    resolved = deepspeed_config.resolve_auto(usual, optim, CPU, 2, "usual.json")
    assert resolved["zero_optimization"] == {"stage": 3}
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert [told.partition(" ")[0] for told in deepspeed_config.list_ignored(usual)] == [
        "activation_checkpointing", "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    ]  # fmt: skip
    one = {**usual, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert "data_types" not in deepspeed_config.resolve_auto(
        one, optim, CPU, 2, "one.json"
    )  # DeepSpeed has no such sums
    coarser = OptimWrapper(dict(type=torch.optim.AdamW, lr=LR), dtype="bf16", sums="bf16")
    with pytest.raises(ConfigError, match=r"grad_accum_dtype is fp32 in the .* by the config it is bf16"):
        deepspeed_config.resolve_auto(one, coarser, CPU, 2, "one.json")


@pytest.mark.processes
def test_packs_are_summed_in_fp32_and_a_nan_is_not_applied(tmp_path: Path) -> None:
    """In bf16, 2 × 16 packs, SGD with a rate of 1: what masters lose is the gradient. Against one process in fp32."""
    these = uneven_packs()[:32]
    targets = sum(p.num_targets for p in these)

    def gradient(
        dtype: str, zero: str | None, fsdp: str | None, parts: int = 1, **kept: str
    ) -> tuple[Any, dict[str, tuple[int, torch.Tensor]]]:
        rank, ranks = collectives.rank(), collectives.ALL.size
        optim, model = OptimWrapper(dict(type=torch.optim.SGD, lr=1.0), None, 32 // ranks, dtype, **kept), odd_model()
        strategy: Any = select.build_strategy(select.choose_strategy(model, optim, CPU, zero, fsdp), model, optim, CPU)
        before = {n: s.master.read().clone() for n, s in strategy._shards().items()}
        strategy.forward_backward(these[rank::ranks], targets, [parts] * (32 // ranks))
        assert strategy.step(1.0, None)[1]
        lost = {n: (s.master.begin, before[n] - s.master.read()) for n, s in strategy._shards().items()}
        return strategy, lost

    exact = gradient("fp32", None, None)[1]

    def error(found: dict[str, tuple[int, torch.Tensor]]) -> float:
        square = total = 0.0
        for name, (begin, values) in found.items():
            true = exact[name][1].view(-1)[begin : begin + values.numel()]
            square += (values.view(-1) - true).square().sum().item()
            total += true.square().sum().item()
        return float((collectives.ALL.sum(square) / collectives.ALL.sum(total)) ** 0.5)

    # by micro-batches a pack: products of other sizes round differently, on some processors by more than 0.1 %
    least, divided = (error(gradient("bf16", None, None, parts)[1]) for parts in (1, 2))
    assert 5e-3 < least < 7e-3

    def on_two(_: Ranks, folder: Path) -> None:
        assert error(gradient("bf16", None, "full")[1]) < 1.001 * least
        for stage in ("1", "2", "3", "2_offload", "3_offload"):
            strategy, found = gradient("bf16", f"deepspeed_zero{stage}", None, parts=2)
            assert error(found) < 1.001 * divided, stage
            block = strategy.model.model.layers[1]
            hook = block.register_forward_hook(lambda module, args, out: out * float("nan"))
            before = {n: s.master.read().clone() for n, s in strategy._shards().items()}
            strategy.forward_backward(these[collectives.rank() :: 2], targets)
            assert not strategy.step(1.0, None)[1]
            assert all(s.master.read().equal(before[n]) for n, s in strategy._shards().items())
            hook.remove()
        assert error(gradient("bf16", "deepspeed_zero2", None, full="weights")[1]) < 1.001 * least
        # what of stage 1 does not fit in fp32: coarser over the micro-batches of a pack, not over packs and ranks
        assert error(gradient("bf16", "deepspeed_zero1", None, sums="bf16")[1]) < 1.001 * least
        for here in ("1", "2"):  # one rank a node; both on one
            os.environ["LOCAL_WORLD_SIZE"] = here
            assert 1.001 * divided < error(gradient("bf16", "deepspeed_zero1", None, 2, sums="bf16")[1]) < 7e-3
        settings = deepspeed_config.read_settings("deepspeed_zero2")
        settings["data_types"]["grad_accum_dtype"] = "bf16"  # on request
        (folder / f"{collectives.rank()}.json").write_text(json.dumps(settings))
        assert error(gradient("bf16", str(folder / f"{collectives.rank()}.json"), None)[1]) > 1.2 * least

    assert on_ranks(2, on_two, tmp_path) == [0, 0]


@pytest.mark.processes
def test_nodes_that_do_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")

    def refused(_: Ranks, folder: Path) -> None:
        with pytest.raises(ConfigError, match="2 ranks cannot be divided into nodes of 3"):
            make("fsdp_hybrid", folder, 2)

    assert on_ranks(2, refused, tmp_path) == [0, 0]


@pytest.mark.processes
def test_wrong_settings_are_told_before_anything_is_loaded(tiny: Path, tmp_path: Path, xtuner: Any) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 4}}))
    dry = ("train", tiny, "--dry-run", "--deepspeed")
    with pytest.raises(ConfigError, match="stage = 4"):
        xtuner(*dry, path)
    path.write_text('{"zero_optimization": {"stage": 3},}')
    with pytest.raises(ConfigError, match=r"are not JSON: .* line 1 column"):
        xtuner(*dry, path)
    with pytest.raises(ConfigError, match="--deepspeed deepspeed_zero1 and --fsdp full"):
        xtuner(*dry, "deepspeed_zero1", "--fsdp")
    assert xtuner(*dry, "deepspeed_zero3") == 0


# ---- memory -------------------------------------------------------------------------------------------------------

MEMORY = """
import json, resource, sys
from pathlib import Path
import deepspeed, torch
import torch.distributed.fsdp  # with what it imports, which DeepSpeed will too: part of what is there before
from safetensors import safe_open
from helpers.models import large_model
from helpers.ranks import on_ranks
import xtuner.engine.zero.deepspeed_strategy
from xtuner.engine.strategies import select as choose; from xtuner.engine.zero import deepspeed_config as zero_config
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.model import from_pretrained

CONSTANT = 32 * 2**20
RANKS = 2
folder = Path(sys.argv[1])
file = folder / "model.safetensors"
shapes = {n: p.shape for n, p in large_model().build_empty(torch.device("meta"), torch.float32).named_parameters()}
total, largest = sum(s.numel() for s in shapes.values()), max(s.numel() for s in shapes.values())
assert 4 * total > 4 * (4 * largest + CONSTANT), "too small a model to show anything"

def body(ranks, where):
    field = next(l for l in open("/proc/self/status") if l.startswith("VmData"))
    shard = 16 * total // RANKS  # weights, masters, gradients and DeepSpeed's copy for sending, in fp32
    mapped = file.stat().st_size  # counts, although it takes no memory
    limit = int(field.split()[1]) * 1024 + shard + 4 * largest + mapped + CONSTANT
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1e-3))
    parts = from_pretrained(str(folder)), optim, torch.device("cpu")
    strategy = choose.build_strategy(choose.choose_strategy(*parts, str(folder / "zero3.json")), *parts)
    try:  # the control: one rank holding all weights beside its shard
        whole = from_pretrained(str(folder)).build()
    except RuntimeError as e:
        assert "llocate memory" in str(e), e
    else:
        sys.exit("the limit limits nothing")
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    with safe_open(file, framework="pt") as source:
        for name, shard in strategy._shards().items():
            begin, values = shard.master.begin, shard.master.values
            assert values.equal(source.get_tensor(name).view(-1)[begin : begin + len(values)]), name

assert on_ranks(RANKS, body, folder / "store") == [0] * RANKS
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_zero3_is_built_shard_by_shard(tmp_path: Path) -> None:
    """From safetensors: the system itself refuses a rank more than its shard + the largest tensor + 32 MiB; with all
    weights on a rank it fails. What each holds then are the numbers of the file."""
    source = large_model()
    tensors = {name: p.data for name, p in source.build().named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(INTERNLM2.write_config(source.config, "float32")))
    settings = deepspeed_config.read_settings("deepspeed_zero3")
    small = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "reduce_bucket_size")
    settings["zero_optimization"] |= dict.fromkeys((*small, "stage3_prefetch_bucket_size"), 10**6)
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}  # what is freed goes back at once
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
