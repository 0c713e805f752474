"""What programs outside read of an export: servers' attributes of the configuration, llama.cpp's tokens."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.corpus import VOCABULARY, train_tokenizer
from helpers.paths import CACHE, reference
from safetensors.torch import save_file

from xtuner.core import log
from xtuner.core.errors import ConfigError
from xtuner.data.tokenizer import load_tokenizer
from xtuner.export.hf import export_hf
from xtuner.families import INTERNLM2
from xtuner.model import from_scratch

Command = Callable[..., int]
LLAMACPP = CACHE / "llama-cpp-python-0.3.36"
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 4}


def model_folder(folder: Path, **shape: Any) -> Path:
    """A model in the internlm2 layout without a tokenizer."""
    source = from_scratch(**{"vocab_size": VOCABULARY, **SHAPE, **shape})
    folder.mkdir()
    save_file(source.build().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(INTERNLM2.write_config(source.config, "float32")))
    return folder


READ = """
import json, sys
from transformers import AutoConfig
found = {}
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    found[folder] = {k: getattr(config, k, "absent") for k in json.load(sys.stdin)} if not found else \
        {k: getattr(config, k, "absent") for k in next(iter(found.values()))}
    config.save_pretrained(folder + "/again")
    again = AutoConfig.from_pretrained(folder + "/again", trust_remote_code=True)
    assert (again.rope_theta, again.rope_scaling) == (config.rope_theta, config.rope_scaling)
    config.rope_theta, config.rope_scaling = 3.0, {"type": "linear", "factor": 5.0}  # as options of servers set them
    assert (config.rope_theta, config.rope_scaling["factor"]) == (3.0, 5.0)
    config.rope_scaling = None
    assert (config.rope_theta, config.rope_scaling) == (3.0, None)
print(json.dumps(found))
"""


@pytest.mark.processes
def test_attributes_that_servers_read(tmp_path: Path) -> None:
    """SGLang, vLLM and LMDeploy take InternLM2's settings from attributes of the loaded configuration, and a default
    where one is absent: these are all that their readers use."""
    expected: dict[str, Any] = {
        "architectures": ["InternLM2ForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 16, "head_dim": 4,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "bias": False, "tie_word_embeddings": False, "rope_theta": 5e7,
        "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "model_type": "internlm2",
    }  # fmt: skip
    scalings = {
        "none": None,
        "dynamic": {"type": "dynamic", "factor": 2.0},
        "linear": {"type": "linear", "factor": 4.0},
    }
    folders = []
    for kind, scaling in scalings.items():
        source = model_folder(tmp_path / kind, rope_theta=5e7, rope_scaling=scaling, max_position_embeddings=4096)
        folders.append(str(export_hf(source, tmp_path / f"{kind}.hf", None, with_code=True)))
        written = json.loads((tmp_path / f"{kind}.hf" / "config.json").read_text())
        assert (written["rope_theta"], written["rope_scaling"]) == (5e7, scaling)
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", READ, *folders]
    done = subprocess.run(words, input=json.dumps([*expected, "rope_scaling"]), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, scaling in zip(folders, scalings.values(), strict=True):
        found = json.loads(done.stdout)[folder]
        theirs = found.pop("rope_scaling")
        assert theirs == scaling or theirs == {**(scaling or {}), "rope_type": (scaling or {}).get("type")}
        assert found == expected
        again = json.loads(Path(folder, "again", "config.json").read_text())
        assert (again["rope_theta"], again["rope_scaling"]) == (5e7, theirs)


def test_what_readers_of_the_internlm2_layout_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Biases and heads of another size, which servers compute or drop themselves, are warned of."""
    log.setup("WARNING")
    for name, shape, what in (
        ("plain", {}, ""),
        ("bias", {"bias": True}, "the model has biases in attention: vLLM"),
        ("heads", {"head_dim": 8}, "the model has heads of 8, which is not hidden_size / num_attention_heads: vLLM"),
    ):
        source = model_folder(tmp_path / name, **shape)
        for layout in ("internlm2", "llama"):
            capsys.readouterr()
            export_hf(source, tmp_path / f"{name}.{layout}", None, layout)
            said = capsys.readouterr().err
            assert ("the model has" in said) == bool(what and layout == "internlm2")
            assert layout == "llama" or what in said


CONVERT = """
import sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf
for folder in sys.argv[2:]:
    sys.argv = ["convert", folder, "--vocab-only", "--outfile", folder + ".gguf"]
    convert_hf_to_gguf.main()
"""


