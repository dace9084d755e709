"""What a finished table is, before it is written in any format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from analysis.aggregate import Estimate


@dataclass(frozen=True)
class Column:
    """A column: how its numbers are written, and which end is better."""

    title: str
    scale: float = 1.0
    digits: int | None = 2
    """Digits after the point; None writes four significant digits."""
    better: Literal["high", "low"] | None = None
    signed: bool = False


@dataclass
class Line:
    """A row of a table."""

    label: str
    cells: list[Estimate | None]
    partial: list[bool]
    published: bool = False
    source: str = ""
    diverged: bool = False
    name: str = ""


@dataclass
class Table:
    """A table with its caption and its notes."""

    exhibit: str
    title: str
    caption: str
    first: str
    columns: list[Column]
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def marks(self) -> list[list[bool]]:
        """Which cells are best of their column among our own finished lines (the seam for significance tests)."""
        marked = [[False] * len(self.columns) for _ in self.lines]
        for index, column in enumerate(self.columns):
            found = [
                (line.cells[index], number)
                for number, line in enumerate(self.lines)
                if not line.published and line.cells[index] is not None
            ]
            if column.better is None or len(found) < 2:
                continue
            shown = {number: self.rounded(index, cell.mean) for cell, number in found if cell is not None}
            best = (max if column.better == "high" else min)(shown.values())
            for number, value in shown.items():
                marked[number][index] = value == best
        return marked

    def rounded(self, index: int, value: float) -> float:
        """The value as it is printed: ties in print share the mark."""
        return float(self.number(index, value).replace(",", ""))

    def number(self, index: int, value: float) -> str:
        """A value of a column as text, without marks."""
        column = self.columns[index]
        scaled = value * column.scale
        if column.digits is None:
            return f"{scaled:#.4g}" if abs(scaled) < 1e4 else f"{scaled:,.0f}"
        return f"{scaled:+,.{column.digits}f}" if column.signed else f"{scaled:,.{column.digits}f}"
