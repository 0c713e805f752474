"""The kinds of token files other than InternEvo's `.bin`: how each is recognised, listed and read."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.foreign_inputs import read_regular
from xtuner.data.format.cache_dirs import CacheDirs
from xtuner.data.format.document_file import DocumentFile, Facts
from xtuner.data.format.file_order import walk_files
from xtuner.data.sources.arrow import ArrowFile
from xtuner.data.sources.columns import AUTO, Columns
from xtuner.data.sources.jsonl import JsonlFile
from xtuner.data.sources.megatron import ENDINGS, MegatronFile, idx_path
from xtuner.data.sources.parquet import ParquetFile
from xtuner.data.sources.raw_reader import RawReader

Kind = Literal["auto", "internevo", "megatron", "parquet", "arrow", "jsonl"]
INTERNEVO: Literal["internevo"] = "internevo"
SUFFIXES: dict[Kind, tuple[str, ...]] = {  # of the files of each kind
    INTERNEVO: (".bin",),
    "megatron": (".bin",),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "jsonl": (".jsonl",),
}
NONE = "none"  # on the command line: no labels, or no mask
HF_STATE, HF_SPLITS = "state.json", "dataset_dict.json"  # in folders of Hugging Face's save_to_disk


class _Named:
    """What kinds are called, in caches and in commands."""

    name: str
    columns: Columns

    @property
    def tag(self) -> str:
        return _tag(self.name, self.columns)

    @property
    def options(self) -> str:
        return _options(self.name, self.columns)


@dataclass(frozen=True)
class MegatronKind(_Named):
    columns: Columns
    cache_dirs: CacheDirs
    name = "megatron"
    examined = "meta_size"

    def __post_init__(self) -> None:
        if self.columns.ids != AUTO:
            raise ConfigError("Megatron's files have no columns", where="ids", do="leave ids out")

    def file(self, path: Path, name: str, min_length: int, facts: Facts | None = None) -> DocumentFile:
        return MegatronFile(path, name, min_length, facts, self.columns)

    def reader(self, file: Any, long: Any) -> RawReader:
        return RawReader(file, file)


@dataclass(frozen=True)
class ColumnKind(_Named):
    """Files of which columns are read."""

    columns: Columns
    cache_dirs: CacheDirs
    name: str  # parquet, arrow or jsonl
    examined = "size"

    def file(self, path: Path, name: str, min_length: int, facts: Facts | None = None) -> DocumentFile:
        make = {"parquet": ParquetFile, "arrow": ArrowFile, "jsonl": JsonlFile}[self.name]
        return make(path, name, min_length, facts, self.cache_dirs, self.columns)

    def reader(self, file: Any, long: Any) -> Any:
        return file.make_reader()


def _tag(name: str, columns: Columns) -> str:
    return f"{name}-{hashlib.sha256(columns.tag.encode()).hexdigest()[:8]}-"


def _options(name: str, columns: Columns) -> str:
    given = [("ids", columns.ids), ("labels", columns.labels), ("mask", columns.mask)]
    return " ".join([f"--kind {name}", *(f"--{key} {value or NONE}" for key, value in given if value != AUTO)])


def make_kind(name: str, columns: Columns, cache_dirs: CacheDirs) -> MegatronKind | ColumnKind:
    return MegatronKind(columns, cache_dirs) if name == "megatron" else ColumnKind(columns, cache_dirs, name)


def detect_kind(root: Path, only: str | None = None, prefer_bin: bool = False) -> Kind:
    """The kind of the files in a folder, or of one file of it.

    Args:
        prefer_bin: InternEvo's `.bin` where there are also tables or JSON lines, or nothing at all.

    Raises: ConfigError for files of several kinds; DataError for none.
    """
    endings = (".idx", *{s for suffixes in SUFFIXES.values() for s in suffixes})
    found: dict[Kind, str] = {}  # kind → the first file
    pairs: dict[str, set[str]] = {".bin": set(), ".idx": set()}
    for name in [only] if only else walk_files(root, endings):
        if name.endswith((".bin", ".idx")):
            pairs[name[-4:]].add(name[:-4])
        elif kind := next((k for k, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None):
            found.setdefault(kind, name)
    if only and pairs[".bin"] and os.path.exists(idx_path(root / only)):
        pairs[".idx"] = pairs[".bin"]
    if pairs[".idx"]:
        found["megatron"] = f"{min(pairs['.idx'])}.idx"
    if others := pairs[".bin"] - pairs[".idx"]:
        found[INTERNEVO] = f"{min(others)}.bin"
    if prefer_bin and "megatron" not in found and (INTERNEVO in found or not (found or only)):
        return INTERNEVO
    if not found:
        raise DataError(
            f"{only} is not a token file" if only else "no token file in the data folder",
            where=str(root / only if only else root),
            why="files end with " + ", ".join(s for k, v in SUFFIXES.items() for s in v if k != "megatron"),
            do="give another folder, or the kind of the files",
        )
    if len(found) > 1:
        shown = ", ".join(f"{kind} ({name})" for kind, name in found.items())
        raise ConfigError(
            f"the data folder has files of several kinds: {shown}",
            where=str(root),
            do='say which to read: kind="…" in a config, --kind on the command line (--from of convert); or mix them',
        )
    return next(iter(found))


def list_files(kind: Kind, root: Path, columns: Columns) -> list[str]:
    """The files of a folder in the loader's order. Raises: ConfigError, DataError."""
    names = list(walk_files(root, SUFFIXES[kind]))
    if kind == "megatron":  # an .idx without its .bin is one that lacks it, not nothing
        found = (name.removesuffix(".idx") + ".bin" for name in walk_files(root, ".idx"))
        names = _without_companions(list(dict.fromkeys([*names, *found])), columns)
    if kind == "arrow":
        _require_one_split(root)
        names = [name for name in names if _is_of_dataset(root / name)]
    if not names:
        raise DataError(
            f"no {' or '.join(SUFFIXES[kind])} file in the data folder", where=str(root), do="give another folder"
        )
    return names


