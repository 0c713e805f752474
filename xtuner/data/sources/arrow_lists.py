"""Columns of lists in Arrow's memory format, which Parquet is decoded to. Needs pyarrow, which is imported on use."""

from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import ConfigError, DataError
from xtuner.data.format.parse_tokens import Int64s
from xtuner.data.sources.columns import PADDING, Chosen, Columns, padding_error, to_signed
from xtuner.data.sources.decoded import Decoded


def import_pyarrow() -> Any:
    """The module, with `ipc` and `parquet`. Raises: ConfigError."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as e:
        raise ConfigError(
            "Parquet and Arrow files need pyarrow",
            why=f"it cannot be imported: {e}",
            do='pip install "xtuner[arrow]", or convert the data on a machine that has it (xtuner data convert)',
        ) from None
    return pyarrow


def is_list(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def choose_columns(pa: Any, schema: Any, columns: Columns, where: str) -> Chosen:
    """The columns of a file. Raises: DataError."""
    numbers = [f.name for f in schema if is_list(pa, f.type) and pa.types.is_integer(f.type.value_type)]
    chosen = columns.choose(schema.names, where, numbers)
    for name in filter(None, (chosen.ids, chosen.learned)):
        kind = schema.field(name).type
        value = kind.value_type if is_list(pa, kind) else None
        fits = value is not None and (
            pa.types.is_integer(value)
            or (name == chosen.learned and (pa.types.is_boolean(value) or pa.types.is_floating(value)))
        )
        if not fits:
            raise DataError(
                f"the column {name!r} is of type {kind}, not a list of integers",
                where=where,
                do="give another column, or write lists of integers",
            )
    return chosen


def take_list(pa: Any, array: Any, name: str, first: int, where: str) -> tuple[Int64s, npt.NDArray[Any]]:
    """(lengths, values end to end) of an array of lists. `first`: number of its first row, for messages.

    Raises: DataError for a null.
    """
    array.validate(full=True)  # offsets that lead elsewhere would be followed
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{name!r} is null", where=f"{where}, row {first + row}", do="leave such rows out")
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(len(array), array.type.list_size, np.int64)
    else:
        lengths = np.diff(array.offsets.to_numpy(zero_copy_only=False)).astype(np.int64)
    values = array.flatten()
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise DataError(f"{name!r} contains a null", where=f"{where}, row {first + row}", do="leave such rows out")
    return lengths, values.to_numpy(zero_copy_only=False)


def decode_batch(pa: Any, batch: Any, chosen: Chosen, first: int, where: str) -> Decoded:
    """The documents of a record batch whose first row has this number. Raises: DataError."""
    lengths, ids = take_list(pa, batch.column(chosen.ids), chosen.ids, first, where)
    ends = np.cumsum(lengths)

    def locate(i: int) -> str:
        row = int(np.searchsorted(ends, i, side="right"))
        return f"{where}, row {first + row}, token {i - int(ends[row] - lengths[row])}"

    learned = None
    if chosen.learned:
        counts, learned = take_list(pa, batch.column(chosen.learned), chosen.learned, first, where)
        if len(differ := np.flatnonzero(counts != lengths)):
            row = int(differ[0])
            raise DataError(
                f"a document has {lengths[row]} ids and {counts[row]} {chosen.role}",
                where=f"{where}, row {first + row}",
            )
    return Decoded(lengths, to_signed(ids, learned, chosen.role, locate))


def require_unpadded(batch: Any, columns: Columns, chosen: Chosen, where: str) -> None:
    """Reject documents that were padded to one length: padding would be learned.

    Raises: DataError if `attention_mask` has zeros, and neither labels nor a mask say what is learned.
    """
    if chosen.role or PADDING not in batch.schema.names or columns.learns_all:
        return
    flat = batch.column(PADDING).flatten().to_numpy(zero_copy_only=False)
    if len(flat) and not flat.all():
        raise padding_error(where)
