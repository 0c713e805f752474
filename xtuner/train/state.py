"""Counters and data position of a run: what a resume needs in addition to weights and optimizer state."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from xtuner.data.loading.sampler import Position


@dataclass(frozen=True)
class TrainState:
    iteration: int = 0  # optimizer steps, including those that were not applied
    position: Position = field(default_factory=Position)
    packs: int = 0  # over all ranks
    targets: int = 0  # tokens with a loss, over all ranks
    skipped: int = 0  # iterations with a loss or gradient that was not finite

    def advance(self, position: Position, packs: int, targets: int) -> "TrainState":
        """The state after one more iteration."""
        return replace(
            self,
            iteration=self.iteration + 1,
            position=position,
            packs=self.packs + packs,
            targets=self.targets + targets,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """Raises: ValueError, TypeError, KeyError, AttributeError for a value that `to_json` cannot have written."""
        position = value["position"]
        for number in (*position.values(), *(n for key, n in value.items() if key != "position")):
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError(f"{number!r:.40} is not a count")
        return cls(**{**value, "position": Position(**position)})
