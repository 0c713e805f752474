"""benchmarks/multi_gpu.py: its arithmetic against numbers computed by hand, and all of it on two CPU processes."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import forked_python

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def forks(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forks of this process, in which all is imported that several of them need."""
    bench("benchlib.peers.transformers_model")
    monkeypatch.setattr(subprocess, "Popen", forked_python.popen)


def test_what_each_engine_sends(bench: Any) -> None:
    """1.8B has 1,889,110,016 parameters: embedding and head of 189,530,112 each, 24 blocks have the rest."""
    predict, one_gpu = bench("benchlib.multi_gpu.prediction"), bench("benchlib.multi_gpu.single_gpu_times")
    m, links = one_gpu.MODELS["1.8b"], predict.Interconnect()
    assert (m.parameters, m.ends) == (1_889_110_016, 379_060_224)
    free = one_gpu.MACHINES["H100"].free

    def by_zero(m: Any, engine: str, ranks: int) -> Any:
        return predict.zero_traffic(m, engine, ranks, links, predict.plan_memory(m, engine, ranks, free))

    # half of: sums of gradients in fp32, to their owners once, and weights in bf16, gathered
    assert by_zero(m, "zero1", 2).bytes == (4 + 2) * 1_889_110_016 / 2
    assert by_zero(m, "zero2", 2) == by_zero(m, "zero1", 2)
    # 7B on four: sums in bf16 under stage 1; under stage 2 all-reduced in fp32 with each of 3 micro-batches
    seven = one_gpu.MODELS["7b"]
    assert by_zero(seven, "zero1", 4).bytes == (2 + 2) * 7_737_708_544 * 3 / 4
    assert by_zero(seven, "zero2", 4).bytes == (3 * 8 + 2) * 7_737_708_544 * 3 / 4
    # our own strategy keeps both full: weights in bf16, gathered once; gradients in fp32, reduce-scattered once
    there = predict.plan_memory(m, "fsdp", 8, one_gpu.MACHINES["H100"].free)
    assert predict.sharded_traffic(m, 8, links, there).bytes == 7 / 8 * (2 + 4) * 1_889_110_016
    # 7B on four: gradients for each of 3 micro-batches
    there = predict.plan_memory(seven, "fsdp", 4, one_gpu.MACHINES["H100"].free)
    assert predict.sharded_traffic(seven, 4, links, there).bytes == 3 / 4 * (2 + 3 * 4) * 7_737_708_544
    # head and 5 blocks stay: (10⁹ − 2 heads) ÷ 2 blocks of 62,918,741 is 4.9
    zero3 = (2 * (2 * 1_889_110_016 - 189_530_112 - 5 * 1_510_049_792 / 24) + 4 * 1_889_110_016) / 2
    assert by_zero(m, "zero3", 2).bytes == pytest.approx(zero3, rel=1e-9)
    assert all(by_zero(m, engine, 1) == predict.Traffic(0, 0, 0) for engine in predict.ENGINES[1:])
    assert predict.sharded_traffic(m, 1, links, dataclasses.replace(there, parts=1)) == predict.Traffic(0, 0, 0)


