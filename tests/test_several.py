"""benchmarks/several.py: its arithmetic against numbers computed by hand, and all of it on two CPU processes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_what_each_engine_sends(bench: Any) -> None:
    """1.8B has 1,889,110,016 parameters: embedding and head of 189,530,112 each, 24 blocks have the rest."""
    predict, one_gpu = bench("predict"), bench("one_gpu")
    m, links = one_gpu.MODELS["1.8b"], predict.Links()
    assert (m.parameters, m.ends) == (1_889_110_016, 379_060_224)
    # half of: gradients in fp32, all-reduced (twice), and weights in bf16, gathered
    assert predict.sent(m, "zero1", 2, links).bytes == (2 * 4 + 2) * 1_889_110_016 / 2
    assert predict.sent(m, "zero2", 2, links) == predict.sent(m, "zero1", 2, links)
    # our own strategy keeps both full: weights in bf16, gathered once; gradients in fp32, reduce-scattered once
    there = predict.room(m, "fsdp", 8, one_gpu.MACHINES["H100"].free)
    assert predict.sent_by_own(m, 8, links, there).bytes == 7 / 8 * (2 + 4) * 1_889_110_016
    # 7B on four: gradients for each of 3 micro-batches
    seven = one_gpu.MODELS["7b"]
    there = predict.room(seven, "fsdp", 4, one_gpu.MACHINES["H100"].free)
    assert predict.sent_by_own(seven, 4, links, there).bytes == 3 / 4 * (2 + 3 * 4) * 7_737_708_544
    # head and 5 blocks stay: (10⁹ − 2 heads) ÷ 2 blocks of 62,918,741 is 4.9
    zero3 = (2 * (2 * 1_889_110_016 - 189_530_112 - 5 * 1_510_049_792 / 24) + 4 * 1_889_110_016) / 2
    assert predict.sent(m, "zero3", 2, links).bytes == pytest.approx(zero3, rel=1e-9)
    assert all(predict.sent(m, engine, 1, links) == predict.Sent(0, 0, 0) for engine in predict.ENGINES[1:])
    assert predict.sent_by_own(m, 1, links, predict.Room(0, there.plan, 1)) == predict.Sent(0, 0, 0)


def test_a_prediction_begins_with_what_was_measured(bench: Any) -> None:
    predict, one_gpu = bench("predict"), bench("one_gpu")
    usual, h100, links = np.full(64, 93.6e6), one_gpu.MACHINES["H100"], predict.Links()
    for m in one_gpu.MODELS.values():
        assert predict.alone(m, h100, np.full(64, m.squares)) == pytest.approx(m.tokens_per_s)
        one_document = m.fixed + m.attention_long  # ms
        assert predict.alone(m, h100, np.array([one_gpu.LONG])) == pytest.approx(32_768_000 / one_document)
    assert one_gpu.MODELS["7b"].a + one_gpu.MODELS["7b"].b * 129.7e6 == pytest.approx(286, rel=0.02)  # as measured
    m = one_gpu.MODELS["1.8b"]
    for engine, (tokens_per_s, squares) in one_gpu.THROUGH.items():
        found = predict.predict(m, h100, engine, 1, np.full(64, squares), links)
        assert found.tokens_per_s == pytest.approx(tokens_per_s)  # one GPU through the engine: its own figure
        assert found.terms["exposed"] == found.terms["slowest rank"] == 0
    # one rank of two has 10⁸ more: all of an iteration wait for it
    uneven = predict.predict(m, h100, "fsdp", 2, np.array([1e8, 2e8] * 8), links)
    assert uneven.terms["slowest rank"] == pytest.approx((643 - 66) / (2**30 - 66.5e6) * 0.5e8)
    # at 1 GB/s everywhere, half a second for a rank's half of a gibibyte, and nothing is hidden any more
    names, at_all_sizes = ("all_reduce", "all_gather", "reduce_scatter"), {"1024": 1e9, str(2**30): 1e9}
    slow = predict.Links({"slowdown": 0.5, "bytes_per_s": {name: at_all_sizes for name in names}})
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


def test_dealing_packs(bench: Any) -> None:
    balance = bench("balance")
    # documents of 3, 4 and 6 in packs of 5: 3 + 2 | 2 + 3 | the last 3 fill none
    assert balance.squares(np.array([3, 4, 6]), 5).tolist() == [13, 13]
    assert balance.squares(np.array([5, 5]), 5).tolist() == [25, 25]
    times = np.array([1.0, 3.0, 3.0, 1.0])
    assert balance.waiting(times, 2) == pytest.approx(1 - 2 / 3)  # both iterations take 3, the mean pack 2
    assert balance.waiting(times, 2, window=2) == 0  # the two of 1 together, the two of 3
    assert balance.waiting(times, 1) == 0
    with pytest.raises(ValueError, match="4 packs are no 2 iterations of 4 ranks"):
        balance.waiting(times, 4, window=2)
    lengths = balance.lengths(2**25, 2**15, 0.5)
    assert lengths[lengths == 2**15].sum() / lengths.sum() == pytest.approx(0.5, abs=0.01)
    many = balance.squares(lengths, 2**15)
    assert 0 < balance.waiting(many, 8, 16) < balance.waiting(many, 8, 4) < balance.waiting(many, 8)


def several(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "several.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_all_of_it_on_two_cpu_processes(tmp_path: Path) -> None:
    """Measured, run, compared with one process, killed and resumed; what is done is not done again."""
    words = ("--tiny", "--gpus", 2, "--results", tmp_path, "--engines", "fsdp", "--drills", "killed")
    done = several("all", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NCCL_NVLS_ENABLE=0" in done.stdout
    assert "| tiny, fsdp, 2 |" in done.stdout
    assert "| one GPU | " in done.stdout
    assert "NO" not in done.stdout.replace("NCCL", "")
    collectives = json.loads((tmp_path / "bandwidth-2.json").read_text())
    assert collectives["backend"] == "gloo"
    assert all(min(sizes.values()) > 0 for sizes in collectives["bytes_per_s"].values())
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    kinds = {r["job"][0]: r for r in records}
    assert set(kinds) == {"speed", "even", "reference"}
    assert kinds["speed"]["losses"][:4] == pytest.approx(kinds["reference"]["losses"][:4], abs=1e-5)
    assert len(kinds["speed"]["losses"]) == 12
    (killed,) = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert (killed["code"], killed["resumed_at"], killed["as_promised"]) == (137, 7, True)
    again = several("run", *words)
    assert again.returncode == 0
    assert "tok/s/GPU, loss" not in again.stdout  # nothing ran
    assert "| tiny, fsdp, 2 |" in again.stdout
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(records)


def test_not_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--tiny runs on two CPU processes" in several("run").stderr
    assert "there are 2 here" in several("run", "--tiny", "--gpus", 4).stderr
