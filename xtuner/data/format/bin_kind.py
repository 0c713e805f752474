"""`.bin` files as one kind of files; see `FileKind`."""

from dataclasses import dataclass
from typing import Any

from xtuner.data.format.bin_file import BinFile
from xtuner.data.format.cache_dirs import CacheDirs
from xtuner.data.format.document_file import Facts
from xtuner.data.format.text_reader import LongLines, SpanReader, ZeroReader
from xtuner.data.format.token_cache import TokenCache, find_token_cache


@dataclass(frozen=True)
class BinKind:
    cache_dirs: CacheDirs
    learn_zero: bool = False
    name = "internevo"
    tag = ""
    examined = "meta_size"

    @property
    def options(self) -> str:
        return "--learn-zero" if self.learn_zero else ""

    def file(self, path: Any, name: str, min_length: int, facts: Facts | None = None) -> BinFile:
        return BinFile(path, name, min_length, facts, self.learn_zero)

    def reader(self, file: BinFile, long: LongLines) -> TokenCache | SpanReader | ZeroReader:
        reader = find_token_cache(file, self.cache_dirs) or SpanReader(file, long)
        return ZeroReader(reader) if self.learn_zero else reader