def test_a_prediction_begins_with_what_was_measured(bench: Any) -> None:
    predict, one_gpu = bench("benchlib.multi_gpu.prediction"), bench("benchlib.multi_gpu.single_gpu_times")
    usual, h100, links = np.full(64, 93.6e6), one_gpu.MACHINES["H100"], predict.Interconnect()
    for m in one_gpu.MODELS.values():
        assert predict.single_gpu_speed(m, h100, np.full(64, m.squares)) == pytest.approx(m.tokens_per_s)
        one_document = m.fixed + m.attention_long  # ms
        assert predict.single_gpu_speed(m, h100, np.array([one_gpu.LONG])) == pytest.approx(32_768_000 / one_document)
    assert one_gpu.MODELS["7b"].a + one_gpu.MODELS["7b"].b * 129.7e6 == pytest.approx(286, rel=0.02)  # as measured
    m = one_gpu.MODELS["1.8b"]
    for engine in predict.ENGINES:
        found = predict.predict(m, h100, engine, 1, usual, links)
        assert found.terms["exposed"] == found.terms["slowest rank"] == 0
        assert (found.terms["gradients"] > 0) == (engine != "fsdp")
    # one rank of two has 10⁸ more: all of an iteration wait for it
    uneven = predict.predict(m, h100, "fsdp", 2, np.array([1e8, 2e8] * 8), links)
    assert uneven.terms["slowest rank"] == pytest.approx((643 - 66) / (2**30 - 66.5e6) * 0.5e8)
    # at 1 GB/s everywhere, half a second for a rank's half of a gibibyte, and nothing is hidden any more
    names, at_all_sizes = ("all_reduce", "all_gather", "reduce_scatter"), {"1024": 1e9, str(2**30): 1e9}
    slow = predict.Interconnect({"slowdown": 0.5, "bytes_per_s": {name: at_all_sizes for name in names}})
    assert slow.ms("all_gather", 2**30, 2) == pytest.approx(536.87, rel=1e-4)
    assert slow.ms("all_reduce", 2**30, 2) == pytest.approx(2 * 536.87, rel=1e-4)
    late = predict.predict(m, h100, "fsdp", 2, usual, slow).terms
    assert late["exposed"] > 5000  # 5.7 GB, of which what runs beside 0.6 s of compute is hidden
    # 7B: ZeRO-1 holds 2 + 14 ÷ 2 bytes a parameter, 65 GiB, beside 3 for libraries: no pack fits into what is left
    assert predict.predict(one_gpu.MODELS["7b"], h100, "zero1", 2, usual, links) is None
    assert predict.predict(one_gpu.MODELS["7b"], one_gpu.MACHINES["H200"], "zero1", 2, usual, links).peak < 139 * 2**30
    table = predict.table(links, usual, 2)
    assert "H100, 7b, zero1 | does not fit" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_predictions_are_what_four_gpus_took(bench: Any) -> None:
    """Mean seconds of iterations 6 to 8 on four H100 (docs/performance.md), with the Σ len² of their packs, and ms of
    DeepSpeed's own norm of gradients, which these runs still computed."""
    predict, one_gpu = bench("benchlib.multi_gpu.prediction"), bench("benchlib.multi_gpu.single_gpu_times")
    packs = np.array([149.7, 53.8, 112.9, 79.1, 146.8, 66.7, 47.8, 67.9, 137.2, 71.6, 122.4, 86.4]) * 1e6
    for shape, engine, norm, measured in (
        ("7b", "fsdp", 0, 2.718),
        ("7b", "zero1", 22, 2.787),
        ("7b", "zero2", 22, 3.101),
        ("7b", "zero3", 42, 3.173),
        ("1.8b", "fsdp", 0, 0.698),
        ("1.8b", "zero3", 32, 0.757),
    ):
        model, machine = one_gpu.MODELS[shape], one_gpu.MACHINES["H100"]
        found = predict.predict(model, machine, engine, 4, packs, predict.Interconnect())
        seconds = (sum(found.terms.values()) + norm) / 1000
        assert seconds == pytest.approx(measured, rel=0.04), (shape, engine, found.terms)


def test_dealing_packs(bench: Any) -> None:
    balance = bench("benchlib.multi_gpu.waiting_time")
    # documents of 3, 4 and 6 in packs of 5: 3 + 2 | 2 + 3 | the last 3 fill none
    assert balance.squares(np.array([3, 4, 6]), 5).tolist() == [13, 13]
    assert balance.squares(np.array([5, 5]), 5).tolist() == [25, 25]
    times = np.array([1.0, 3.0, 3.0, 1.0])
    assert balance.waiting(times, 2) == pytest.approx(1 - 2 / 3)  # both iterations take 3, the mean pack 2
    assert balance.waiting(times, 2, window=2) == 0  # the two of 1 together, the two of 3
    assert balance.waiting(times, 1) == 0
    with pytest.raises(ValueError, match="4 packs are fewer than 2 iterations of 4 ranks"):
        balance.waiting(times, 4, window=2)
    lengths = balance.lengths(2**25, 2**15, 0.5)
    assert lengths[lengths == 2**15].sum() / lengths.sum() == pytest.approx(0.5, abs=0.01)
    many = balance.squares(lengths, 2**15)
    assert 0 < balance.waiting(many, 8, 16) < balance.waiting(many, 8, 4) < balance.waiting(many, 8)


