"""What a run has done so far: everything a resume needs beside weights and optimizer."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from xtuner.data.loading.sampler import Position


@dataclass(frozen=True)
class TrainState:
    iteration: int = 0  # optimizer steps done, those that were not applied included
    position: Position = field(default_factory=Position)
    packs: int = 0  # by all ranks
    targets: int = 0  # tokens learned from, by all ranks
    skipped: int = 0  # iterations whose loss or gradient was not finite

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
        """Raises: ValueError, TypeError, KeyError, AttributeError for anything that `to_json` does not make."""
        position = value["position"]
        for number in (*position.values(), *(n for key, n in value.items() if key != "position")):
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError(f"{number!r:.40} is not a count")
        return cls(**{**value, "position": Position(**position)})
