"""A table for a terminal: aligned columns, bold where the terminal can, stars where it cannot."""

from __future__ import annotations

import textwrap

from analysis.hypertext import shown_columns
from analysis.render import TEXT_STYLE, Style, cell_text, sources
from analysis.table import Table

BOLD, PLAIN = "\033[1m", "\033[0m"
GAP = "  "
STARS = Style(str, lambda text: f"*{text}*")


def to_text(table: Table, *, color: bool, width: int = 100) -> str:
    """Title, rows, notes and published rows; `color` prints marks in bold, else between stars."""
    lines = [table.title, "", *_rows(table, color)]
    for note in (table.caption, *table.notes):
        lines += ["", *textwrap.wrap(note, width)] if note else []
    if table.published is not None:
        lines += ["", table.published.title, "", *_rows(table.published, color)]
        lines += [f"[{number}] {source}" for number, source in enumerate(sources(table), 1)]
    return "\n".join(lines)


def _rows(table: Table, color: bool) -> list[str]:
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
    lines = []
    for number, row in enumerate(rows):
        padded = [text.ljust(w) if not place else text.rjust(w) for place, (text, w) in enumerate(zip(row, widths))]
        texts = [f"{BOLD}{text}{PLAIN}" if (number, place) in bold else text for place, text in enumerate(padded)]
        lines.append(GAP.join(texts).rstrip())
        if not number:
            lines.append(GAP.join("-" * w for w in widths))
    return lines
