"""tokenizer.json made of tokenizer.model: the ids of the reference and of SentencePiece, read by other libraries."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.corpus import train_tokenizer
from helpers.paths import ROOT, TESTS, reference

from xtuner.data.tokenizer import load_tokenizer
from xtuner.export.tokenizer_json import complete

CHAT = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]


def made(model: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(model, folder / "tokenizer.model")
    complete(folder)
    return folder


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(reference("tokenizer", "internlm2_tokenizer.model"), tmp_path_factory.mktemp("internlm2"))


def test_ids_of_the_reference(internlm2: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(internlm2)
    assert len(theirs) == 92544
    assert theirs.convert_tokens_to_ids(["<unk>", "<s>", "</s>", *CHAT]) == [0, 1, 2, *range(92538, 92544)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    for case in json.loads(reference("tokenizer", "strings.json").read_text()):
        found = theirs(case["text"])
        assert found.keys() == {"input_ids", "attention_mask"}
        assert found["input_ids"] == case["fast"]["ids_add_special"], case["text"]
        assert theirs.encode(case["text"], add_special_tokens=False) == case["fast"]["ids"], case["text"]
        assert theirs.decode(case["fast"]["ids"]) == case["fast"]["decode"], case["text"]
        skipped = theirs.decode(case["fast"]["ids"], skip_special_tokens=True)
        assert skipped == case["fast"]["decode_skip_special"], case["text"]


def test_chats_of_the_reference(internlm2: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(internlm2)
    for case in json.loads(reference("tokenizer", "chat.json").read_text()):
        for form, ask in (("hf_chat_template", False), ("hf_chat_template_gen_prompt", True)):
            options = {"add_generation_prompt": ask}
            assert theirs.apply_chat_template(case["messages"], tokenize=False, **options) == case[form]["text"]
            assert theirs.apply_chat_template(case["messages"], **options)["input_ids"] == case[form]["fast_ids"]


def texts(count: int) -> list[str]:
    """Pieces of this repository's text, and letters, blanks and signs of many scripts thrown together."""
    draw = random.Random(0)
    files = [*TESTS.rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(p.read_text() for p in files).replace("<", "[").replace("UNUSED", "")
    letters = [*"ab 1 \t\n中文éａＥ😀▁ا한", "  ", "aaaa", "ааа", "\u200b", "23"]
    cut = [text[(i := draw.randrange(len(text))) : i + draw.randrange(1, 200)] for _ in range(count)]
    return cut + ["".join(draw.choices(letters, k=draw.randrange(1, 30))) for _ in range(count)]


def test_ids_of_sentencepiece(internlm2: Path) -> None:
    from tokenizers import Tokenizer

    theirs, ours = Tokenizer.from_file(str(internlm2 / "tokenizer.json")), load_tokenizer(internlm2)
    for text in texts(1000):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text


def test_other_models(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Trained here, with and without a blank put before; what there is in tokenizer_config.json stays."""
    import sentencepiece
    from transformers import AutoTokenizer

    prefixed = train_tokenizer(tmp_path / "prefixed", add_dummy_prefix=True)
    for i, model in enumerate((tokenizer_folder, prefixed)):
        folder = tmp_path / str(i)
        folder.mkdir()
        old = {"auto_map": {"AutoTokenizer": ["x.X", None]}, "chat_template": "mine", "tokenizer_class": "X"}
        (folder / "tokenizer_config.json").write_text(json.dumps(old))
        made(model / "tokenizer.model", folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.chat_template == "mine"
        raw = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
        for text in texts(300):
            ids = raw.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == ids, text
            assert theirs.decode(ids) == raw.decode(ids), text
        before = (folder / "tokenizer.json").stat().st_mtime_ns
        (folder / "tokenizer_config.json").write_text(json.dumps({**old, "eos_token": "</s>"}))
        complete(folder)  # a tokenizer.json that is there stays; remote code that is not is no longer named
        assert (folder / "tokenizer.json").stat().st_mtime_ns == before
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert "auto_map" not in config
        assert (config["tokenizer_class"], config["eos_token"]) == ("PreTrainedTokenizerFast", "</s>")
    rewriting = train_tokenizer(tmp_path / "by_default", normalization_rule_name="nmt_nfkc")
    folder = made(rewriting / "tokenizer.model", tmp_path / "left")
    assert [p.name for p in folder.iterdir()] == ["tokenizer.model"]


def test_an_export_generates(internlm2: Path, tmp_path: Path, xtuner: Callable[..., int]) -> None:
    """The folder alone: its chat template, its tokenizer, its weights, the ids at which it stops."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xtuner.export.hf import _copy_tokenizer, _generation
    from xtuner.families import LLAMA
    from xtuner.model import from_scratch
    from xtuner.model.weights import split

    source = from_scratch(
        vocab_size=92544, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in source.build().state_dict().items():
        tensors |= {k: t.contiguous() for k, t in split(name, tensor, LLAMA, source.config).items()}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA.write_config(source.config, "float32")))
    (tmp_path / "given").mkdir()
    shutil.copy(internlm2 / "tokenizer.model", tmp_path / "given")
    stops = _copy_tokenizer(tmp_path / "given", tmp_path, source.config)
    assert stops == [2, 92542]
    (tmp_path / "generation_config.json").write_text(json.dumps(_generation(source.config, stops)))
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [2, 92542]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=3)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
