"""Mean loss on tokenized data, per data type (the first folder below the data folder) and in all."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner.config.build import build
from xtuner.config.load import load
from xtuner.core.errors import ConfigError
from xtuner.core.files import read_json, write_json
from xtuner.core.log import logger, progress
from xtuner.data.format import BinFile
from xtuner.data.index import TokenizedFolder
from xtuner.data.pack import IGNORE
from xtuner.model import load_pretrained
from xtuner.model.decoder import CausalLM
from xtuner.model.source import ModelSource
from xtuner.train.checkpoint import TRAINER

BATCH_TOKENS = 16384


@dataclass
class Result:
    """Sum of the cross entropy in nats over `tokens` learned tokens."""

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
    """Results by file, kept on disk so that an evaluation that was stopped goes on with the next file.

    The record belongs to one model and one `max_length`; files that have changed are evaluated again.
    """

    def __init__(self, path: Path | None, model: str, max_length: int) -> None:
        self.path = path
        self.facts: dict[str, Any] = {"model": model, "max_length": max_length, "files": {}}
        if path is not None and path.is_file():
            found = read_json(path)
            if {k: found.get(k) for k in ("model", "max_length")} != {"model": model, "max_length": max_length}:
                raise ConfigError(
                    "the record is of another model or another --max-length",
                    where=str(path),
                    do="remove it, or give another --save",
                )
            self.facts = found
            logger.info(f"{len(found['files'])} files are in {path} already")

    def find(self, file: BinFile) -> tuple[float, int] | None:
        entry = self.facts["files"].get(file.name)
        if not entry or entry["identity"] != file.identity().hex():
            return None
        return entry["total"], entry["tokens"]

    def keep(self, file: BinFile, total: float, tokens: int) -> None:
        if self.path is not None:
            entry = {"identity": file.identity().hex(), "total": total, "tokens": tokens}
            self.facts["files"][file.name] = entry
            write_json(self.path, self.facts)


def open_model(name: str, options: list[str], device: torch.device) -> tuple[CausalLM, str]:
    """A model in evaluation form, and the identity of its weights.

    Args:
        name: a Hugging Face folder, a checkpoint, or a config (for what it would start from).
        options: overrides of a config.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = Path(name).expanduser()
    if name.endswith(".py"):
        config = load(name, options)
        source: ModelSource = build(config.values["model"], "model")
        return source.build(device, dtype).eval(), f"{config.resolved()['model']}"
    if (path / TRAINER).is_file():
        path = path / "weights"
    if not (path / "config.json").is_file():
        raise ConfigError(
            "this is no model", where=name, do="give a Hugging Face folder, an iter_N.pth checkpoint, or a config file"
        )
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(path.iterdir())]
    return load_pretrained(path, dtype, device), hashlib.sha256(repr(stats).encode()).hexdigest()


@torch.inference_mode()
def evaluate(
    model: CausalLM, documents: TokenizedFolder, max_length: int, record: Record | None = None, quiet: bool = False
) -> list[Result]:
    """Loss over all documents; the first token of a document, and of a part of one, has no prediction.

    Documents are taken whole, in parts of `max_length` tokens if they are longer. Returns one result per data type,
    then "all".
    """
    by_type: dict[str, Result] = {}
    files = list(documents)
    for file in files if quiet else progress(files, "evaluating"):
        kind = file.name.split("/")[0] if "/" in file.name else "."
        found = record.find(file) if record else None
        if found is None:
            found = _file_loss(model, file, max_length)
            if record:
                record.keep(file, *found)
        by_type.setdefault(kind, Result(kind)).add(*found)
    everything = Result("all", sum(r.total for r in by_type.values()), sum(r.tokens for r in by_type.values()))
    return [*by_type.values(), everything]


def _file_loss(model: CausalLM, file: BinFile, max_length: int) -> tuple[float, int]:
    sums = [_loss(model, parts) for parts in _groups(file, max_length, model.config.vocab_size)]
    return sum(total for total, _ in sums), sum(count for _, count in sums)


def _groups(file: BinFile, max_length: int, vocab_size: int) -> Iterator[list[torch.Tensor]]:
    """Signed tokens of documents and their parts, up to BATCH_TOKENS (or one part) at a time."""
    group: list[torch.Tensor] = []
    held = 0
    for document in range(file.num_documents):
        tokens = torch.from_numpy(file.read_document(document, vocab_size))
        for part in tokens.split(max_length) if len(tokens) else ():
            if held and held + len(part) > BATCH_TOKENS:
                yield group
                group, held = [], 0
            group.append(part)
            held += len(part)
    if group:
        yield group


def _loss(model: CausalLM, parts: list[torch.Tensor]) -> tuple[float, int]:
    """(sum of losses, number of targets) of documents laid end to end."""
    signed = torch.cat(parts)
    cu_seqlens = torch.tensor([0] + [len(p) for p in parts]).cumsum(0).int()
    targets = torch.where(signed > 0, signed, IGNORE).roll(-1)
    targets[cu_seqlens[1:].long() - 1] = IGNORE
    device = model.output.weight.device
    total = model(signed.abs().to(device), cu_seqlens.to(device), targets.to(device))
    return float(total), int((targets != IGNORE).sum())
