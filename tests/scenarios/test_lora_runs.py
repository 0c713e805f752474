"""LoRA from a config to serving: train, resume, export, merge, evaluate, chat; and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.corpus import VOCABULARY
from helpers.lora import lora_config, write_base
from helpers.runs import contents, records
from safetensors.torch import load_file, save_file

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.model import load_pretrained
from xtuner.model.adapters.folder import open_adapter
from xtuner.model.adapters.loading import load_adapted

Command = Callable[..., int]
IDS = torch.arange(3, 60)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model", "internlm2", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def config(tiny: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_config(tiny, tmp_path_factory.mktemp("lora") / "lora.py", base)


def loss_of(capsys: pytest.CaptureFixture[str]) -> float:
    return float(capsys.readouterr().out.splitlines()[-1].split()[2])


@pytest.mark.processes
def test_from_config_to_serving(
    config: Path, base: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path, xtuner: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, other = tmp_path / "run", tmp_path / "other"
    options = ("--cfg-options", "save_steps=5", "lr=2e-2")
    assert xtuner("train", config, "--work-dir", run, *options) == 0
    assert "model.adapter" not in capsys.readouterr().err
    saved = run / "iter_15.pth"
    assert {p.name for p in saved.iterdir()} == {"adapter", "optimizer", "trainer.json", "manifest.json"}
    # resumed from the middle: the same bits
    shutil.copytree(run / "iter_10.pth", other / "iter_10.pth")
    assert xtuner("train", config, "--work-dir", other, "--resume", "auto", *options) == 0
    assert contents(other / "iter_15.pth") == contents(saved)
    # exports: of PEFT and merged, in both layouts; all compute the same
    unmerged = load_adapted(open_adapter(saved), base)
    with torch.no_grad():
        expected = unmerged(IDS)
        assert (load_pretrained(base)(IDS) - expected).abs().max() > 1e-3
    for words in (("--merge",), ("--merge", "--layout", "llama"), (), ("--layout", "llama")):
        name = "".join(words) or "peft"
        assert xtuner("convert", "pth_to_hf", config, saved, tmp_path / name, "--fp32", *words, *options) == 0
    for name in ("--merge", "--merge--layoutllama"):
        with torch.no_grad():
            assert (load_pretrained(tmp_path / name)(IDS) - expected).abs().max() < 1e-5
    found = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert found["target_modules"] == ["wqkv", "wo", "w1", "w3", "w2"]
    assert found["base_model_name_or_path"] == str(base)
    for words, what in (
        ((saved, tmp_path / "x", "--layout", "qwen2"), "no biases of q, k and v, which the qwen2 layout cannot"),
        ((tmp_path / "peft", tmp_path / "x", "--merge"), r"this is an adapter \(LoRA\)"),
        ((base, tmp_path / "x", "--merge"), "has no adapter"),
    ):
        with pytest.raises(ConfigError, match=what):
            xtuner("convert", "pth_to_hf", config, *words)
    with pytest.raises(ConfigError, match="HF_DIR --fp32 --merge"):
        xtuner("convert", "turbomind", saved)
    # evaluation: of the checkpoint, of the base with it, with PEFT's folder, and of the merged model
    losses = []
    capsys.readouterr()
    for words in ((saved,), (base, "--adapter", saved), (base, "--adapter", tmp_path / "peft"), (tmp_path / "--merge",),
                  (base,)):  # fmt: skip
        assert xtuner("eval", "loss", *words[:1], corpus, "--max-length", "64", *words[1:]) == 0
        losses.append(loss_of(capsys))
    assert len(set(losses[:4])) == 1
    assert losses[0] < losses[4] - 0.05
    prompt = ("--prompt", "def", "--max-new-tokens", "4", "--tokenizer", tokenizer_folder, "--template", "plain")
    answers = []
    for words in ((tmp_path / "--merge",), (base, "--adapter", saved)):
        assert xtuner("chat", *words, *prompt) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    # start from the adapter
    assert xtuner("train", config, "--work-dir", tmp_path / "more", *options, f"load_from={saved}") == 0
    assert records(tmp_path / "more")[1]["loss"] < records(run)[1]["loss"] - 0.05
    capsys.readouterr()
    assert xtuner("check-cfg", config, "--cfg-options", f"load_from={saved}", "model.adapter.alpha=16") == 0
    assert "not the model that this adapter was trained in: scale 2.0 → 4.0" in "".join(capsys.readouterr())


@pytest.mark.processes
def test_another_base_is_refused(config: Path, base: Path, corpus: Path, tmp_path: Path, xtuner: Command) -> None:
    """One of the same shape; copies and other divisions into files are the same."""
    run = tmp_path / "run"
    assert xtuner("train", config, "--work-dir", run, "--cfg-options", "max_epochs=1") == 0
    saved = run / (run / "last_checkpoint").read_text().strip()
    moved, tensors = tmp_path / "moved", load_file(base / "model.safetensors")
    moved.mkdir()
    shutil.copy(base / "config.json", moved)
    names = sorted(tensors)
    for i, part in enumerate((names[:5], names[5:])):
        save_file({n: tensors[n] for n in part}, moved / f"part-{i}.safetensors")
    assert xtuner("eval", "loss", moved, corpus, "--adapter", saved, "--max-length", "64") == 0
    other = write_base(tmp_path / "other", "internlm2", seed=5, vocab_size=VOCABULARY)
    words: Any
    key = f"model.pretrained_model_name_or_path={other}"
    for words in (
        ("train", config, "--work-dir", run, "--resume", "auto", "--cfg-options", key),
        ("train", config, "--work-dir", tmp_path / "new", "--cfg-options", key, f"load_from={saved}"),
        ("eval", "loss", other, corpus, "--adapter", saved),
        ("chat", other, "--adapter", saved, "--prompt", "x", "--tokenizer", other),
    ):
        with pytest.raises(ConfigError, match="was trained on another base model") as caught:
            xtuner(*words)
        assert str(base) in caught.value.what
        assert str(base) in caught.value.do
    shutil.copytree(saved, tmp_path / "copy")
    record = tmp_path / "copy" / "adapter" / "adapter.json"
    record.write_text(record.read_text().replace(str(base), str(tmp_path / "gone")))
    with pytest.raises(CheckpointError):  # the manifest knows
        xtuner("convert", "pth_to_hf", config, tmp_path / "copy", tmp_path / "hf", "--merge")


def test_a_format_that_does_not_fit(tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    """check-cfg reports it, with the one that fits."""
    base = write_base(tmp_path / "base", "internlm2", vocab_size=VOCABULARY, intermediate_size=80)
    config = lora_config(tiny, tmp_path / "lora.py", base)
    with pytest.raises(
        ConfigError, match=r"model has rows of 80\n.*frozen_weights\n.*give \"own\", the default, or \"int8\""
    ):
        xtuner("check-cfg", config, "--cfg-options", "model.frozen_weights=nf4")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ("targets=['lm_head']", r"(?s)there is no matrix 'lm_head' in a block.*give train=\[.output.\] to train it"),
        ("targets=['q_porj']", r"there is no matrix 'q_porj'. Did you mean 'q_proj'"),
        ("targets=[]", "targets names no matrix"),
        ("targets=['wqkv','q']", "wqkv contains q"),
        ("rank=65", "rank = 65 is above the smaller side of wqkv, 64"),
        ("rank=0", "rank = 0 is not at least 1"),
        ("dropout=1.0", "dropout = 1.0 is not at least 0 and below 1"),
        ("scaling='rslora'", "scaling = 'rslora' is not"),
        ("train=['embeddings']", "train has no part 'embeddings'. Did you mean 'embedding'"),
        ("rnak=3", "lora has no setting 'rnak'. Did you mean 'rank'"),
    ],
)
def test_settings_that_fit_nothing(settings: str, what: str, config: Path, xtuner: Command) -> None:
    key, _, value = settings.partition("=")
    with pytest.raises(ConfigError, match=what) as caught:
        xtuner("check-cfg", config, "--cfg-options", f"model.adapter.{key}={value}")
    assert "adapter" in f"{caught.value.where}"
