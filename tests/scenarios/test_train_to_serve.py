"""From a trained checkpoint to what serves it: both layouts, transformers, TurboMind, and back into training.

Head size 128, which LMDeploy's last converter takes for granted in the internlm2 layout.
"""

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
from helpers.checkpoints import WEIGHTS, read_files
from helpers.corpus import VOCABULARY
from helpers.paths import EXTERNAL, LMDEPLOY
from safetensors.torch import load_file

from xtuner.cli.main import main
from xtuner.core.errors import ConfigError
from xtuner.model import load_pretrained
from xtuner.model.generate import generate

pytestmark = pytest.mark.processes

Command = Callable[..., int]
SHAPE = ["hidden_size=256", "model.num_attention_heads=2", "model.num_key_value_heads=1", "num_layers=2"]
OPTIONS = ["--cfg-options", *SHAPE, "custom_hooks=[]"]
LAYOUTS = ("internlm2", "llama")


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`iter.pth`, and of it `LAYOUT` (bf16) and `LAYOUT.fp32`."""
    folder = tmp_path_factory.mktemp("served")
    assert main(["train", str(tiny), "--work-dir", str(folder / "w"), *OPTIONS, "max_epochs=3"]) == 0
    last = folder / "w" / (folder / "w" / "last_checkpoint").read_text().strip()
    last.rename(folder / "iter.pth")
    for layout in LAYOUTS:
        for name, words in ((layout, []), (f"{layout}.fp32", ["--fp32"])):
            target = [str(tiny), str(folder / "iter.pth"), str(folder / name), "--layout", layout, *words]
            assert main(["convert", "pth_to_hf", *target]) == 0
    return folder


def test_transformers_answers_with_our_tokens(folder: Path) -> None:
    """Greedy, token for token, from the weights of the checkpoint and of each export."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder / "llama.fp32").eval()
    models = [load_pretrained(p) for p in (folder / "iter.pth" / "weights", *(folder / f"{n}.fp32" for n in LAYOUTS))]
    draw = torch.Generator().manual_seed(0)
    for length in (1, 7, 30):
        prompt = torch.randint(3, VOCABULARY, (1, length), generator=draw)
        options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        answer = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, length:].tolist()
        assert len(answer) == 24
        for model in models:
            assert list(generate(model, prompt[0].tolist(), 24)) == answer