def test_which_runs_there_are(bench: Any) -> None:
    runs, peers, cases = (
        bench("benchlib.multi_gpu.xtuner_runs"),
        bench("benchlib.multi_gpu.peer_runs"),
        bench("benchlib.workloads"),
    )
    Job = runs.Job
    found = runs.jobs([1, 2, 4], ["1.8b", "7b", "20b"], ["fsdp", "zero1"])
    assert len({job.name for job in found}) == len(found)
    assert found[0] == Job("speed", "1.8b", "fsdp", 4, 4)
    large = [job for job in found if job.shape == "20b"]
    assert large == [Job("speed", "20b", "fsdp", 4, 4, "8bit")]
    assert (large[0].iterations, large[0].warm, large[0].name) == (30, 4, "20b-fsdp-4-speed-4-8bit")
    # hidden 6144, 48 layers of q and out, k and v of 8 heads, MLP, two norms; the last norm; embedding and head
    layer = 2 * 6144**2 + 2 * 6144 * 8 * 128 + 3 * 6144 * 16384 + 2 * 6144
    assert bench("xtuner.model.flops").num_parameters(cases.SHAPES["20b"].config) == (
        48 * layer + 6144 + 2 * 92544 * 6144
    )
    of_most = {job.variant for job in found if job.kind == "speed" and job.variant and job.shape == "7b"}
    assert of_most == set(runs.VARIANTS)
    alone = [job for job in found if job.engine == "single" and job.variant]  # fp8 on the packs of four
    assert [(job.shape, job.variant) for job in alone] == [
        (shape, kind) for shape in ("1.8b", "7b") for kind in ("fp8", "fp8_full")
    ]
    assert all(job.gpus == 4 for job in found if (job.variant or job.kind in ("mixed", "save")) and job not in alone)
    assert all(job.packs == 4 for job in alone)
    dealt, mixed = Job("speed", "7b", "fsdp", 4, 4, "balance-16"), Job("mixed", "7b", "fsdp", 4, 4)
    # a whole window counts, and one epoch holds both; 200 iterations of 4 packs are 3.1 epochs of 256
    assert (dealt.iterations, dealt.warm, dealt.iterations * runs.MOST) == (32, 16, 256)
    assert (mixed.iterations, mixed.epochs, mixed._replace(gpus=8, packs=8).epochs) == (200, 4, 7)
    mixed_dealt = mixed._replace(variant="balance-16")
    assert {mixed, mixed_dealt, mixed._replace(variant="balance-0")} <= set(found)
    assert (mixed_dealt.iterations, mixed_dealt.warm, mixed_dealt.epochs) == (64, 16, 1)
    assert not {job for job in runs.jobs([2], ["tiny"], ["zero1"]) if job.engine == "fsdp"}
    assert Job(*["speed", "7b", "fsdp", 4, 4]).variant == ""  # as records of before have it
    # chosen in the order of the patterns, each once
    wanted = runs.select([*found, *peers.jobs(4, ["7b"])], "7b-torchtitan*,7b-fsdp-4-mixed-4,7b-torchtitan-full-4,20b*")
    assert [job.name for job in wanted] == [
        "7b-torchtitan-full-4", "7b-torchtitan-selective-4", "7b-torchtitan-budget-0.3-4", "7b-fsdp-4-mixed-4",
        "20b-fsdp-4-speed-4-8bit",
    ]  # fmt: skip
    assert runs.select(found, None) == found
    with pytest.raises(ValueError, match=r"no run is called 7b-fdsp; there are: 1.8b-fsdp-4-speed-4, "):
        runs.select(found, "20b*,7b-fdsp")
    # the likely best of each first
    assert [job.name for job in peers.jobs(4, ["1.8b", "7b", "20b"])[:4]] == [
        "1.8b-torchtitan-selective-4", "7b-torchtitan-full-4", "1.8b-hf-liger-full-4", "7b-hf-liger-full-4",
    ]  # fmt: skip


