"""Checkpoint → Hugging Face: bit-exact, loads in transformers, shards, atomic, small memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.paths import reference, reference_models
from safetensors.torch import load_file

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import verify
from xtuner.export.hf import parse_size
from xtuner.model import load_pretrained
from xtuner.model.weights import WeightFolder

Command = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from xtuner.cli.main import main

    work_dir = tmp_path_factory.mktemp("trained")
    assert main(["train", str(tiny), "--work-dir", str(work_dir), "--cfg-options", "custom_hooks=[]"]) == 0
    return work_dir / (work_dir / "last_checkpoint").read_text().strip()


def loss_of(logits: torch.Tensor) -> float:
    return float(logits.double().logsumexp(-1).sum())


@pytest.mark.processes
def test_round_trip_is_bit_exact(trained: Path, tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    masters = load_file(trained / "weights" / "model.safetensors")
    for layout in ("internlm2", "llama"):
        for words, dtype in ((["--fp32"], torch.float32), ([], torch.bfloat16)):
            target = tmp_path / f"{layout}-{dtype}"
            arguments = (tiny, trained, target, "--layout", layout, "--max-shard-size", "200KB", *words)
            assert xtuner("convert", "pth_to_hf", *arguments) == 0
            verify(target)
            model = load_pretrained(target, dtype=dtype)
            for name, tensor in model.state_dict().items():
                assert tensor.equal(masters[name].to(dtype)), name
            weights = WeightFolder(target)
            index = json.loads((target / "model.safetensors.index.json").read_text())
            files = sorted(set(index["weight_map"].values()))
            assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
            assert len(files) > 2
            assert index["metadata"]["total_size"] == sum(weights[n].nbytes for n in weights)
            for file in files:
                tensors = load_file(target / file)
                assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 200_000
            assert (target / "tokenizer.model").is_file()
            assert (target / "tokenizer.json").is_file()
            assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [2]
            facts = json.loads((trained / "trainer.json").read_text())
            assert facts["data"]["data"] in (target / "README.md").read_text()
    script = Path(__file__).parents[2] / "xtuner" / "tools" / "model_converters" / "pth_to_hf.py"
    words = [sys.executable, str(script), str(tiny), str(trained), str(tmp_path / "by_script")]
    subprocess.run(words, check=True, capture_output=True)
    assert len(list((tmp_path / "by_script").glob("*.safetensors"))) == 1


@pytest.mark.processes
def test_the_llama_layout_in_transformers(trained: Path, tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    from transformers import LlamaForCausalLM

    assert xtuner("convert", "pth_to_hf", tiny, trained, tmp_path / "hf", "--layout", "llama", "--fp32") == 0
    theirs, report = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    ours = load_pretrained(tmp_path / "hf")
    ids = torch.randint(3, 400, (70,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs.eval()(ids[None]).logits[0] - ours(ids)).abs().max() < 1e-4


@pytest.mark.processes
def test_our_own_remote_code(
    trained: Path, tiny: Path, tmp_path: Path, xtuner: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--with-code, and the reference models: transformers 5 gives our logits, generates with its cache, learns."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from xtuner.export.hf import _copy_code
    from xtuner.families import INTERNLM2

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    words = (tiny, trained, tmp_path / "exported", "--fp32", "--with-code")
    with pytest.raises(ConfigError, match="is only for the internlm2 layout"):
        xtuner("convert", "pth_to_hf", *words, "--layout", "llama")
    assert xtuner("convert", "pth_to_hf", *words) == 0
    folders = [tmp_path / "exported"]
    for name in reference_models():
        model = load_pretrained(reference("models", name))
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        save_file(model.state_dict(), folders[-1] / "model.safetensors", metadata={"format": "pt"})
        config = {**_copy_code(folders[-1]), **INTERNLM2.write_config(model.config, "float32")}
        (folders[-1] / "config.json").write_text(json.dumps(config))
    for folder in folders:
        ours = load_pretrained(folder)
        theirs, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(report.values())
        ids = torch.randint(3, ours.config.vocab_size, (150,), generator=torch.Generator().manual_seed(0))
        for part in (ids, ids[:40]):  # c: beyond the longest position it was trained for, and then not
            with torch.no_grad():
                assert (theirs(part[None]).logits[0] - ours(part)).abs().max() < 1e-4, folder
        prompts = torch.stack((ids[:20], torch.cat((torch.full((5,), 2), ids[:15]))))
        mask = torch.ones_like(prompts)
        mask[1, :5] = 0  # one is filled up on its left
        options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
        cached = theirs.generate(prompts, attention_mask=mask, **options)
        assert cached.equal(theirs.generate(prompts, attention_mask=mask, use_cache=False, **options))
        assert cached[1, 5:].equal(theirs.generate(ids[None, :15], **options)[0])
        theirs.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert again.config._attn_implementation == "sdpa"  # config.json said eager, as the original does
        with torch.no_grad():
            assert (again(ids[None]).logits - theirs(ids[None]).logits).abs().max() < 1e-4
        theirs.train()(ids[None, :30], labels=ids[None, :30]).loss.backward()
        assert theirs.model.layers[0].attention.wqkv.weight.grad.abs().sum() > 0


def test_the_reference_models_in_transformers(tmp_path: Path) -> None:
    """Biases, linear and dynamic rope, grouped heads: our llama layout means the same to transformers."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    from xtuner.families import LLAMA
    from xtuner.model.weights import split_for_family

    for name in {"a_gqa", "b_mha", "d_mqa_bias", "e_linear"} & set(reference_models()):
        model = load_pretrained(reference("models", name))
        folder = tmp_path / name
        folder.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for key, tensor in model.state_dict().items():
            tensors |= {k: t.contiguous() for k, t in split_for_family(key, tensor, LLAMA, model.config).items()}
        if "model.layers.0.self_attn.o_proj.bias" in tensors:
            assert model.config.attention_bias
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(LLAMA.write_config(model.config, "float32")))
        theirs = LlamaForCausalLM.from_pretrained(folder).eval()
        ids = torch.arange(3, 100)
        with torch.no_grad():
            assert (theirs(ids[None]).logits[0] - model(ids)).abs().max() < 1e-4, name


