"""Token files of other tools: the documents that their own libraries write, packed as those of a `.bin` are."""

import hashlib
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import on_ranks
from helpers.runs import contents, records
from helpers.token_files import (
    Document,
    draw_documents,
    ids_of,
    labels_of,
    load_library,
    make_table,
    write_arrow,
    write_hf,
    write_jsonl,
    write_megatron,
    write_parquet,
)

from xtuner.core.errors import ConfigError, DataError
from xtuner.data import load_token_files, mixture
from xtuner.data.format.cache_dirs import Opening
from xtuner.data.format.folder import TokenizedFolder
from xtuner.data.format.writer import write_bin
from xtuner.data.loading.open_on_ranks import open_on_ranks
from xtuner.data.packing import document_order
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.sources.decoded import BlockReader, DecodedFile, DecodedTokens
from xtuner.data.sources.kinds import detect_kind
from xtuner.data.sources.megatron_writer import MegatronWriter
from xtuner.data.sources.raw_reader import RawReader
from xtuner.dist.collectives import Ranks

DOCUMENTS = draw_documents(230)


class Listed:
    """Documents in memory: the general way to pack."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents, self.lengths = documents, np.array([len(ids) for ids, _ in documents])

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, i: int) -> tuple[Any, Any]:
        ids, learned = self.documents[i]
        return np.array(ids, np.int64), np.array(learned, bool)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.documents).encode()).hexdigest()


def require_equal(folder: TokenizedFolder, documents: list[Document]) -> None:
    """Every document and every pack, also after a pickle; the following token at the end of a pack included."""
    (file,) = folder
    for i, (ids, learned) in enumerate(documents):
        found = file.read(i)
        assert (found[0].tolist(), found[1].tolist()) == (ids, learned), i
    ours, general = (PackedDataset(source, 33, 5) for source in (folder, [Listed(documents)]))
    ours = pickle.loads(pickle.dumps(ours))
    assert len(ours) == len(general) > 100
    for i in range(len(ours)):
        assert {k: v.tolist() for k, v in ours[i].items()} == {k: v.tolist() for k, v in general[i].items()}, i


def write_own_megatron(path: Path, documents: list[Document]) -> None:
    """By our own writer, where megatron-core is not needed."""
    ids, learned = (np.array([v for d in documents for v in d[part]]) for part in (0, 1))
    with MegatronWriter(path, "<i4") as writer:
        writer.write(np.array([len(i) for i, _ in documents]), ids, learned.astype(bool))
        writer.commit()


def test_megatron(tmp_path: Path) -> None:
    """Every type of number that the library writes; labels in a pair of their own."""
    ids = ids_of(DOCUMENTS)
    everything = [(i, [True] * len(i)) for i in ids]
    indexed = load_library("megatron.core.datasets.indexed_dataset")
    for code in indexed.DType:
        dtype = indexed.DType.dtype_from_code(code.value)
        folder = tmp_path / f"{dtype.__name__}"
        write_megatron(folder / "a.bin", ids, dtype)
        theirs = indexed.IndexedDataset(str(folder / "a"))
        assert [theirs[i].tolist() for i in range(len(theirs))] == ids
        require_equal(load_token_files(folder), everything)
    write_megatron(folder / "a_labels.bin", labels_of(DOCUMENTS))
    require_equal(load_token_files(folder), DOCUMENTS)
    require_equal(load_token_files(folder, labels=None), everything)
    write_megatron(folder / "a_loss_mask.bin", [[int(t) for t in d[1]] for d in DOCUMENTS], np.uint8)
    require_equal(load_token_files(folder, labels=None, mask="_loss_mask"), DOCUMENTS)
    assert len({load_token_files(folder, labels=x).fingerprint() for x in ("auto", "_labels", None)}) == 2
    write_own_megatron(tmp_path / "own" / "a.bin", DOCUMENTS)
    for part in ("a", "a_labels"):
        own, others = indexed.IndexedDataset(str(tmp_path / "own" / part)), ids if part == "a" else labels_of(DOCUMENTS)
        assert [own[i].tolist() for i in range(len(own))] == others
        assert own.document_indices.tolist() == list(range(len(ids) + 1))


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """With --split-sentences; without any end_document each sequence is one; multimodal files have modes."""
    import torch

    indexed = load_library("megatron.core.datasets.indexed_dataset")
    ids = ids_of(DOCUMENTS)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "joined.bin"), multimodal=True)
    for document in ids:
        sentences = [document[i : i + 7] for i in range(0, len(document), 7)]
        builder.add_document(torch.tensor(document), [len(s) for s in sentences], [0] * len(sentences))
    builder.finalize(str(tmp_path / "joined.idx"))
    require_equal(load_token_files(tmp_path / "joined.bin"), [(i, [True] * len(i)) for i in ids])
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "single.bin"))
    for document in ids:
        builder.add_item(torch.tensor(document))
    builder.finalize(str(tmp_path / "single.idx"))
    require_equal(load_token_files(tmp_path / "single.bin"), [(i, [True] * len(i)) for i in ids])


def test_parquet(tmp_path: Path) -> None:
    pq, pa = load_library("pyarrow.parquet"), load_library("pyarrow")
    write_parquet(tmp_path / "a" / "a.parquet", DOCUMENTS, row_group_size=60)
    assert pq.read_table(tmp_path / "a" / "a.parquet")["input_ids"].to_pylist() == ids_of(DOCUMENTS)
    folder = load_token_files(tmp_path / "a")
    require_equal(folder, DOCUMENTS)
    assert isinstance(folder.reader(0, None), DecodedTokens)
    table = make_table(DOCUMENTS, "loss_mask", pa.large_list, pa.uint8())
    pq.write_table(table.rename_columns(["text", "own ids", "own mask"]), tmp_path / "b.parquet", compression="zstd")
    same = load_token_files(tmp_path / "b.parquet", ids="own ids", mask="own mask")
    require_equal(same, DOCUMENTS)
    assert same.fingerprint() == folder.fingerprint()  # of contents: a run may continue on either


def test_arrow(tmp_path: Path) -> None:
    """As save_to_disk writes it, in several shards; all types of lists, in batches that are slices of others."""
    pa, datasets = load_library("pyarrow"), load_library("datasets")
    write_hf(tmp_path / "hf", DOCUMENTS, num_shards=2)
    shutil.copy(next((tmp_path / "hf").glob("data*.arrow")), tmp_path / "hf" / "cache-0123.arrow")  # of a `map`
    theirs = datasets.load_from_disk(str(tmp_path / "hf"))
    folder = load_token_files(tmp_path / "hf")
    assert [n for n in folder.names if "cache" in n] == []
    found = [file.read(i) for file in folder for i in range(len(file))]
    assert [ids.tolist() for ids, _ in found] == theirs["input_ids"][:] == ids_of(DOCUMENTS)
    assert [t.tolist() for _, t in found] == [[x >= 0 for x in row] for row in theirs["labels"][:]]
    assert isinstance(folder.reader(0, None), RawReader)
    assert not (tmp_path / "hf" / ".xtuner-cache").exists()
    makers = (pa.list_, pa.large_list)
    types = (pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64())
    cases = [(make, values, learned) for make in makers for values in types for learned in ("labels", "loss_mask")]
    for number, (make, values, learned) in enumerate(cases):
        path, stream = tmp_path / f"{number}.arrow", number % 3 > 0
        table = pa.concat_tables([make_table(DOCUMENTS[:7]), make_table(DOCUMENTS)]) if not number else None
        table = table or make_table([*DOCUMENTS[:7], *DOCUMENTS], learned, make, values)
        compression = "zstd" if number % 4 == 3 else None
        write_arrow(path, table.slice(7), rows=number % 60 + 1, stream=stream, compression=compression)
        folder = load_token_files(path)
        require_equal(folder, DOCUMENTS)
        assert isinstance(folder.reader(0, None), DecodedTokens if compression else RawReader)
    even = [(ids[:9], learned[:9]) for ids, learned in draw_documents(600, most=80) if len(ids) >= 9]
    ids = pa.array(ids_of(even), pa.list_(pa.int32(), 9))
    mask = pa.array([t for _, t in even], pa.list_(pa.bool_(), 9))
    write_arrow(tmp_path / "fixed.arrow", pa.table({"ids": ids, "mask": mask}).slice(3), rows=11)
    require_equal(load_token_files(tmp_path / "fixed.arrow"), even[3:])


def test_json_lines(tmp_path: Path) -> None:
    """In the form that is parsed at once, and in others; lines across the borders of blocks; lines without labels."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, DOCUMENTS)
    require_equal(load_token_files(path), DOCUMENTS)
    odd = [json.dumps({"meta": "é", "mask": learned, "input_ids": ids}) for ids, learned in DOCUMENTS]
    path.write_text("\n".join([odd[0], "", *odd[1:-1], json.dumps({"input_ids": [0, 5]}), odd[-1].replace(" ", "")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xtuner.data.sources.jsonl.BLOCK", 700)
        require_equal(load_token_files(path), [*DOCUMENTS[:-1], ([0, 5], [True, True]), DOCUMENTS[-1]])


def test_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is used while it fits the file, rebuilt if it is lost or damaged, and done without if need be."""
    path = tmp_path / "data" / "a.jsonl"
    write_jsonl(path, DOCUMENTS)
    monkeypatch.setattr("xtuner.data.sources.jsonl.BLOCK", 700)
    folder = load_token_files(path.parent, opening=Opening(read_only=True))
    require_equal(folder, DOCUMENTS)
    assert not (path.parent / ".xtuner-cache").exists()
    assert isinstance(folder.reader(0, None), BlockReader)
    folder = load_token_files(path.parent)
    (cache,) = path.parent.glob(".xtuner-cache/tokens/*")
    with monkeypatch.context() as patch:
        patch.setattr(DecodedFile, "blocks", None)
        again = load_token_files(path.parent)
        assert again.fingerprint() == folder.fingerprint()
        assert again.file(0).lengths.tolist() == [len(ids) for ids, _ in DOCUMENTS]
    cache.unlink()
    require_equal(folder, DOCUMENTS)
    assert cache.exists()
    cache.write_bytes(cache.read_bytes()[:-8])
    require_equal(load_token_files(path.parent), DOCUMENTS)
    changed = [([9], [True]), *DOCUMENTS[1:]]
    write_jsonl(path, changed)
    with pytest.raises(DataError, match="has changed since it was indexed"):
        PackedDataset(folder, 33)[0]
    require_equal(load_token_files(path.parent), changed)
    assert load_token_files(path.parent).fingerprint() != folder.fingerprint()
    monkeypatch.setattr(document_order, "SMALL", 1)  # the orders are mapped, too
    monkeypatch.setattr("xtuner.data.format.folder.document_order.SMALL", 1)
    require_equal(load_token_files(path.parent), changed)
    mapped = load_token_files(path.parent)
    assert mapped.load_orders(5) is not None
    require_equal(mapped, changed)
    few = load_token_files(path.parent, min_length=20)
    assert [len(few.file(0).read(i)[0]) for i in range(len(few.file(0)))] == [
        len(ids) for ids, _ in changed if len(ids) >= 20
    ]


def resize(path: Path, change: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))


def patch_idx(at: int, form: str, *values: int) -> Callable[[Path], None]:
    def patch(folder: Path) -> None:
        data = bytearray((folder / "a.idx").read_bytes())
        struct.pack_into(form, data, at, *values)
        (folder / "a.idx").write_bytes(data)

    return patch


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: resize(f / "a.bin", -1),
            r"sequence 3 of 4 tokens begins at byte 20, and the .bin has 35 (.|\n)*:35",
        ),
        (lambda f: resize(f / "a.bin", 4), r"continues after the last sequence .* 40 bytes instead of 36(.|\n)*bin:36"),
        (lambda f: resize(f / "a.idx", -1), r"cut short: 121 bytes instead of 122(.|\n)*a.idx:121"),
        (lambda f: resize(f / "a.idx", 1), "longer than its arrays: 123 bytes"),
        (lambda f: (f / "a.idx").write_bytes(b"TNTIDX\0\0" + bytes(99)), "Megatron's older format"),
        (lambda f: (f / "a.idx").write_bytes(b""), "it is not the .idx of a Megatron dataset"),
        (patch_idx(9, "<Q", 2), r"version 2, which is not known\n  where: .*a.idx:9"),
        (patch_idx(17, "<B", 9), r"type code 9, which is not known\n  where: .*a.idx:17"),
        (patch_idx(38, "<i", -2), r"sequence 1 has -2 tokens from byte 12 on\n  where: .*a.idx:38"),
        (patch_idx(58, "<q", 2**62), "sequence 1 of 2 tokens begins at byte 4,611,686,018,427,387,904"),
        (
            patch_idx(114, "<q", 3),
            r"document index does not cover the sequences: 4 .* from 0 to 3\n  where: .*a.idx:82",
        ),
        (lambda f: (f / "a.bin").unlink(), "a.bin cannot be opened: No such file"),
        (lambda f: write_own_megatron(f / "a_labels.bin", SHORT[:2]), r"document 2 has 0 tokens and no labels"),
    ],
)
def test_a_damaged_megatron_pair(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write_own_megatron(tmp_path / "a.bin", SHORT)
    load_token_files(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_token_files(tmp_path, kind="megatron")


SHORT = [([1, 2, 3], [True] * 3), ([4, 0], [True] * 2), ([], []), ([5, 6, 7, 8], [True] * 4)]


def test_a_file_that_changes_under_a_run(tmp_path: Path) -> None:
    """Nothing is read from a file that has another size or time, and one that ends too early is noticed."""
    write_own_megatron(tmp_path / "a.bin", DOCUMENTS)
    write_arrow(tmp_path / "a.arrow", make_table(DOCUMENTS))
    for kind, name in (("megatron", "a.bin"), ("megatron", "a_labels.idx"), ("arrow", "a.arrow")):
        data = PackedDataset(load_token_files(tmp_path, kind=kind), 33)  # type: ignore[arg-type]
        assert data[0]["input_ids"].shape == (33,)
        resize(tmp_path / name, 1)
        with pytest.raises(DataError, match="has changed since it was indexed"):
            data[0]
        resize(tmp_path / name, -1)
    file = load_token_files(tmp_path, kind="megatron").file(0)
    fresh = type(file)(file.path, file.name)  # as if its facts were not known
    _ = fresh.all_lengths
    resize(tmp_path / "a.bin", -8)
    with pytest.raises(DataError, match=r"ends before its last document\n  where: .*a.bin:\d+"):
        _ = [fresh.read(i) for i in range(len(DOCUMENTS))]


def test_damaged_tables(tmp_path: Path) -> None:
    """Cut anywhere: an error that names the file, never other documents."""
    write_parquet(tmp_path / "a.parquet", DOCUMENTS, row_group_size=60)
    write_arrow(tmp_path / "a.arrow", make_table(DOCUMENTS))
    write_arrow(tmp_path / "b.feather", make_table(DOCUMENTS), stream=False, compression="lz4")
    draw = np.random.RandomState(0)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for cut in [0, 1, 7, len(whole) - 1, len(whole) - 8, *draw.randint(0, len(whole), 12)]:
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError, match=rf"(.|\n)*{path.name}"):
                load_token_files(path, cache_dir=tmp_path / "cache").file(0).read(0)
    write_parquet(path := tmp_path / "c.parquet", DOCUMENTS, row_group_size=60, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"c.parquet cannot be decoded: .*\n  where: .*, row group \d, row \d+"):
        load_token_files(path)


def read_all(path: Path) -> None:
    (file,) = load_token_files(path)
    for i in range(len(file)):
        file.read(i)


def test_values_that_are_not_documents(tmp_path: Path) -> None:
    """Named with file, row or byte, and token, whichever way they are read."""
    pa = load_library("pyarrow")
    pq = load_library("pyarrow.parquet")
    good = {"input_ids": [[1, 2], [3, 0, 5]], "labels": [[-100, 2], [3, 0, -100]]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"labels": [[-100, 2], [0, 5, -100]]}, "the label of a token is 0, and its id 3(.|\n)*not shifted"),
        ({"labels": [[-100, 2], [3, 0]]}, "a (document|line) has 3 ids and 2 labels"),
        ({"input_ids": [[1, 2], [3, -7, 5]]}, "-7 is not a token id"),
        ({"input_ids": [[1, 2], [3, 2**31 - 1, 5]], "labels": None}, "2147483647 is not a token id"),
        ({"labels": None, "mask": [[1, 1], [0, 2, 1]]}, "a value of the mask is 2, not 0 or 1"),
        ({"input_ids": [[1, 2], [3, None, 5]]}, "'input_ids' contains (a null|None)"),
        ({"input_ids": [[1, 2], None]}, "'input_ids' is (null|not a list)"),
        ({"input_ids": None}, r"there is no column of ids \(input_ids, tokens, ids\): the columns are labels"),
        ({"labels": None, "attention_mask": [[1, 1], [1, 1, 0]]}, "the documents are padded"),
        ({"input_ids": [["a", "b"], ["c"]]}, "not a list of integers|contains 'a', not an integer"),
    ]
    for number, (change, message) in enumerate(cases):
        columns = {k: v for k, v in {**good, **change}.items() if v is not None}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
        write_arrow(tmp_path / f"{number}.arrow", pa.table(columns))
        for ending in ("jsonl", "parquet", "arrow"):
            with pytest.raises(DataError, match=message) as caught:
                read_all(tmp_path / f"{number}.{ending}")
            assert f"{number}.{ending}" in str(caught.value.where)
    with pytest.raises(DataError, match=r"there is no column 'x': the columns are input_ids, labels"):
        load_token_files(tmp_path / "0.parquet", ids="x")
    with pytest.raises(DataError, match=r"there is no column 'y'(.|\n)*set labels=None"):
        load_token_files(tmp_path / "0.parquet", labels="y")
    for broken, message in (
        ('{"input_ids": [1', r"is not JSON: .*it begins '\{\"input_ids\": \[1'\n  where: .*jsonl:27"),
        ("[1, 2]", "not an object with a list of ids"),
        ("[" * 99999, "nested too deeply"),
        ('{"input_ids": [1, 2.5]}', "contains 2.5, not an integer"),
        ('{"input_ids": [1, 99999999999999999999]}', "a number beyond"),
    ):
        path = tmp_path / "broken.jsonl"
        path.write_text('{"input_ids": [1, 2, 3]}\n\n\n' + broken)
        with pytest.raises(DataError, match=message):
            load_token_files(path)


def test_which_files(tmp_path: Path) -> None:
    """Kinds that are not clear, datasets of several splits or with indices: the message says what to give instead."""
    with pytest.raises(DataError, match="no token file in the data folder"):
        load_token_files(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", SHORT)
    write_own_megatron(tmp_path / "en" / "a.bin", SHORT)
    with pytest.raises(ConfigError, match=r"several kinds: jsonl \(a.jsonl\), megatron \(en/a.idx\)(.|\n)*kind="):
        load_token_files(tmp_path)
    write_bin(tmp_path / "fr" / "a.bin", [[1, 2]])
    with pytest.raises(ConfigError, match=r"several kinds: jsonl .*, megatron \(en/a.idx\), internevo \(fr/a.bin\)"):
        detect_kind(tmp_path, prefer_bin=True)
    shutil.rmtree(tmp_path / "fr")
    assert load_token_files(tmp_path, kind="jsonl").names == ["a.jsonl"]
    assert load_token_files(tmp_path, kind="megatron").names == ["en/a.bin"]
    with pytest.raises(ConfigError, match="from a disk only\n  where: s3://bucket/data"):
        load_token_files("s3://bucket/data")
    with pytest.raises(ConfigError, match="labels and mask are both given"):
        load_token_files(tmp_path, kind="jsonl", labels="a", mask="b")
    with pytest.raises(ConfigError, match="Megatron's files have no columns"):
        load_token_files(tmp_path, kind="megatron", ids="a")
    with pytest.raises(ConfigError, match="kind = 'csv'"):
        load_token_files(tmp_path, kind="csv")  # type: ignore[arg-type]
    datasets = load_library("datasets")
    write_hf(tmp_path / "hf" / "train", SHORT)
    (tmp_path / "hf" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"splits: train, test(.|\n)*give the folder of one: .*/hf/train"):
        load_token_files(tmp_path / "hf")
    assert datasets.load_from_disk(str(tmp_path / "hf" / "train")).num_rows == len(SHORT)
    state = tmp_path / "hf" / "train" / "state.json"
    found = json.loads(state.read_text())
    state.write_text(json.dumps(found | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match=r"selects its rows by indices(.|\n)*flatten_indices"):
        load_token_files(tmp_path / "hf" / "train")
    state.write_text(json.dumps(found | {"_data_files": [*found["_data_files"], {"filename": "gone.arrow"}]}))
    with pytest.raises(DataError, match=r"gone.arrow is missing"):
        load_token_files(tmp_path / "hf" / "train")


@pytest.mark.processes
def test_a_mixture_of_all_trains_and_resumes(
    tiny: Path, corpus: Path, tmp_path: Path, xtuner: Callable[..., int]
) -> None:
    """Bit for bit, with worker processes, and from copies in another format."""
    documents = {name: draw_documents(40, seed, 400) for seed, name in enumerate(("jsonl", "megatron", "arrow"))}
    write_jsonl(tmp_path / "jsonl" / "a.jsonl", documents["jsonl"])
    write_own_megatron(tmp_path / "megatron" / "en" / "a.bin", documents["megatron"])
    write_parquet(tmp_path / "parquet" / "a.parquet", documents["jsonl"])
    write_hf(tmp_path / "arrow", documents["arrow"])
    text = tiny.read_text()
    begin, end = text.index("    dataset_cfg=dict("), text.index("    packed_length=max_length")
    kinds = ("jsonl", "megatron", "arrow")
    own = ", ".join(f"dict(type=load_token_files, folder=folders[{i}], name={k!r})" for i, k in enumerate(kinds))
    bins = f"dict(type=load_intern_repo_tokenized_dataset, folder={str(corpus)!r})"
    cfg = f"    dataset_cfg=dict(type=mixture, sources=[{own}, {bins}]),\n"
    folders = [str(tmp_path / kind) for kind in kinds]
    config = tmp_path / "mixed.py"
    head = f"from xtuner.data import load_token_files, mixture\nfolders = {folders!r}\n"
    val = f"val_dataset = dict(type=load_token_files, folder={folders[1]!r})\n"
    config.write_text(head + text[:begin] + cfg + text[end:] + val)
    assert xtuner("check-cfg", config) == 0
    one = f"train_dataset.dataset_cfg.sources.0.folder={tmp_path}/jsonl/a.jsonl"
    assert xtuner("check-cfg", config, "--cfg-options", one) == 0  # one file is a source, too
    bins_file = one.replace("sources.0", "sources.3")
    with pytest.raises(ConfigError, match=r"data folder is a file(.|\n)*sources.3.folder"):
        xtuner("check-cfg", config, "--cfg-options", bins_file)
    assert not list(tmp_path.rglob(".xtuner-cache"))  # it writes nothing
    for wrong in (
        ["train_dataset.dataset_cfg.sources.1.folder=s3://bucket/x"],
        ["train_dataset.dataset_cfg.sources.1.ids=no"],
    ):
        with pytest.raises(ConfigError) as failed:  # names the source at fault, and no other
            xtuner("train", config, "--dry-run", "--work-dir", tmp_path / "dry", "--cfg-options", *wrong)
        assert "sources.1" in failed.value.where, failed.value
        assert not any(f"sources.{other}" in failed.value.where for other in (0, 2, 3)), failed.value
    held_out = "val_dataset={'type': 'xtuner.data.mixture', 'sources': []}"
    with pytest.raises(ConfigError, match=r"needs a list of sources: .*\n  where: \S+ val_dataset.sources"):
        xtuner("check-cfg", config, "--cfg-options", held_out)
    with pytest.raises(ConfigError, match=r"'wieght'\. Did you mean 'weight'"):
        xtuner("check-cfg", config, "--cfg-options", "train_dataset.dataset_cfg.sources.1.wieght=2")
    options = ["--cfg-options", "max_epochs=2", "save_steps=4", "save_total_limit=-1", "evaluation_inputs=[]"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert xtuner("train", config, "--work-dir", straight, *options) == 0
    lines = records(straight)
    last = max(lines)
    assert last > 8
    moved = [*options, f"folders={[str(tmp_path / 'parquet'), *folders[1:]]!r}", "train_dataloader.num_workers=1"]
    assert xtuner("train", config, "--work-dir", resumed, "--resume", straight / "iter_4.pth", *moved) == 0
    assert records(resumed) == {n: line for n, line in lines.items() if n > 4}
    assert contents(resumed / f"iter_{last}.pth") == contents(straight / f"iter_{last}.pth")
    documents["jsonl"][3][0][0] ^= 1
    write_parquet(tmp_path / "parquet" / "a.parquet", documents["jsonl"])
    with pytest.raises(DataError, match="not what the checkpoint was trained on"):
        xtuner("train", config, "--work-dir", tmp_path / "other", "--resume", straight / "iter_4.pth", *moved)
    big = [([401], [True])] * 40
    write_jsonl(tmp_path / "jsonl" / "a.jsonl", big)
    with pytest.raises(DataError, match=r"token id 401 is outside the vocabulary of 400\n  where: .*a.jsonl"):
        xtuner("train", config, "--work-dir", tmp_path / "other", *options)


@pytest.mark.processes
def test_ranks_open_what_rank_0_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is decoded once, and all ranks map the cache and the order."""
    monkeypatch.setattr(document_order, "SMALL", 1)
    write_jsonl(tmp_path / "data" / "a.jsonl", DOCUMENTS)

    def opened(ranks: Ranks, folder: Path) -> None:
        if not ranks.is_main:
            DecodedFile._pass = None  # type: ignore[method-assign, assignment]

        def build(known: Any) -> PackedDataset:
            return PackedDataset(load_token_files(tmp_path / "data", opening=Opening(known=known)), 33)

        data = open_on_ranks(build, ranks)
        assert len(set(ranks.gather(str(data[3]["input_ids"].tolist())))) == 1
        assert data.documents.orders is not None
        assert len(set(ranks.gather(str(data.documents.orders.path)))) == 1

    assert on_ranks(2, opened, tmp_path) == [0, 0]


def test_sources_that_share_a_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "a.jsonl", DOCUMENTS)
    one = dict(type=load_token_files, folder=str(tmp_path / "a"))
    with pytest.raises(DataError, match=r"share a file: a.jsonl"):
        PackedDataset(mixture([one | {"name": "x"}, one | {"name": "y", "labels": None}]), 33)
