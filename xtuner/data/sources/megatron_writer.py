"""Writes Megatron's `.bin` / `.idx` pairs; see megatron.py for the format. Each document is one sequence."""

from array import array
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from xtuner.core.files import PendingFile, atomic_file
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.sources.megatron import HEAD, MAGIC, TYPES, idx_path

UINT16_IDS = 65_500  # a smaller vocabulary is stored in 16 bits, as Megatron's own tool decides
IGNORED = -100  # label of a token that is not learned


class MegatronWriter:
    """`with MegatronWriter(path, "<u2") as w: w.write(lengths, ids, learned); …; w.commit()`. Without `commit`, no file
    remains.

    If there are tokens that are not learned, a pair NAME_labels says so: labels are the ids, or -100.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        labels = path.with_name(f"{path.name.removesuffix('.bin')}_labels.bin")
        self._pairs = [_Pair(path, dtype), _Pair(labels, "<i4")]
        self.has_labels = False

    def __enter__(self) -> "MegatronWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        for pair in self._pairs:
            pair.drop()

    def write(self, lengths: Int64s, ids: Int64s, learned: npt.NDArray[np.bool_]) -> None:
        self.has_labels |= not learned.all()
        self._pairs[0].write(lengths, ids)
        self._pairs[1].write(lengths, np.where(learned, ids, IGNORED))

    def commit(self) -> None:
        """Give the files their names, the `.idx` last."""
        self._pairs[0].commit()
        if self.has_labels:
            self._pairs[1].commit()


class _Pair:
    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._pending: PendingFile | None = PendingFile(path, "wb")
        self._lengths = array("i")

    def write(self, lengths: Int64s, values: Int64s) -> None:
        assert self._pending is not None
        self._pending.file.write(values.astype(self.dtype).data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def commit(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        pending.commit()
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
        n, code = len(lengths), next(code for code, name in TYPES.items() if name == self.dtype.str)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        with atomic_file(idx_path(self.path), "wb") as f:
            f.write(HEAD.pack(MAGIC, 1, code, n, n + 1))
            f.write(lengths.astype("<i4").data)
            f.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").data)
            f.write(np.arange(n + 1, dtype="<i8").data)

    def drop(self) -> None:
        if self._pending is not None:
            self._pending.drop()