@pytest.mark.processes
def test_wrong_sources_and_targets(trained: Path, tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for error, source, target, message in (
        (ConfigError, trained.parent, tmp_path / "a", f"a folder of checkpoints(?s:.*)such as {trained.parent}/iter_"),
        (ConfigError, tmp_path / "nowhere.pth", tmp_path / "a", "there is no checkpoint"),
        (ConfigError, tmp_path, tmp_path / "a", "not a checkpoint that can be recognised"),
        (ConfigError, trained, tmp_path / "mine", "not an earlier export"),
        (CheckpointError, trained, tmp_path / "mine/thesis.txt/a/b", r"thesis\.txt is a file, not a folder"),
    ):
        with pytest.raises(error, match=message):
            xtuner("convert", "pth_to_hf", tiny, source, target)
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        xtuner("convert", "weights", trained, tmp_path / "mine/thesis.txt/a.safetensors")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"mine"}
    assert [parse_size(s) for s in ("2GB", "500MB", "1GiB", "1.5 kb", "7")] == [2 * 10**9, 5 * 10**8, 2**30, 1500, 7]
    for wrong in ("2 apples", "", "0GB", "-1GB"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_size(wrong)


@pytest.mark.processes
def test_only_an_export_is_replaced(
    trained: Path, tiny: Path, tmp_path: Path, xtuner: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a checkpoint, the source or what is around it; a target that cannot be written is said at once."""
    work_dir = tmp_path / "w"
    source = work_dir / "iter_2.pth"
    shutil.copytree(trained, source)
    shutil.copytree(trained, work_dir / "iter_1.pth")
    shutil.copytree(trained, tmp_path / "posing")
    manifest = json.loads((tmp_path / "posing" / "manifest.json").read_text())
    (tmp_path / "posing" / "manifest.json").write_text(json.dumps({**manifest, "kind": "export"}))
    (tmp_path / "no manifest").mkdir()
    (tmp_path / "no manifest" / "manifest.json").write_text("[]")
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    wrong = [
        source,
        source / "hf",
        source / "weights",
        work_dir,
        tmp_path / "link",
        work_dir / "x" / ".." / "iter_2.pth",
    ]
    for target in (*wrong, work_dir / "iter_1.pth", tmp_path / "posing", tmp_path / "no manifest", tiny):
        with pytest.raises(ConfigError, match="the target"):
            xtuner("convert", "pth_to_hf", tiny, source, target)
    for target in ("/proc/hf", tiny / "hf"):
        with pytest.raises(CheckpointError, match=f"(?s)cannot be written.*{target}"):
            xtuner("convert", "pth_to_hf", tiny, source, target)
    assert sorted(tmp_path.rglob("*")) == before
    verify(source)
    verify(work_dir / "iter_1.pth")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert xtuner("convert", "pth_to_hf", tiny, source, ".") == 0
    monkeypatch.chdir(tmp_path)
    assert verify(tmp_path / "empty")["kind"] == "export"
    assert "auto_map" not in json.loads((tmp_path / "empty" / "config.json").read_text())
    assert xtuner("convert", "pth_to_hf", tiny, source, "empty", "--layout", "llama") == 0
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.processes
def test_a_full_disk(
    trained: Path, tiny: Path, tmp_path: Path, xtuner: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xtuner.export.hf.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        xtuner("convert", "pth_to_hf", tiny, trained, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_a_damaged_checkpoint_is_not_loaded(
    trained: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path, xtuner: Command
) -> None:
    source = tmp_path / "iter_2.pth"
    shutil.copytree(trained, source)
    weights = bytearray((source / "weights" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "weights" / "model.safetensors").write_bytes(weights)
    for words in (("eval", "loss", source, corpus), ("chat", source, "--tokenizer", tokenizer_folder, "--prompt", "x")):
        with pytest.raises(CheckpointError, match="is altered"):
            xtuner(*words)


MEMORY = """
import gc, resource, sys
from pathlib import Path
import torch
from xtuner.core.files import seal, write_json
from xtuner.export.hf import export_hf
from xtuner.families import INTERNLM2
from xtuner.model import from_scratch
from safetensors import safe_open
from safetensors.torch import save_file

folder = Path(sys.argv[1])
def checkpoint(name, layers):
    source = from_scratch(vocab_size=8000, hidden_size=768, intermediate_size=3072, num_hidden_layers=layers,
                          num_attention_heads=6, num_key_value_heads=2)
    model = source.build()
    (folder / name / "weights").mkdir(parents=True)
    save_file(dict(model.state_dict()), folder / name / "weights" / "model.safetensors")
    write_json(folder / name / "weights" / "config.json", INTERNLM2.write_config(source.config, "float32"))
    facts = dict(state=dict(iteration=1, packs=1, targets=1), max_iterations=1, config={},
                 data=dict(packed_length=1, label_rule="", data=""))
    write_json(folder / name / "trainer.json", facts)
    seal(folder / name)
    return sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters())

checkpoint("small", 1)
total, largest = checkpoint("large", 14)
export_hf(folder / "small", folder / "out_small", None, "llama", torch.float32)  # imports and caches are there now
gc.collect()  # the models that were saved are gone
field = next(l for l in open("/proc/self/status") if l.startswith("VmData"))
SHARD, CONSTANT = 40 * 2**20, 32 * 2**20
mapped = total + 2**20  # the checkpoint's file is mapped, which the system counts although it takes no memory
limit = int(field.split()[1]) * 1024 + mapped + SHARD + largest + CONSTANT
assert total > 4 * (SHARD + largest + CONSTANT), "too small a model to show anything"
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "whole":
    with safe_open(folder / "large/weights/model.safetensors", "pt") as f:
        state = {k: f.get_tensor(k) + 1 for k in f.keys()}
else:
    export_hf(folder / "large", folder / "out", None, "llama", torch.float32, SHARD)
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_memory_is_a_shard_and_a_tensor(tmp_path: Path) -> None:
    """The system itself refuses more than one shard + one tensor + 32 MiB; holding all weights does fail under it."""
    for mode, ok in (("export", True), ("whole", False)):
        words = [sys.executable, "-c", MEMORY, str(tmp_path / mode), mode]
        # a fixed threshold: else malloc keeps some of the models that were saved, and the limit would include it
        environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
        done = subprocess.run(words, capture_output=True, text=True, env=environ)
        assert (done.returncode == 0) == ok, done.stderr[-2000:]


@pytest.mark.processes
def test_eval_and_chat(trained: Path, tiny: Path, corpus: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """The loss of a checkpoint, of its export and by hand are one number; chat prints what generate gives."""
    assert xtuner("convert", "pth_to_hf", tiny, trained, tmp_path / "hf", "--fp32") == 0
    capsys.readouterr()
    tables = []
    for model in (trained, tmp_path / "hf"):
        assert xtuner("eval", "loss", model, corpus, "--max-length", "16") == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    rows = {r.split()[0]: r.split()[1:] for r in tables[0].splitlines()[1:]}
    assert rows.keys() == {"code", "en", "all"}
    from xtuner.data import load_intern_repo_tokenized_dataset

    model, total, count = load_pretrained(tmp_path / "hf"), 0.0, 0
    for file in load_intern_repo_tokenized_dataset(corpus):
        for i in range(file.num_documents):
            for part in torch.from_numpy(file.read_document(i)).split(16):
                with torch.no_grad():
                    losses = torch.nn.functional.cross_entropy(model(part.abs())[:-1], part[1:].abs(), reduction="none")
                total += float(losses[part[1:] > 0].sum())
                count += int((part[1:] > 0).sum())
    assert rows["all"][0] == f"{count:,}"
    assert float(rows["all"][1]) == pytest.approx(total / count, abs=1e-4)
    assert xtuner("eval", "loss", tiny, corpus) == 0
    assert capsys.readouterr().out != tables[0]
    chat = ("chat", tmp_path / "hf", "--prompt", "import", "--template", "plain", "--max-new-tokens", "8")
    assert xtuner(*chat) == 0
    shown = capsys.readouterr().out
    assert xtuner(*chat) == 0
    assert capsys.readouterr().out == shown != "\n"
    assert xtuner(*chat, "--temperature", "1.5", "--seed", "3") == 0
    assert capsys.readouterr().out != shown
    with pytest.raises(ConfigError, match="Did you mean 'internlm2_chat'"):
        xtuner("chat", tmp_path / "hf", "--prompt", "x", "--template", "internlm_chat")
    assert xtuner("plot-loss", trained.parent) == 0
    assert (trained.parent / "loss.png").read_bytes()[:4] == b"\x89PNG"
