"""What one rank contributes to a checkpoint, copied out of the way of training, and how it gets to the disk."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xtuner.core.files import file_entry, sync_file, usual_permissions, write_json

SHARD = 2**30  # bytes a file; files are written and hashed side by side
WRITERS = 4


@dataclass
class Snapshot:
    """Files of one rank: tensors by file and name, and small JSON files. Training does not change them any more."""

    tensors: dict[str, dict[str, torch.Tensor]]
    json: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for tensors in self.tensors.values() for t in tensors.values())

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write and sync all files below `folder`. Returns their manifest entries. Raises: OSError."""
        for name in (*self.tensors, *self.json):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name, value in self.json.items():
            write_json(folder / name, value)
        with ThreadPoolExecutor(WRITERS) as pool:
            entries = dict(pool.map(lambda name: (name, self._write(folder / name, name)), self.tensors))
        return entries | {name: file_entry(folder / name) for name in self.json}

    def _write(self, path: Path, name: str) -> dict[str, Any]:
        try:
            save_file(self.tensors[name], path, metadata={"format": "pt"})
        except Exception as e:  # safetensors wraps the system's error in one of its own
            raise OSError(getattr(e, "errno", None) or 5, str(e), str(path)) from e
        usual_permissions(path)
        sync_file(path)
        return file_entry(path)


def in_shards(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Divide tensors over files of at most SHARD bytes, or one tensor: `PREFIX.safetensors`, or `PREFIX-00001-of-…`."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if groups[-1] and held + tensor.nbytes > SHARD:
            groups.append({})
            held = 0
        groups[-1][name] = tensor
        held += tensor.nbytes
    if len(groups) == 1:
        return {f"{prefix}.safetensors": groups[0]}
    return {f"{prefix}-{i + 1:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups)}


class HostCopy:
    """Host memory for snapshots, taken once and used again: pinned for GPUs, so that copies run at the link's speed."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of `tensors`, complete when this returns. The copies of the last call are overwritten."""
        pinned = any(t.is_cuda for t in tensors.values())
        for name, tensor in tensors.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        if pinned:
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in tensors}
