"""Which columns of a source have the ids and what is learned, and what their values mean.

    ids      token ids from 0
    labels   for each token its id where it is learned, else -100 (not shifted: label i belongs to token i)
    mask     for each token 1 (or true) where it is learned, else 0

Without labels and mask every token is learned. Id 0 is an ordinary id: unlike in a `.bin`, a label says whether it is
learned.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.core.errors import ConfigError, DataError
from xtuner.core.foreign_inputs import short

AUTO = "auto"
IDS, LABELS, MASK = ("input_ids", "tokens", "ids"), ("labels",), ("loss_mask", "mask")  # names that "auto" finds
PADDING = "attention_mask"  # 0 for padding
MAX_ID = 2**31 - 2  # id + 1 has a sign in 32 bits
ID_OFFSET = 1  # of signed tokens, see `Reader`
Role = Literal["labels", "mask", ""]
Values = npt.NDArray[Any]
Where = Callable[[int], str]  # index of a token → where it is, for messages


class Chosen(NamedTuple):
    """Names of the columns that are read; `role`: what the values of `learned` are, "" if there is none."""

    ids: str
    learned: str | None
    role: Role


@dataclass(frozen=True)
class Columns:
    """The columns that a config names. "auto": the first of the usual names that exists; None: none."""

    ids: str = AUTO
    labels: str | None = AUTO
    mask: str | None = AUTO

    def __post_init__(self) -> None:
        if self.labels not in (None, AUTO) and self.mask not in (None, AUTO):
            raise ConfigError(
                "labels and mask are both given", where="mask", why="each says which tokens are learned", do="give one"
            )

    @property
    def tag(self) -> str:
        return f"{self.ids},{self.labels},{self.mask}"

    @property
    def learns_all(self) -> bool:
        """Whether the config says so, and not only the columns that there are."""
        return self.labels is None and self.mask is None

    def choose(self, names: Iterable[str], where: str, lists: Iterable[str] | None = None) -> Chosen:
        """Among the columns of a file. `lists`: those of them that can be ids. Raises: DataError."""
        names = list(names)
        found = self._find(names, self.ids, IDS)
        others = {*LABELS, *MASK, PADDING}
        if self.ids == AUTO and found is None and len(only := [n for n in lists or () if n not in others]) == 1:
            found = only[0]
        if found is None:
            wanted_ids = f"of ids ({', '.join(IDS)})" if self.ids == AUTO else repr(self.ids)
            raise DataError(
                f"there is no column {wanted_ids}: the columns are {short(', '.join(names)) or 'none'}",
                where=where,
                do='name the column of token ids: ids="…"',
            )
        for role, wanted, usual_names in (("labels", self.labels, LABELS), ("mask", self.mask, MASK)):
            if self._is_other(role):
                continue
            column = self._find(names, wanted, usual_names) if wanted else None
            if column is None and wanted not in (None, AUTO):
                raise DataError(
                    f"there is no column {wanted!r}: the columns are {short(', '.join(names))}",
                    where=where,
                    do=f"name another one, or set {role}=None to learn every token",
                )
            if column and column != found:
                return Chosen(found, column, role)  # type: ignore[arg-type]
        return Chosen(found, None, "")

    def _is_other(self, role: str) -> bool:
        """Whether the config names a column of the other role."""
        return (self.mask if role == "labels" else self.labels) not in (None, AUTO)

    @staticmethod
    def _find(names: list[str], wanted: str, usual: tuple[str, ...]) -> str | None:
        return next((n for n in (usual if wanted == AUTO else (wanted,)) if n in names), None)


def to_signed(ids: Values, learned: Values | None, role: Role, where: Where) -> npt.NDArray[np.int32]:
    """±(id + 1), positive where a token is learned. Raises: DataError for values that are not ids, labels or a mask."""
    ids = _integers(ids, "a token id", where)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) > MAX_ID):
        i = int(np.flatnonzero((ids < 0) | (ids > MAX_ID))[0])
        raise DataError(
            f"{ids[i]} is not a token id",
            where=where(i),
            why="ids are 0 to 2^31 - 2; only InternEvo's .bin marks tokens that are not learned by a sign",
            do="give labels (-100 where a token is not learned) or a mask",
        )
    value = ids.astype(np.int32) + np.int32(ID_OFFSET)
    if learned is None:
        return value
    return np.where(_find_learned(ids, learned, role, where), value, -value)


def padding_error(where: str) -> DataError:
    return DataError(
        f"the documents are padded: {PADDING} has zeros, and there are no labels",
        where=where,
        why="the padding would be trained on",
        do=f'tokenize without padding; mask="{PADDING}" keeps the padding, but does not learn it',
    )


def _find_learned(ids: Values, values: Values, role: Role, where: Where) -> npt.NDArray[np.bool_]:
    if values.dtype == np.bool_:
        return values
    values = _integers(values, "a label" if role == "labels" else "a value of the mask", where)
    if role == "mask":
        if len(wrong := np.flatnonzero((values != 0) & (values != 1))):
            i = int(wrong[0])
            raise DataError(f"a value of the mask is {values[i]}, not 0 or 1", where=where(i))
        return values == 1
    learned = values >= 0
    if len(wrong := np.flatnonzero(learned & (values != ids))):
        i = int(wrong[0])
        raise DataError(
            f"the label of a token is {values[i]}, and its id {ids[i]}",
            where=where(i),
            why="label i belongs to token i, and is its id or -100; the loss shifts them",
            do="write labels that are not shifted, or set labels=None to learn every token",
        )
    return learned


def _integers(values: Values, what: str, where: Where) -> Values:
    if values.dtype.kind in "iu":
        return values
    if values.dtype.kind == "f":
        whole = np.isfinite(values) & (values == np.floor(values)) & (np.abs(values) <= 2**31)
        if whole.all():
            return values.astype(np.int64)
        i = int(np.flatnonzero(~whole)[0])
        raise DataError(f"{what} is {values[i]}, not an integer", where=where(i))
    raise DataError(f"{what} is of type {values.dtype}, not an integer", where=where(0))
