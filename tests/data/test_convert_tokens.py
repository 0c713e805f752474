"""`xtuner data convert`, and the other tools of `xtuner data` on token files of every kind."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.token_files import (
    Document,
    draw_documents,
    ids_of,
    labels_of,
    load_library,
    make_table,
    write_arrow,
    write_jsonl,
    write_megatron,
    write_parquet,
)

from xtuner.core.errors import ConfigError, DataError
from xtuner.data import load_intern_repo_tokenized_dataset, load_token_files
from xtuner.data.format.folder import TokenizedFolder
from xtuner.data.format.writer import write_bin
from xtuner.data.sources import document_blocks

Run = Callable[..., int]
NO_ZEROS = [([i + 1 for i in ids], learned) for ids, learned in draw_documents(200, 1)]
DOCUMENTS = draw_documents(200, 2)


def documents_of(folder: TokenizedFolder) -> list[Document]:
    found = [file.read(i) for file in folder for i in range(len(file))]
    return [(ids.tolist(), learned.tolist()) for ids, learned in found]


def write_all(root: Path, documents: list[Document]) -> list[Path]:
    """A folder of each kind that marks what is learned."""
    write_parquet(root / "parquet" / "en" / "a.parquet", documents, row_group_size=70)
    write_arrow(root / "arrow" / "en" / "a.arrow", make_table(documents))
    write_arrow(root / "feather" / "en" / "a.feather", make_table(documents), stream=False, compression="zstd")
    write_jsonl(root / "jsonl" / "en" / "a.jsonl", documents)
    write_megatron(root / "megatron" / "en" / "a.bin", ids_of(documents), np.uint16)
    write_megatron(root / "megatron" / "en" / "a_labels.bin", labels_of(documents))
    return sorted(root.iterdir())


@pytest.mark.processes
def test_from_any_kind_to_any(tmp_path: Path, xtuner: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several processes, each with a part of a file; no cache is written next to what is converted."""
    monkeypatch.setattr(document_blocks, "TOKENS", 500)
    monkeypatch.setattr("xtuner.data.sources.jsonl.BLOCK", 2000)
    folders = write_all(tmp_path / "from", NO_ZEROS)
    for number, folder in enumerate(folders):
        target = tmp_path / "bin" / folder.name
        with monkeypatch.context() as patch:
            patch.setattr(
                "xtuner.data.sources.decoded.MAX_SENT", 0 if folder.name == "feather" else 2**28
            )  # without processes
            assert xtuner("data", "convert", folder, target, "--workers", 1 + number % 2) == 0
        assert sorted(p.name for p in (target / "en").iterdir()) == ["a.bin", "a.bin.meta"]
        assert documents_of(load_intern_repo_tokenized_dataset(target)) == NO_ZEROS
    assert not list(tmp_path.rglob(".*"))
    source = tmp_path / "bin" / "parquet"
    for kind, vocab in (("megatron", "60000"), ("jsonl", "70000")):
        target = tmp_path / "to" / kind
        options = ("--to", kind, "--vocab-size", vocab, "--from", "internevo", "--workers", 1)
        assert xtuner("data", "convert", source, target, *options) == 0
        assert documents_of(load_token_files(target)) == NO_ZEROS
    with monkeypatch.context() as patch:
        patch.setattr("xtuner.data.sources.decoded.PARALLEL", 1)  # its row groups are decoded by several processes
        assert documents_of(load_token_files(tmp_path / "from" / "parquet", cache_dir=tmp_path / "cache")) == NO_ZEROS
    indexed = load_library("megatron.core.datasets.indexed_dataset")
    theirs = indexed.IndexedDataset(str(tmp_path / "to" / "megatron" / "en" / "a"))
    assert theirs.index.dtype == np.uint16
    assert [theirs[i].tolist() for i in range(len(theirs))] == ids_of(NO_ZEROS)
    assert xtuner("data", "convert", tmp_path / "to" / "megatron", tmp_path / "back", "--workers", 1) == 0
    assert (tmp_path / "back" / "en" / "a.bin").read_bytes() == (source / "en" / "a.bin").read_bytes()


