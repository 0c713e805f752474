"""Many mistakes, one error: a user mends them all before the next try."""

from collections.abc import Sequence

from xtuner.core.errors import ConfigError


def together(problems: Sequence[ConfigError], what: str = "mistakes in the config") -> ConfigError:
    """One error that says all of them; a single one as it is."""
    if len(problems) == 1:
        return problems[0]
    return ConfigError(f"{len(problems)} {what}\n" + "\n".join(f"* {p}" for p in problems))