def test_mixed_documents_fill_whole_packs(bench: Any, tmp_path: Path) -> None:
    cases, runs = bench("benchlib.workloads"), bench("benchlib.multi_gpu.xtuner_runs")
    cases.write_mixed(tmp_path, 120, 512, 500)
    lengths = np.load(tmp_path / "synthetic.bin.meta")[:, 1]
    assert 120 * 512 <= lengths.sum() < 121 * 512
    whole, long = lengths[lengths == 1024].sum(), lengths[(lengths >= 128) & (lengths < 512)].sum()
    assert whole == 10 * 1024  # a sixth
    assert 1 / 3 <= long / lengths.sum() < 0.36  # short ones reach that length rarely
    assert (runs.squares(tmp_path, True) == 512**2).sum() >= 10


def record(job: Any, **more: Any) -> str:
    """A line of results of a GPU."""
    found = {"job": list(job), "tiny": False, "device": "NVIDIA H100 80GB HBM3", "mfu": 0.5, "memory": 70 * 2**30}
    found |= {"mean": 40_000.0, "tokens_per_s": 40_000.0, "spread": [36_000.0, 44_000.0], "losses": [11.0, 10.0]}
    return json.dumps(found | {"norms": [1.0, 1.0], "in_use": 78 * 2**30, "first": 20.0} | more) + "\n"


def test_the_table_of_runs(bench: Any, tmp_path: Path) -> None:
    runs, predict = bench("benchlib.multi_gpu.xtuner_runs"), bench("benchlib.multi_gpu.prediction")
    usual, results = runs.Job("speed", "7b", "fsdp", 4, 4), tmp_path / "runs.jsonl"
    expected = "memory: 50.0 GiB of state; micro-batches of at most 4,096 tokens; peak 76.05 GiB expected"
    save = {"bytes": 86 * 2**30, "saved": 43.0, "waited": 2.5, "disk_writes": 2**30, "disk_reads": 2**31}
    save |= {"seconds": 2.75, "beside": [3.5, 2.75], "first": 31.0, "resumed": 52.0, "loaded": 20.5}
    results.write_text(
        record(usual, failed="an earlier attempt")
        + record(usual, expected=expected)
        + record(usual._replace(variant="fp8"), mean=60_000.0, short=["memory ran out on rank 1", "again"])
        + record(usual._replace(variant="balance-0"))
        + record(usual._replace(variant="balance-16"), mean=42_000.0)
        + record(usual._replace(kind="mixed"), cut=120)
        + record(usual._replace(engine="zero3"), failed="CUDA out of memory")
        + record(usual._replace(kind="save"), **save)
    )
    text = runs.table(results, tmp_path, lambda n: predict.Interconnect())
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()[2:-4]}
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert rows["7b, fsdp, 4"][0] == "10,000"
    assert float(rows["7b, fsdp, 4"][2]) == pytest.approx(
        10_000 / float(rows["7b, fsdp, 4"][1].replace(",", "")), abs=1e-3
    )
    assert rows["7b, fsdp, 4"][3:6] == ["0.500", "70.0", "78.0, 76.05, -2.5%"]
    assert rows["7b, fsdp, 4 (fp8, memory ran out 2 times)"][:3] == ["15,000", "", ""]  # nothing is predicted of it
    assert rows["7b, fsdp, 4 (mixed, 120 of 200 iterations)"][5] == "78.0"
    assert rows["7b-zero3-4-speed-4"][0] == "failed: CUDA out of memory"
    gain = re.search(r"7b-fsdp-4-speed-4-balance-16: \+5.0% tok/s against balance-0 \(\+([\d.]+)% predicted\)", text)
    assert gain
    assert 0.5 < float(gain[1]) < 5  # of packs that differ by a few percent of an iteration
    assert (
        "86.0 GiB saved in 43.0 s (2,048 MiB/s; the disk alone writes 1,024, reads 2,048), training waited 2.50 s"
        in text
    )
    assert "during the save 3.50 s at most; first iteration 31 s after the command, after a resume 52 s" in text


