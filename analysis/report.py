"""The report: everything that a grid found, in one HTML file that opens anywhere and asks nobody for anything."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from analysis.accuracy_tables import MEAN, TASKS
from analysis.audit import audit_table
from analysis.drawing import pictures
from analysis.exhibits import FIGURES, TABLES
from analysis.figures import short
from analysis.frames import ExhibitData, ExhibitRow
from analysis.hypertext import fragment, grid, words
from analysis.make_tables import Material, collect, write
from analysis.motivation import deltas
from analysis.page import page
from analysis.table import Table
from analysis.verdicts import Verdict
from analysis.verify import origin_text, places_of
from sparseforge_core.store.results import Results

CAPTIONS = {
    "accuracy-vs-tokens": "Perplexity and accuracy against retraining tokens; published points are hollow.",
    "hard-vs-soft": "Loss during training and where it ends: soft and hard masks, the seven lowest rows of Table 2.",
    "ablations": "Each ablation against the full method.",
    "mask-softness": "How soft the mask still is: share of entries in (0.1, 0.9), and mean distance to the hard mask.",
    "mask-histograms": "Mask values of one run on their way from soft to hard.",
}
LISTED = 200
"""Missing results that are listed one by one."""


def write_report(results: Results, grid_name: str | None, path: Path) -> Path:
    """Write the report of a grid (None: the one planned last) to `path`, whole or not at all, and return it.

    Raises SparseForgeError if the grid is unknown, a column mixes what does not compare, or the file cannot be written.
    """
    material = collect(results, results.grid(grid_name)["name"])
    write(path, render(results, material).encode())
    return path


def render(results: Results, material: Material) -> str:
    """The whole document."""
    tables = {name: TABLES[name](data) for name, data in material.exhibits.items() if _shown(name, data)}
    figures = {name: _figure(name, material) for name in FIGURES}
    sections = [
        ("status", "Status", _status(results, material)),
        ("figures", "Figures", figures["accuracy-vs-tokens"]),
        ("comparison", "Methods and models", _comparison(material.exhibits.values())),
        *((name, title(table), fragment(table, _key) + _verdicts(table)) for name, table in tables.items()),
        ("ablation-deltas", "Ablations", figures["ablations"] + _deltas(material.exhibits["table-3"])),
        ("tasks", "Task by task", _tasks(material.exhibits)),
        ("masks", "Masks", "".join(figures[name] for name in ("hard-vs-soft", "mask-softness", "mask-histograms"))),
        ("checks", "Checks", _checks(results, tables)),
    ]
    kept = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in kept)
    body = "".join(content if key in tables else _section(key, name, content) for key, name, content in kept)
    head = (
        f'<h1>{escape(material.title)}</h1><p class="soft">Grid {escape(material.grid)}. Click or tap a number to see '
    )
    head += "where it comes from; click a column's head to sort by it.</p>"
    return page(f"{material.title} - SparseForge", head + body, _origins(results, material.grid, tables.values()), nav)


def title(table: Table) -> str:
    """The short name of a table."""
    return table.title.partition(". ")[0]


def _shown(name: str, data: ExhibitData) -> bool:
    return name in TABLES and bool(data.rows or len(data.published))


def _key(place: tuple[str, str]) -> str:
    return f"{place[0]}/{place[1]}"


def _section(key: str, name: str, content: str) -> str:
    return f'<section><h2 id="{key}">{escape(name)}</h2>{content}</section>'


def _figure(name: str, material: Material) -> str:
    drawing = FIGURES[name](material.exhibits, material.curves)
    if drawing is None:
        return ""
    svg = pictures(drawing, (".svg",))[".svg"].decode()
    return f"<figure>{inline_svg(svg)}<figcaption>{CAPTIONS[name]}</figcaption></figure>"


def inline_svg(text: str) -> str:
    """An SVG file as an element of a page: without prologue, document type and metadata, which name addresses."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', body, count=1)


def _status(results: Results, material: Material) -> str:
    states = results.stage_statuses(material.grid)
    by_cell: dict[str, set[str]] = {}
    for (cell, _), status in states.items():
        by_cell.setdefault(cell, set()).add(status)
    done = sum(found == {"done"} for found in by_cell.values())
    counts = Counter(states.values())
    entries, head = results.log_head()
    tiles = [
        (f"{done:,} / {len(by_cell):,}", "cells done"),
        *((f"{count:,}", f"stages {status}") for status, count in sorted(counts.items())),
        (f"{entries:,}", "entries in the results log"),
    ]
    html = "".join(f'<div class="tile"><b>{number}</b><span>{escape(name)}</span></div>' for number, name in tiles)
    note = f'<p class="soft">Results log ends in {head}.</p>'
    return f'<div class="tiles">{html}</div>{note}{_missing(material)}'


def _missing(material: Material) -> str:
    gaps = [(name, *gap) for name, data in material.exhibits.items() for gap in data.missing]
    if not gaps:
        return ""
    rows = [[words(*gap)] for gap in gaps[:LISTED]]
    more = f"<p>and {len(gaps) - LISTED:,} more</p>" if len(gaps) > LISTED else ""
    head = ["exhibit", "row", "cell", "stage", "state"]
    listed = grid(head, rows, wordy=len(head))
    return f"<details><summary>{len(gaps):,} planned results are missing</summary>{listed}{more}</details>"


