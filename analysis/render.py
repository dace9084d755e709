"""A table as Markdown, LaTeX and CSV: the same numbers, the same marks, the same bytes every time."""

from __future__ import annotations

import csv
import io
import re

from analysis.table import Line, Table

DAGGER = {"markdown": "†", "latex": r"$^\dagger$"}
PUBLISHED = {"markdown": "‡", "latex": r"$^\ddagger$"}
LATEX_SPECIAL = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}


def to_markdown(table: Table) -> str:
    """GitHub-flavoured Markdown: title, table, caption, notes."""
    head = [table.first, *(column.title for column in table.columns)]
    lines = [f"**{table.title}**", "", _md_row(head), _md_row(["---", *["---:"] * len(table.columns)])]
    marks = table.marks()
    for number, line in enumerate(table.lines):
        texts = [_text(table, line, i, bold=marks[number][i], style="markdown") for i in range(len(table.columns))]
        label = line.label + (PUBLISHED["markdown"] if line.published else "") + (" (diverged)" if line.diverged else "")
        lines.append(_md_row([label.replace("|", r"\|"), *texts]))
    notes = [table.caption, *_notes(table, "markdown")]
    return "\n".join([*lines, "", *(note for text in notes if text for note in (text, ""))])


def to_latex(table: Table) -> str:
    """A `table` environment for the booktabs package."""
    marks = table.marks()
    body = []
    was_published = False
    for number, line in enumerate(table.lines):
        if line.published and not was_published:
            body.append(r"\midrule")
            was_published = True
        texts = [_text(table, line, i, bold=marks[number][i], style="latex") for i in range(len(table.columns))]
        label = _escape(line.label) + (PUBLISHED["latex"] if line.published else "")
        label += " (diverged)" if line.diverged else ""
        body.append(" & ".join([label, *texts]) + r" \\")
    head = " & ".join(_escape(text) for text in [table.first, *(column.title for column in table.columns)]) + r" \\"
    notes = " ".join([_escape(table.caption), *(_escape_note(note) for note in _notes(table, "latex"))])
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering\small",
            rf"\caption{{{_escape(table.title)}. {notes}}}",
            rf"\label{{tab:{table.exhibit}}}",
            r"\begin{tabular}{l" + "r" * len(table.columns) + "}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def to_csv(table: Table) -> str:
    """Every number unrounded: mean, standard deviation, half interval and n for each column, in printed units."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("", " std", " ci95", " n")
    writer.writerow(["row", "label", "published", *(c.title + part for c in table.columns for part in parts)])
    for line in table.lines:
        values: list[object] = []
        for column, cell in zip(table.columns, line.cells, strict=True):
            if cell is None:
                values += ["", "", "", ""]
            else:
                scaled = [None if v is None else repr(v * column.scale) for v in (cell.mean, cell.std, cell.half)]
                values += [*("" if v is None else v for v in scaled), cell.n]
        writer.writerow([line.name, line.label, line.source, *values])
    return out.getvalue()


def _text(table: Table, line: Line, index: int, *, bold: bool, style: str) -> str:
    cell = line.cells[index]
    if cell is None:
        return "--" if style == "latex" else "–"
    text = table.number(index, cell.mean)
    if style == "latex":
        text = text.replace(",", "{,}")
    if bold:
        text = rf"\textbf{{{text}}}" if style == "latex" else f"**{text}**"
    if cell.half is not None:
        spread = table.number(index, cell.half).lstrip("+")
        text += rf" $\pm$ {spread}" if style == "latex" else f" ± {spread}"
    return text + (DAGGER[style] if line.partial[index] else "")


def _notes(table: Table, style: str) -> list[str]:
    notes = []
    if any(cell is not None and cell.half is not None for line in table.lines for cell in line.cells):
        notes.append("± is half the 95 % t interval over seeds." if style == "markdown" else "$\\pm$ is half the 95 % t interval over seeds.")
    if any(any(line.partial) for line in table.lines):
        notes.append(f"{DAGGER[style]} fewer seeds than planned.")
    sources = list(dict.fromkeys(line.source for line in table.lines if line.published))
    if sources:
        notes.append(f"{PUBLISHED[style]} published, not measured here: {'; '.join(sources)}.")
    return notes + table.notes


def _md_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    return re.sub(r"[&%$#_{}]", lambda match: LATEX_SPECIAL[match.group()], text)


def _escape_note(text: str) -> str:
    return text.replace("%", r"\%")