def _without_companions(names: list[str], columns: Columns) -> list[str]:
    """Without the pairs that contain labels or masks of others."""
    endings = [ending for role in ENDINGS.values() for ending in role]
    endings += [e for e in (columns.labels, columns.mask) if e not in (None, AUTO)]
    stems = {name.removesuffix(".bin") for name in names}
    return [
        name
        for name in names
        if not any(
            stem.endswith(ending) and stem.removesuffix(ending) in stems
            for stem in [name.removesuffix(".bin")]
            for ending in endings
        )
    ]


def _require_one_split(root: Path) -> None:
    path = root / HF_SPLITS
    if not path.is_file():
        return
    splits = _read_object(path).get("splits")
    shown = ", ".join(map(str, splits)) if isinstance(splits, list) else "several"
    raise ConfigError(
        f"the folder is a Hugging Face dataset with splits: {shown}",
        where=str(root),
        why="they would be trained on together",
        do=f"give the folder of one: {root}/{splits[0] if isinstance(splits, list) and splits else 'train'}",
    )


def _is_of_dataset(path: Path) -> bool:
    """Whether an Arrow file belongs to the dataset of its folder, if that is one; others there are caches of `map`.

    Raises: DataError for a dataset that selects rows by indices.
    """
    state = path.parent / HF_STATE
    if not state.is_file():
        return True
    found = _read_object(state)
    if found.get("_indices_data_files") or found.get("_indices_files"):
        raise DataError(
            "the dataset selects its rows by indices",
            where=str(state),
            why="its files contain other rows, too",
            do="write it again: datasets.load_from_disk(…).flatten_indices().save_to_disk(…)",
        )
    files = found.get("_data_files")
    listed = [f.get("filename") for f in files if isinstance(f, dict)] if isinstance(files, list) else []
    for name in listed:
        if isinstance(name, str) and not (path.parent / name).is_file():
            raise DataError(
                f"{name} is missing", where=str(path.parent), why=f"{HF_STATE} names it", do="copy it again"
            )
    return not listed or path.name in listed


def _read_object(path: Path) -> dict[str, Any]:
    """Raises: DataError."""
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path.name} cannot be read: {e}", where=str(path)) from None
    if not isinstance(found, dict):
        raise DataError(f"{path.name} is not a JSON object", where=str(path))
    return found
