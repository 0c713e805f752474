"""What people read: chat, packs shown, validation, evaluation that goes on after a stop."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_corpus

from xtuner.cli.chat import spoken
from xtuner.core.errors import ConfigError
from xtuner.data import load_intern_repo_tokenized_dataset
from xtuner.data.chat_template import PROMPT_TEMPLATE
from xtuner.data.pack import PackedDataset
from xtuner.data.show import show_pack
from xtuner.data.tokenizer import load_tokenizer
from xtuner.data.write import write_bin

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
    got = list(spoken(iter(text.encode()), Letters(), stops))  # type: ignore[arg-type]
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


def test_evaluation_goes_on_by_file(model: Path, corpus: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """Files in the record are not read again; a file that has changed is; another model's record is refused."""
    words = ("eval", "loss", model, corpus, "--save", tmp_path / "r.json")
    capsys.readouterr()
    assert xtuner(*words) == 0
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    assert sorted(record["files"]) == ["code/a.bin", "code/b.bin", "en/a.bin", "en/b.bin"]
    del record["files"]["en/b.bin"]
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert xtuner(*words) == 0
    assert capsys.readouterr().out == table
    record["files"]["en/a.bin"]["total"] += 1e6
    record["files"]["code/a.bin"] |= {"identity": "another", "total": 1e6}
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert xtuner(*words) == 0
    rows = {r.split()[0]: r.split()[1:] for r in capsys.readouterr().out.splitlines()[1:]}
    before = {r.split()[0]: r.split()[1:] for r in table.splitlines()[1:]}
    assert rows["code"] == before["code"]
    assert float(rows["en"][1]) > float(before["en"][1]) + 100
    with pytest.raises(ConfigError, match="another model"):
        xtuner(*words, "--max-length", "7")
