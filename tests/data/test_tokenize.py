"""`xtuner data tokenize`: bytes equal to the reference tools, mistakes named by line, nothing ever half written."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT, TOKENIZER_TEXT, reference

from xtuner.core.errors import CheckpointError, ConfigError, DataError
from xtuner.data import process_pool
from xtuner.data.chat_template import INTERNLM2_MARKS, PROMPT_TEMPLATE, Message, internlm2_chat
from xtuner.data.format.folder import load_intern_repo_tokenized_dataset
from xtuner.data.format.meta import read_meta
from xtuner.data.format.writer import write_bin
from xtuner.data.tokenize import encode_chunk, read_chunks, tokenize_files
from xtuner.data.tokenizer import Tokenizer, load_tokenizer

Command = Callable[..., int]


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internlm2")
    shutil.copy(reference("tokenizer", "internlm2_tokenizer.model"), folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of about 400 pieces that knows the chat marks."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("small")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT.read_text().split("\n")),
        model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400, byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    listed = {str(500 + i): {"content": name} for i, name in enumerate(INTERNLM2_MARKS)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    return folder


def lines(path: Path) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in path.read_bytes().split(b"\n")[:-1]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts(tokenizer: Tokenizer, path: Path) -> list[str]:
    return [tokenizer.decode([abs(i) for i in doc][1:-1]) for doc in lines(path)]


def runs(tokenizer: Tokenizer, tokens: list[int]) -> list[list[str]]:
    """As `segments_readable.json` shows a document: what is learned, what is skipped."""
    found: list[tuple[str, list[int]]] = []
    for token in tokens:
        kind = "learn" if token > 0 else "skip"
        if not found or found[-1][0] != kind:
            found.append((kind, []))
        found[-1][1].append(abs(token))
    return [[kind, tokenizer.decode(ids)] for kind, ids in found]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---------------------------------------------------------------- equal to the reference


def test_internevo_text_tools(tmp_path: Path, internlm2: Path, xtuner: Command) -> None:
    given, expected = reference("internevo_data", "input"), reference("internevo_data", "tokenizer_internlm2")
    options = ["--tokenizer", internlm2, "--output", tmp_path]
    # txt: byte-equal where no text spells a special token, and everywhere if that is allowed as there
    xtuner("data", "tokenize", given / "corpus.txt", *options)
    ours, theirs = lines(tmp_path / "train/en/corpus.bin"), lines(expected / "txt.bin")
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True] * 5 + [False, True]
    assert load_tokenizer(internlm2).decode(ours[5][1:-1]) == "A line with <s> inside and <|im_start|> too."
    allowed = ["--allow-special", "<s>", "--allow-special", "</s>", "--allow-special", "<unk>"]
    xtuner("data", "tokenize", given / "corpus.txt", *options, *allowed, "--type", "code")
    assert (tmp_path / "train/code/corpus.bin").read_bytes() == (expected / "txt.bin").read_bytes()
    for a, b in zip(read_meta(tmp_path / "train/code/corpus.bin"), read_meta(expected / "txt.bin"), strict=True):
        assert a.tolist() == b.tolist()
    # json and jsonl: that tool tokenizes the JSON of a record
    xtuner("data", "tokenize", given / "corpus.json", *options, "--whole-record", "--type", "json")
    assert (tmp_path / "train/json/corpus.bin").read_bytes() == (expected / "json.bin").read_bytes()
    with pytest.raises(DataError, match=r"corpus\.jsonl:4: not JSON"):
        xtuner("data", "tokenize", given / "corpus.jsonl", *options, "--whole-record", "--type", "jsonl")
    good = write(tmp_path, "good.jsonl", b"".join((given / "corpus.jsonl").read_bytes().splitlines(True)[:3]))
    xtuner("data", "tokenize", good, *options, "--whole-record", "--type", "jsonl")
    assert lines(tmp_path / "train/jsonl/good.bin") == lines(expected / "jsonl.bin")[:3]
    # without --whole-record: the text
    with pytest.raises(DataError, match=r"corpus\.jsonl:3: no key 'text' .*; the record has 'tokens'"):
        xtuner("data", "tokenize", given / "corpus.jsonl", *options, "--type", "jsonl")
    with pytest.raises(DataError, match=r"corpus\.json:14: a record is a list(.|\n)*corpus\.json:21: no key 'text'"):
        xtuner("data", "tokenize", given / "corpus.json", *options, "--type", "jsonl")


@pytest.mark.parametrize("split", ["0.1", "0.34"])
def test_internevo_alpaca_tool(split: str, tmp_path: Path, internlm2: Path, xtuner: Command) -> None:
    given = reference("internevo_data", "input") / "alpaca.json"
    options = ["--tokenizer", internlm2, "--template", "internevo", "--valid-fraction", split]
    xtuner("data", "tokenize", given, "--output", tmp_path, *options)
    theirs = reference("internevo_data", f"alpaca_late_split{split}")
    ours, wanted = (
        sorted(str(d) for path in folder.rglob(f"{name}.bin") for d in lines(path))
        for folder, name in ((tmp_path, "alpaca"), (theirs, "dataset"))
    )  # which ones are valid is drawn otherwise
    assert ours == wanted


@pytest.mark.processes
def test_alpaca_is_a_conversation(tmp_path: Path, small: Path, xtuner: Command) -> None:
    records = [{"instruction": "Add", "input": "1, 2", "output": "3"}, {"instruction": "Hi", "output": "Hello"}]
    listed = write(tmp_path, "listed.json", json.dumps(records))
    rows = write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, records)))
    xtuner("data", "tokenize", listed, rows, "--tokenizer", small, "--output", tmp_path / "out")
    assert lines(tmp_path / "out/train/en/listed.bin") == lines(tmp_path / "out/train/en/rows.bin")
    tokenizer = load_tokenizer(small)
    assert runs(tokenizer, lines(tmp_path / "out/train/en/rows.bin")[0]) == [
        ["learn", "<s>"],
        ["skip", "<|im_start|>user\nAdd\n1, 2<|im_end|>\n<|im_start|>assistant\n"],
        ["learn", "3<|im_end|>\n"],
    ]


@pytest.mark.processes
def test_ftdp(tmp_path: Path, internlm2: Path) -> None:
    script = [sys.executable, ROOT / "xtuner" / "tools" / "tokenize_ftdp_datasets.py"]
    paths = ["--processed-dir", reference("ftdp", "input"), "--tokenized-dir", tmp_path, "--tokenizer-path", internlm2]
    done = subprocess.run([*script, *paths, "--workers", "2"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
    wanted = reference("ftdp", "output")
    files = sorted(p.relative_to(wanted) for p in wanted.rglob("*.bin"))
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.bin")) == files
    assert len(files) == 4
    different = {
        (file.name, n): line
        for file in files
        for n, (line, theirs) in enumerate(zip(lines(tmp_path / file), lines(wanted / file), strict=True))
        if line != theirs
    }
    for file in files:
        if file.name in ("long.bin", "many.bin"):
            assert (tmp_path / file).read_bytes() == (wanted / file).read_bytes()
            assert (tmp_path / f"{file}.meta").read_bytes() == (wanted / f"{file}.meta").read_bytes()
    tokenizer = load_tokenizer(internlm2)
    assert {key: runs(tokenizer, line)[1:] for key, line in different.items()} == {
        ("plugin.bin", 4): [  # `loss: false` covers the end of the turn, too
            [
                "skip",
                "<|im_start|>user\nmasked tool turn<|im_end|>\n<|im_start|>assistant\n"
                'calling<|action_start|><|plugin|>\n{"c": 3}<|action_end|>\n<|im_end|>\n'
                "<|im_start|>environment name=<|plugin|>\nok<|im_end|>\n<|im_start|>assistant\n",
            ],
            ["learn", "end<|im_end|>\n"],
        ],
        ("basic.bin", 3): [
            [
                "skip",
                "<|im_start|>user\nno loss turn<|im_end|>\n<|im_start|>assistant\nthis reply is masked<|im_end|>\n"
                "<|im_start|>user\nnow<|im_end|>\n<|im_start|>assistant\n",
            ],
            ["learn", "this one counts<|im_end|>\n"],
        ],
        ("basic.bin", 9): [  # leading newlines are kept
            ["skip", "<|im_start|>user\n\n\nleading newlines<|im_end|>\n<|im_start|>assistant\n"],
            ["learn", "\n  leading newline and spaces in the answer \n<|im_end|>\n"],
        ],
    }
    readable = json.loads(reference("ftdp", "segments_readable.json").read_text())
    for file in files:
        for n, shown in enumerate(readable.get(str(file), [])):
            if (file.name, n) not in different:
                assert runs(tokenizer, lines(tmp_path / file)[n]) == shown


def test_chat_ids_are_those_of_the_hub_template(tmp_path: Path, internlm2: Path, xtuner: Command) -> None:
    cases = json.loads(reference("tokenizer", "chat.json").read_text())
    path = write(tmp_path, "chat.jsonl", "".join(json.dumps({"messages": c["messages"]}) + "\n" for c in cases))
    options = ["--tokenizer", internlm2, "--output", tmp_path]
    xtuner("data", "tokenize", path, *options)
    xtuner("data", "tokenize", path, *options, "--type", "spelt", "--allow-special", "<|im_end|>")
    ours, spelt = ([[abs(i) for i in d] for d in lines(tmp_path / f"train/{t}/chat.bin")] for t in ("en", "spelt"))
    wanted = [c["hf_chat_template"]["fast_ids"] for c in cases]
    assert spelt == wanted
    assert [n for n, ids in enumerate(ours) if ids != wanted[n]] == [6]  # "what is <|im_end|> ?" stays text
    assert ours[6].count(92542) == 1


# ---------------------------------------------------------------- conversations


def readable(*messages: Message) -> str:
    """Learned parts in brackets."""
    text, before = "", False
    for piece in internlm2_chat(messages):
        text += ("[" if piece.learned else "]") if piece.learned != before else ""
        text, before = text + piece.text, piece.learned
    return text.replace("<|im_start|>", "^").replace("<|im_end|>\n", "$") + ("]" if before else "")


def test_roles() -> None:
    user, ok, call = Message("user", "u"), Message("assistant", "ok"), Message("tool", "t")
    code = Message("function", "t", "interpreter")
    masked = Message("assistant", "a", loss=False)
    action = "<|action_start|>{}\nt<|action_end|>\n"
    for messages, wanted in (
        ((Message("system", "s"), user, ok), "^system\ns$^user\nu$^assistant\n[ok$]"),
        ((user, ok, user, ok), "^user\nu$^assistant\n[ok$]^user\nu$^assistant\n[ok$]"),
        ((Message("system", "s", "plugin"), ok), "^system name=<|plugin|>\ns$^assistant\n[ok$]"),
        ((Message("user", "u", "Ann"), Message("assistant", "a", "Bo")), "^user name=Ann\nu$^assistant name=Bo\n[a$]"),
        ((ok, Message("tool", "t", "plugin")), f"^assistant\n[ok{action.format('<|plugin|>')}$]"),
        ((user, code), f"^user\nu$^assistant\n[{action.format('<|interpreter|>')}$]"),
        ((user, call), f"^user\nu$^assistant\n[{action.format('')}$]"),
        ((user, ok, call, call), f"^user\nu$^assistant\n[ok{action.format('') * 2}$]"),
        ((Message("environment", "e", "plugin"), ok), "^environment name=<|plugin|>\ne$^assistant\n[ok$]"),
        ((Message("thought", "t"), ok), "^assistant\n[t$]^assistant\n[ok$]"),
        ((user, masked, user, ok), "^user\nu$^assistant\na$^user\nu$^assistant\n[ok$]"),
        ((Message("user", "u", loss=True), ok), "^user\nu$^assistant\n[ok$]"),
        ((masked, call), f"^assistant\na{action.format('')}$"),
        ((masked, Message("tool", "t", loss=True)), f"^assistant\na[{action.format('')}$]"),
        ((ok, Message("tool", "t", loss=False)), f"^assistant\n[ok]{action.format('')}$"),
        ((user, Message("assistant", "")), "^user\nu$^assistant\n[$]"),
    ):
        assert readable(*messages) == wanted


def test_a_prompt_is_the_beginning_of_what_is_trained() -> None:
    pieces = internlm2_chat([Message("system", "s"), Message("user", "u"), Message("assistant", "a")])
    template = PROMPT_TEMPLATE.internlm2_chat
    assert "".join(p.text for p in pieces) == template.prompt("u", "s") + "a" + template.assistant_end


def test_cut_and_unlearned(tmp_path: Path, small: Path, xtuner: Command, capfd: Any) -> None:
    rows = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": "word " * 50}]]
    rows += [[{"role": "user", "content": "only a question"}]]
    path = write(tmp_path, "chat.json", json.dumps(rows))
    xtuner("data", "tokenize", path, "--tokenizer", small, "--output", tmp_path, "--max-length", 30, "--no-add-bos")
    documents = lines(tmp_path / "train/en/chat.bin")
    assert len(documents[0]) == 30
    assert documents[0][0] == -load_tokenizer(small).special["<|im_start|>"]
    told = capfd.readouterr().err
    assert "1 documents were longer than 30 tokens" in told
    assert "1 documents have no learned token" in told


# ---------------------------------------------------------------- lines and lists


def test_lines(tmp_path: Path, small: Path, xtuner: Command) -> None:
    tokenizer = load_tokenizer(small)
    raw = "\ufefffirst\r\n\r\n  \n\u2028\ntwo\u2028still\x0b\x0c\x1c\x85two \u2029\n"
    options = ["--tokenizer", small, "--output", tmp_path]
    xtuner("data", "tokenize", write(tmp_path, "a.txt", raw + "last"), *options)
    assert texts(tokenizer, tmp_path / "train/en/a.bin") == ["first", "two\u2028still\x0b\x0c\x1c\x85two", "last"]
    rows = ["x\u2028y", " kept \n", "", "z"]
    body = "\ufeff" + "\r\n".join(json.dumps({"body": t}, ensure_ascii=False) for t in rows)
    path = write(tmp_path, "b.jsonl", body)
    xtuner("data", "tokenize", path, *options, "--text-key", "body", "--no-add-bos", "--no-add-eos")
    assert lines(tmp_path / "train/en/b.bin") == [tokenizer.encode_plain(t) for t in ("x\u2028y", " kept \n", "z")]
    xtuner("data", "tokenize", path, *options, "--whole-record", "--type", "whole")
    whole = texts(tokenizer, tmp_path / "train/whole/b.bin")
    assert whole == [json.dumps({"body": t}, ensure_ascii=False) + "\n" * (t != "z") for t in rows]


@pytest.mark.parametrize("chunk", [1, 7, 50, 1 << 20])
def test_a_json_list_is_read_piece_by_piece(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_chunks, "CHUNK", chunk)
    values = [{"a": 'é\u2028]}\\"'}, [], {}, "", 12, -1.5e3, True, None, [[1, [2]], {"b": {}}], "x" * 100, "ünï"]
    for n, indent in ((0, None), (1, 0), (11, None), (11, 2)):
        text = "\ufeff " + json.dumps(values[:n], ensure_ascii=False, indent=indent) + "\n"
        path = write(tmp_path, "a.json", text)
        with open(path, "rb") as f:
            items = list(read_chunks.JsonList(read_chunks.Hashed(f)).items())
        assert [json.loads(text) for _, text in items] == values[:n]
        for line, record in items:
            assert record.split("\n")[0] in text.split("\n")[line - 1]


# ---------------------------------------------------------------- mistakes

CHAT = '{"messages": [{"role": "user", "content": "u"}, %s]}'
MISTAKES = [
    ("a.txt", b"good\nbad \xff\n", "", r"a\.txt:2: not UTF-8: byte 0xff at byte 4"),
    ("a.txt", b"", "", r"a\.txt: no document in it: it is empty"),
    ("a.txt", b"\xef\xbb\xbf\n \n", "", "it is empty"),
    ("a.jsonl", b'{"text": ""}\n', "", "all texts are empty"),
    ("a.jsonl", b'{"text": "x"}\n{"text": }\n', "", r"a\.jsonl:2: not JSON: Expecting value, character 9"),
    ("a.jsonl", b'{"text": "x"}\n\n{"txt": 1}', "", r"a\.jsonl:3: no key 'text' .*; the record has 'txt'"),
    ("a.jsonl", b'{"text": 5}', "", r"a\.jsonl:1: the value of 'text' is a int"),
    ("a.jsonl", b'[1]', "", r"a\.jsonl:1: a record is a list"),
    ("a.jsonl", b'{"text": "\\ud800"}', "", r"a\.jsonl:1: .*surrogate"),
    ("a.jsonl", b"[" * 100_000, "", r"a\.jsonl:1: nested too deeply"),
    ("a.jsonl", b"1" * 5000, "", r"a\.jsonl:1: not readable"),
    ("a.json", b'[{"text": "x"},\n {"text": 1}]', "", r"a\.json:2: the value of 'text'"),
    ("a.json", b'{"text": "x"}\n{"text": "y"}', "", r"a\.json:1: not a list of records.*jsonl"),
    ("a.json", b'[{"text": "x"},\n\n {"text": }]', "", r"a\.json:3: not JSON"),
    ("a.json", b'[{"text": "x"}\n {"text": "y"}]', "", r"a\.json:2: no comma"),
    ("a.json", b'[{"text": "x"},\n {"text": "y"}', "", r"a\.json:2: the list is cut short"),
    ("a.json", b'[{"text": "x"},\n {"text": "y', "", r"a\.json:2: not JSON"),
    ("a.json", b'[{"text": "x"}]\n]', "", r"a\.json:2: text after the end"),
    ("a.json", b'[{"text": "x"},\n "\xff"]', "", r"a\.json:2: not UTF-8"),
    ("a.json", b"[]", "", "it is empty"),
    ("a.json", b'[{"instruction": "x", "output": 3}]', "", r"a\.json:1: the value of 'output' is a int"),
    ("a.json", b'[{"instruction": "x"}]', "--format alpaca", r"a\.json:1: no key 'output'"),
    ("a.jsonl", CHAT % '{"role": "asistant", "content": ""}', "", r":1: message 2 .*unknown role.*mean 'assistant'"),
    ("a.jsonl", CHAT % '{"role": "user"}', "", r"a\.jsonl:1: message 2 has no 'content'"),
    ("a.jsonl", CHAT % '{"content": "x"}', "", r"message 2 has no 'role'"),
    ("a.jsonl", CHAT % '{"role": "user", "content": null}', "", r"message 2: 'content' is a NoneType"),
    ("a.jsonl", CHAT % '{"role": "assistant", "content": "", "loss": 1}', "", "'loss' is 1"),
    ("a.jsonl", CHAT % '{"role": "tool", "content": "", "tool_call_id": "7"}', "", "OpenAI's form"),
    ("a.jsonl", CHAT % '"text"', "", "message 2 is a str"),
    ("a.jsonl", '{"messages": []}', "", "without messages"),
    ("a.jsonl", '{"conversations": []}', "--format chat", "no key 'messages'; the record has 'conversations'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "options", "message"), MISTAKES)
def test_mistakes(
    name: str, text: str | bytes, options: str, message: str, tmp_path: Path, small: Path, xtuner: Command
) -> None:
    path = write(tmp_path / "in", name, text)
    with pytest.raises(DataError, match=message):
        xtuner("data", "tokenize", path, "--tokenizer", small, "--output", tmp_path / "out", *options.split())
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.processes
def test_many_mistakes_and_good_files_beside(tmp_path: Path, small: Path, xtuner: Command) -> None:
    write(tmp_path / "in", "a.jsonl", "bad\n" * 3)
    write(tmp_path / "in", "b/good.txt", "text")
    command = ["data", "tokenize", tmp_path / "in", "--tokenizer", small, "--output", tmp_path / "out"]
    with pytest.raises(DataError) as caught:
        xtuner(*command)
    assert [f"a.jsonl:{n}" in str(caught.value) for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.*")) == ["good.bin", "good.bin.meta", "good.json"]
    write(tmp_path / "in", "a.jsonl", "bad\n" * 1000)
    with pytest.raises(DataError, match="20 mistakes in the input, possibly more") as caught:
        xtuner(*command)
    assert "a.jsonl:20:" in str(caught.value)
    assert "a.jsonl:21:" not in str(caught.value)
    write(tmp_path / "in", "a.jsonl", '{"text": "x"}')
    before = (tmp_path / "out/train/en/b/good.bin").stat().st_mtime_ns
    xtuner(*command)
    assert (tmp_path / "out/train/en/b/good.bin").stat().st_mtime_ns == before
    assert load_intern_repo_tokenized_dataset(tmp_path / "out/train").num_documents == 2


def test_options_that_cannot_be(tmp_path: Path, small: Path, tokenizer_folder: Path, xtuner: Command) -> None:
    path, empty = write(tmp_path, "a.txt", "x"), write(tmp_path, "empty/a.csv", "x").parent
    chat = write(tmp_path, "c.jsonl", CHAT % '{"role": "assistant", "content": "a"}')
    for words, error, message in (
        ([path, "--format", "jsnl"], ConfigError, "Did you mean 'json"),
        ([path, "--valid-fraction", "1.5"], ConfigError, "is not a fraction"),
        ([path, "--max-length", "1"], ConfigError, "1 tokens are too few"),
        ([path, "--max-length", "100"], ConfigError, "are not cut"),
        ([path, "--workers", "0"], ConfigError, "do no work"),
        ([path, "--type", "a/b"], ConfigError, "is not a folder name"),
        ([path, "--template", "internevo", "--format", "chat"], ConfigError, "alpaca records only"),
        ([chat, "--template", "internevo", "--format", "alpaca"], ConfigError, "the internevo template uses 92542"),
        ([path, "--allow-special", "<|nope|>"], ConfigError, "no special token <|nope|>".replace("|", r"\|")),
        ([chat, "--tokenizer", tokenizer_folder], ConfigError, r"no special token <\|im_start\|>"),
        ([tmp_path / "nothing"], ConfigError, "the input does not exist"),
        ([write(tmp_path, "a.csv", "x")], ConfigError, "implies no format"),
        ([path, path], ConfigError, "two inputs would be written"),
        # options that would do nothing
        ([path, "--seed", 3], ConfigError, "(?s)seed of the split into train and valid.*where: --seed 3"),
        ([path, "--text-key", "body"], ConfigError, "the input is txt, not json or jsonl"),
        ([chat, path, "--whole-record", "--format", "chat"], ConfigError, "the input is chat, not json or jsonl"),
        ([chat, "--whole-record", "--text-key", "body"], ConfigError, "(?s)with all keys.*where: --text-key body"),
        (
            [path, "--template", "llama3_chat"],
            ConfigError,
            "(?s)the input is txt, not alpaca or chat or ftdp.*llama3_chat",
        ),
        ([chat, "--template", "internevo"], ConfigError, "the input is chat, not alpaca"),
        ([path, "--suffix", ".md"], ConfigError, r"(?s)no input is a folder.*where: --suffix \.md"),
        ([path, "--format", "ftdp"], ConfigError, "is not in a folder `processed`"),
        ([empty], DataError, r"no \.txt or \.json or \.jsonl in the input folder"),
        ([empty, "--format", "ftdp"], DataError, r"no DATASET/processed/FILE\.jsonl in the input folder"),
    ):
        with pytest.raises(error, match=message):
            xtuner("data", "tokenize", "--tokenizer", small, "--output", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    fifo = tmp_path / "pipe.txt"
    os.mkfifo(fifo)
    with pytest.raises(DataError, match=r"(?s)cannot be read.*pipe\.txt"):
        xtuner("data", "tokenize", fifo, "--tokenizer", small, "--output", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"(?s)cannot be written.*a\.txt"):
        xtuner("data", "tokenize", path, "--tokenizer", small, "--output", path)


@pytest.mark.processes
def test_files_with_other_endings(tmp_path: Path, small: Path, xtuner: Command, capfd: Any) -> None:
    """What a folder holds beside the format's own files is counted, and taken on request."""
    for name in ("a.txt", "b.md", "c.md", "d.rst", "README"):
        write(tmp_path / "in", name, "text")
    command = ["data", "tokenize", tmp_path / "in", "--tokenizer", small, "--format", "txt"]
    for suffixes, taken, left_out in (
        ([], "a", "4 files have another ending than .txt: skipped (2 .md, 1 without an ending, 1 .rst); --suffix"),
        (["--suffix", ".md", "--suffix", "rst"], "bcd", "2 files have another ending than .md or .rst: skipped"),
        (["--suffix", ""], ["README"], "4 files have another ending than"),
    ):
        output = tmp_path / f"out{len(suffixes)}"
        assert xtuner(*command, "--output", output, *suffixes) == 0
        assert sorted(p.stem for p in output.rglob("*.bin")) == list(taken)
        assert left_out in capfd.readouterr().err
    with pytest.raises(DataError, match=r"(?s)no \.html in the input folder.*next: --suffix \.ENDING selects"):
        xtuner(*command, "--output", tmp_path / "out", "--suffix", ".html")


