"""A table for a terminal: aligned columns, bold where the terminal can, stars where it cannot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from analysis.hypertext import shown_columns
from analysis.render import TEXT_STYLE, Style, cell_text, sources
from analysis.table import Table

BOLD, PLAIN = "\033[1m", "\033[0m"
GAP = "  "
STARS = Style(str, lambda text: f"*{text}*")
PROSE = 100
"""Letters of a line of notes where no terminal says how many it has."""


def to_text(table: Table, *, color: bool, width: int | None = None) -> str:
    """Title, rows, notes and published rows; `color` prints marks in bold, else between stars.

    Columns that do not fit into `width` go on below, behind the names of the rows; None is as wide as it takes.
    """
    lines = [table.title, "", *_rows(table, color, width)]
    for note in (table.caption, *table.notes):
        lines += ["", *textwrap.wrap(note, width or PROSE)] if note else []
    if table.published is not None:
        lines += ["", table.published.title, "", *_rows(table.published, color, width)]
        lines += [f"[{number}] {source}" for number, source in enumerate(sources(table), 1)]
    return "\n".join(lines)


def _rows(table: Table, color: bool, width: int | None) -> list[str]:
    shown, marked = shown_columns(table), table.marked
    quoted = list(dict.fromkeys(line.source for line in table.lines))
    style = TEXT_STYLE if color else STARS
    rows = [[table.first, *(table.columns[i].title for i in shown)]]
    bold: dict[tuple[int, int], bool] = {}
    for number, line in enumerate(table.lines):
        label = f"{line.label} [{quoted.index(line.source) + 1}]" if line.source else line.label
        cells = [cell_text(table.columns[i], line.cells[i], style, bold=number in marked[i]) for i in shown]
        rows.append([label, *cells])
        bold |= {(number + 1, place + 1): True for place, i in enumerate(shown) if number in marked[i] and color}
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for places in _abreast(widths, width):
        lines += [""] if lines else []
        for number, row in enumerate(rows):
            padded = [row[place].rjust(widths[place]) if place else row[place].ljust(widths[place]) for place in places]
            texts = [f"{BOLD}{text}{PLAIN}" if (number, at) in bold else text for at, text in zip(places, padded)]
            lines.append(GAP.join(texts).rstrip())
            if not number:
                lines.append(GAP.join("-" * widths[place] for place in places))
    return lines


def _abreast(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Which columns stand side by side: the first and as many others as fit, at least one."""
    blocks = [[0]]
    for place in range(1, len(widths)):
        taken = sum(widths[at] + len(GAP) for at in blocks[-1]) + widths[place]
        if width is not None and taken > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(place)
    return blocks
