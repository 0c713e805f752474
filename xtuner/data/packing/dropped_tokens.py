"""Tokens that packing drops: the last ones of each file, which do not fill a pack. Many, where files are small.

Packs of whole documents drop no tail; they contain padding instead, and may drop documents longer than a pack.
"""

from typing import NamedTuple

WARN_FROM = 0.1  # share of dropped tokens from which a warning is logged


class DroppedTokens(NamedTuple):
    """Totals over all files."""

    packed_length: int
    tokens: int
    dropped: int  # of these tokens
    files: int
    without_pack: int  # files with fewer tokens than one pack
    padding: int = 0  # tokens in packs that are none of the data's
    whole: bool = False  # packs of whole documents

    @property
    def share(self) -> str:
        return f"{self.dropped / self.tokens:.1%}" if self.tokens else "0.0%"

    @property
    def padding_share(self) -> float:
        """Of the tokens in packs."""
        return self.padding / max(self.tokens - self.dropped + self.padding, 1)

    def describe(self) -> str:
        """What happens at the ends of packs, for the report of a run."""
        if not self.whole:
            return f"{self.dropped:,} tokens ({self.share}) at the ends of files are dropped"
        dropped = f"; {self.dropped:,} tokens ({self.share}) of longer documents are dropped" if self.dropped else ""
        return f"documents are not cut: {self.padding:,} tokens are padding ({self.padding_share:.2%}){dropped}"

    def warning(self) -> str:
        """What is dropped and what to do about it; empty below the limit."""
        if self.whole:
            return self._whole_warning()
        if not self.dropped or self.dropped < WARN_FROM * self.tokens:
            return ""
        none = f" ({self.without_pack:,} of {self.files:,} files fill none at all)" if self.without_pack else ""
        return (
            f"{self.share} of the tokens ({self.dropped:,} of {self.tokens:,}) are not trained on: the last tokens of "
            f"each file fill no pack of {self.packed_length:,}{none}. Lower max_length, or join small files of one "
            "type: mkdir -p joined/en; cat data/en/*.bin > joined/en/all.bin; xtuner data check joined --fix-meta"
        )

    def _whole_warning(self) -> str:
        found = []
        if self.padding_share >= WARN_FROM:
            found.append(
                f"{self.padding_share:.1%} of the tokens in packs are padding: each file is packed separately, and its "
                "last packs are not full. Join small files of one type, or lower max_length"
            )
        if self.dropped and self.dropped >= WARN_FROM * self.tokens:
            found.append(
                f"{self.share} of the tokens ({self.dropped:,} of {self.tokens:,}) are not trained on: their documents "
                f'are longer than a pack of {self.packed_length:,}, and long = "drop". Raise max_length, or set long '
                'to "cut"'
            )
        return ". ".join(found)
