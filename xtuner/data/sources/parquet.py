"""Parquet files with a column of ids, one document a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xtuner.core.errors import DataError, XTunerError
from xtuner.core.foreign_inputs import check_regular
from xtuner.data.sources.arrow_lists import choose_columns, decode_batch, import_pyarrow, require_unpadded
from xtuner.data.sources.columns import PADDING
from xtuner.data.sources.decoded import Decoded, DecodedFile, damaged

TOKENS = 2**22  # about so many are decoded at once
MAX_ROWS = 2**16


@dataclass(frozen=True)
class ParquetFile(DecodedFile):
    def blocks(self) -> list[tuple[int, int]]:
        """(row group, number of its first row) of each."""
        with self._open() as file:
            meta, first, found = file.metadata, 0, []
            for group in range(meta.num_row_groups):
                found.append((group, first))
                first += meta.row_group(group).num_rows
            return found

    def decode(self, block: tuple[int, int]) -> Iterator[Decoded]:
        pa, (group, row) = import_pyarrow(), block
        position = f", row group {group}"
        with self._open() as file:
            where = str(self.path)
            chosen = choose_columns(pa, file.schema_arrow, self.columns, where)
            names = [n for n in (chosen.ids, chosen.learned) if n]
            if not group and PADDING in file.schema_arrow.names:
                names.append(PADDING)
            meta = file.metadata.row_group(group)
            values = max((meta.column(i).num_values for i in range(meta.num_columns)), default=1)
            rows = min(max(TOKENS * meta.num_rows // max(values, 1), 1), MAX_ROWS)
            try:
                for batch in file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
                    if row == 0:
                        require_unpadded(batch, self.columns, chosen, where)
                    yield decode_batch(pa, batch, chosen, row, where)
                    row += len(batch)
            except XTunerError:
                raise
            except Exception as e:  # pyarrow raises many kinds of errors for damaged data
                raise damaged(self.path, f"{position}, row {row}", e) from None

    def block_bytes(self, block: tuple[int, int]) -> int:
        with self._open() as file:
            return int(file.metadata.row_group(block[0]).total_byte_size)

    def describe(self, block: tuple[int, int], i: int) -> str:
        return f"{self.path}, row {block[1] + i}"

    def _open(self) -> Any:
        pa = import_pyarrow()
        try:
            check_regular(self.path)
            return pa.parquet.ParquetFile(self.path, page_checksum_verification=True)
        except OSError as e:
            if e.errno:
                raise DataError(f"{self.name} cannot be opened: {e.strerror}", where=str(self.path)) from None
            raise damaged(self.path, "", e) from None
        except Exception as e:
            raise damaged(self.path, "", e) from None
