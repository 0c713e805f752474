"""What people read: chat, packs shown, validation, evaluation that goes on after a stop."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.corpus import write_corpus

from xtuner.cli.chat import decode_stream
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.data import load_intern_repo_tokenized_dataset
from xtuner.data.chat_template import PROMPT_TEMPLATE
from xtuner.data.format.writer import write_bin
from xtuner.data.inspect.show_packs import show_pack
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.tokenizer import load_tokenizer

Command = Callable[..., int]


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tiny model as a Hugging Face folder."""
    from xtuner.cli.main import main

    root = tmp_path_factory.mktemp("model")
    assert main(["train", str(tiny), "--work-dir", str(root / "w"), "--cfg-options", "custom_hooks=[]"]) == 0
    last = (root / "w" / "last_checkpoint").read_text().strip()
    assert main(["convert", "pth_to_hf", str(tiny), str(root / "w" / last), str(root / "hf"), "--fp32"]) == 0
    return root / "hf"


@pytest.mark.processes
def test_a_conversation_is_one_document(
    model: Path, xtuner: Command, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turn two continues turn one with its keys and values: the same reply as from the whole text at once."""
    from xtuner.model import load_pretrained
    from xtuner.model.generate import generate

    options = ("--max-new-tokens", "6", "--system", "Be brief.")
    monkeypatch.setattr("sys.stdin", io.StringIO("import os\n\nand?\n/reset\nimport os\n/exit\nnever\n"))
    capsys.readouterr()
    assert xtuner("chat", model, *options) == 0
    shown = capsys.readouterr().out
    template, tokenizer, network = PROMPT_TEMPLATE.internlm2_chat, load_tokenizer(model), load_pretrained(model)
    ids = [1, *tokenizer.encode(template.prompt("import os", "Be brief."))]
    first = list(generate(network, ids, 6, [2]))
    ids += first + tokenizer.encode(template.assistant_end) + tokenizer.encode(template.prompt("and?"))
    second = list(generate(network, ids, 6, [2]))
    replies = [tokenizer.decode(tokens) for tokens in (first, second, first)]
    assert shown == "".join(f"{reply}\n" for reply in replies)
    assert xtuner("chat", model, *options, "--prompt", "import os") == 0
    assert capsys.readouterr().out == replies[0] + "\n"


class Letters:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("ab", [], ["a", "b", ""]),
        ("é好", [], ["é", "好", ""]),  # a character is shown when its last byte is there
        ("abSTOPcd", ["STOP"], ["a", "b", ""]),  # no letter of a stop word is shown
        ("abSTcdefg", ["STOP"], ["a", "b", "S", "T", "c", "d", "efg"]),  # which was none
    ],
)
def test_streaming(text: str, stops: list[str], pieces: list[str]) -> None:
    got = list(decode_stream(iter(text.encode()), Letters(), stops))  # type: ignore[arg-type]
    assert got == pieces
    assert "".join(got) == text.split("STOP")[0]


def test_packs_shown(tokenizer_folder: Path, tmp_path: Path, tiny: Path, xtuner: Command, capsys: Any) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = ["import os", "from pathlib", "def tokenizer"]
    documents = [[1, *tokenizer.encode(t)] for t in texts]
    documents[1] = [-t for t in documents[1]]
    write_bin(tmp_path / "en" / "a.bin", documents)
    data = PackedDataset(load_intern_repo_tokenized_dataset(tmp_path), sum(map(len, documents)) - 2)
    order = data.file_packs(0).order.tolist()
    plain = "\n".join(show_pack(data, 0, "text", tokenizer, colour=False))
    assert [f"document {d}" in plain for d in order] == [True] * 3
    assert plain.index(f"document {order[0]}") < plain.index(f"document {order[1]}")
    assert "⟦" in plain
    assert "from pathlib⟧" in plain or order[-1] == 1
    assert f"positions 0 to {len(documents[order[0]]) - 1}" in plain
    last = len(documents[order[-1]])
    assert f"its tokens 0 to {last - 3} of {last}" in plain
    coloured = "\n".join(show_pack(data, 0, "text", tokenizer, colour=True))
    assert "\033[32m" in coloured
    assert "\033[2m" in coloured
    masked = "\n".join(show_pack(data, 0, "masked_text", tokenizer, colour=False))
    assert "pathlib" not in masked
    numbers = "\n".join(show_pack(data, 0, "all", tokenizer, colour=False))
    assert f"input_ids {documents[order[0]]}".replace("-", "") in numbers
    assert "labels    [-100" in numbers
    folder = ("data", "show", tmp_path, "--max-length", "8")
    assert xtuner(*folder, "--pack", "1", "--tokenizer", tokenizer_folder) == 0
    assert "pack 1 of" in capsys.readouterr().out
    assert xtuner(*folder) == 0
    assert "input_ids [" in capsys.readouterr().out
    assert xtuner("log-dataset", tiny, "--show", "all", "--num-packs", "2") == 0
    assert capsys.readouterr().out.count("learned, ") == 2
    write_bin(tmp_path / "one" / "a.bin", [[1, 2, 3, 4, 5, 6, 7]])  # nothing predicts the first
    assert xtuner("data", "show", tmp_path / "one", "--max-length", "7") == 0
    assert "pack 0 of 1: 7 tokens, 7 marked as learned, 6 targets of the loss, a.bin" in capsys.readouterr().out


@pytest.mark.processes
def test_chat_without_what_it_needs(
    model: Path, tiny: Path, tokenizer_folder: Path, xtuner: Command, capsys: Any
) -> None:
    """A checkpoint gets no files added: the message gives the tokenizer of the run. Missing marks are named."""
    checkpoint = next((model.parent / "w").glob("iter_*.pth"))
    with pytest.raises(
        ConfigError, match=rf"has no tokenizer[\s\S]*--tokenizer {tokenizer_folder}, the one in the run"
    ):
        xtuner("chat", checkpoint, "--prompt", "x")
    capsys.readouterr()
    words = ("chat", checkpoint, "--tokenizer", tokenizer_folder, "--prompt", "x", "--max-new-tokens", "1")
    assert xtuner(*words, "--stop-words", "") == 0
    said = capsys.readouterr().err
    assert "no special token <|im_start|>, <|im_end|>, which the template internlm2_chat uses" in said
    assert "the answer is empty" in said
    assert xtuner(*words, "--template", "plain") == 0
    assert "no special token" not in capsys.readouterr().err


@pytest.mark.processes
def test_validation_while_training(tiny: Path, corpus: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """`val_folder` gives val_loss at its interval and at the end: the number that `eval loss` gives."""
    held_out = write_corpus(tmp_path / "valid", 4, seed=9)
    options = ["custom_hooks=[]", f"val_folder={held_out}", "val_interval=4"]
    assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--cfg-options", *options) == 0
    file = next((tmp_path / "w").glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    losses = {r["iter"]: r["val_loss"] for r in records if "val_loss" in r}
    last = max(r["iter"] for r in records)
    assert set(losses) == {*range(4, last + 1, 4), last}
    capsys.readouterr()
    assert xtuner("eval", "loss", tmp_path / "w" / f"iter_{last}.pth", held_out, "--max-length", "32") == 0
    assert float(capsys.readouterr().out.split()[-2]) == pytest.approx(losses[last], abs=1e-4)


@pytest.mark.processes
def test_evaluation_goes_on_by_file(model: Path, corpus: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """Files in the record are not read again; a file that has changed is; another model's record is refused."""
    words = ("eval", "loss", model, corpus, "--save", tmp_path / "r.json")
    capsys.readouterr()
    assert xtuner(*words) == 0
    table = capsys.readouterr().out
    save = tmp_path / "r.json"
    head, *entries = save.read_text().splitlines(keepends=True)
    assert sorted(json.loads(e)["file"] for e in entries) == ["code/a.bin", "code/b.bin", "en/a.bin", "en/b.bin"]
    for cut in (len(entries[-1]), 3, 1):  # without the last entry, and with it torn by a kill
        save.write_text("".join((head, *entries))[:-cut])
        assert xtuner(*words) == 0
        assert capsys.readouterr().out == table
        assert save.read_text() == "".join((head, *entries))
    save.write_text(head[:7])
    assert xtuner(*words) == 0
    assert sorted(save.read_text().splitlines()) == sorted("".join((head, *entries)).splitlines())
    capsys.readouterr()
    record = {e["file"]: e for e in map(json.loads, entries)}
    record["en/a.bin"]["total"] += 1e6
    record["code/a.bin"] |= {"identity": "another", "total": 1e6}
    save.write_text(head + "".join(json.dumps(e) + "\n" for e in record.values()))
    assert xtuner(*words) == 0
    rows = {r.split()[0]: r.split()[1:] for r in capsys.readouterr().out.splitlines()[1:]}
    before = {r.split()[0]: r.split()[1:] for r in table.splitlines()[1:]}
    assert rows["code"] == before["code"]
    assert float(rows["en"][1]) > float(before["en"][1]) + 100
    with pytest.raises(ConfigError, match="another model"):
        xtuner(*words, "--max-length", "7")
    for mine in ("my notes", "my\nnotes\n", "{}\n", '{"a": 1}\n{"b": 2}\nno'):
        save.write_text(mine)
        with pytest.raises(ConfigError, match="not a record"):
            xtuner(*words)
        assert save.read_text() == mine


@pytest.mark.processes
def test_the_record_may_lie_beside_the_weights(
    model: Path, corpus: Path, tmp_path: Path, xtuner: Command, capsys: Any
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(model, folder)
    words = ("eval", "loss", folder, corpus, "--save", folder / "losses.json")
    assert xtuner(*words) == 0
    kept = (folder / "losses.json").read_text()
    assert xtuner(*words) == 0
    assert (folder / "losses.json").read_text() == kept
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(ConfigError, match="another model"):
        xtuner(*words)


@pytest.mark.processes
def test_records_that_cannot_be_written(
    model: Path, corpus: Path, tmp_path: Path, xtuner: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the model is read, naming the path; and if the disk fills up later."""
    from xtuner.train import evaluate

    (tmp_path / "file").write_text("")
    (tmp_path / "iter_1.pth").mkdir()
    (tmp_path / "iter_1.pth" / "trainer.json").write_text("{}")
    for place in ("/proc/x.json", tmp_path, tmp_path / "file" / "x.json", "/dev/null"):
        with pytest.raises(CheckpointError, match=f"(?s)cannot be written.*{place}"):
            xtuner("eval", "loss", "no model", corpus, "--save", place)
    with pytest.raises(ConfigError, match="inside a checkpoint"):
        xtuner("eval", "loss", "no model", corpus, "--save", tmp_path / "iter_1.pth" / "x.json")
    with pytest.raises(ConfigError, match="no model"):
        xtuner("eval", "loss", "no model", corpus, "--save", tmp_path / "new" / "x.json")
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(evaluate, "_encode_line", lambda value: b"x" if "file" in value else b"{}\n")
    record = evaluate.Record(tmp_path / "x.json", "m", 8)
    (tmp_path / "x.json").unlink()
    (tmp_path / "x.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        record.keep(load_intern_repo_tokenized_dataset(corpus)[0], 1.0, 1)


@pytest.mark.parametrize(
    "words",
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--max-new-tokens", "0"),
    ],
)
def test_chat_options(words: tuple[str, str], xtuner: Command) -> None:
    with pytest.raises(ConfigError, match=words[0]):
        xtuner("chat", "no model", *words)


def test_a_plot_of_validation_and_nan(tmp_path: Path, xtuner: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "demo")
    demo: Any = importlib.import_module("run")
    shown = []
    legend = Axes.legend

    def spy(axes: Axes, **words: Any) -> Any:
        shown.append({line.get_label(): [float(y) for y in line.get_ydata()] for line in axes.get_lines()})
        return legend(axes, **words)

    monkeypatch.setattr(Axes, "legend", spy)
    file = tmp_path / demo.WORK_DIR / "1" / "vis_data" / "scalars.json"
    file.parent.mkdir(parents=True)
    lines = [{"iter": 1, "loss": 2.5, "lr": 0.1}, {"iter": 2, "loss": float("nan"), "lr": 0.1}]
    lines += [{"iter": 3, "loss": float("inf"), "lr": 0.1}, {"iter": 3, "val_loss": 2.0}, {"iter": 4, "loss": 1.5}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iter": 5, "lo')
    assert xtuner("plot-loss", tmp_path / demo.WORK_DIR) == 0
    assert (tmp_path / demo.WORK_DIR / "loss.png").stat().st_size > 0
    (curves,) = shown
    assert repr(curves) == "{'training': [2.5, nan, nan, 1.5], 'validation': [2.0]}"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(demo, "OUT", tmp_path)
    assert repr(demo.read_losses()) == "[2.5, nan, inf, 1.5]"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("[print('x' * 999) for _ in range(999)]; return 0", 141),
        ("print('x'); return 0", 141),  # fails only when flushed
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_ends_of_commands(body: str, code: int) -> None:
    script = f"from xtuner.core.command import exit_with\ndef f():\n    {body}\nexit_with(f)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (code, "xtuner: interrupted\n" if code == 130 else "")
