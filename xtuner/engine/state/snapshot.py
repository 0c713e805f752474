"""What one rank contributes to a checkpoint, copied out of the way of training, and how it gets to the disk."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xtuner.core.files import file_entry, set_default_permissions, sync_file, write_json
from xtuner.core.progress import record_progress

SHARD = 2**30  # bytes a file; files are written and hashed side by side
WRITERS = 4


@dataclass
class Snapshot:
    """Files of one rank: tensors by file and name, and small JSON files. Training does not change them any more."""

    tensors: dict[str, dict[str, torch.Tensor]]
    json: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # of tensor files; one entry, as their order is random

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for tensors in self.tensors.values() for t in tensors.values())

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write and sync all files below `folder`. Returns their manifest entries. Raises: OSError."""
        for name in (*self.tensors, *self.json):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name, value in self.json.items():
            write_json(folder / name, value)
        with ThreadPoolExecutor(WRITERS) as pool, ThreadPoolExecutor(WRITERS) as hashers:
            written = pool.map(lambda name: (name, self._write(folder / name, name, hashers)), self.tensors)
            entries = {name: entry.result() for name, entry in written}
        return entries | {name: file_entry(folder / name) for name in self.json}

    def _write(self, path: Path, name: str, hashers: ThreadPoolExecutor) -> Future[dict[str, Any]]:
        try:
            save_file(self.tensors[name], path, metadata=self.metadata.get(name, {"format": "pt"}))
        except Exception as e:  # safetensors wraps the system's error in one of its own
            raise OSError(getattr(e, "errno", None) or 5, str(e), str(path)) from e
        set_default_permissions(path)
        entry = hashers.submit(file_entry, path)  # from memory, while the disk takes the file
        sync_file(path)
        record_progress(f"{name} written")  # a large save takes longer than a rank may stand still
        return entry


def divide(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, divided over files of at most SHARD bytes, or of one tensor."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > SHARD:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def file_names(prefix: str, count: int) -> list[str]:
    """`PREFIX.safetensors`, or `PREFIX-00001-of-00007.safetensors` and so on."""
    if count == 1:
        return [f"{prefix}.safetensors"]
    return [f"{prefix}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
