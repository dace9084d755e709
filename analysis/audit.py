"""The auditor: does a table add up? Means, differences, ranks, and quantities that are stated twice.

Works on printed texts, so that it can judge any paper's table and our own in the same way. Rounding is granted: a
finding is a number that no unrounded numbers behind the printed ones could give.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from analysis.accuracy_tables import TASKS
from analysis.render import TEXT_STYLE, cell_text
from analysis.table import Table
from sparseforge_core.errors import SparseForgeError

Kind = Literal["mean", "difference", "rank", "stated twice", "direction"]

MEANS = ("Mean", "Avg")
EPSILON = 1e-9
MIN_TASKS = 3
"""Tasks that a row must show before its mean can be of them."""


class Number(Protocol):
    """A printed number and its place; what the store keeps of a quoted one."""

    @property
    def exhibit(self) -> str: ...

    @property
    def row(self) -> str: ...

    @property
    def column(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class TypedNumber:
    """A number typed off a page."""

    exhibit: str
    row: str
    column: str
    text: str


Place = tuple[str, str, str]
"""Exhibit, row, column."""
CSV_HEAD = ("table", "row", "column", "text")


@dataclass(frozen=True)
class Finding:
    """One number that does not add up."""

    table: str
    row: str
    column: str
    kind: Kind
    printed: str
    recomputed: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def audit_numbers(numbers: Iterable[Number], same: Sequence[tuple[Place, Place]] = ()) -> list[Finding]:
    """Findings among quoted numbers; `same` lists pairs of places that state one quantity."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for number in numbers:
        rows.setdefault((number.exhibit, number.row), {})[number.column] = number.text
    found = []
    for (exhibit, row), texts in rows.items():
        found += [*_mean(exhibit, row, texts), *_difference(exhibit, row, texts), *_direction(exhibit, row, texts)]
    return [*found, *_twice(rows, same)]


