"""A user's own questions, one JSON object per line:

    {"question": "…", "answer": "…"}                            free text answer
    {"question": "…", "A": "…", "B": "…", …, "answer": "B"}     multiple choice, with at least two options

OpenCompass applies the first row's fields to all rows and fills in missing ones, so every row is checked first.
"""

import json
import string
from pathlib import Path
from typing import Any, NoReturn

from xtuner.core.errors import DataError

QUESTIONS, CHOICES = "qa", "mcq"  # OpenCompass's names


def check(path: Path) -> str:
    """QUESTIONS or CHOICES. Raises: DataError with the line of the first invalid row."""
    if path.suffix != ".jsonl":
        raise DataError(
            "the file is not a .jsonl", where=str(path), do="give JSON lines, one row per line, in a file NAME.jsonl"
        )
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise DataError(f"the file cannot be read: {e.strerror}", where=str(path)) from None
    if lines[-1] == b"":
        lines.pop()
    first: dict[str, Any] = {}
    options: list[str] = []
    for number, line in enumerate(lines, start=1):
        row = _row(line, path, number)
        if number == 1:
            first, options = row, _options(row)
        _check(row, first, options, path, number)
    if not lines:
        raise DataError("the file has no rows", where=str(path))
    return CHOICES if options else QUESTIONS


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        _refuse(f"the line is not UTF-8: {e.reason}", path, number)
    except json.JSONDecodeError as e:
        _refuse("the line is empty" if not line.strip() else f"the line is not JSON: {e.msg}", path, number)
    if not isinstance(row, dict):
        _refuse("the line is not a JSON object", path, number)
    return row


def _options(row: dict[str, Any]) -> list[str]:
    """A, B, … up to the first letter that the row lacks (OpenCompass's rule)."""
    found = []
    for letter in string.ascii_uppercase:
        if letter not in row:
            break
        found.append(letter)
    return found if len(found) > 1 else []


def _check(row: dict[str, Any], first: dict[str, Any], options: list[str], path: Path, number: int) -> None:
    for name in ("question", *options, "answer"):
        if name not in row:
            _refuse(f"the row has no {name!r}", path, number)
        if not isinstance(row[name], str):
            _refuse(f"{name!r} is {row[name]!r}, not a text", path, number)
    if options and row["answer"] not in options:
        _refuse(f"the answer is {row['answer']!r}, not one of {', '.join(options)}", path, number)
    if strange := sorted(first.keys() ^ row.keys()):
        verb = "lacks" if strange[0] in first else "has"
        _refuse(f"the row {verb} {strange[0]!r}, unlike line 1", path, number)
    for name, value in row.items():
        if type(value) is not type(first[name]):
            _refuse(f"{name!r} is {value!r}, but {first[name]!r} on line 1: another type", path, number)


def _refuse(what: str, path: Path, number: int) -> NoReturn:
    do = '{"question": "…", "answer": "…"} or {"question": "…", "A": "…", "B": "…", "answer": "A"} in every line'
    raise DataError(what, where=f"{path}:{number}", why="OpenCompass would score it wrongly or stop", do=do)