# ---------------------------------------------------------------- train and valid


def test_the_split(tmp_path: Path, small: Path, xtuner: Command) -> None:
    path = write(tmp_path, "a.txt", "".join(f"number {n % 700}\n" for n in range(1000)))

    def parts(*options: Any) -> tuple[list[str], list[str]]:
        command = ["data", "tokenize", path, "--tokenizer", small, "--output", tmp_path / "out", "--overwrite"]
        xtuner(*command, *options)
        both = [tmp_path / "out" / part / "en/a.bin" for part in ("train", "valid")]
        return tuple([str(d) for d in lines(p)] if p.exists() else [] for p in both)  # type: ignore[return-value]

    train, valid = parts("--valid-fraction", 0.2)
    assert not set(train) & set(valid)  # equal documents, too, are on one side
    assert len(train) + len(valid) == 1000
    assert 150 < len(valid) < 250
    assert parts("--valid-fraction", 0.2) == (train, valid)
    assert parts("--valid-fraction", 0.2, "--seed", 1)[1] != valid
    everything, nothing = parts()
    assert sorted(everything) == sorted(train + valid)
    assert nothing == []  # the old valid part is gone
    assert parts("--valid-fraction", 1) == ([], everything)


# ---------------------------------------------------------------- workers, reruns, kills


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    draw = random.Random(0)
    for name, count in (("a.txt", 400), ("b/c.jsonl", 300), ("d.json", 100), ("e.txt", 1)):
        rows = [" ".join(str(draw.randrange(999)) for _ in range(draw.randrange(1, 30))) for _ in range(count)]
        records = [{"text": row} for row in rows]
        text = "\n".join(rows) if ".txt" in name else "\n".join(map(json.dumps, records))
        write(tmp_path / "in", name, json.dumps(records) if name == "d.json" else text)
    return tmp_path / "in"


