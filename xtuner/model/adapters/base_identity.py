"""The identity of a base model: an adapter is of use only with the weights that it was trained on.

It covers the network, names and shapes of all tensors, and the values of three rows of each: equal for copies and other
divisions into files, different for a fine-tuned model of the same shape. The reading takes seconds, not minutes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.families import checkpoint_config
from xtuner.families.base import ModelFamily
from xtuner.families.network import DecoderConfig
from xtuner.model.weights import WeightFolder, hf_shapes

IGNORED = ("max_position_embeddings", "torch_dtype", "dtype")  # fields of config.json that no weight depends on


@dataclass(frozen=True)
class BaseModel:
    """A base model as checkpoints record it.

    Args:
        name: as the user gave it; of a folder, its absolute path.
    """

    name: str
    identity: str

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "identity": self.identity}


def read_base(given: Any, where: str) -> BaseModel:
    """The inverse of `to_json`. Raises: CheckpointError."""
    if isinstance(given, Mapping) and all(isinstance(given.get(key), str) for key in ("name", "identity")):
        return BaseModel(given["name"], given["identity"])
    raise CheckpointError("the base model is missing or not in the format of this version", where=where)


def identify_base(folder: Path, layout: ModelFamily, c: DecoderConfig) -> str:
    """The identity of the weights in a folder with these names. Raises: CheckpointError."""
    weights = WeightFolder(folder)
    fields = {k: v for k, v in checkpoint_config(c).items() if k not in IGNORED}
    found = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, shape in sorted(hf_shapes(c, layout).items()):
        found.update(f"{name} {list(shape)}".encode())
        for row in sorted({0, shape[0] // 2, shape[0] - 1}):
            found.update(weights.read_row(name, row).float().numpy().tobytes())
    return found.hexdigest()


def require_same_base(expected: BaseModel, here: BaseModel, what: str, where: str) -> None:
    """Raise ConfigError unless both are the same model.

    Args:
        expected: the one that the adapter was trained on.
        what: the adapter, for the message.
    """
    if expected.identity == here.identity:
        return
    raise ConfigError(
        f"{what} was trained on another base model: {expected.name}, not {here.name}",
        where=where,
        why="its weights are differences to that model, and mean nothing added to others (identities "
        f"{expected.identity[:12]} and {here.identity[:12]})",
        do=f"give the model that it was trained on: {expected.name}",
    )
