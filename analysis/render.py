"""A table as Markdown, LaTeX and CSV: the same numbers, the same marks, the same bytes every time."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from analysis.table import Cell, Column, Table

DASH = "\N{EN DASH}"
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{DAGGER}": r"$^\dagger$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
}
MARKDOWN = {"\\": "\\\\", "|": r"\|", "*": r"\*", "_": r"\_", "<": "&lt;", "`": r"\`"}


@dataclass(frozen=True)
class Style:
    """How a format escapes plain text and prints in bold."""

    escape: Callable[[str], str]
    bold: Callable[[str], str]


def escape_latex(text: str) -> str:
    """Plain text as LaTeX; every character that LaTeX would act on is spelt out."""
    return "".join(LATEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    """Plain text inside a Markdown table or paragraph."""
    return "".join(MARKDOWN.get(character, character) for character in text)


IN_MARKDOWN = Style(escape_markdown, lambda text: f"**{text}**")
TEXT_STYLE = Style(str, str)
IN_LATEX = Style(escape_latex, lambda text: rf"\textbf{{{text}}}")


def to_markdown(table: Table) -> str:
    """GitHub-flavoured Markdown: title, rows, caption, notes, then the published rows in a block of their own."""
    lines = [f"**{escape_markdown(table.title)}**", "", *_markdown_rows(table), ""]
    for text in (table.caption, *table.notes):
        lines += [escape_markdown(text), ""] if text else []
    if table.published is not None:
        lines += [f"**{escape_markdown(table.published.title)}**", "", *_markdown_rows(table.published), ""]
        lines += [escape_markdown(f"- [{number}] {source}.") for number, source in enumerate(sources(table), 1)]
        lines.append("")
    return "\n".join(lines)


def to_latex(table: Table) -> str:
    """A `table` environment for the booktabs package."""
    notes = " ".join(text for text in (table.caption, *table.notes) if text)
    lines = [r"\begin{table}[t]", r"\centering\small"]
    lines.append(rf"\caption{{{escape_latex(_period(table.title))} {escape_latex(notes)}}}")
    lines += [rf"\label{{tab:{table.exhibit}}}", *_latex_rows(table)]
    if table.published is not None:
        lines += [
            "",
            r"\medskip",
            rf"\textit{{{escape_latex(table.published.title)}}}",
            "",
            *_latex_rows(table.published),
        ]
        quoted = [f"[{number}] {source}." for number, source in enumerate(sources(table), 1)]
        lines += ["", rf"{{\footnotesize {escape_latex(' '.join(quoted))}}}"]
    return "\n".join([*lines, r"\end{table}", ""])


def to_csv(table: Table) -> str:
    """Every number to twelve digits, in printed units: mean, standard deviation, half interval, n, planned n."""
    blocks = [block for block in (table, table.published) if block is not None]
    titles = list(dict.fromkeys(column.title for block in blocks for column in block.columns))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("", " std", " ci95", " n", " planned")
    writer.writerow(["row", "label", "published in", *(title + part for title in titles for part in parts)])
    for block in blocks:
        for line in block.lines:
            by_title = {c.title: _csv_cell(c, cell) for c, cell in zip(block.columns, line.cells, strict=True)}
            values = [value for title in titles for value in by_title.get(title, [""] * len(parts))]
            writer.writerow([line.name, line.label, line.source, *values])
    return out.getvalue()


def _csv_cell(column: Column, cell: Cell) -> list[str]:
    found = cell.estimate
    if found is None:
        return ["", "", "", str(cell.seeds) if cell.planned else "", str(cell.planned or "")]
    numbers = [None if v is None else v * column.scale for v in (found.mean, found.std, found.half)]
    texts = ["" if v is None else f"{v:.12g}" for v in numbers]
    return [*texts, str(found.n), str(cell.planned or "")]


def _printed(table: Table) -> list[int]:
    return [index for index, column in enumerate(table.columns) if column.in_print]


def _markdown_rows(table: Table) -> list[str]:
    columns = _printed(table)
    head = [table.first, *(table.columns[i].title for i in columns)]
    rows = [[escape_markdown(text) for text in head], [":---", *["---:"] * len(columns)]]
    rows += _rows(table, IN_MARKDOWN)
    return ["| " + " | ".join(row) + " |" for row in rows]


def _latex_rows(table: Table) -> list[str]:
    columns = _printed(table)
    head = [escape_latex(text) for text in [table.first, *(table.columns[i].title for i in columns)]]
    body: list[str] = []
    groups = ["" if line.source else line.name.rpartition("/")[0] for line in table.lines]
    for number, row in enumerate(_rows(table, IN_LATEX)):
        if number and groups[number] != groups[number - 1] and len(set(groups)) < len(groups):
            body.append(r"\addlinespace")
        body.append(" & ".join(row) + r" \\")
    begin = rf"\begin{{tabular}}{{l{'r' * len(columns)}}}"
    return [begin, r"\toprule", " & ".join(head) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]


def _rows(table: Table, style: Style) -> list[list[str]]:
    """Every line as finished texts: label, then the printed columns."""
    best, quoted = table.marked, list(dict.fromkeys(line.source for line in table.lines))
    found = []
    for number, line in enumerate(table.lines):
        label = f"{line.label} [{quoted.index(line.source) + 1}]" if line.source else line.label
        cells = [cell_text(table.columns[i], line.cells[i], style, bold=number in best[i]) for i in _printed(table)]
        found.append([style.escape(label), *cells])
    return found


def cell_text(column: Column, cell: Cell, style: Style, *, bold: bool = False) -> str:
    """One entry with its interval and its marks."""
    found = cell.estimate
    if cell.text:
        return style.escape(cell.text)
    if found is None:
        if cell.diverged:
            return "diverged"
        return style.escape(DASH + ("\N{DAGGER}" if cell.partial else ""))
    text = style.escape(column.number(found.mean))
    text = style.bold(text) if bold else text
    if found.half is not None:
        text += style.escape(f" \N{PLUS-MINUS SIGN} {column.number(found.half, beside=found.mean)}")
    if cell.partial:
        text += style.escape(f"\N{DAGGER} ({found.n}/{cell.planned})")
    if cell.diverged:
        text += style.escape(f" ({cell.diverged} diverged)")
    return text


def sources(table: Table) -> list[str]:
    """What the published rows are quoted from, in the order of their numbers."""
    return [] if table.published is None else list(dict.fromkeys(line.source for line in table.published.lines))


def _period(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