def numbers_of(path: Path) -> list[TypedNumber]:
    """The numbers of a CSV file with the columns of CSV_HEAD; columns are called as in our own tables.

    Raises SparseForgeError for a file that cannot be read, another head, or a text that is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SparseForgeError(f"{path} cannot be read ({error}); name a CSV file") from error
    wanted = f"the head must be {','.join(CSV_HEAD)}, and each line one printed number"
    if not lines or tuple(lines[0]) != CSV_HEAD:
        raise SparseForgeError(f"{path} begins with {','.join(lines[0]) if lines else 'nothing'}; {wanted}")
    found = []
    for number, line in enumerate(lines[1:], 2):
        try:
            exhibit, row, column, text = line
            if not math.isfinite(float(text)):
                raise ValueError(f"{text} is no number that could be printed")
        except ValueError as error:
            raise SparseForgeError(f"{path}, line {number}: {','.join(line)!r} ({error}); {wanted}") from error
        found.append(TypedNumber(exhibit, row, column, text))
    return found


def audit_table(table: Table) -> list[Finding]:
    """Findings in a finished table of ours: as a reader with the printed page would check it."""
    columns = [column for column in table.columns if column.in_print]
    indices = [index for index, column in enumerate(table.columns) if column.in_print]
    found: list[Finding] = []
    for line in table.lines:
        cells = {column.title: line.cells[i] for column, i in zip(columns, indices, strict=True)}
        whole = {title: cell for title, cell in cells.items() if not cell.partial and not cell.diverged}
        texts = {
            column.title: _bare(cell_text(column, whole[column.title], TEXT_STYLE))
            for column in columns
            if column.title in whole and whole[column.title].estimate is not None
        }
        found += [*_mean(table.exhibit, line.label, texts), *_difference(table.exhibit, line.label, texts)]
    return [*found, *_ranks(table)]


def _bare(text: str) -> str:
    """The mean of a printed entry, without interval and marks."""
    return text.split(" ")[0].replace(",", "").replace("\N{DAGGER}", "")


def unit(text: str) -> float:
    """The place value of the last printed digit."""
    return 10.0 ** -len(text.partition(".")[2])


def _values(texts: Mapping[str, str], names: Iterable[str]) -> list[tuple[str, float]]:
    return [(texts[name], float(texts[name])) for name in names if name in texts]


def _mean(exhibit: str, row: str, texts: Mapping[str, str]) -> list[Finding]:
    """Is the printed mean that of the printed tasks?"""
    title = next((name for name in MEANS if name in texts), None)
    tasks = _values(texts, TASKS.values())
    if title is None or len(tasks) < MIN_TASKS:
        return []
    recomputed = statistics.fmean(value for _, value in tasks)
    slack = statistics.fmean(unit(text) for text, _ in tasks) / 2 + unit(texts[title]) / 2
    if abs(recomputed - float(texts[title])) <= slack + EPSILON:
        return []
    why = f"the mean of the {len(tasks)} printed tasks is {recomputed:.3f}; rounding explains {slack:.3f} at most"
    return [Finding(exhibit, row, title, "mean", texts[title], f"{recomputed:.2f}", why)]


PAIRS = (("Difference", "SparseForge acc", "Dense acc"),)


def _difference(exhibit: str, row: str, texts: Mapping[str, str]) -> list[Finding]:
    """Is the printed difference that of the printed pair?"""
    found = []
    for title, of, to in PAIRS:
        if not {title, of, to} <= texts.keys():
            continue
        recomputed = float(texts[of]) - float(texts[to])
        slack = (unit(texts[of]) + unit(texts[to]) + unit(texts[title])) / 2
        if abs(recomputed - float(texts[title])) > slack + EPSILON:
            why = f"{texts[of]} minus {texts[to]} is {recomputed:+.2f}"
            found.append(Finding(exhibit, row, title, "difference", texts[title], f"{recomputed:+.2f}", why))
    return found


def _direction(exhibit: str, row: str, texts: Mapping[str, str]) -> list[Finding]:
    """A sparse model whose accuracy falls and whose perplexity falls too: the text was adapted to, not recovered."""
    names = ("Dense acc", "SparseForge acc", "Dense PPL", "SparseForge PPL")
    if not set(names) <= texts.keys():
        return []
    dense, sparse, before, after = (float(texts[name]) for name in names)
    if sparse >= dense or after >= before:
        return []
    why = f"accuracy falls by {dense - sparse:.2f} points and perplexity improves below dense: not the same quality"
    return [Finding(exhibit, row, names[3], "direction", texts[names[3]], f"at least {texts[names[2]]}", why)]


def _twice(rows: Mapping[tuple[str, str], Mapping[str, str]], same: Sequence[tuple[Place, Place]]) -> list[Finding]:
    """Do two places that state one quantity agree, to the digits of the shorter one?"""
    found = []
    for first, second in same:
        one, other = (rows.get(place[:2], {}).get(place[2]) for place in (first, second))
        if one is None or other is None:
            continue
        coarse = max(unit(one), unit(other))
        if abs(float(one) - float(other)) > coarse / 2 + EPSILON:
            why = f"{second[0]}, row {second[1]}, column {second[2]} states the same quantity as {other}"
            found.append(Finding(*first, "stated twice", one, other, why))
    return found


def _ranks(table: Table) -> list[Finding]:
    """Is the best printed number of a column among its marks, and is no worse one marked without the better?"""
    found = []
    for column, marked, index in zip(table.columns, table.marked, range(len(table.columns)), strict=True):
        if not marked or not column.in_print:
            continue
        sign = 1.0 if column.better == "high" else -1.0
        rivals = {
            number: sign * line.cells[index].estimate.mean  # type: ignore[union-attr]
            for number, line in enumerate(table.lines)
            if not line.reference and not line.source and line.cells[index].estimate is not None
            if not line.cells[index].partial and not line.cells[index].diverged
        }
        best = max(rivals, key=lambda number: rivals[number])
        if best not in marked:
            label, other = table.lines[best].label, table.lines[min(marked)].label
            why = f"{label} is best in this column and is not marked"
            found.append(Finding(table.exhibit, label, column.title, "rank", other, label, why))
    return found


def report_lines(found: Sequence[Finding]) -> list[str]:
    """The findings for a terminal."""
    if not found:
        return ["everything adds up"]
    lines = [f"{len(found)} numbers do not add up:"]
    for one in found:
        lines.append(f"  {one.table}  {one.row}  {one.column}: printed {one.printed}, recomputed {one.recomputed}")
        lines.append(f"    {one.kind}: {one.why}")
    return lines
