"""Formats rows as a text table."""

from collections.abc import Sequence


def text(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; numbers are right-aligned. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_cell(c, w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(cell: str, width: int) -> str:
    return cell.rjust(width) if cell.replace(".", "", 1).replace("-", "", 1).isdigit() else cell.ljust(width)