def test_labels_of_id_0(tmp_path: Path, xtuner: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A `.bin` that would lose one is not written, unless `learn_zero` restores them all, or it is requested."""
    write_jsonl(tmp_path / "mixed" / "a.jsonl", DOCUMENTS)
    run = ("data", "convert", tmp_path / "mixed", tmp_path / "bin", "--workers", 1)
    with pytest.raises(DataError, match=r"a token of id 0 is learned.*\n  where: .*a.jsonl, token \d+ of the document"):
        xtuner(*run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixed"]
    assert xtuner(*run, "--lossy") == 0
    lost = sum(i == 0 and t for d in DOCUMENTS for i, t in zip(*d, strict=True))
    assert f"{lost} tokens of id 0 are no longer learned" in capsys.readouterr().out
    found = documents_of(load_intern_repo_tokenized_dataset(tmp_path / "bin"))
    assert found == [(ids, [t and i > 0 for i, t in zip(ids, learned, strict=True)]) for ids, learned in DOCUMENTS]
    ruled = documents_of(load_intern_repo_tokenized_dataset(tmp_path / "bin", learn_zero=True))
    assert ruled != found
    write_jsonl(tmp_path / "ruled" / "a.jsonl", ruled)
    run = ("data", "convert", tmp_path / "ruled", tmp_path / "bin", "--workers", 1)
    assert xtuner(*run, "--overwrite") == 0
    assert "train on it with learn_zero=True, which learns exactly these" in capsys.readouterr().out.replace("\n", " ")
    assert documents_of(load_intern_repo_tokenized_dataset(tmp_path / "bin", learn_zero=True)) == ruled
    back = ("data", "convert", tmp_path / "bin", tmp_path / "back", "--to", "megatron", "--learn-zero", "--workers", 1)
    assert xtuner(*back) == 0
    assert "labels are in NAME_labels" in capsys.readouterr().out
    assert documents_of(load_token_files(tmp_path / "back")) == ruled


def test_what_is_not_converted(tmp_path: Path, xtuner: Run) -> None:
    """Nothing remains of a conversion that fails, and nothing of the user's is replaced without a request."""
    source, target = tmp_path / "a", tmp_path / "b"
    write_jsonl(source / "x" / "a.jsonl", NO_ZEROS)
    (source / "x" / "b.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": [3, "x"]}\n')
    run = ("data", "convert", source)
    with pytest.raises(DataError, match=r"'input_ids' contains 'x', not an integer\n  where: .*b.jsonl:22"):
        xtuner(*run, target, "--workers", 1)
    with pytest.raises(
        DataError, match=r"token id 1\d\d? is outside the vocabulary of 9\n  where: .*a.jsonl:0, document"
    ):
        xtuner(*run, target, "--vocab-size", 9, "--workers", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    (source / "x" / "b.jsonl").write_text("\n")
    target.mkdir()
    (target / "mine").touch()
    for options, message in (
        ((target,), "the target folder is not empty"),
        ((source,), "would replace the data that are converted"),
        ((tmp_path,), "would replace the data that are converted"),
        ((source / "y",), "the target lies in the folder that is converted"),
        ((target, "--to", "jsonl"), "the data are jsonl already"),
        ((target / "mine",), "the target is a file"),
        (("s3://bucket/x",), "written to a disk only"),
        ((target, "--from", "parquet"), "no .parquet file in the data folder"),
        ((target, "--vocab-size", 0), "a vocabulary of 0 has no ids"),
        ((target, "--learn-zero"), "--learn-zero has no meaning for jsonl files, only for internevo"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            xtuner(*run, *options, "--overwrite" if options[0] in (source, tmp_path) else "--lossy")
    assert xtuner(*run, target, "--overwrite", "--workers", 1) == 0
    assert sorted(p.name for p in target.iterdir()) == ["x"]
    write_bin(tmp_path / "c" / "a.bin", [[1, 2]])
    with pytest.raises(ConfigError, match=r"these are .bin files(.|\n)*--to megatron"):
        xtuner("data", "convert", tmp_path / "c", tmp_path / "d")
    with pytest.raises(ConfigError, match="--mask has no meaning for internevo files, only for megatron, parquet"):
        xtuner("data", "convert", tmp_path / "c", tmp_path / "d", "--to", "megatron", "--mask", "none")
    for name in ("a.arrow", "b.arrow"):
        write_arrow(tmp_path / "e" / name, make_table(NO_ZEROS))
    write_arrow(tmp_path / "e" / "a.feather", make_table(NO_ZEROS))
    with pytest.raises(ConfigError, match=r"a.arrow and a.feather would both become a.bin"):
        xtuner("data", "convert", tmp_path / "e", tmp_path / "d")


@pytest.mark.processes
def test_the_tools_accept_every_kind(tmp_path: Path, xtuner: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """`data stats`, `check`, `cache`, `show` and `order`; options of a config by the same names."""
    tokens, learned = (sum(map(part, DOCUMENTS)) for part in (lambda d: len(d[0]), lambda d: sum(d[1])))
    seen = set()
    for folder in write_all(tmp_path, DOCUMENTS):
        run = lambda verb, *options, where=folder: xtuner("data", verb, where, *options)  # noqa: E731
        assert run("stats", "--max-length", 64, "--json", "--workers", 1) == 0
        stats = json.loads(capsys.readouterr().out)
        assert (stats["documents"], stats["tokens"], stats["learned"]) == (200, tokens, learned)
        assert (stats["types"][0]["name"], stats["longest"], stats["zeros"]) == ("en/", 40, 0)
        seen.add((stats["packs"], stats["tail"], str(stats["lengths"]), str(stats["cost"])))
        assert run("check", "--json", "--vocab-size", 100, "--workers", 1) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["documents"], found["tokens"], found["learned"], found["largest"]) == (200, tokens, learned, 99)
        assert run("check", "--vocab-size", 99, "--workers", 1) == 65
        assert "token id 99 is outside the vocabulary of 99" in capsys.readouterr().out
        assert run("show", "--pack", 2, "--max-length", 64, "--show", "labels") == 0
        seen.add(capsys.readouterr().out.replace(folder.name, "kind").replace(".kind", "").replace("a.bin", "a"))
        assert run("cache", "--workers", 1) == 0
        assert "index of 200 documents in 1 files" in capsys.readouterr().out
    assert len(seen) == 2  # the same for all
    (tmp_path / "jsonl" / "en" / "b.jsonl").write_bytes((tmp_path / "jsonl" / "en" / "a.jsonl").read_bytes())
    (tmp_path / "jsonl" / "en" / "c.jsonl").write_text('{"input_ids": [1]}\n{')
    assert xtuner("data", "check", tmp_path / "jsonl") == 65
    out = capsys.readouterr().out
    assert "b.jsonl  has the same documents as en/a.jsonl" in out
    assert "c.jsonl  a line is not JSON" in out
    assert "c.jsonl:19)" in out
    assert "problems: 2" in out
    write_bin(tmp_path / "internevo" / "a.bin", [[1, 2]])
    for verb, kind, options, message in (
        ("check", "jsonl", ["--fix-meta"], "jsonl files have no meta"),
        ("check", "internevo", ["--ids", "x"], "--ids has no meaning for internevo files, only for parquet"),
        ("stats", "internevo", ["--labels", "none"], "--labels has no meaning for internevo files"),
        ("cache", "megatron", ["--ids", "x"], "--ids has no meaning for megatron files"),
        ("cache", "arrow", ["--kind", "arrow", "--file-type", ".x"], "--file-type has no meaning for arrow files"),
        ("show", "parquet", ["--learn-zero"], "--learn-zero has no meaning for parquet files, only for internevo"),
        ("show", "parquet", ["--long", "drop"], "packing that cuts documents also cuts long ones"),
        ("stats", "parquet", ["--processes", 8], "only the schedule of one depends on the number of processes"),
    ):
        with pytest.raises(ConfigError, match=message):
            xtuner("data", verb, tmp_path / kind, *options)
    plain = ("--labels", "none", "--json", "--workers", 1)
    assert xtuner("data", "stats", tmp_path / "parquet", *plain) == 0
    assert json.loads(capsys.readouterr().out)["learned"] == tokens
