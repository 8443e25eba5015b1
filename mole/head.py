"""What a head on a backbone says of a whole text: one of some labels, or a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Head:
    """The task of a head: `labels` in the order of its outputs; none of a regression, which has one output."""

    kind: Literal["classification", "regression"]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "regression") == bool(self.labels):
            raise ValueError(f"a head for {self.kind} with labels {list(self.labels)}: classification has labels alone")
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"labels {list(self.labels)}: at least two are wanted, each once")

    @property
    def size(self) -> int:
        """How many outputs it has."""
        return len(self.labels) or 1
