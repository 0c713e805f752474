"""A torch.save file with the full model, such as XTuner's `iter_N.pth` with `save_optimizer=False`."""

from collections.abc import Mapping
from pathlib import Path

import torch

from xtuner.core.pickles import load_tensors
from xtuner.model.weights import Shape, WeightSource, require_tensors


class SingleFile(WeightSource):
    """The tensors of `state_dict`, or of the file itself if it has only tensors. They stay on disk until used.

    Raises: CheckpointError for files of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = load_tensors(path, opaque=True)
        inner = content.get("state_dict", content) if isinstance(content, dict) else content
        self._tensors = require_tensors(inner, path)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]