def test_the_table_of_peers(bench: Any, tmp_path: Path) -> None:
    peers, runs = bench("benchlib.multi_gpu.peer_runs"), bench("benchlib.multi_gpu.xtuner_runs")
    titan, liger = peers.PeerJob("torchtitan", "7b", "full", 4), peers.PeerJob("hf-liger", "7b", "full", 4)
    of_ours = record(runs.Job("speed", "7b", "fsdp", 4, 4), losses=[11.25, 10.0])
    of_ours += record(runs.Job("speed", "7b", "fsdp", 4, 4, "fp8"), tokens_per_s=1e9)  # is not compared
    (tmp_path / "ours").write_text(of_ours)
    (tmp_path / "peers").write_text(
        record(titan, tokens_per_s=32_000.0, engine="torchtitan flex full")
        + record(liger, tokens_per_s=30_000.0, engine="hf-liger flex full")
        + record(titan._replace(recompute="selective"), failed="x", out_of_memory=True)
    )
    text = peers.table(tmp_path / "peers", tmp_path / "ours")
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "| 7b, 4 | ours | 10,000 (9.0–11.0k) | 0.500 | 70.0, 78.0 |  |" in text
    assert "| 7b, 4 | torchtitan flex full | 8,000 (9.0–11.0k) | 0.500 | 70.0, 78.0 | 2.5e-01 |" in text
    assert "| 7b-torchtitan-selective-4 | failed: out of memory |" in text
    assert "7b, 4 GPUs: ours is 1.25 × the best, torchtitan flex full (1.2 × required: yes)" in text
    (tmp_path / "ours").write_text(of_ours.splitlines()[0].replace("40000.0", "38000.0"))
    assert "ours is 1.19 × the best, torchtitan flex full (1.2 × required: NO)" in peers.table(
        tmp_path / "peers", tmp_path / "ours"
    )


