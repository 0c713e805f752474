"""What packing leaves out: the last tokens of each file, which fill no pack. Much of it in many small files."""

from typing import NamedTuple

WARN_FROM = 0.1  # share of the tokens from which on a warning says so


class DroppedTokens(NamedTuple):
    """Of all files together."""

    packed_length: int
    tokens: int
    dropped: int  # of them
    files: int
    without_pack: int  # of them: they have fewer tokens than one pack

    @property
    def share(self) -> str:
        return f"{self.dropped / self.tokens:.1%}" if self.tokens else "0.0%"

    def warning(self) -> str:
        """What is lost and what to do about it; empty where it is little."""
        if not self.dropped or self.dropped < WARN_FROM * self.tokens:
            return ""
        none = f" ({self.without_pack:,} of {self.files:,} files fill none at all)" if self.without_pack else ""
        return (
            f"{self.share} of the tokens ({self.dropped:,} of {self.tokens:,}) are not trained on: the last tokens of "
            f"each file fill no pack of {self.packed_length:,}{none}. Lower max_length, or join small files of one "
            "type: mkdir -p joined/en; cat data/en/*.bin > joined/en/all.bin; xtuner data check joined --fix-meta"
        )