def test_turbomind_from_both_layouts(folder: Path, tmp_path: Path, xtuner: Command) -> None:
    """The same weights from either; every file as LMDeploy's own converter writes it from the same export."""
    trees = []
    for layout in LAYOUTS:
        target = tmp_path / layout
        words = ["internlm2-chat-7b", folder / layout, "--dst-path", target, "--chat-template", "base"]
        assert xtuner("convert", "turbomind", *words) == 0
        assert xtuner("convert", "turbomind", folder / layout, "--check", target) == 0
        trees.append(read_files(target))
    weights = [{n: b for n, b in t.items() if n.endswith(".weight")} for t in trees]
    assert weights[0] == weights[1]
    if not (LMDEPLOY / "installed").is_file():
        pytest.skip(f"lmdeploy 0.9.2.post1 is not in {LMDEPLOY}: `make lmdeploy` fetches it (76 MB)")
    theirs = [
        dict(model_name="internlm2-chat-7b", model_path=str(folder / layout), dst_path=str(tmp_path / f"old.{layout}"))
        for layout in LAYOUTS
    ]
    env = {**os.environ, "PYTHONPATH": str(LMDEPLOY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(EXTERNAL / "lmdeploy_convert.py"), json.dumps(theirs)]
    done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for layout, ours in zip(LAYOUTS, trees, strict=True):
        expected = read_files(tmp_path / f"old.{layout}")
        assert expected == ours, layout
        assert len([n for n in expected if n.startswith(WEIGHTS.as_posix())]) == 18  # 17 of weights


def test_training_starts_from_either_layout(folder: Path, tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    """`load_from`, and `from_pretrained`: the same first loss and the same end, bit for bit, as from the checkpoint."""
    ends = []
    sources = {name: [f"load_from={folder / name}"] for name in ("iter.pth", "internlm2.fp32", "llama.fp32")}
    for name, options in sources.items():
        assert xtuner("train", tiny, "--work-dir", tmp_path / name, *OPTIONS, *options) == 0
        (end,) = (tmp_path / name).glob("iter_*.pth")
        ends.append(load_file(end / "weights" / "model.safetensors"))
        (first, *_) = next((tmp_path / name).glob("*/vis_data/scalars.json")).read_text().splitlines()
        ends[-1]["loss"] = torch.tensor(json.loads(first)["loss"], dtype=torch.float64)
    for other in ends[1:]:
        assert all(other[name].equal(value) for name, value in ends[0].items())
    assert xtuner("train", tiny, "--work-dir", tmp_path / "new", *OPTIONS) == 0
    (first, *_) = next((tmp_path / "new").glob("*/vis_data/scalars.json")).read_text().splitlines()
    assert json.loads(first)["loss"] != float(ends[0]["loss"])


def test_code_in_a_folder_is_never_run(folder: Path, tiny: Path, tmp_path: Path, xtuner: Command, corpus: Path) -> None:
    """A folder whose config and tokenizer name code of its own: everything reads it, nothing runs it."""
    marker, evil = tmp_path / "marker", tmp_path / "evil"
    shutil.copytree(folder / "internlm2.fp32", evil, ignore=shutil.ignore_patterns("manifest.json"))
    for name in ("configuration_internlm2", "modeling_internlm2", "tokenization_internlm2", "conversation"):
        (evil / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    for name, keys in (
        ("config.json", {"AutoConfig": "configuration_internlm2.C", "AutoModelForCausalLM": "modeling_internlm2.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_internlm2.T", None]}),
    ):
        settings = json.loads((evil / name).read_text())
        (evil / name).write_text(json.dumps({**settings, "auto_map": keys}))
    pretrained = f"tokenizer_path={evil}"
    runs: list[tuple[Any, ...]] = [
        ("eval", "loss", evil, corpus),
        ("chat", evil, "--prompt", "x", "--template", "plain", "--max-new-tokens", "2"),
        ("convert", "turbomind", evil, "--dst-path", tmp_path / "tm"),
        ("convert", "weights", evil, tmp_path / "w.safetensors"),
        ("convert", "pth_to_hf", tiny, evil, tmp_path / "hf", "--cfg-options", pretrained),
        ("train", tiny, "--work-dir", tmp_path / "t", *OPTIONS, f"load_from={evil}", pretrained, "max_length=128"),
    ]
    for words in runs:
        assert xtuner(*words) == 0, words
    assert not marker.exists()
    assert "auto_map" not in (tmp_path / "hf" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "hf" / "tokenizer_config.json").read_text()


def test_a_tokenizer_that_does_not_fit(folder: Path, tiny: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """More ids than rows are refused before anything is written; one that is not there, too; none at all is told."""
    export = ("convert", "pth_to_hf", tiny, folder / "iter.pth", tmp_path / "hf", "--cfg-options")
    large = tmp_path / "large"
    shutil.copytree(folder / "llama", large)
    added = {"added_tokens_decoder": {str(VOCABULARY + 6): {"content": "<|im_start|>", "special": True}}}
    (large / "tokenizer_config.json").write_text(json.dumps(added))
    for options, message in (
        ([f"tokenizer_path={large}"], "the tokenizer has 407 ids, the embedding 400 rows"),
        ([f"tokenizer_path={tmp_path / 'nowhere'}"], "nowhere"),
        ([f"tokenizer_path={folder / 'iter.pth'}"], r"neither tokenizer\.model nor tokenizer\.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            xtuner(*export, *options)
        assert not (tmp_path / "hf").exists()
    capsys.readouterr()
    assert xtuner(*export, "tokenizer=None") == 0
    assert "names no tokenizer" in capsys.readouterr().err
