"""Components that a setting selects by name."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from xtuner.core.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Name → component of one kind: first the shipped ones, then those that a user's code registers.

    A config, or a module that it imports, calls `register`.

    Args:
        what: the kind of component, for messages.
        shipped: the components of the package.
    """

    def __init__(self, what: str, shipped: Mapping[str, T]) -> None:
        super().__init__(shipped)
        self._what, self._shipped = what, frozenset(shipped)

    def register(self, name: str, component: T) -> T:
        """Add `component` as `name` and return it. A config that is run twice registers twice: the later one is kept.

        Raises: ConfigError if a shipped one has this name.
        """
        if name in self._shipped:
            what = f"xtuner already has the {self._what} {name!r}"
            raise ConfigError(what, why="configs that name it would get yours", do="choose another name")
        self[name] = component
        return component

    def find(self, name: str, where: str, otherwise: str = "") -> T:
        """The component of that name. Raises: ConfigError with the known names, and `otherwise` as an alternative."""
        if isinstance(name, str) and name in self:  # a config may give any value
            return self[name]
        what = f"there is no {self._what} {name!r}.{did_you_mean(str(name), list(self))}"
        known = f"choose one of {', '.join(self)}"
        raise ConfigError(what, where=where, do=f"{known}; or {otherwise}" if otherwise else known)
