"""Hugging Face → the directory of LMDeploy up to 0.9: every byte as its own converter writes it, checks, refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import D64, D128, WEIGHTS, read_files, write_hf_folder
from helpers.paths import EXTERNAL, LMDEPLOY
from safetensors.torch import load_file, save_file

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import verify
from xtuner.export.tokenizer_json import complete_tokenizer
from xtuner.export.turbomind import read_source
from xtuner.export.turbomind_config import flatten_yaml
from xtuner.export.turbomind_support import better_template, template_by_path
from xtuner.families import FAMILIES

Command = Callable[..., int]


@pytest.mark.processes
def test_every_byte_is_lmdeploys(tmp_path: Path, tokenizer_folder: Path, xtuner: Command, capsys: Any) -> None:
    if not (LMDEPLOY / "installed").is_file():
        pytest.skip(f"lmdeploy 0.9.2.post1 is not in {LMDEPLOY}: `make lmdeploy` fetches it (76 MB)")
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 3}, "max_position_embeddings": 4096}
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rms_norm_eps": 1e-6}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 = {"rope_scaling": {**scaling, "original_max_position_embeddings": 16}}
    tied = {"tie_word_embeddings": True}
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}}
    yarn |= {"max_position_embeddings": 4096}
    other_yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": 1.5, "beta_fast": 24}}
    cases: list[tuple[Path, list[str]]] = [
        (write_hf_folder(tmp_path / "internlm2-chat-7b"), ["--tp", "1"]),
        (write_hf_folder(tmp_path / "a", shards=3, **dynamic), ["--tp", "2", "--dtype", "bfloat16"]),
        (
            write_hf_folder(tmp_path / "b", dtype=torch.float32, vocab_size=503, intermediate_size=321, **linear),
            ["--tp", "4"],
        ),
        (
            write_hf_folder(tmp_path / "c", dtype=torch.float16),
            ["--tp", "4", "--dtype", "bfloat16", "--chat-template", "internlm2"],
        ),
        (write_hf_folder(tmp_path / "Llama-2-7b-chat-hf", "llama", vocab_size=3, **D128), ["--tp", "1"]),
        (write_hf_folder(tmp_path / "Meta-Llama-3-8B", "llama", dtype=torch.float32, **dynamic), ["--tp", "2"]),
        (write_hf_folder(tmp_path / "f", "llama", intermediate_size=321, **D64, rope_theta=50000000), ["--tp", "4"]),
        (
            write_hf_folder(tmp_path / "g", "llama", **{**D64, "num_key_value_heads": 1}),
            ["--tp", "4", "--dtype", "float16"],
        ),
        (write_hf_folder(tmp_path / "h", "llama", **D128, max_position_embeddings=64, **llama3), ["--tp", "2"]),
        (write_hf_folder(tmp_path / "internlm3-8b-instruct", "internlm3", **D128, **dynamic), ["--tp", "2"]),
        (write_hf_folder(tmp_path / "Mistral-7B-Instruct-v0.3", "mistral", **D64), ["--tp", "1"]),
        (write_hf_folder(tmp_path / "Mistral-Nemo", "mistral", **D64, head_dim=128), ["--tp", "2"]),
        (write_hf_folder(tmp_path / "Llama-3.2-1B", "llama", **D64, vocab_size=401, **tied, **llama3), ["--tp", "4"]),
        (write_hf_folder(tmp_path / "Qwen2.5-7B", "qwen2", **D128), ["--tp", "1"]),
        (write_hf_folder(tmp_path / "Qwen2-0.5B", "qwen2", shards=2, **D64, **tied, **yarn), ["--tp", "2"]),
        (
            write_hf_folder(
                tmp_path / "QwQ-32B-Preview", "qwen2", torch.float32, **{**D64, "num_key_value_heads": 1}, **other_yarn
            ),
            ["--tp", "4"],
        ),
        (write_hf_folder(tmp_path / "DeepSeek-R1-Distill-Qwen", "qwen2", **D64, **linear), ["--tp", "1"]),
        (write_hf_folder(tmp_path / "Qwen3-0.6B", "qwen3", **D64, head_dim=128, **tied, **yarn), ["--tp", "2"]),
        (
            write_hf_folder(
                tmp_path / "QwQ", "qwen3", **{**D64, "num_key_value_heads": 1}, head_dim=128, attention_bias=True
            ),
            ["--tp", "4", "--dtype", "float16"],
        ),
    ]
    for name in ("merges.txt", "qwen.tiktoken", "README.md", "chat_template.jinja"):
        (tmp_path / "a" / name).write_text(name)  # README.md and .jinja stay behind
    (tmp_path / "a" / "modeling.py").write_text("print('not run')\n")
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path / "b")  # as our export leaves them
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "b" / name).unlink()
    complete_tokenizer(tmp_path / "b")
    theirs = []
    for folder, words in cases:
        options: dict[str, Any] = {w[2:].replace("-", "_"): v for w, v in zip(words[::2], words[1::2], strict=True)}
        options |= {"model_name": "it's: 7b", "model_path": str(folder), "tp": int(options["tp"])}
        theirs.append({**options, "dst_path": str(tmp_path / "old" / folder.name)})
    biased = write_hf_folder(tmp_path / "biased", "llama", **D64, attention_bias=True, mlp_bias=True)
    theirs.append({"model_name": "", "model_path": str(biased), "dst_path": str(tmp_path / "old" / "biased")})
    env = {**os.environ, "PYTHONPATH": str(LMDEPLOY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(EXTERNAL / "lmdeploy_convert.py"), json.dumps(theirs)]
    done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list((tmp_path / "old" / "biased" / WEIGHTS).glob("*.bias"))  # what `test_what_lmdeploy_drops` is about
    for folder, words in cases:
        old, new = tmp_path / "old" / folder.name, tmp_path / "new" / folder.name
        assert xtuner("convert", "turbomind", "it's: 7b", folder, "--dst-path", new, *words) == 0
        ours, expected = read_files(new), read_files(old)
        assert ours.keys() == expected.keys(), folder.name
        for name in expected:
            assert ours[name] == expected[name], f"{folder.name}: {name}"
        verify(new)
        assert xtuner("convert", "turbomind", "--check", old, folder) == 0
        assert "bitwise equal" in capsys.readouterr().out
        for place in (old, new):  # room for the next
            shutil.rmtree(place)


def test_any_head_dim(tmp_path: Path, xtuner: Command, caplog: Any) -> None:
    """What the old converter could not: the internlm2 layout, of which the llama layout says the same numbers."""
    for heads, kv_heads, tp, more in ((4, 2, 2, {}), (8, 2, 4, {"head_dim": 20}), (64, 4, 8, {})):
        shape = {"hidden_size": 384, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}
        made = []
        for layout in ("internlm2", "llama"):
            source = write_hf_folder(tmp_path / f"{layout}-{heads}", layout, **shape)
            target = tmp_path / f"{layout}-{heads}-tm"
            assert xtuner("convert", "turbomind", source, "--dst-path", target, "--tp", tp) == 0
            made.append({n: b for n, b in read_files(target / WEIGHTS).items() if n.endswith(".weight")})
        assert made[0] == made[1]


def test_attention_means_the_same(tmp_path: Path, xtuner: Command) -> None:
    """From the files alone, by TurboMind's rules (neighbours are rotated): the attention of the network."""
    from xtuner.model import load_pretrained
    from xtuner.model.decoder import DocumentLayout

    source = write_hf_folder(
        tmp_path / "hf", hidden_size=48, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1
    )
    assert xtuner("convert", "turbomind", source, "--dst-path", tmp_path / "tm", "--tp", "2", "--dtype", "bf16") == 0
    T, D, heads, kv_heads = 9, 6, 4, 1  # of each of the two ranks
    x = torch.randn(T, 48, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(T)[:, None] * 1e6 ** (-torch.arange(D // 2) * 2 / D)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    total = torch.zeros(T, 48)
    for rank in range(2):

        def matrix(name: str, rank: int = rank) -> torch.Tensor:
            raw = (tmp_path / "tm" / WEIGHTS / f"layers.0.attention.{name}.{rank}.weight").read_bytes()
            return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).float()

        qkv = (x @ matrix("w_qkv").view(48, -1)).view(T, -1, D)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q, k = (torch.view_as_real(torch.view_as_complex(a.unflatten(2, (-1, 2))) * turn).flatten(2) for a in (q, k))
        o = torch.nn.functional.scaled_dot_product_attention(
            *(a.transpose(0, 1) for a in (q, k, v)), is_causal=True, enable_gqa=True
        )
        total += o.transpose(0, 1).reshape(T, -1) @ matrix("wo").view(-1, 48)
    model = load_pretrained(source)
    with torch.no_grad():
        borders = torch.tensor([0, T], dtype=torch.int32)
        layout = DocumentLayout(borders, T, *model.model.rope.table(torch.arange(T), borders, T))
        assert (model.model.layers[0].attention(x, layout) - total).abs().max() < 1e-5


def test_check_names_the_first_difference(tmp_path: Path, xtuner: Command) -> None:
    source = write_hf_folder(tmp_path / "hf")
    good = tmp_path / "tm"
    assert xtuner("convert", "turbomind", "internlm2-chat-7b", source, "--dst-path", good, "--tp", "2") == 0
    config = good / WEIGHTS / "config.yaml"
    older = re.sub(r"  (tokenizer_size|moe_group_num): .*\n", "", config.read_text()) + "  new_key: 1\n"
    config.write_text(older)  # another version's keys
    assert xtuner("convert", "turbomind", source, "--check", good) == 0

    def flip(path: Path, at: int) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    output, w1 = "output.1.weight", "layers.1.feed_forward.w1.0.weight"
    for message, damage in (
        (r"output\.1\.weight differs from the source: number 700 is", lambda d: flip(d / WEIGHTS / output, 1400)),
        (r"w1\.0\.weight is missing", lambda d: (d / WEIGHTS / w1).unlink()),
        (r"w1\.0\.weight is too short: 163838 bytes", lambda d: os.truncate(d / WEIGHTS / w1, 163838)),
        (r"w1\.0\.weight is too long", lambda d: os.truncate(d / WEIGHTS / w1, 163842)),
        (r"layers\.2.* is not of this model", lambda d: (d / WEIGHTS / "layers.2.ffn_norm.weight").touch()),
        (r"tokenizer\.json is not the source's", lambda d: flip(d / "tokenizer.json", 3)),
        (
            r"config\.yaml says model_config\.head_num: 8 where the source gives 4",
            lambda d: (d / WEIGHTS / "config.yaml").write_text(older.replace("head_num: 4", "head_num: 8", 1)),
        ),
        (r"cannot be parsed", lambda d: (d / WEIGHTS / "config.yaml").write_text("x: 1\n")),
        (r"not a converted directory", lambda d: shutil.rmtree(d / WEIGHTS)),
    ):
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        damage(bad)
        with pytest.raises(CheckpointError, match=message):
            xtuner("convert", "turbomind", "--check", bad, source)
        shutil.rmtree(bad)


def test_refusals(tmp_path: Path, xtuner: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf_folder(tmp_path / "hf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")

    def changed(name: str, change: Callable[[Path], Any]) -> Path:
        shutil.copytree(source, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def settings(**hf: Any) -> Callable[[Path], Any]:
        text = json.dumps({**json.loads((source / "config.json").read_text()), **hf})
        return lambda d: (d / "config.json").write_text(text)

    def large(folder: Path) -> None:
        tensors = load_file(folder / "model-0.safetensors")
        tensors["output.weight"][7, 7] = 70000
        save_file(tensors, folder / "model-0.safetensors")

    cases = [
        (ConfigError, r"3 GPUs cannot share.*sizes that work: 1, 2, 4", source, ["--tp", "3"]),
        (ConfigError, r"8 GPUs cannot share", source, ["--tp", "8"]),
        (ConfigError, r"0 GPUs cannot share", source, ["--tp", "0"]),
        (ConfigError, r"neither tokenizer", changed("n", lambda d: (d / "tokenizer.json").unlink()), []),
        (CheckpointError, r"which is missing", changed("w", lambda d: (d / "model-0.safetensors").unlink()), []),
        (CheckpointError, r"config\.json is missing", changed("c", lambda d: (d / "config.json").unlink()), []),
        (CheckpointError, r"\[400, 512\] on disk and \[401, 512\]", changed("v", settings(vocab_size=401)), []),
        (CheckpointError, r"are not in the model", changed("l", settings(num_hidden_layers=1)), []),
        (ConfigError, r"biases", changed("b", settings(bias=True)), []),
        (ConfigError, r"type 'bert' are not supported", changed("t", settings(model_type="bert")), []),
        (ConfigError, r"output\.0\.weight has numbers that fp16 can", changed("f", large), ["--dtype", "fp16"]),
        (ConfigError, r"not an earlier export", source, ["--dst-path", tmp_path / "mine"]),
        (ConfigError, r"the target is the source itself", source, ["--dst-path", source]),
        (ConfigError, r"the target is the source itself", source, ["--dst-path", source / "tm"]),
        (ConfigError, r"neither a folder here", tmp_path / "nowhere", []),
    ]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for error, message, folder, words in cases:
        with pytest.raises(error, match=f"(?s){message}"):
            xtuner("convert", "turbomind", "internlm2-chat-7b", folder, *words)
    assert sorted(tmp_path.rglob("*")) == before
    assert xtuner("convert", "turbomind", changed("x", large)) == 0  # bf16 holds it; DST is ./workspace
    assert xtuner("convert", "turbomind", source) == 0  # an earlier one is replaced
    assert verify(tmp_path / "workspace")["kind"] == "turbomind"


def test_what_lmdeploy_drops(tmp_path: Path) -> None:
    """Networks that its converter makes others of without a message: rejected before weights or tokenizer are read."""
    shape = {"vocab_size": 400, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 128, **D128}
    yarn = {"rope_type": "yarn", "factor": 4.0, "truncate": False}
    some = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    checkpoint = {"xtuner_family": "qwen3", "xtuner_network": {"qk_norm": True}, "bias": False}
    pytorch = r".*PyTorch engine of LMDeploy 0.18: .*--backend pytorch"
    for family, hf, message in (
        ("internlm2", {"bias": True}, rf"biases in attention, which .*json: bias{pytorch}"),
        ("llama", {"attention_bias": True}, rf"biases in attention, .* LlamaForC.*json: attention_bias{pytorch}"),
        ("llama", {"mlp_bias": True}, rf"biases in the MLP, .*json: mlp_bias{pytorch}"),
        ("internlm3", {"qkv_bias": True}, rf"biases of q, k and v alone, .*json: qkv_bias{pytorch}"),
        ("internlm3", {"qkv_bias": True, "bias": True}, r"biases in the MLP, biases in attention, .*json: bias"),
        ("mistral", {"sliding_window": 8}, rf"sliding windows, .*json: sliding_window{pytorch}"),
        ("qwen2", {**some, "max_window_layers": 0}, rf"sliding windows, .*json: use_sliding_window{pytorch}"),
        ("qwen3", some, r"sliding windows, .*json: use_sliding_window.*windows in some layers, such as vLLM"),
        ("qwen2", {"rope_scaling": yarn}, rf"yarn with borders that are not rounded, .*json: rope_scaling{pytorch}"),
        ("interns1", {"text_config": {"model_type": "qwen3", **shape}}, r"has a qwen3 network in another form.*HF_DIR"),
        ("internlm2", checkpoint, r"has a qwen3 network in another form.*pth_to_hf CONFIG .* HF_DIR"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **shape, **hf}))
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            read_source(tmp_path)


def test_yarn_as_config_json_says_it(tmp_path: Path, xtuner: Command) -> None:
    """Where lmdeploy's quotient of two contexts is another factor, as in Qwen2.5's instructions, and where it reads
    neither mscale nor the names of transformers 5."""
    contexts = {"max_position_embeddings": 1024, **D64}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    new = {"rope_theta": 5e5, "rope_type": "yarn", "factor": 2, "mscale": 1.0, "mscale_all_dim": 0.5}
    factor, attention, base = [], [], []
    for name, more in (("a", {"rope_scaling": yarn}), ("b", {"rope_theta": None, "rope_parameters": new})):
        source = write_hf_folder(tmp_path / name, "qwen2", **contexts, **more)
        assert xtuner("convert", "turbomind", source, "--dst-path", tmp_path / "tm") == 0
        rope = flatten_yaml((tmp_path / "tm" / WEIGHTS / "config.yaml").read_text())
        assert rope["attention_config.rope_param.max_position_embeddings"] == "1024"
        factor.append(float(rope["attention_config.rope_param.factor"]))
        attention.append(float(rope["attention_config.rope_param.attention_factor"]))
        base.append(float(rope["attention_config.rope_param.base"]))
    assert (factor, base) == ([4.0, 2.0], [1e6, 5e5])
    assert attention == pytest.approx([1 + 0.1 * log(4), (1 + 0.1 * log(2)) / (1 + 0.05 * log(2))])


def test_what_is_told(tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """An ignored name, a chat model without its chat template, a head size that TurboMind lacks, too many ids."""
    source = write_hf_folder(
        tmp_path / "hf", hidden_size=40, num_attention_heads=4, num_key_value_heads=4, vocab_size=3
    )
    added = {"id": 4, "content": "<|im_start|>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": [added]}))
    assert xtuner("convert", "turbomind", "llama-7b", source, "--dst-path", tmp_path / "tm") == 0
    told = capsys.readouterr().err
    base = "chat template: base (none), by the path; for chats give --chat-template internlm2"
    for words in ("the name llama-7b is only written to config.yaml", "head_dim is 10", base, "has 5 ids"):
        assert words in told
    shutil.copytree(source, tmp_path / "qwen2")
    assert xtuner("convert", "turbomind", tmp_path / "qwen2", "--dst-path", tmp_path / "tm") == 0
    other = "chat template: qwen, which this tokenizer has no marks of, by the path"
    assert f"{other}; for chats give --chat-template internlm2" in capsys.readouterr().err
    words = ("turbomind", source, "--dst-path", tmp_path / "tm", "--chat-template", "base")
    assert xtuner("convert", *words) == 0  # it was asked for
    assert "chat template" not in capsys.readouterr().err
    assert xtuner("convert", "turbomind", "llama-7b", source, "--dst-path", tmp_path / "tm") == 0
    values = flatten_yaml((tmp_path / "tm" / WEIGHTS / "config.yaml").read_text())
    names = ("tokenizer_size", "model_name", "chat_template", "weight_type")
    assert [values[f"model_config.{n}"] for n in names] == ["3", "llama-7b", "base", "bfloat16"]
    paths = ["internlm/internlm2-chat-7b", "/x/InternLM2-Math-20b", "/x/internlm2-7b", "/x/chat", "./hf"]
    assert [template_by_path(p) for p in paths] == ["internlm2", "internlm2", "base", "base", "base"]
    for template, family, chat, better in (
        ("base", "qwen3", "qwen_chat", "qwen3"),
        ("qwen2d5", "qwen3", "qwen_chat", ""),
        ("qwen", "qwen2", "deepseek_r1_chat", "deepseek-r1"),
        ("llama2", "llama", "llama3_chat", "llama3"),
        ("llama2", "llama", "", ""),
        ("base", "internlm3", "internlm2_chat", "internlm3"),
    ):
        assert better_template(template, FAMILIES[family], chat) == better


MEMORY = """
import json, resource, sys
from pathlib import Path
import torch
from safetensors import safe_open
from helpers.checkpoints import write_hf_folder
from xtuner.export import turbomind

folder = Path(sys.argv[1])
turbomind.BLOCK = 2**20
shape = dict(hidden_size=768, num_attention_heads=6, num_key_value_heads=6, intermediate_size=3072, vocab_size=8000)
small = turbomind.read_source(write_hf_folder(folder / "small", **shape, num_hidden_layers=1))
large = write_hf_folder(folder / "large", dtype=torch.float32, **shape, num_hidden_layers=14)
turbomind.convert_to_turbomind(small, folder / "out")  # imports and caches are there now
total = (large / "model-0.safetensors").stat().st_size  # is mapped: counted by the system, although it takes no memory
wqkv, CONSTANT = 3 * 768 * 768 * 4, 16 * 2**20
held = 4 * turbomind.BLOCK + 3 * wqkv + CONSTANT
assert total > 8 * held, "too small a model to show anything"
field = next(l for l in open("/proc/self/status") if l.startswith("VmData"))
limit = int(field.split()[1]) * 1024 + total + 2**20 + held
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "whole":
    with safe_open(large / "model-0.safetensors", "pt") as f:
        state = {k: (f.get_tensor(k) + 1, f.get_tensor(k) + 2) for k in f.keys()}  # whether a map counts or not
else:
    turbomind.convert_to_turbomind(turbomind.read_source(large), folder / "out", 2)
    turbomind.compare_with_source(turbomind.read_source(large), folder / "out")
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_memory_is_a_few_blocks(tmp_path: Path) -> None:
    """The system itself refuses more than four blocks, three wqkv and 16 MiB; holding all weights fails under it."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for mode, ok in (("convert", True), ("whole", False)):
        words = [sys.executable, "-c", MEMORY, str(tmp_path / mode), mode]
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        assert (done.returncode == 0) == ok, done.stderr[-2000:]
        shutil.rmtree(tmp_path / mode)
