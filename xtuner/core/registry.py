"""Parts that a setting chooses by name."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from xtuner.core.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Parts of one kind by name: the shipped ones in the order given, then those that a user's code registers.

    Code of a user that calls `register` is a config, or a module that a config imports.

    Args:
        what: one of them, in words for messages.
        shipped: the ones that the package has.
    """

    def __init__(self, what: str, shipped: Mapping[str, T]) -> None:
        super().__init__(shipped)
        self._what, self._shipped = what, frozenset(shipped)

    def register(self, name: str, part: T) -> T:
        """Make `part` known as `name` and return it. A config that is run twice registers twice: the later one holds.

        Raises: ConfigError for the name of a shipped one.
        """
        if name in self._shipped:
            what = f"there is a shipped {self._what} {name!r}"
            raise ConfigError(what, why="configs that name it would get another one", do="give yours another name")
        self[name] = part
        return part

    def find(self, name: str, where: str, otherwise: str = "") -> T:
        """The part of that name. Raises: ConfigError that lists the known ones, with what to do `otherwise`."""
        if isinstance(name, str) and name in self:  # a config may say anything
            return self[name]
        what = f"there is no {self._what} {name!r}.{did_you_mean(str(name), list(self))}"
        known = f"it is one of {', '.join(self)}"
        raise ConfigError(what, where=where, do=f"{known}; or {otherwise}" if otherwise else known)