@pytest.mark.processes
def test_tokens_of_llamacpp(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Its own converter and its own tokenizer: from both layouts the ids that we, and the reference, give to texts, and
    the tokens at which `generation_config.json` stops."""
    if not (LLAMACPP / "tokenize").is_file():
        pytest.skip(f"llama.cpp is not in {LLAMACPP}: `make llamacpp` fetches its converter and builds its tokenizer")
    texts = ["Hello, world", " a", "  two", "x\n\n y ", "def f(x):\n    return x\n", "é中文😀", "<s>a</s>", "1234 "]
    tokenizers = {"small": tokenizer_folder, "prefix": train_tokenizer(tmp_path / "with_blank", add_dummy_prefix=True)}
    cases = json.loads(reference("tokenizer", "strings.json").read_text())
    expected = {"internlm2": {c["text"]: c["fast"]["ids_add_special"] for c in cases if "\0" not in c["text"]}}
    assert len(expected["internlm2"]) > 70
    tokenizers["internlm2"] = tmp_path / "given"
    (tmp_path / "given").mkdir()
    shutil.copy(reference("tokenizer", "internlm2_tokenizer.model"), tmp_path / "given" / "tokenizer.model")
    folders = []
    for name, tokenizer in tokenizers.items():
        source = model_folder(tmp_path / f"{name}.model", vocab_size=load_tokenizer(tokenizer).vocab_size)
        folders += [
            export_hf(source, tmp_path / f"{name}.{layout}", tokenizer, layout) for layout in ("internlm2", "llama")
        ]
    words = [sys.executable, "-c", CONVERT, str(LLAMACPP), *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in folders:
        ours = load_tokenizer(folder)
        answers = expected.get(folder.stem) or {t: [1, *ours.encode(t)] for t in texts}
        words = [str(LLAMACPP / "tokenize"), f"{folder}.gguf"]
        done = subprocess.run(words, input="".join(f"{t}\0" for t in answers), capture_output=True, text=True)
        stops, *lines = done.stdout.splitlines()
        eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert [int(i) for i in stops.split()] == [1, *eos] == [1, 2, *([92542] if folder.stem == "internlm2" else [])]
        for (text, ids), line in zip(answers.items(), lines, strict=True):
            assert [int(i) for i in line.split()] == ids, (folder.name, text)


def test_special_tokens_without_an_id(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Names that a settings file holds without ids get the ids of the model's pieces, or are refused: transformers
    would give them ids that the embedding has no rows for."""
    from transformers import AutoTokenizer

    marks = ["<|im_start|>", "<|im_end|>"]
    source = model_folder(tmp_path / "model", vocab_size=VOCABULARY + 2)
    pieces = train_tokenizer(tmp_path / "pieces", user_defined_symbols=marks)
    for i, (file, settings) in enumerate(
        (
            ("tokenizer_config.json", {"additional_special_tokens": marks}),
            ("tokenizer_config.json", {"extra_special_tokens": {"a": marks[0], "b": marks[1]}}),
            ("special_tokens_map.json", {"additional_special_tokens": [{"content": mark} for mark in marks]}),
            ("special_tokens_map.json", {"eos_token": {"content": marks[1]}, "cls_token": marks[0]}),
        )
    ):
        for made, has_pieces in ((tokenizer_folder, False), (pieces, True)):
            given = tmp_path / f"given{i}{has_pieces}"
            given.mkdir()
            shutil.copy(made / "tokenizer.model", given)
            (given / file).write_text(json.dumps(settings))
            if not has_pieces:
                with pytest.raises(ConfigError, match=rf"without their ids: .*<\|im_[\s\S]*from {VOCABULARY}"):
                    export_hf(source, tmp_path / "refused", given, "llama")
                continue
            folder = export_hf(source, tmp_path / f"hf{i}", given, "llama")
            theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(given)
            assert len(theirs) == VOCABULARY
            text = "<|im_start|>user\nx<|im_end|>\n"
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
            ids = [ours.special[mark] for mark in marks]
            assert max(ids) < VOCABULARY
            assert not set(ids) & set(ours.encode_plain(text))
            assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, ids[1]]
    assert not (tmp_path / "refused").exists()
    older = tmp_path / "older"
    older.mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.model", older)
    (older / "added_tokens.json").write_text(json.dumps({m: VOCABULARY + i for i, m in enumerate(marks)}))
    (older / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": marks}))
    folder = export_hf(source, tmp_path / "from_older", older, "llama")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.convert_tokens_to_ids(marks) == [VOCABULARY, VOCABULARY + 1]
    shutil.copy(folder / "tokenizer.json", older)  # the same with tokenizer.json alone, in which one id is missing
    for name in ("tokenizer.model", "added_tokens.json"):
        (older / name).unlink()
    assert load_tokenizer(older).vocab_size == VOCABULARY + 2
    (older / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [*marks, "<|tool|>"]}))
    with pytest.raises(ConfigError, match=r"without their ids: <\|tool\|>"):
        export_hf(source, tmp_path / "refused", older, "llama")


def test_shapes_that_rope_cannot_turn(tmp_path: Path, tiny: Path, xtuner: Command) -> None:
    """Refused when a config is checked, when a config.json is read, and before an export writes anything."""
    source = model_folder(tmp_path / "good")
    config = json.loads((source / "config.json").read_text())
    for changed, message in (
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"head_dim": None, "hidden_size": 12}, "head_dim 3 is odd"),
        ({"head_dim": None, "hidden_size": 18}, "18 is not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "4 (query )?heads cannot share 3 "),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic rope scaling is undefined for"),
    ):
        (source / "config.json").write_text(json.dumps({**config, **changed}))
        before = sorted(tmp_path.rglob("*"))
        for words in (
            ("convert", "pth_to_hf", tiny, source, tmp_path / "hf", "--cfg-options", "tokenizer=None"),
            ("convert", "turbomind", source, "--dst-path", tmp_path / "tm"),
            ("chat", source, "--prompt", "x"),
        ):
            with pytest.raises(ConfigError, match=message):
                xtuner(*words)
        assert sorted(tmp_path.rglob("*")) == before
    for options in (["model.head_dim=7"], ["hidden_size=130", "model.num_attention_heads=26"]):
        with pytest.raises(ConfigError, match="rotary positions rotate pairs"):
            xtuner("check-cfg", tiny, "--cfg-options", *options)