@pytest.mark.processes
def test_workers_do_not_change_a_byte(
    tmp_path: Path, corpus_folder: Path, small: Path, xtuner: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["data", "tokenize", corpus_folder, "--tokenizer", small, "--valid-fraction", 0.3]
    xtuner(*command, "--output", tmp_path / "one", "--workers", 1)
    for module in (read_chunks, tokenize_files):
        monkeypatch.setattr(module, "CHUNK", 500)
    xtuner(*command, "--output", tmp_path / "three", "--workers", 3)
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    assert len(tree(tmp_path / "one")) >= 4 * 3
    # the same bytes as `write_bin`, meta and all
    ours = tmp_path / "one/train/en/b/c.bin"
    write_bin(tmp_path / "again.bin", lines(ours))
    assert ours.read_bytes() == (tmp_path / "again.bin").read_bytes()
    assert ours.with_suffix(".bin.meta").read_bytes() == (tmp_path / "again.bin.meta").read_bytes()
    write(corpus_folder, "a.txt", b"good line\n" * 899 + b"\xff")
    with pytest.raises(DataError, match=r"a\.txt:900: not UTF-8"):  # lines are counted across chunks
        xtuner(*command, "--output", tmp_path / "four", "--workers", 3)


@pytest.mark.processes
def test_few_chunks_are_under_way(small: Path) -> None:
    settings = tokenize_files.TokenizeSettings(str(small)).resolved("txt")
    taken = 0

    def chunks() -> Any:
        nonlocal taken
        for taken in range(1, 101):  # noqa: B007
            yield read_chunks.Chunk(0, settings, data=b"text\n")

    ahead = []
    for given, result in enumerate(process_pool.map_ordered(encode_chunk.encode_chunk, chunks(), 2), 1):
        assert result.train.counts[0] == len(load_tokenizer(small).encode("text")) + 2
        ahead.append(taken - given)
    assert given == 100
    assert max(ahead) <= 6


def test_outputs_that_are_there(tmp_path: Path, small: Path, xtuner: Command, capfd: Any) -> None:
    path = write(tmp_path, "a.txt", "some text\nmore text\n")
    out = tmp_path / "out"
    target = out / "train/en/a.bin"
    command = ["data", "tokenize", path, "--tokenizer", small, "--output", out]
    xtuner(*command)
    first = tree(out)
    capfd.readouterr()
    xtuner(*command)
    assert "complete, made from the same input and settings: skipped" in capfd.readouterr().err
    xtuner("data", "tokenize", path, "--tokenizer", shutil.copytree(small, tmp_path / "moved"), "--output", out)
    assert tree(out) == first
    meta = target.with_suffix(".bin.meta")
    for spoil, message in (
        (lambda: path.write_text("other text\nmore text\n"), "other contents of a.txt"),
        (lambda: target.write_bytes(target.read_bytes()[:-1]), r"a\.bin has been altered"),
        (lambda: meta.write_bytes(meta.read_bytes()[:-1]), r"a\.bin\.meta has been altered"),
        (lambda: meta.unlink(), "one of its files is missing"),
        (lambda: (out / "made_from/en/a.json").unlink(), "there is no record of what it was made from"),
        (lambda: (out / "made_from/en/a.json").write_text("{"), "there is no record"),
    ):
        spoil()  # type: ignore[no-untyped-call]
        before = tree(out)
        with pytest.raises(DataError, match=message) as caught:
            xtuner(*command)
        assert str(target) in str(caught.value)
        assert "--overwrite" in str(caught.value)
        assert tree(out) == before
        path.write_text("some text\nmore text\n")
        xtuner(*command, "--overwrite")
        assert tree(out) == first
    with pytest.raises(DataError, match="made with other settings: add_eos"):
        xtuner(*command, "--no-add-eos")
    shutil.rmtree(out / "train")
    xtuner(*command)  # nothing is there: made again
    assert tree(out) == first
    path.write_text("")  # a mistake found while replacing leaves the old output as it was
    with pytest.raises(DataError, match="it is empty"):
        xtuner(*command, "--overwrite")
    assert tree(out) == first
    write(tmp_path, "b.txt", "x")
    write(out, "train/en/b.bin", "foreign")
    with pytest.raises(DataError, match="2 outputs exist already"):
        xtuner("data", "tokenize", tmp_path / "b.txt", *command[2:])


def killed_after(renames: int, command: Callable[[], int]) -> bool:
    """Run `command` in a child that gets SIGKILL instead of its next rename. False if it came to its end."""
    pid = os.fork()
    if pid == 0:
        done, replace = 0, os.replace

        def counted(*words: Any) -> None:
            nonlocal done
            if done == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            replace(*words)

        os.replace = counted  # type: ignore[assignment]
        try:
            os._exit(command())
        finally:
            os._exit(1)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.processes
def test_killed_at_every_rename(tmp_path: Path, corpus_folder: Path, small: Path, xtuner: Command) -> None:
    options = ["data", "tokenize", corpus_folder, "--tokenizer", small, "--valid-fraction", 0.3, "--workers", 1]
    xtuner(*options, "--output", tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    kills = 0
    while killed_after(kills, partial(xtuner, *options, "--output", tmp_path / str(kills))):
        out = tmp_path / str(kills)
        for file in out.rglob("*.bin"):  # with a meta, it is the whole file
            name = str(file.relative_to(out))
            assert not file.with_suffix(".bin.meta").exists() or file.read_bytes() == whole[name]
        xtuner(*options, "--output", out)
        hidden = [p for p in out.rglob(".*.tmp-*")]
        assert {k: v for k, v in tree(out).items() if ".tmp-" not in k} == whole
        assert 1 <= len(hidden) <= 3
        for p in hidden:  # what a killed process left is taken away when it is a day old
            os.utime(p, (0, 0))
        xtuner(*options, "--output", out, "--overwrite")
        assert tree(out) == whole
        kills += 1
    records = len(list((tmp_path / "whole/made_from").rglob("*.json")))
    assert kills == len(whole) + records  # a record is written twice


def descendants(pid: int) -> list[int]:
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [d for child in children for d in descendants(child)]


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed_with_workers(tmp_path: Path, small: Path, xtuner: Command) -> None:
    path = write(tmp_path, "a.txt", "some text that is long enough\n" * 300_000)
    command = ["data", "tokenize", path, "--tokenizer", small, "--output", tmp_path / "out"]
    shell = [sys.executable, "-m", "xtuner.cli.main", *map(str, command), "--workers", "2"]
    process = subprocess.Popen(shell, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    folder = tmp_path / "out/train/en"
    while not (folder.exists() and list(folder.iterdir())):
        assert process.poll() is None
        time.sleep(0.005)
    left = descendants(process.pid)
    process.kill()
    process.wait()
    assert len(left) >= 2
    assert not list(folder.glob("*.bin"))
    end = time.monotonic() + 10
    while alive := [p for p in left if Path(f"/proc/{p}/cmdline").exists() and Path(f"/proc/{p}/cmdline").read_bytes()]:
        assert time.monotonic() < end, f"workers outlive their parent: {alive}"
        time.sleep(0.02)
    write(tmp_path, "a.txt", "some text that is long enough\n")
    xtuner(*command)
    assert len(lines(folder / "a.bin")) == 1


@pytest.mark.processes
def test_help_is_light() -> None:
    code = """
import sys
from xtuner.cli.main import main
try:
    main(["data", "tokenize", "--help"])
except SystemExit as e:
    assert e.code == 0
assert not {"torch", "numpy", "rich", "sentencepiece"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--valid-fraction" in done.stdout
