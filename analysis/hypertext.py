"""A table as HTML: sortable columns, marks, and behind every number how it came about."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from analysis.page import page
from analysis.render import DASH, TEXT_STYLE, cell_text, sources
from analysis.table import Cell, Column, Line, Table

Place = tuple[str, str]
"""Cell key and stage."""


def to_html(table: Table) -> str:
    """One table as a page of its own, with the cells and stages behind each number, without times or machines."""
    return page(table.title, fragment(table))


def fragment(table: Table, key_of: Callable[[Place], str] = lambda place: f"{place[0]}/{place[1]}") -> str:
    """The table with its notes and its published rows; `key_of` names a place among the page's origins."""
    parts = [f'<h2 id="{escape(table.exhibit)}">{escape(table.title)}</h2>']
    parts += [f"<p>{escape(table.caption)}</p>"] if table.caption else []
    parts.append(_rows(table, key_of))
    parts.append(f'<div class="notes">{"".join(f"<p>{escape(note)}</p>" for note in table.notes)}</div>')
    if table.published is not None:
        parts += [f"<h3>{escape(table.published.title)}</h3>", _rows(table.published, key_of, kind="scroll published")]
        named = "".join(f"<p>[{n}] {escape(source)}.</p>" for n, source in enumerate(sources(table), 1))
        parts.append(f'<div class="notes">{named}</div>')
    return "\n".join(parts)


def words(*texts: str) -> str:
    """Cells of words, which begin at their left edge as numbers end at their right."""
    return "".join(f'<td class="word">{escape(text)}</td>' for text in texts)


def grid(head: list[str], rows: list[list[str]], frame: str = "scroll", wordy: int = 1) -> str:
    """A sortable table of finished cells (each a whole `<td>`), its heads plain text; the first `wordy` hold words."""
    kinds = [' class="word"' if 0 < number < wordy else "" for number in range(len(head))]
    titles = "".join(f"<th data-sort{kind}>{escape(title)}</th>" for kind, title in zip(kinds, head, strict=True))
    body = "\n".join(row[0] if row[0].startswith("<tr") else f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="{frame}"><table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def shown_columns(table: Table) -> list[int]:
    """Numbers of the columns that are printed."""
    return [index for index, column in enumerate(table.columns) if column.in_print]


def _rows(table: Table, key_of: Callable[[Place], str], kind: str = "scroll") -> str:
    shown, marked = shown_columns(table), table.marked
    quoted = list(dict.fromkeys(line.source for line in table.lines))
    rows = []
    for number, line in enumerate(table.lines):
        label = f"{line.label} [{quoted.index(line.source) + 1}]" if line.source else line.label
        cells = [f"<td>{escape(label)}</td>"]
        cells += [_cell(table.columns[i], line, i, number in marked[i], key_of) for i in shown]
        reference = ' class="reference"' if line.reference else ""
        rows.append([f"<tr{reference}>{''.join(cells)}</tr>"])
    return grid([table.first, *(table.columns[i].title for i in shown)], rows, kind)


def _cell(column: Column, line: Line, index: int, best: bool, key_of: Callable[[Place], str]) -> str:
    cell = line.cells[index]
    attributes = ' class="best"' if best else ""
    if cell.estimate is not None:
        attributes += f' data-v="{cell.estimate.mean * column.scale:.10g}"'
    places = list(dict.fromkeys(cell.sources))
    if places:
        keys = " ".join(escape(key_of(place)) for place in places)
        attributes += f' data-p="{keys}" data-about="{escape(about(column, line, cell))}"'
    mean, mark, rest = cell_text(column, cell, TEXT_STYLE).partition(" \N{PLUS-MINUS SIGN}")
    text = escape(mean) + (f" <small>\N{PLUS-MINUS SIGN}{escape(rest)}</small>" if mark else "")
    return f"<td{attributes}>{text or DASH}</td>"


def about(column: Column, line: Line, cell: Cell) -> str:
    """One number in words: mean, standard deviation, interval, seeds, and the cells behind it."""
    found = cell.estimate
    head = f"{line.label}, {column.title}"
    if found is None:
        return f"{head}: diverged" if cell.diverged else f"{head}: no result yet ({cell.planned} planned)"
    parts = [f"{head}: {found.mean * column.scale:.6g}"]
    if found.std is not None:
        parts.append(f"sd {found.std * column.scale:.4g}")
    if found.half is not None:
        parts.append(f"95 % interval \N{PLUS-MINUS SIGN} {found.half * column.scale:.4g}")
    parts.append(f"n {found.n}" + (f" of {cell.planned} seeds" if cell.planned else ""))
    cells = dict.fromkeys(key for key, _ in cell.sources)
    return f"{', '.join(parts)}; cells {', '.join(cells)}"
