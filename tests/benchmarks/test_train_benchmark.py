"""The benchmarks' arithmetic, and that peers do the same work as ours: equal losses from equal weights and packs."""

import copy
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.paths import CACHE

from xtuner.data.loading.batch import Batch
from xtuner.families import LLAMA
from xtuner.model import lora
from xtuner.model.adapters.lora import build_lora
from xtuner.model.attention import Backend
from xtuner.model.decoder import CausalLM, DecoderConfig, initialize_parameter
from xtuner.model.flops import count_attention_pairs, training_flops, whole_pack_flops
from xtuner.model.weights import split_for_family
from xtuner.train.reporting.profile import sum_by_part

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = DecoderConfig(300, 128, 512, 2, 2, 1, 64)
BORDERS = [0, 50, 51, 128]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def pack(borders: list[int]) -> Batch:
    draw = torch.Generator().manual_seed(0)
    lengths = [b - a for a, b in pairwise(borders)]
    targets = torch.randint(3, 300, (128,), generator=draw)
    targets[5:9] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    ids = torch.randint(3, 300, (128,), generator=draw)
    return Batch(ids, targets, positions, cu_seqlens, max(lengths), int((targets >= 0).sum()))


@pytest.fixture(scope="module")
def ours() -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(SHAPE)  # PyTorch's own random weights: large enough that attention matters
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("package", "engine", "attention"),
    [("transformers", "hf", "sdpa"), ("transformers", "hf", "flex"), ("torchtitan", "torchtitan", "flex")],
)
def test_peers_do_the_same_work(package: str, engine: str, attention: str, ours: CausalLM) -> None:
    pytest.importorskip(package)
    from benchlib.peers.training_loop import Settings, build, copy_shard

    settings = Settings(engine, SHAPE, torch.device("cpu"), "fp32", attention=attention, compute=torch.float32)
    peer = build(settings)
    weights = {
        k: v for name, p in ours.named_parameters() for k, v in split_for_family(name, p.data, LLAMA, SHAPE).items()
    }
    theirs = dict(peer.model.named_parameters())
    for name, weight in peer.rename(weights).items():
        copy_shard(theirs.pop(name), weight)
    assert not theirs
    apart, together = pack(BORDERS), pack([0, 128])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling is the GPU's business
        wanted, mixed = (
            ours(b.input_ids, b.cu_seqlens, b.targets, b.position_ids).item() / b.num_targets for b in (apart, together)
        )
        found = peer.loss(apart).item()
    print(f"{engine} {attention}: ours {wanted:.6f}, peer {found:.6f}; were documents one: {mixed:.6f}")
    assert abs(mixed - wanted) > 1e-3
    assert found == pytest.approx(wanted, abs=2e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_a_peer_with_an_adapter_does_the_same_work(ours: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    if not (CACHE / "peft-0.21.2" / "installed").exists():
        pytest.skip("`make peft` downloads PEFT")
    monkeypatch.syspath_prepend(CACHE / "peft-0.21.2")
    from benchlib.peers.peft_terms import MODULES
    from benchlib.peers.training_loop import Settings, build
    from benchlib.workloads import Terms

    terms = Terms("own", rank=4)
    more = dict(attention="loop", compute=torch.float32, terms=terms)
    peer = build(Settings("hf", SHAPE, torch.device("cpu"), "fp32", **more))
    theirs = dict(peer.model.named_parameters())
    for name, p in ours.named_parameters():
        for key, weight in split_for_family(name, p.data, LLAMA, SHAPE).items():
            theirs[key].data.copy_(weight)
    assert peer.adapt
    peer.adapt()
    theirs = {name: p for name, p in peer.model.named_parameters() if p.requires_grad}
    mine = copy.deepcopy(ours)
    build_lora(lora(rank=terms.rank, alpha=terms.alpha, targets=terms.TARGETS), SHAPE).apply(mine)
    pairs = {}
    for name, p in mine.named_parameters():
        if p.requires_grad:
            _, _, layer, kind, _, _, part, factor = name.split(".")
            module = MODULES[{"wo": "o", "w1": "gate", "w3": "up", "w2": "down"}.get(part, part)]
            place = {"attention": "self_attn", "feed_forward": "mlp"}[kind]
            pairs[name] = theirs.pop(f"model.layers.{layer}.{place}.{module}.lora_{factor}.default.weight")
            torch.nn.init.normal_(p, std=0.1)
            pairs[name].data.copy_(p.data)
    assert not theirs
    batch = pack(BORDERS)
    with torch.no_grad():
        without = ours(batch.input_ids, batch.cu_seqlens, batch.targets, batch.position_ids).item() / batch.num_targets
    wanted = mine(batch.input_ids, batch.cu_seqlens, batch.targets, batch.position_ids) / batch.num_targets
    wanted.backward()
    found = peer.loss(batch)
    found.backward()
    assert abs(without - wanted.item()) > 1e-3
    assert found.item() == pytest.approx(wanted.item(), abs=2e-6)
    gradients = {name: p.grad for name, p in mine.named_parameters() if p.requires_grad}
    for name, theirs_p in pairs.items():
        torch.testing.assert_close(theirs_p.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_unsloth_loads_the_weights_that_ours_starts_from(tmp_path: Path) -> None:
    """Its engine needs a GPU; the folder that it loads is one for transformers."""
    transformers = pytest.importorskip("transformers")
    from benchlib.peers.unsloth_model import write_folder

    shape = replace(SHAPE, initializer_range=0.2)  # large enough that attention matters
    write_folder(tmp_path, shape, torch.float32, torch.device("cpu"))
    mine = CausalLM(shape)
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            initialize_parameter(name, parameter, shape, 0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = pack([0, 128])
    row = {"input_ids": batch.input_ids[None], "labels": batch.targets[None], "shift_labels": batch.targets[None]}
    with torch.no_grad():
        wanted = mine(batch.input_ids, batch.cu_seqlens, batch.targets, batch.position_ids).item() / batch.num_targets
        assert theirs(**row).loss.item() == pytest.approx(wanted, abs=1e-5)
        next(iter(theirs.model.layers)).self_attn.o_proj.weight.zero_()
        assert abs(theirs(**row).loss.item() - wanted) > 1e-3
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (2, "<pad>")


def test_unsloth_refuses_what_it_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchlib.peers.training_loop import Settings, build
    from benchlib.peers.unsloth_model import OFFLINE
    from benchlib.workloads import Terms

    def refusal(device: str, **chosen: object) -> str:
        with pytest.raises(SystemExit) as ended:
            build(Settings("unsloth", SHAPE, torch.device(device), "fp32", **chosen))
        return str(ended.value)

    for variable in (*OFFLINE, "UNSLOTH_COMPILE_LOCATION"):
        monkeypatch.setenv(variable, "")
    terms = Terms("nf4")
    assert "--adapter lora or qlora" in refusal("cuda")
    assert "--attention" in refusal("cuda", terms=terms, attention="varlen")
    assert "--recompute" in refusal("cuda", terms=terms, recompute="selective")
    assert "without --products" in refusal("cuda", terms=terms, products="fp8")
    assert "needs a GPU" in refusal("cpu", terms=terms)
    if not importlib.util.find_spec("unsloth"):
        assert refusal("cuda", terms=terms) == (
            "No module named 'unsloth'; benchmarks/benchlib/peers/unsloth_model.py says what to install"
        )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("products", ["fp8", "fp8_rowwise", "fp8_rowwise_forward"])
@pytest.mark.parametrize(("package", "engine"), [("transformers", "hf"), ("torchtitan", "torchtitan")])
def test_fp8_products_of_peers(package: str, engine: str, products: str) -> None:
    """Every linear layer of blocks is converted, the output layer is not; rounding changes the loss a little."""
    for needed in (package, "torchao"):
        if not importlib.util.find_spec(needed):
            pytest.skip(f"needs {needed}")
    from benchlib.peers.training_loop import Loop, Settings, build
    from torchao.float8.float8_linear import Float8Linear

    losses = {}
    for name in (None, products):
        options = dict(long=True, attention="sdpa", compute=torch.float32, recompute="none", products=name)
        settings = Settings(engine, replace(SHAPE, vocab_size=320), torch.device("cpu"), "fp32", **options)
        with torch.compiler.set_stance("force_eager"):
            peer = build(settings)
            losses[name] = [found.loss for found in Loop(peer, settings).iterate([[pack([0, 128])]] * 2)]
    converted = [name for name, module in peer.model.named_modules() if isinstance(module, Float8Linear)]
    assert len(converted) == 7 * SHAPE.num_layers
    assert not any("head" in name or "output" in name.split(".") for name in converted)
    assert peer.name.endswith(products)
    assert losses[products] != losses[None]
    assert losses[products] == pytest.approx(losses[None], rel=1e-3)


@pytest.mark.processes
def test_a_peer_runs_as_a_case(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    words = [sys.executable, str(BENCHMARKS / "single_gpu.py"), "1.8b", "--engine", "hf", "--tiny", "--warm", "1"]
    words += ["--iterations", "2", "--results", str(tmp_path / "results.jsonl")]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout[run.stdout.index("{") :])
    assert (found["case"], found["engine"], found["states"]) == ("1.8b", "hf sdpa full", "fp32")
    assert found["spread"] == [found["tokens_per_s"]] * 2  # of the one iteration that counts
    assert not (tmp_path / "results.jsonl").exists()  # nothing was measured
    run = subprocess.run([*words, "--warm", "2"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "leaves none" in run.stderr


def test_attention_by_document_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import attention as script

    def fail(*inputs: object) -> torch.Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(script.BACKENDS, "broken", Backend("fails", lambda: fail, devices=(), dtypes=()))
    monkeypatch.setattr(sys, "argv", ["attention.py", "--tiny", "--documents", "512", "mix", "65536", "--repeats", "1"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert "tiny without flash4: it does not run on cpu" in lines
    assert "tiny 512 broken failed: RuntimeError: no kernel" in lines
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(r["backend"], r["documents"], r["tokens"]) for r in rows] == [
        ("loop", "512", 512), ("loop", "mix", 512), ("loop", "65536", 1024),
    ]  # fmt: skip
    assert rows[0]["count"] == 64
    seconds, flops = rows[0]["backward_ms"] / 1e3, 4 * 4 * 16 * 64 * 8**2  # 4 heads of 16; 64 documents of 8 tokens
    assert rows[0]["backward_tflops"] == pytest.approx(flops / seconds / 1e12)
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {**rows[0], "backend": "flash4 4.0"}]))
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in script.table(results).splitlines()]
    assert ["shape", "documents", "loop", "flash4 4.0"] in cells
    assert next(row for row in cells if "mix" in row)[3] == "–"


def test_every_script_explains_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for script in BENCHMARKS.glob("*.py"):
        monkeypatch.setattr(sys, "argv", [script.name, "--help"])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(script.stem).main()
        assert ended.value.code == 0
        assert f"usage: {script.name}" in capsys.readouterr().out


def test_flops_by_hand() -> None:
    c = DecoderConfig(100, 8, 16, 1, 2, 1, 4)
    weights = (8 * 8 + 2 * 8 * 4 + 8 * 8) + 3 * 8 * 16 + 100 * 8  # q, k and v, out; the MLP; the head
    assert weights == 1376
    assert training_flops(c, 10, 6 * 6 + 4 * 4) == 6 * weights * 10 + 6 * 8 * 52
    assert whole_pack_flops(c, 10, 10) == 6 * weights * 10 + 12 * 8 * 100
    borders = torch.tensor([0, 6, 10])
    assert count_attention_pairs(c, borders) == 52
    assert count_attention_pairs(replace(c, sliding_window=5), borders) == 51  # one of 36 / 2 pairs is outside, halved


def test_kernels_are_summed_by_part() -> None:
    kernels = {
        "flash_bwd": 3.0,
        "nvjet_hsh": 5.0,
        "triton_poi_fused_add": 1.0,
        "multi_tensor_apply": 0.5,
        "Memcpy": 0.25,
    }
    parts = sum_by_part(kernels, 10.0)
    assert {k: v for k, v in parts.items() if v} == {
        "attention": 3.0, "matrix products": 5.0, "elementwise": 1.0, "optimizer": 0.5, "copies": 0.25, "idle": 0.25,
    }  # fmt: skip
    assert sum_by_part(kernels, 1.0)["idle"] == 0  # kernels of two streams overlap


@pytest.mark.processes
def test_the_table_shows_old_and_new_rows(tmp_path: Path) -> None:
    place = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130"}
    old = {**place, "case": "1.8b", "engine": "zero2", "date": "2026-11-23", "tokens_per_s": 40000, "mfu": 0.447}
    old |= {"spread": [39000, 41000], "memory": 64 * 2**30, "first": 25.4, "profile": None}
    new = {**old, "date": "2026-11-24", "engine": "single", "states": "fp32", "data_time": 0.0004, "first": 17.0}
    new |= {
        "expected": "memory: 33.4 GiB of state; peak 72.2 GiB expected",
        "profile": {"attention": 66.2, "idle": 9.8},
    }
    peer = {**new, "engine": "torchtitan flex selective", "versions": "torchtitan 0.2.2", "data_time": None}
    peer |= {"mfu": float("nan"), "expected": "", "gpu": "unknown"}
    from benchlib.results_table import table

    path = tmp_path / "results.jsonl"
    assert "nothing" in table(path)
    adapted = {**old, "date": "2026-11-28", "case": "7b", "engine": "hf-liger flash4 full", "states": "fp32"}
    adapted |= {"terms": "qlora", "pack": 8192, "limited": "12G", "in_use": 11 * 2**30}
    path.write_text("".join(json.dumps(row) + "\n" for row in (old, new, peer, adapted)))
    text = table(path)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    # (6 · 1,699,479,552 + 12 · 24 · 2048 · 32768) · 40,000 / 989.4e12 = 1.194
    figures = ["40,000 (39.0–41.0k)", "0.447", "1.194"]
    assert ["1.8b", "zero2", "–", *figures, "64.0", "25", "–"] in cells
    assert ["1.8b", "single", "fp32", *figures, "64.0 (72.2)", "17", "0.000"] in cells
    assert ["1.8b", "torchtitan flex selective", "fp32", figures[0], "–", "–", "64.0", "17", "–"] in cells
    assert ["1.8b", "single", "66", "10", "0"] in cells
    assert ["7b qlora 8k 12G", "hf-liger flash4 full", *figures[:2], "64.0", "11.0", "25", "–"] in cells
    assert "torchtitan flex selective: torchtitan 0.2.2" in text
    assert text.index("2026-11-23") < text.index("2026-11-24")
    assert max(map(len, text.splitlines())) <= 120
