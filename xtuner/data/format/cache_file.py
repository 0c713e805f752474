"""The header that all cache files of data begin with: 4096 bytes, one line of JSON, then arrays of numbers.

[magic] {"VERSION_KEY": VERSION, ...}  spaces  \\n | arrays, which may be mapped
└──────────────── 4096 bytes ────────────────────┘
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.core.foreign_inputs import short_repr

HEADER_BYTES = 4096
DAMAGED = "damaged"


@dataclass(frozen=True)
class CacheFormat:
    """One kind of cache file: the key of its version in the header, which also names the kind."""

    version_key: str
    version: int
    magic: bytes = b""

    def header(self, **facts: Any) -> bytes:
        """The header with `facts`, small JSON values."""
        text = json.dumps({self.version_key: self.version, **facts}).encode()
        return (self.magic + text).ljust(HEADER_BYTES - 1) + b"\n"

    def read_header(self, data: Any) -> dict[str, Any]:
        """The facts of a header, from the first bytes of a file or a map of it.

        Raises: ValueError with a readable reason for anything else than a header of this kind and version.
        """
        if bytes(data[: len(self.magic)]) != self.magic:
            raise ValueError(DAMAGED)
        try:
            facts: dict[str, Any] = json.loads(bytes(data[len(self.magic) : HEADER_BYTES]))
            version = facts.pop(self.version_key)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise ValueError(DAMAGED) from None
        if version != self.version:
            raise ValueError(f"of version {short_repr(version)}, not {self.version}")
        return facts

    def read_facts(self, path: Path) -> tuple[dict[str, Any], int]:
        """(the facts of a file's header, its bytes); ({}, 0) if it cannot be read or is of another kind or version."""
        try:
            with open(path, "rb") as f:
                return self.read_header(f.read(HEADER_BYTES)), os.fstat(f.fileno()).st_size
        except (OSError, ValueError):
            return {}, 0
