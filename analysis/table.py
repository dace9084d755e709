"""What a finished table is, before it is written in any format."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from analysis.aggregate import Estimate
from analysis.items import Items
from analysis.significance import leaders, paired
from sparseforge_core.store.rows import PublishedNumber

if TYPE_CHECKING:
    from analysis.verdicts import Verdict


@dataclass(frozen=True)
class Column:
    """A column: how its numbers are written, and which end is better."""

    title: str
    scale: float = 1.0
    digits: int | None = 2
    """Digits after the point; None writes four significant digits."""
    better: Literal["high", "low"] | None = None
    signed: bool = False
    in_print: bool = True
    """Whether the column is shown in Markdown and LaTeX; CSV has every column."""

    def number(self, value: float, beside: float | None = None) -> str:
        """A value as text, without marks; with as many digits as `beside`, the mean that it belongs to, would have."""
        scaled, size = value * self.scale, abs((value if beside is None else beside) * self.scale)
        digits = self.digits
        if digits is None:
            digits = 4 - len(f"{size:.0f}") if size >= 1 else 4
        digits = max(digits, 0)
        signed = self.signed and beside is None
        return f"{scaled:+,.{digits}f}" if signed else f"{scaled:,.{digits}f}"


@dataclass(frozen=True)
class Cell:
    """One entry. Empty where the table plans nothing; planned and without an estimate where a result is missing."""

    estimate: Estimate | None = None
    planned: int = 0
    """Seeds that should stand behind the estimate; 0 for what is not averaged over seeds."""
    diverged: int = 0
    """Seeds whose model diverged, so that there is no number of them."""
    text: str = ""
    """How a source prints the number, for quoted ones; shown as it is."""
    items: Items | None = field(default=None, compare=False, repr=False)
    """Outcomes of the items behind the number, where the store has them."""
    sources: tuple[tuple[str, str], ...] = ()
    """(cell, stage) of each seed behind the number."""

    @property
    def partial(self) -> bool:
        """Whether fewer seeds are in than planned."""
        return self.planned > self.seeds + self.diverged

    @property
    def seeds(self) -> int:
        """Seeds behind the estimate."""
        return 0 if self.estimate is None else self.estimate.n


EMPTY = Cell()


@dataclass
class Line:
    """A row of a table."""

    name: str
    label: str
    cells: list[Cell]
    reference: bool = False
    """A model that is not sparse; it takes no part in the contest for the best mark."""
    source: str = ""
    """Where the numbers are quoted from; empty for our own."""


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
    published: Table | None = None
    """Quoted rows, in columns of their own."""
    verdicts: list[Verdict] = field(default_factory=list)
    """Each row against its reference, tested."""

    @functools.cached_property
    def marked(self) -> list[set[int]]:
        """What `marks` says, asked once: the tests behind it take time."""
        return self.marks()

    @functools.cached_property
    def untested(self) -> bool:
        """Whether a column has a contest that nobody can judge, because outcomes of single items are missing."""
        return any(
            _contest(column, [line.cells[i] for line in self.lines], self._rivals()) is None
            for i, column in enumerate(self.columns)
        )

    @functools.cached_property
    def contested(self) -> bool:
        """Whether a column has two sparse rows or more with all their seeds, that can be tested against each other."""
        return any(
            _contest(column, [line.cells[i] for line in self.lines], self._rivals())
            for i, column in enumerate(self.columns)
        )

    def marks(self) -> list[set[int]]:
        """For each column, the numbers of the lines to print in bold."""
        return [
            marks(column, [line.cells[i] for line in self.lines], self._rivals())
            for i, column in enumerate(self.columns)
        ]

    def _rivals(self) -> list[bool]:
        return [not line.reference and not line.source for line in self.lines]


def marks(column: Column, cells: Sequence[Cell], rivals: Sequence[bool]) -> set[int]:
    """The best of a column among the rivals, with every rival that is not shown to be worse (`significance.leaders`).

    A cell that lacks seeds neither wins nor sets the bar. Where nobody is shown to be worse, none is marked: a mark on
    every number says nothing. None is marked either where a rival has no outcomes of the same items to test on.
    """
    contest = _contest(column, cells, rivals)
    if not contest:
        return set()
    numbers = list(contest)
    scores = [_mean(cells[number]) for number in numbers]
    best = leaders(list(contest.values()), scores, high=column.better == "high")
    return {numbers[index] for index in best} if len(best) < len(numbers) else set()


def _contest(column: Column, cells: Sequence[Cell], rivals: Sequence[bool]) -> dict[int, Items] | None:
    """Items of the cells that contend in a column, by number; empty without a contest, None if it cannot be judged."""
    if column.better is None:
        return {}
    complete = {
        number: cell.items
        for number, (cell, rival) in enumerate(zip(cells, rivals, strict=True))
        if rival and cell.estimate is not None and not cell.partial and not cell.diverged
    }
    if len(complete) < 2:
        return {}
    known = {number: items for number, items in complete.items() if items is not None}
    first = next(iter(known.values()), None)
    if first is None or len(known) < len(complete) or not all(paired(first, items) for items in known.values()):
        return None
    return known


def _mean(cell: Cell) -> float:
    return cell.estimate.mean if cell.estimate is not None else 0.0


def published_table(table: Table, numbers: Sequence[PublishedNumber]) -> Table | None:
    """The quoted numbers of an exhibit as a table of their own, each as its source prints it; None if there are none.

    Columns of the same title stand in the order of `table`; values come in printed units.
    """
    if not numbers:
        return None
    known = {column.title: column for column in table.columns}
    titles = list(dict.fromkeys(number.column for number in numbers))
    order = [title for title in known if title in titles] + [title for title in titles if title not in known]
    columns = [known.get(title) or Column(title, digits=None if "PPL" in title else 2) for title in order]
    quoted = Table(table.exhibit, "Published (not measured here)", "", table.first, [_unmarked(c) for c in columns])
    for row, own in quoted_rows(numbers).items():
        by_title = {number.column: _quoted(number, known.get(number.column)) for number in own}
        cells = [by_title.get(title, EMPTY) for title in order]
        quoted.lines.append(Line(row, row, cells, source=own[0].source))
    return quoted


def quoted_rows(numbers: Sequence[PublishedNumber]) -> dict[str, list[PublishedNumber]]:
    """Quoted numbers by row, in the order in which the rows begin."""
    found: dict[str, list[PublishedNumber]] = {}
    for number in numbers:
        found.setdefault(number.row, []).append(number)
    return found


def _unmarked(column: Column) -> Column:
    return Column(column.title, column.scale, column.digits, signed=column.signed)


def _quoted(number: PublishedNumber, column: Column | None) -> Cell:
    if number.value is None:
        return Cell(text=number.text)
    scale = column.scale if column else 1.0
    return Cell(Estimate(number.value / scale, None, 1, None), text=number.text)
