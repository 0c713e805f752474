"""Mean loss on tokenized data, per data type (the first folder below the data folder) and in all.

Forward passes are assigned to ranks in turn; all ranks get the same result.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xtuner.compat.translate import load
from xtuner.config.build import build
from xtuner.core import path_kinds
from xtuner.core.activity import record_progress
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import verify
from xtuner.core.log import logger, progress
from xtuner.data.format.bin_file import data_type
from xtuner.data.packing.document_source import Documents, SourceFile
from xtuner.data.packing.raw_pack import IGNORE
from xtuner.dist.collectives import ALL, Ranks
from xtuner.export.sources.peft import open_peft
from xtuner.model import load_pretrained
from xtuner.model.adapters.folder import AdapterFolder, has_adapter, open_adapter
from xtuner.model.adapters.loading import load_adapted
from xtuner.model.decoder import CausalLM
from xtuner.model.source import ModelSource
from xtuner.model.weights import find_base_weights
from xtuner.train.checkpoints.checkpoint import TRAINER

BATCH_TOKENS = 16384
Piece = tuple[torch.Tensor, torch.Tensor]  # ids and unshifted labels of a document, or of a piece of one
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")  # files that identify a model


@dataclass
class Result:
    """`total`: sum of the cross entropy in nats over `tokens` targets."""

    name: str
    total: float = 0.0
    tokens: int = 0

    def add(self, total: float, tokens: int) -> None:
        self.total += total
        self.tokens += tokens

    @property
    def loss(self) -> float:
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Record:
    """Results by file on the disk, so that a stopped evaluation continues with the next file.

    JSON lines: first the model and `max_length` that the record belongs to, then one line per file, appended when the
    file is done. Files that have changed are evaluated again; the last line of a file is valid.

    Raises: ConfigError for another model's record or another kind of file, CheckpointError if it cannot be written.
    """

    def __init__(self, path: Path | None, model: str, max_length: int) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        facts = {"model": model, "max_length": max_length}
        head = _encode_line(facts)
        with _writing(path):
            data = path.read_bytes() if path.exists() else b""
        complete = data[: data.rfind(b"\n") + 1]  # a kill may have left a partial last line
        if complete:
            self._read(path, complete, facts)
        elif not head.startswith(data):
            raise _not_a_record(path)
        if len(complete) < len(data):
            with _writing(path):
                os.truncate(path, len(complete))
        if not complete:
            self._append(head)

    def _read(self, path: Path, complete: bytes, facts: dict[str, Any]) -> None:
        try:
            found, *entries = map(json.loads, complete.splitlines())
            self.entries = {
                e["file"]: {"identity": e["identity"], "total": float(e["total"]), "tokens": int(e["tokens"])}
                for e in entries
            }
            ours = found.keys() == facts.keys()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _not_a_record(path) from None
        if not ours:
            raise _not_a_record(path)
        if found != facts:
            raise ConfigError(
                "the record belongs to another model or another --max-length",
                where=str(path),
                do="remove it, or give another --save",
            )
        logger.info(f"{len(self.entries)} files are already in {path}")

    def find(self, file: SourceFile) -> tuple[float, int] | None:
        entry = self.entries.get(file.name)
        if not entry or entry["identity"] != file.fingerprint():
            return None
        return entry["total"], entry["tokens"]

    def keep(self, file: SourceFile, total: float, tokens: int) -> None:
        if self.path is not None:
            entry = {"identity": file.fingerprint(), "total": total, "tokens": tokens}
            self.entries[file.name] = entry
            self._append(_encode_line({"file": file.name, **entry}))

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        with _writing(self.path), open(self.path, "ab") as f:
            f.write(line)


def _encode_line(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # names that are not UTF-8 become JSON escapes


def _not_a_record(path: Path) -> ConfigError:
    return ConfigError(
        "the file is not a record of `eval loss`",
        where=str(path),
        why="it was not changed",
        do="give another --save",
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Convert OSError to CheckpointError."""
    try:
        yield
    except OSError as e:
        raise CheckpointError(
            f"the record cannot be written: {e}", where=str(path), do="give another --save, or check the disk"
        ) from None


