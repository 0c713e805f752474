"""One rank's part of a checkpoint, copied so that training can continue, and how it is written to disk."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xtuner.core.activity import record_progress
from xtuner.core.files import file_entry, set_default_permissions, sync_file, write_json

SHARD = 2**30  # bytes a file; files are written and hashed concurrently
WRITERS = 4


@dataclass
class Snapshot:
    """Files of one rank: tensors by file and name, and small JSON files. Training no longer changes them."""

    tensors: dict[str, dict[str, torch.Tensor]]
    json: dict[str, Any] = field(default_factory=dict)
    # of tensor files; a single entry each, as safetensors writes entries in random order
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)

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
        except Exception as e:  # safetensors wraps the system's error in its own
            raise OSError(getattr(e, "errno", None) or 5, str(e), str(path)) from e
        set_default_permissions(path)
        entry = hashers.submit(file_entry, path)  # from the page cache, while the disk writes the file
        sync_file(path)
        record_progress(f"{name} written")  # a large save may outlast the heartbeat's progress limit
        return entry


def group_into_files(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, grouped into files of at most SHARD bytes, or of a single tensor."""
    groups: list[list[str]] = [[]]
    size_of_group = 0
    for name, size in sizes.items():
        if groups[-1] and size_of_group + size > SHARD:
            groups.append([])
            size_of_group = 0
        groups[-1].append(name)
        size_of_group += size
    return groups
