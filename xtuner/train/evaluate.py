"""Mean loss on tokenized data, per data type (the first folder below the data folder) and in all."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from xtuner.config.build import build
from xtuner.config.load import load
from xtuner.core.errors import ConfigError
from xtuner.core.log import progress
from xtuner.data.format import BinFile
from xtuner.data.index import load_intern_repo_tokenized_dataset
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

    @property
    def loss(self) -> float:
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def open_model(name: str, options: list[str], device: torch.device) -> CausalLM:
    """A model from a Hugging Face folder, a checkpoint, or a config's starting point, in evaluation form."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = Path(name).expanduser()
    if name.endswith(".py"):
        config = load(name, options)
        source: ModelSource = build(config.values["model"], "model")
        return source.build(device, dtype).eval()
    if (path / TRAINER).is_file():
        path = path / "weights"
    if not (path / "config.json").is_file():
        raise ConfigError(
            "this is no model", where=name, do="give a Hugging Face folder, an iter_N.pth checkpoint, or a config file"
        )
    return load_pretrained(path, dtype, device)


@torch.inference_mode()
def evaluate(model: CausalLM, folder: str | Path, max_length: int) -> list[Result]:
    """Loss over all documents of a folder; the first token of a document has no prediction.

    Documents are taken whole, in parts of `max_length` tokens if they are longer. Returns one result per data type,
    then "all".
    """
    documents = load_intern_repo_tokenized_dataset(folder)
    by_type: dict[str, Result] = {}
    for file in progress(list(documents), "evaluating"):
        kind = file.name.split("/")[0] if "/" in file.name else "."
        result = by_type.setdefault(kind, Result(kind))
        for parts in _groups(file, max_length, model.config.vocab_size):
            total, count = _loss(model, parts)
            result.total += total
            result.tokens += count
    everything = Result("all", sum(r.total for r in by_type.values()), sum(r.tokens for r in by_type.values()))
    return [*by_type.values(), everything]


def _groups(file: BinFile, max_length: int, vocab_size: int) -> list[list[torch.Tensor]]:
    """Signed tokens of documents, grouped up to BATCH_TOKENS."""
    groups: list[list[torch.Tensor]] = [[]]
    held = 0
    for document in range(file.num_documents):
        for part in torch.from_numpy(file.read_document(document, vocab_size)).split(max_length):
            if held and held + len(part) > BATCH_TOKENS:
                groups.append([])
                held = 0
            groups[-1].append(part)
            held += len(part)
    return [g for g in groups if g]


def _loss(model: CausalLM, parts: list[torch.Tensor]) -> tuple[float, int]:
    """(sum of losses, number of targets) of documents laid end to end."""
    signed = torch.cat(parts)
    lengths = torch.tensor([0] + [len(p) for p in parts])
    cu_seqlens = lengths.cumsum(0).int()
    targets = torch.where(signed > 0, signed, -100).roll(-1)
    targets[cu_seqlens[1:].long() - 1] = -100
    device = model.output.weight.device
    total = model(signed.abs().to(device), cu_seqlens.to(device), targets.to(device))
    return float(total), int((targets != -100).sum())