def _comparison(exhibits: Iterable[ExhibitData]) -> str:
    """Every recipe of the grid once."""
    rows: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for data in exhibits:
        metrics = [f"{suite['name']}:perplexity" for suite in data.of_kind("perplexity")]
        for row in data.rows:
            places = row.places(MEAN) or tuple(p for metric in metrics for p in row.places(metric))
            if not places or (key := tuple(sorted({(cell, "") for cell, _ in places}))) in rows:
                continue
            accuracy = row.estimate(MEAN)
            found = [e for metric in metrics if (e := row.estimate(metric)) is not None]
            name = (
                row.label
                if data.exhibit not in ("accuracy-vs-tokens",)
                else f"{row.group} at {short(row.tokens)} tokens"
            )
            rows[key] = [
                words(name, data.exhibit, row.method),
                _number(row.tokens, short(row.tokens)),
                _number(len(row.seeds), str(len(row.seeds))),
                "<td></td>" if accuracy is None else _number(accuracy.mean, f"{100 * accuracy.mean:.2f}"),
                _number(found[0].mean, f"{found[0].mean:.4g}") if found else "<td></td>",
            ]
    if not rows:
        return ""
    head = ["row", "shown in", "method", "tokens", "seeds", "mean accuracy, %", "perplexity"]
    return grid(head, list(rows.values()), "scroll tall", wordy=3)


def _number(value: float, text: str, kind: str = "") -> str:
    return f'<td data-v="{value:.10g}"{kind}>{text}</td>'


def _verdicts(table: Table) -> str:
    if not table.verdicts:
        return ""
    rows = [_verdict(one) for one in table.verdicts]
    head = ["row", "against", "column", "verdict", "difference", "95 % bootstrap", "p", "p (Holm)", "p (TOST)", "d"]
    return f"<details><summary>Tests of {escape(title(table))}</summary>{grid(head, rows, wordy=4)}</details>"


def _verdict(one: Verdict) -> list[str]:
    found, effect = one.found, "" if one.found.effect is None else f"{one.found.effect:.2f}"
    points = f"{100 * found.difference:+.2f}"
    return [
        words(one.label, one.reference, one.column),
        f'<td class="word {one.says}">{one.says}</td>',
        _number(found.difference, points),
        f"<td>{100 * one.low:+.2f} to {100 * one.high:+.2f}</td>",
        *(_number(p, f"{p:.3g}") for p in (found.p, one.corrected, one.equivalent)),
        _number(found.effect or 0.0, effect),
    ]


def _deltas(data: ExhibitData) -> str:
    rows = []
    for one in deltas(data):
        span = "" if one.low is None or one.high is None else f"{one.low:+.2f} to {one.high:+.2f}"
        good = (one.value > 0) == ("accuracy" in one.quantity)
        tone = (' class="better"' if good else ' class="worse"') if one.significant else ""
        rows.append(
            [
                words(one.label, one.quantity),
                _number(one.value, f"{one.value:+.2f}", tone),
                f"<td>{span}</td>",
            ]
        )
    return grid(["ablation", "quantity", "change", "95 % bootstrap"], rows, wordy=2) if rows else ""


def _tasks(exhibits: Mapping[str, ExhibitData]) -> str:
    """Each row of Tables 2, 4 and 6 against its dense model, task by task, in points."""
    parts = []
    for name in ("table-2", "table-4", "table-6"):
        data = exhibits[name]
        tasks = [task for task in TASKS if f"{task}/acc" in data.metrics()]
        rows = [found for row in data.rows if (found := _task_row(data, row, tasks)) is not None]
        if rows and tasks:
            head = ["row", *(TASKS[task] for task in tasks)]
            what = f"{name.replace('-', ' ').capitalize()}: points above or below dense"
            parts.append(f"<h3>{what}</h3>{grid(head, rows)}")
    return "".join(parts)


def _task_row(data: ExhibitData, row: ExhibitRow, tasks: list[str]) -> list[str] | None:
    dense = data.row(f"{row.group}/dense" if row.group else "dense")
    if dense is None or dense is row:
        return None
    cells = [f"<td>{escape(row.label)}</td>"]
    for task in tasks:
        of, to = row.estimate(f"{task}/acc"), dense.estimate(f"{task}/acc")
        cells.append("<td></td>" if of is None or to is None else _shaded(100 * (of.mean - to.mean)))
    return cells


def _shaded(points: float) -> str:
    """A difference, the deeper coloured the larger; blue is better and orange worse, as in the figures."""
    depth = min(abs(points) / 15, 1) * 0.55
    color = "0,114,178" if points > 0 else "213,94,0"
    return f'<td data-v="{points:.6g}" style="background:rgba({color},{depth:.2f})">{points:+.2f}</td>'


def _checks(results: Results, tables: Mapping[str, Table]) -> str:
    findings = [finding for table in tables.values() for finding in audit_table(table)]
    breaks = results.breaks()
    texts = [f"{f.table}, {f.row}, {f.column}: printed {f.printed}, recomputed {f.recomputed}" for f in findings]
    texts += [one.sentence for one in breaks]
    listed = "".join(f'<p class="worse">{escape(text)}</p>' for text in texts)
    audit = f"{len(findings)} numbers of these tables do not add up." if findings else "These tables add up."
    log = f"{len(breaks)} contradictions in the results log." if breaks else "The results log matches every result."
    return f"<p>{audit} {log}</p>{listed}"


def _origins(results: Results, name: str, tables: Iterable[Table]) -> str:
    known = results.origins(name)
    places = sorted(places_of(tables))
    return json.dumps({_key(place): origin_text(place, known) for place in places}, sort_keys=True)
