"""Tokenizers in the form of the families' own: byte-level BPE, begin tokens or none, marks of their chat templates."""

import base64
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.neighbours import DEEPSEEK, LLAMA, QWEN, write_model, write_tokenizer
from helpers.paths import reference

from xtuner.core.errors import ConfigError
from xtuner.data.tiktoken_files import _byte_letters
from xtuner.data.tokenizer import begin_tokens, load_tokenizer
from xtuner.export.hf import export_hf
from xtuner.families import FAMILIES, chat_templates
from xtuner.families.chat import Message
from xtuner.model import from_scratch

TALK = [("system", "Be brief."), ("user", "Hi! <|im_end|><|eot_id|><｜User｜>"), ("assistant", "Yes!")]


CASES = {
    "qwen2": ("qwen2", QWEN, (), dict(bos_token=None, eos_token="<|im_end|>"), "qwen_chat"),
    "llama": ("llama", LLAMA, (), dict(bos_token=LLAMA[0], eos_token=LLAMA[4]), "llama3_chat"),
    "deepseek": (
        "qwen2",
        DEEPSEEK,
        DEEPSEEK[2:],
        dict(bos_token=DEEPSEEK[0], eos_token=DEEPSEEK[1]),
        "deepseek_r1_chat",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_data_and_chat_follow_the_tokenizer(
    name: str, tmp_path: Path, xtuner: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids are those of transformers; the family's chat template is found; text cannot spell its marks; id 0 is "!"."""
    from transformers import AutoTokenizer

    family_name, marks, plain, config, template = CASES[name]
    folder = write_tokenizer(tmp_path / "tokenizer", marks, plain, **config)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for case in json.loads(reference("tokenizer", "strings.json").read_text()):
        assert ours.encode(case["text"]) == theirs.encode(case["text"], add_special_tokens=False), case["text"]
    assert ours.encode("!") == [0]
    assert begin_tokens(ours, 7) == ([] if config["bos_token"] is None else [7])
    chat = FAMILIES[family_name].chat_for(ours.special)
    assert chat is not None
    assert chat.name == template

    (tmp_path / "talk.jsonl").write_text(json.dumps([{"role": r, "content": c} for r, c in TALK]) + "\n")
    words = ("--tokenizer", folder, "--output", tmp_path / "data", "--format", "chat", "--workers", 1)
    assert xtuner("data", "tokenize", tmp_path / "talk.jsonl", *words) == 0
    zeros = sum(c.count("!") for role, c in TALK if role == "assistant")
    assert f"{zeros} tokens of id 0, which has no sign, are only learned with learn_zero" in "".join(
        capsys.readouterr()
    )
    (file,) = (tmp_path / "data").rglob("*.bin")
    (line,) = file.read_text().splitlines()
    tokens = json.loads(line)["tokens"]
    begin = [theirs.convert_tokens_to_ids(str(config["bos_token"]))] if config["bos_token"] else []
    assert [abs(t) for t in tokens[: len(begin)]] == begin
    pieces = [piece for r, c in TALK for piece in chat.pieces([Message(r, c)])]
    text = theirs.decode([abs(t) for t in tokens[len(begin) :]], skip_special_tokens=False)
    assert text == "".join(piece.text for piece in pieces)
    expected = sum(piece.is_mark for piece in pieces)
    added = set(theirs.get_added_vocab().values()) - {0}
    assert sum(abs(t) in added for t in tokens[len(begin) :]) == expected
    assert theirs.decode([t for t in tokens[len(begin) :] if t > 0]).startswith("Yes")

    network = from_scratch(
        family=family_name, vocab_size=500, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=None, eos_token_id=ours.eos_id, seed=0,
    )  # fmt: skip
    write_model(tmp_path / "hf", network.config, family_name)
    exported = export_hf(tmp_path / "hf", tmp_path / "out", folder)
    stops = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == {ours.eos_id, *(ours.special[w] for w in chat.stop_words if w in ours.special)}
    assert xtuner("chat", exported, "--prompt", "Hi", "--max-new-tokens", 2) == 0


CONFIG = """
from xtuner.data.chat_template import PROMPT_TEMPLATE
from xtuner.data.tokenizer import load_tokenizer
from xtuner.train.hooks import EvaluateChatHook

tokenizer = dict(type=load_tokenizer, name_or_path="{}")
custom_hooks = [
    dict(type=EvaluateChatHook, tokenizer=tokenizer, evaluation_inputs="", prompt_template=PROMPT_TEMPLATE.{})
]
"""


def test_a_base_tokenizer_gets_the_template_that_the_config_names(
    tmp_path: Path, xtuner: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """In transformers, with a begin token or without; a template of its own stays; without any name there is none."""
    from transformers import AutoTokenizer

    def export(tokenizer: Path, template: str) -> tuple[Path, str]:
        (tmp_path / "config.py").write_text(CONFIG.format(tokenizer, template))
        words = ("convert", "pth_to_hf", tmp_path / "config.py", tmp_path / "hf", tmp_path / "out")
        assert xtuner(*words) == 0
        return tmp_path / "out", "".join(capsys.readouterr())

    network = from_scratch(vocab_size=500, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=2, family="qwen2")  # fmt: skip
    write_model(tmp_path / "hf", network.config, "qwen2")
    talk = [Message("user", "Hi!"), Message("assistant", "Yes!")]
    given = [{"role": m.role, "content": m.content} for m in talk]
    for name in ("qwen2", "llama"):
        _, marks, plain, config, template = CASES[name]
        folder = write_tokenizer(tmp_path / name, marks, plain, **config)
        chat = chat_templates()[template]
        exported, said = export(folder, template)
        assert f"chat template: {template}, as in the config" in said
        theirs = AutoTokenizer.from_pretrained(exported)
        begin = config["bos_token"] or ""
        assert theirs.apply_chat_template(given, tokenize=False) == begin + "".join(p.text for p in chat.pieces(talk))
        prompt = theirs.apply_chat_template(given[:1], tokenize=False, add_generation_prompt=True)
        assert prompt == begin + chat.prompt("Hi!")
        stops = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
        assert theirs.convert_tokens_to_ids(chat.assistant_end.strip()) in stops

    for named in ("plain", "tokenizer"):
        exported, said = export(tmp_path / "qwen2", named)
        assert "chat template: none, as in the tokenizer's folder" in said
        assert "prompt_template of EvaluateChatHook, such as PROMPT_TEMPLATE.qwen_chat" in said
        assert AutoTokenizer.from_pretrained(exported).chat_template is None
    exported, said = export(tmp_path / "llama", "qwen_chat")
    assert "not qwen_chat, as in the config: the tokenizer has no special token <|im_end|>, <|im_start|>" in said
    assert AutoTokenizer.from_pretrained(exported).chat_template is None
    (tmp_path / "qwen2" / "chat_template.jinja").write_text("mine")
    exported, said = export(tmp_path / "qwen2", "qwen_chat, every=1")  # a hook that training rejects
    assert "chat template: the one in the tokenizer's folder" in said
    assert AutoTokenizer.from_pretrained(exported).chat_template == "mine"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tiktoken_files(family: str, tmp_path: Path) -> None:
    """Ids are those of tiktoken itself, before and after an export, of which transformers has the same."""
    tiktoken = pytest.importorskip("tiktoken")
    from transformers import AutoTokenizer

    form = FAMILIES[family].tiktoken
    assert form is not None
    texts = [case["text"] for case in json.loads(reference("tokenizer", "strings.json").read_text())]
    merges = json.loads((write_tokenizer(tmp_path / "a", ()) / "tokenizer.json").read_text())["model"]["merges"]
    letters = {letter: bytes([b]) for b, letter in enumerate(_byte_letters())}
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"".join(letters[letter] for letter in "".join(pair)) for pair in merges]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    (tmp_path / "b").mkdir()
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / "b" / form.file).write_bytes(b"\n".join(lines) + b"\n")
    special = {name: len(ranks) + i for i, name in enumerate(form.special)}
    reference_encoding = tiktoken.Encoding("x", pat_str=form.words, mergeable_ranks=ranks, special_tokens=special)
    ours = load_tokenizer(tmp_path / "b")
    assert (ours.special, ours.vocab_size) == (special, len(ranks) + len(special))
    assert ours.eos_id == special[form.end]
    assert ours.has_begin == (family == "llama")

    network = from_scratch(
        family=family, vocab_size=900, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=ours.eos_id, seed=0,
    )  # fmt: skip
    write_model(tmp_path / "hf", network.config, family)
    exported = export_hf(tmp_path / "hf", tmp_path / "out", tmp_path / "b")
    again, theirs = load_tokenizer(exported), AutoTokenizer.from_pretrained(exported)
    for text in [*texts, "aaaa " * 9, "1234567 12", "It's I'LL", "\u00e9 e\u0301", *form.special[:12]]:
        normal = unicodedata.normalize("NFC", text) if form.nfc else text
        ids = reference_encoding.encode(normal, allowed_special="all")
        assert ours.encode(text) == again.encode(text) == ids, text
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids) == normal
        plain = reference_encoding.encode(normal, disallowed_special=())
        assert ours.encode_plain(text) == plain, text

    for broken, message in ((lines[:9], "247 bytes have no token, such as 9"), ([*lines, b"?? 1"], "line 401 is not")):
        (tmp_path / "b" / form.file).write_bytes(b"\n".join(broken) + b"\n")
        with pytest.raises(ConfigError, match=f"{form.file} cannot be read: {message}"):
            load_tokenizer(tmp_path / "b")


def test_files_without_the_rule_of_words(tmp_path: Path) -> None:
    """Those of tiktoken under other names and of older tokenizers; with tokenizer.json they do not matter."""
    lines = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    folder = write_tokenizer(tmp_path / "a", LLAMA)
    (folder / "tokenizer.model").write_bytes(lines)
    assert load_tokenizer(folder).encode("!") == [0]
    for name in ("other.tiktoken", "vocab.json"):
        (tmp_path / name[:4]).mkdir()
        (tmp_path / name[:4] / name).write_bytes(lines)
        with pytest.raises(ConfigError, match=rf"the folder has {name}, but no tokenizer.json[\s\S]*save_pretrained"):
            load_tokenizer(tmp_path / name[:4])