def check_record_path(path: Path) -> None:
    """Check before the evaluation that a record can be written to `path`. Raises: CheckpointError, ConfigError."""
    with _writing(path):
        if any((folder / TRAINER).is_file() for folder in path.resolve().parents):
            raise ConfigError(
                "the record would be inside a checkpoint",
                where=str(path),
                why="a checkpoint with a file that is not in its manifest counts as damaged",
                do="give another --save",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with tempfile.TemporaryFile(dir=path.parent):
                return
        if not path.is_file():
            raise CheckpointError("the record cannot be written: this is not a file", where=str(path))
        with open(path, "ab"):
            pass


def open_model(name: str, options: list[str], device: torch.device, adapter: str | None = None) -> tuple[CausalLM, str]:
    """A model in evaluation mode, and the identity of its weights.

    Args:
        name: a Hugging Face folder, a checkpoint, or a config (the model that it starts from).
        options: overrides of a config.
        adapter: a checkpoint of a run with LoRA, or a folder of PEFT; `name` is then its base model. A checkpoint
            with an adapter as `name` is opened with the base model that it records.

    Raises: ConfigError, CheckpointError. A checkpoint is verified first.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = Path(name).expanduser()
    if adapter is not None:
        kind = path_kinds.require_kind(path, (path_kinds.HF,), "MODEL", "give {} as the base model, with --adapter")
        return _open_adapted(_find_adapter(adapter, kind.path), kind.path, device, dtype)
    if name.endswith(".py"):
        config = load(name, options)
        source: ModelSource = build(config.values["model"], "model")
        return source.build(device, dtype).eval(), f"{config.resolved()['model']}"
    if path_kinds.recognise(path).what == path_kinds.ADAPTER:
        do = f"give its base model as MODEL, and --adapter {name}"
        raise ConfigError(f"{name} is {path_kinds.ADAPTER}", where="MODEL", do=do)
    kind = path_kinds.require_kind(path, (path_kinds.CHECKPOINT, path_kinds.HF), "MODEL", "give {} as the model")
    if kind.what == path_kinds.CHECKPOINT:
        verify(path)
        if has_adapter(path):
            return _open_adapted(open_adapter(path), None, device, dtype)
        path = find_base_weights(path)
    return load_pretrained(path, dtype, device), _identify(path)


def _find_adapter(name: str, base: Path) -> AdapterFolder:
    kind = path_kinds.recognise(name)
    if kind.what == path_kinds.ADAPTER:
        return open_peft(kind.path, base)
    if kind.what != path_kinds.CHECKPOINT:
        raise ConfigError(
            f"{name} is {kind.what}",
            where="--adapter",
            do="give an iter_N.pth of a run with LoRA, or a folder with PEFT's adapter_config.json",
        )
    verify(kind.path)
    if not has_adapter(kind.path):
        raise ConfigError(f"{name} has no adapter", where="--adapter", do=f"it is a model itself: give {name} as MODEL")
    return open_adapter(kind.path)


def _open_adapted(
    adapter: AdapterFolder, base: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[CausalLM, str]:
    base = adapter.find_base(base)
    return load_adapted(adapter, base, dtype, device), _identify(base, adapter.path)


def _identify(*folders: Path) -> str:
    """The identity of weights on disk."""
    files = [p for folder in folders for pattern in ("*config.json", *WEIGHTS) for p in sorted(folder.glob(pattern))]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


@torch.no_grad()
def evaluate(
    model: CausalLM,
    documents: Documents,
    max_length: int,
    record: Record | None = None,
    quiet: bool = False,
    ranks: Ranks = ALL,
) -> list[Result]:
    """Loss over all documents. The first token of a document, and of a piece of one, has no prediction.

    Documents longer than `max_length` tokens are cut into pieces of that length. Several ranks call it together, with
    the same arguments and no record. Returns one result per data type, then "all"; the same on every rank.
    """
    assert record is None or ranks.size == 1
    turns = itertools.count()
    sums: list[float] = []  # loss and number of targets of each file
    files = (documents.file(i) for i in range(len(documents)))
    for file in files if quiet else progress(files, "evaluating", total=len(documents)):
        found = record.find(file) if record else None
        if found is None:
            found = _file_loss(model, file, max_length, turns, ranks)
            if record:
                record.keep(file, *found)
        sums += found
    if ranks.rank >= next(turns) % ranks.size > 0:
        nothing = torch.zeros(1, dtype=torch.int64)
        _loss(model, [(nothing, nothing)])  # dummy forward: other ranks wait in its collectives
    sums, _ = ranks.sums_and_maxima(sums, [])
    by_type: dict[str, Result] = {}
    for name, total, tokens in zip(documents.names, sums[::2], sums[1::2], strict=True):
        kind = data_type(name)
        by_type.setdefault(kind, Result(kind)).add(total, int(tokens))
    everything = Result("all", sum(r.total for r in by_type.values()), sum(r.tokens for r in by_type.values()))
    return [*by_type.values(), everything]


def _file_loss(
    model: CausalLM, file: SourceFile, max_length: int, turns: Iterator[int], ranks: Ranks
) -> tuple[float, int]:
    """This rank's part of a file: (sum of losses, number of targets). `turns` counts the groups of all files."""
    total, count = 0.0, 0

    @functools.lru_cache(1)  # pieces of a long document are consecutive
    def read(document: int) -> Piece:
        ids, learned = file.read(document, model.config.vocab_size)
        return torch.from_numpy(ids), torch.from_numpy(np.where(learned, ids, IGNORE))

    for group in _groups(file, max_length):
        if next(turns) % ranks.size == ranks.rank:
            found = ((*read(d), slice(begin, end)) for d, begin, end in group)
            loss, targets = _loss(model, [(ids[piece], labels[piece]) for ids, labels, piece in found])
            total, count = total + loss, count + targets
    return total, count


def _groups(file: SourceFile, max_length: int) -> Iterator[list[tuple[int, int, int]]]:
    """(document, begin, end) of documents and their pieces, in groups of at most BATCH_TOKENS (or one piece)."""
    group: list[tuple[int, int, int]] = []
    held = 0
    for document, length in enumerate(file.lengths.tolist()):
        for begin in range(0, length, max_length):
            end = min(begin + max_length, length)
            if held and held + end - begin > BATCH_TOKENS:
                yield group
                group, held = [], 0
            group.append((document, begin, end))
            held += end - begin
    if group:
        yield group


def _loss(model: CausalLM, pieces: list[Piece]) -> tuple[float, int]:
    """(sum of losses, number of targets) of concatenated documents."""
    ids, labels = map(torch.cat, zip(*pieces, strict=True))
    cu_seqlens = torch.tensor([0] + [len(piece) for piece, _ in pieces]).cumsum(0).int()
    targets = labels.roll(-1)
    targets[cu_seqlens[1:].long() - 1] = IGNORE
    device = model.output.weight.device
    record_progress("evaluating")
    total = model(ids.to(device), cu_seqlens.to(device), targets.to(device))
    return float(total), int((targets != IGNORE).sum())
