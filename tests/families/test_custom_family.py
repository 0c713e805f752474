"""A family of models from outside the package (granite.py): from text to a model that transformers loads."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.corpus import VOCABULARY, train_tokenizer
from safetensors.torch import load_file

from xtuner.core.errors import ConfigError
from xtuner.data.chat_template import find_template
from xtuner.data.tokenize.chat_records import read_messages
from xtuner.data.tokenize.read_chunks import Mistake
from xtuner.data.tokenizer import load_tokenizer
from xtuner.families import FAMILIES, INTERNLM2, LLAMA, read_config
from xtuner.families.chat import Message
from xtuner.model import from_scratch, load_pretrained
from xtuner.model.weights import hf_shapes

Command = Callable[..., int]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is def? <|end_of_text|>"},
    {"role": "assistant", "content": "a keyword"},
    {"role": "user", "content": "And import?"},
    {"role": "assistant", "content": "a statement"},
]


@pytest.fixture
def granite(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported as if for the first time; other tests see the shipped families alone."""
    monkeypatch.delitem(sys.modules, "granite", raising=False)
    import granite

    yield granite
    FAMILIES.pop("granite", None)


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A tokenizer that has Granite's special tokens."""
    folder = train_tokenizer(tmp_path / "tokenizer")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    marks = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
    added = {str(VOCABULARY + i): {"content": mark, **flags} for i, mark in enumerate(marks)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return folder


@pytest.mark.processes
def test_a_family_from_outside(
    granite: Any, marked: Path, tiny: Path, tmp_path: Path, xtuner: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenized by its template, trained from a config that imports it, saved, exported under its names, loaded by
    transformers: equal logits, the same conversation in the same ids, the same tokens to stop at."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteForCausalLM

    tokenizer, end = load_tokenizer(marked), VOCABULARY + 2
    (tmp_path / "talk.jsonl").write_text(f"{json.dumps({'messages': TALK})}\n" * 40)
    words = ("--tokenizer", marked, "--output", tmp_path / "data", "--template", "granite.CHAT", "--workers", "2")
    assert xtuner("data", "tokenize", tmp_path / "talk.jsonl", *words) == 0
    (file,) = (tmp_path / "data" / "train").rglob("*.bin")
    tokens = json.loads(file.read_text().splitlines()[0])["tokens"]
    learned = [t for t in tokens if t > 0]
    answers = [[*tokenizer.encode_plain(text), end, *tokenizer.encode("\n")] for text in ("a keyword", "a statement")]
    assert learned == [1, *answers[0], *answers[1]]

    config = tmp_path / "config.py"
    text = "import granite\n" + tiny.read_text()
    for old, new in (
        ("    type=from_scratch,\n", "    type=from_scratch,\n    family=granite.GRANITE.name,\n"),
        (f"vocab_size = {VOCABULARY}", f"vocab_size = {VOCABULARY + 3}"),
        ("PROMPT_TEMPLATE.plain", "PROMPT_TEMPLATE.granite_chat"),
    ):
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    options = [f"dataset_folder={tmp_path / 'data' / 'train'}", f"tokenizer_path={marked}"]
    assert xtuner("train", config, "--work-dir", tmp_path / "w", "--cfg-options", *options) == 0
    again = ("--resume", "--allow-change", "--cfg-options", *options, "max_epochs=2")
    assert xtuner("train", config, "--work-dir", tmp_path / "w", *again) == 0
    checkpoint = tmp_path / "w" / (tmp_path / "w" / "last_checkpoint").read_text().strip()
    masters = load_file(checkpoint / "weights" / "model.safetensors")
    hf = tmp_path / "hf"
    assert xtuner("convert", "pth_to_hf", config, checkpoint, hf, "--fp32", "--cfg-options", *options) == 0

    assert "model.layers.0.self_attn.k_proj.weight" in load_file(hf / "model.safetensors")
    assert "tags: [xtuner, granite, test]" in (hf / "README.md").read_text()
    assert json.loads((hf / "generation_config.json").read_text())["eos_token_id"] == [2, end]
    ours = load_pretrained(hf)
    assert all(tensor.equal(masters[name]) for name, tensor in ours.state_dict().items())
    theirs, report = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert type(theirs) is GraniteForCausalLM
    assert not any(report.values())
    ids = torch.tensor([abs(t) for t in tokens])
    with torch.no_grad():
        assert (theirs.eval()(ids[None]).logits[0] - ours(ids)).abs().max() < 1e-5
    their_tokenizer = AutoTokenizer.from_pretrained(hf)
    safe = [m | {"content": m["content"].removesuffix(" <|end_of_text|>")} for m in TALK]  # there, it ends a turn
    written = [piece for m in safe for piece in granite.CHAT.pieces([Message(m["role"], m["content"])])]
    assert their_tokenizer.apply_chat_template(safe, tokenize=False) == "<s>" + "".join(p.text for p in written)
    assert their_tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, tokenize=False) == (
        "<s>" + granite.CHAT.prompt(TALK[1]["content"], TALK[0]["content"])
    )

    assert xtuner("chat", hf, "--prompt", "And?", "--max-new-tokens", "1") == 0
    assert "no special token" not in capsys.readouterr().err

    FAMILIES.pop("granite")
    with pytest.raises(ConfigError, match=r"no model family 'granite'[\s\S]*give its chat template with --template"):
        xtuner("chat", checkpoint, "--tokenizer", marked, "--prompt", "x")
    with pytest.raises(ConfigError, match=r"no model family 'granite'[\s\S]*import the module that registers it"):
        xtuner("convert", "pth_to_hf", tiny, checkpoint, tmp_path / "again")
    with pytest.raises(ConfigError, match="models of type 'granite' are not supported"):
        load_pretrained(hf)


def test_what_a_family_cannot_be(granite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped names stay; a network that it does not have, and a setting of another family, are refused."""
    with pytest.raises(ConfigError, match="xtuner already has the model family 'llama'"):
        FAMILIES.register("llama", granite.GRANITE)
    network = from_scratch(
        family="granite", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ).config
    for family in (INTERNLM2, LLAMA, granite.GRANITE):
        assert read_config(family.write_config(network, "float32")) == network
    written = granite.GRANITE.write_config(network, "float32")
    with pytest.raises(ConfigError, match=r"logits_scaling = 8\.0 is not supported"):
        read_config(written | {"logits_scaling": 8.0})
    with pytest.raises(ConfigError, match=r"no model family 'granit'.*Did you mean 'granite'"):
        from_scratch(family="granit")
    with pytest.raises(ConfigError, match="from_scratch has no setting 'bias'"):
        from_scratch(family="granite", bias=True)
    with pytest.raises(Mistake, match=r"unknown role 'tool'.* Known: system, user, assistant"):
        read_messages([{"role": "tool", "content": "x"}], granite.CHAT.roles)
    monkeypatch.setitem(granite.Granite.names, "attention_norm", "post_attention_layernorm")  # as the other norm
    with pytest.raises(AssertionError, match="granite: its files store 592 of 600 numbers"):
        hf_shapes(network, granite.GRANITE)
    for name, message in (("granite.START", "is a str, not a ChatTemplate"), ("granite.X", "no attribute 'X'")):
        with pytest.raises(ConfigError, match=message):
            find_template(name)
