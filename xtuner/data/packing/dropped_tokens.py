"""Tokens that packing drops: the last ones of each file, which do not fill a pack. Many, where files are small."""

from typing import NamedTuple

WARN_FROM = 0.1  # share of dropped tokens from which a warning is logged


class DroppedTokens(NamedTuple):
    """Totals over all files."""

    packed_length: int
    tokens: int
    dropped: int  # of these tokens
    files: int
    without_pack: int  # files with fewer tokens than one pack

    @property
    def share(self) -> str:
        return f"{self.dropped / self.tokens:.1%}" if self.tokens else "0.0%"

    def warning(self) -> str:
        """What is dropped and what to do about it; empty below the limit."""
        if not self.dropped or self.dropped < WARN_FROM * self.tokens:
            return ""
        none = f" ({self.without_pack:,} of {self.files:,} files fill none at all)" if self.without_pack else ""
        return (
            f"{self.share} of the tokens ({self.dropped:,} of {self.tokens:,}) are not trained on: the last tokens of "
            f"each file fill no pack of {self.packed_length:,}{none}. Lower max_length, or join small files of one "
            "type: mkdir -p joined/en; cat data/en/*.bin > joined/en/all.bin; xtuner data check joined --fix-meta"
        )
