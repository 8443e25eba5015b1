"""What a surgery did: names, experts, parameters; and whether the model computes what it did before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WrappedRow:
    """One block. Parameters: of the module before, of the block now, and those that one token meets in it."""

    names: tuple[str, ...]
    num_experts: int
    before: int
    after: int
    active: int


@dataclass(frozen=True)
class SurgeryReport:
    """The blocks that `moefy` made. `changes`: why the model's output differs from the dense one's at the start."""

    rows: tuple[WrappedRow, ...]
    changes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The first name of each block."""
        return [row.names[0] for row in self.rows]

    @property
    def equals_dense(self) -> bool:
        """Whether the model computes what it did before, up to rounding."""
        return not self.changes

    def total(self, what: str) -> int:
        """The sum over blocks of `before`, `after` or `active`."""
        return sum(getattr(row, what) for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.names[0]) for row in self.rows)
        lines = [
            f"{row.names[0]:<{width}}  {row.num_experts} experts  {row.before:,} → {row.after:,} parameters, "
            f"{row.active:,} active per token" + (f"  (also {', '.join(row.names[1:])})" if row.names[1:] else "")
            for row in self.rows
        ]
        before, after, active = (self.total(what) for what in ("before", "after", "active"))
        lines.append(f"{len(self.rows)} blocks: {before:,} → {after:,} parameters, {active:,} active per token")
        if self.changes:
            lines.append(f"the model differs from the dense one from the start: {'; '.join(self.changes)}")
        else:
            lines.append("at the start the model computes what the dense one does")
        return "\n".join(lines)