@pytest.mark.processes
@pytest.mark.usefixtures("forks")
def test_a_peer_that_fails_ends_whole(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One by itself; one in time; and what is done, or runs out of memory, is not tried again."""
    peers, runs = bench("benchlib.multi_gpu.peer_runs"), bench("benchlib.multi_gpu.xtuner_runs")
    (tmp_path / "work").mkdir()
    refused, fine = peers.PeerJob("hf", "tiny", "selective", 2), peers.PeerJob("hf", "tiny", "full", 2)
    assert peers.run([refused], tmp_path / "r", tmp_path / "work", True, time.monotonic() + 60) == 1
    (found,) = runs.read(tmp_path / "r")
    options = "--attention is flash4, varlen, flex, sdpa or loop, --recompute none or full"
    assert found["failed"].startswith(f"transformers: {options}")
    assert not found["out_of_memory"]
    slow = peers.measure(fine, tmp_path / "work", True, 0.2)
    assert slow["failed"] == "not done in 0 s"
    assert not slow["out_of_memory"]
    for done in ({"failed": "x", "out_of_memory": True}, {"failed": "not done in 300 s", "out_of_memory": False}, {}):
        (tmp_path / "r").write_text(record(refused, **done))
        assert peers.run([refused], tmp_path / "r", tmp_path / "work", True, time.monotonic() + 60) == 0
        assert len(runs.read(tmp_path / "r")) == 1
    (tmp_path / "r").write_text(record(refused, failed="x", out_of_memory=False))
    assert peers.run([refused, fine], tmp_path / "r", tmp_path / "work", True, time.monotonic() - 1) == 0
    assert capsys.readouterr().out.endswith("tiny-hf-selective-2 and later runs are left for another call\n")
    assert len(runs.read(tmp_path / "r")) == 1


CHOSEN = "speed-2,even-2,reference-2,speed-2-split,save-2,full-2"  # ends of names


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("forks")
def test_all_of_it_on_two_cpu_processes(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Measured, run, compared with one process and a peer, killed and resumed; what is done is not done again."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")  # so that what the command sets does not remain

    def several(*words: object) -> str:
        tiny = ["--tiny", "--gpus", "2", "--results", str(tmp_path), "--engines", "fsdp"]
        monkeypatch.setattr(sys, "argv", ["multi_gpu.py", *map(str, words), *tiny])
        with pytest.raises(SystemExit) as ended:
            bench("multi_gpu").main()
        printed = capfd.readouterr()
        assert ended.value.code == 0, printed.out + printed.err
        return printed.out

    only = ["--only", ",".join(f"tiny-*-{end}" for end in CHOSEN.split(","))]
    out = several("all", *only, "--drills", "killed")
    assert "NCCL_NVLS_ENABLE=0" in out
    assert "| tiny, fsdp, 2 |" in out
    assert "| one GPU | " in out
    assert "NO" not in out.replace("NCCL", "")
    collectives = json.loads((tmp_path / "bandwidth-2.json").read_text())
    assert collectives["backend"] == "gloo"
    assert all(min(sizes.values()) > 0 for sizes in collectives["bytes_per_s"].values())
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    kinds = {(r["job"][0], r["job"][5]): r for r in records}
    assert set(kinds) == {("speed", ""), ("even", ""), ("reference", ""), ("speed", "split"), ("save", "")}
    speed, split, save = kinds["speed", ""], kinds["speed", "split"], kinds["save", ""]
    assert speed["losses"][:4] == pytest.approx(kinds["reference", ""]["losses"][:4], abs=1e-5)
    assert len(speed["losses"]) == 12
    assert speed["in_use"] > 2**27  # a process that has loaded PyTorch
    assert (speed["states"], split["states"], speed["short"]) == ("fp32", "split", [])
    assert split["losses"] == pytest.approx(speed["losses"], abs=0.02)
    assert split["losses"] != speed["losses"]
    # fp32 weights and two moments, in slices of both ranks
    state = 12 * bench("xtuner.model.flops").num_parameters(bench("benchlib.workloads").SHAPES["tiny"].config)
    assert state < save["bytes"] < 1.02 * state
    assert min(save["saved"], save["first"], save["resumed"], save["disk_writes"], save["disk_reads"]) > 0
    assert not list(tmp_path.glob("work/*/work/iter_*"))
    # transformers with FSDP2 from the same weights, at the same rates, on the same packs
    (peer,) = [json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines()]
    assert peer["engine"] == "hf sdpa full"
    assert peer["losses"] == pytest.approx(speed["losses"], abs=1e-5)
    assert peer["norms"] == pytest.approx(speed["norms"], rel=1e-4)
    assert "tiny, 2 GPUs: ours is" in out
    (killed,) = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert (killed["code"], killed["resumed_at"], killed["as_promised"]) == (137, 7, True)
    again = several("peers", "--only", "tiny-hf-full-2")
    assert "tok/s/GPU, loss" not in again  # nothing ran, of ours neither
    assert "| tiny, 2 | ours |" in again
    assert "| hf sdpa full |" in again
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(records)
    assert len((tmp_path / "peers.jsonl").read_text().splitlines()) == 1


def test_what_is_rejected(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main, folder = bench("multi_gpu").main, "--results=/nowhere/at/all"
    monkeypatch.setattr(bench("benchlib.multi_gpu.xtuner_runs"), "gpus_here", lambda: 0)
    for words, wanted in (
        ("run", "--tiny runs on two CPU processes"),
        ("run --tiny --gpus 4", "there are 2 here"),
        ("peers --tiny --gpus 1", "peers on one GPU are for single_gpu.py"),
        ("faults --tiny --only x", "faults has none"),
        ("run --tiny --only tiny-fsdp-2-speed-2,x", "no run is called x; there are: tiny-fsdp-2-speed-2, "),
        ("peers --tiny --only=", "no run is called ; there are: tiny-hf-full-2, "),
    ):
        monkeypatch.setattr(sys, "argv", ["multi_gpu.py", *words.split(), folder])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert wanted in capsys.readouterr().err
