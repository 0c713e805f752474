"""Token files of other tools, written by the tools' own libraries (`make data-libraries`), and documents to write."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.paths import CACHE

LIBRARIES = CACHE / "data-libraries-1" / "site-packages"
Document = tuple[list[int], list[bool]]  # ids from 0, and whether each is learned


def load_library(name: str) -> Any:
    """A module of these libraries; without them the test is skipped."""
    if LIBRARIES.is_dir() and str(LIBRARIES) not in sys.path:
        sys.path.append(str(LIBRARIES))
    return pytest.importorskip(name, reason="make data-libraries")


def draw_documents(count: int, seed: int = 0, vocabulary: int = 100, most: int = 40) -> list[Document]:
    """Of 0 to `most` tokens. Id 0 is as frequent as others, some of them learned."""
    draw = np.random.RandomState(seed)
    ids = [draw.randint(0, vocabulary, draw.randint(0, most + 1)) for _ in range(count)]
    return [(i.tolist(), (draw.rand(len(i)) < 0.7).tolist()) for i in ids]


def labels_of(documents: Sequence[Document]) -> list[list[int]]:
    return [[i if t else -100 for i, t in zip(*document, strict=True)] for document in documents]


def ids_of(documents: Sequence[Document]) -> list[list[int]]:
    return [ids for ids, _ in documents]


def write_jsonl(path: Path, documents: Sequence[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps({"input_ids": ids, "labels": labels})
        for ids, labels in zip(ids_of(documents), labels_of(documents), strict=True)
    ]
    path.write_text("".join(row + "\n" for row in rows))


def write_megatron(path: Path, documents: Sequence[Sequence[int]], dtype: Any = np.int32, **more: Any) -> None:
    """By megatron-core's own builder. `path`: the .bin."""
    import torch

    library = load_library("megatron.core.datasets.indexed_dataset")
    path.parent.mkdir(parents=True, exist_ok=True)
    builder = library.IndexedDatasetBuilder(str(path), dtype=dtype, **more)
    for ids in documents:
        builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(path.with_suffix(".idx")))


def make_table(
    documents: Sequence[Document], learned: str = "labels", list_type: Any = None, values: Any = None
) -> Any:
    """A pyarrow table with input_ids of this type, and labels or a loss_mask."""
    pa = load_library("pyarrow")
    kind, values = list_type or pa.list_, values or pa.int64()
    other = labels_of(documents) if learned == "labels" else [t for _, t in documents]
    return pa.table({
        "text": ["x"] * len(documents),
        "input_ids": pa.array(ids_of(documents), kind(values)),
        learned: pa.array(other, kind(pa.int32() if learned == "labels" else pa.bool_())),
    })  # fmt: skip


def write_parquet(path: Path, documents: Sequence[Document], **more: Any) -> None:
    load_library("pyarrow.parquet").write_table(make_table(documents), path_of(path), **more)


def write_arrow(path: Path, table: Any, rows: int = 50, stream: bool = True, compression: str | None = None) -> None:
    pa = load_library("pyarrow")
    ipc = load_library("pyarrow.ipc")
    options = ipc.IpcWriteOptions(compression=compression)
    make = ipc.new_stream if stream else ipc.new_file
    with pa.OSFile(path_of(path), "wb") as file, make(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_hf(folder: Path, documents: Sequence[Document], **more: Any) -> None:
    datasets = load_library("datasets")
    datasets.disable_progress_bars()
    rows = {"input_ids": ids_of(documents), "labels": labels_of(documents)}
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder), **more)


def path_of(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path)
