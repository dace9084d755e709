"""Tables 1 to 6: accuracies and perplexities, by model, by method and by ablation."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.aggregate import Estimate, difference
from analysis.frames import ExhibitData, ExhibitRow
from analysis.table import Column, Line, Table

TASKS = {
    "hellaswag": "HellaSwag",
    "race": "RACE",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "boolq": "BoolQ",
    "rte": "RTE",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
"""Tasks in the papers' order, with their names there."""

VARIANTS = {"dense": "Dense", "dense-control": "Dense control", "sparseforge": "SparseForge"}


def table_1(data: ExhibitData) -> Table:
    """Models against variants: mean accuracy and perplexity, dense, control and SparseForge."""
    return _summary(data, "Table 1. SparseForge across models, 2:4")


def table_5(data: ExhibitData) -> Table:
    """Table 1 for block-16."""
    return _summary(data, "Table 5. SparseForge across models, block-16")


def table_4(data: ExhibitData) -> Table:
    """Table 1 task by task."""
    return _by_task(data, "Table 4. Zero-shot accuracy by task, 2:4", compare="dense")


def table_6(data: ExhibitData) -> Table:
    """Table 5 task by task."""
    return _by_task(data, "Table 6. Zero-shot accuracy by task, block-16", compare="dense")


def table_2(data: ExhibitData) -> Table:
    """Every method on one model."""
    return _by_task(data, "Table 2. Methods on one model", tokens=True, mean="Avg")


def table_3(data: ExhibitData) -> Table:
    """Ablations of SparseForge on one model."""
    return _by_task(data, "Table 3. Ablations", compare="full")


def _summary(data: ExhibitData, title: str) -> Table:
    variants = [v for v in VARIANTS if any(row.variant == v for row in data.rows)]
    perplexities = _perplexities(data)
    columns = [Column(f"{VARIANTS[v]} acc", 100.0) for v in variants]
    columns.append(Column("Difference", 100.0, signed=True))
    columns += [Column(f"{VARIANTS[v]} {_perplexity_title(m)}", digits=None) for m in perplexities for v in variants]
    table = Table(data.exhibit, title, data.caption, "Model", columns)
    for group in dict.fromkeys(row.group for row in data.rows):
        rows = {v: data.row(f"{group}/{v}") for v in variants}
        wanted: list[tuple[ExhibitRow | None, str]] = [(rows[v], "mean/acc") for v in variants]
        cells, partial = _cells(wanted)
        dense, sparse = (rows.get(v) for v in ("dense", "sparseforge"))
        cells.append(difference(_estimate(sparse, "mean/acc"), _estimate(dense, "mean/acc")))
        partial.append(False)
        more, more_partial = _cells([(rows[v], metric) for metric in perplexities for v in variants])
        diverged = any(row is not None and row.diverged for row in rows.values())
        table.lines.append(Line(group, cells + more, partial + more_partial, diverged=diverged, name=group))
    _add_published(table, data.published)
    return table


def _by_task(
    data: ExhibitData, title: str, *, compare: str | None = None, tokens: bool = False, mean: str = "Mean"
) -> Table:
    found = data.metrics()
    tasks = [task for task in TASKS if f"{task}/acc" in found]
    perplexities = _perplexities(data)
    metrics = [*(f"{task}/acc" for task in tasks), *(["mean/acc"] if "mean/acc" in found else [])]
    # Marks across models would mean nothing: only tables about one model have them.
    one_model = "/" not in "".join(row.row for row in data.rows)
    better = "high" if one_model else None
    columns = [Column("Tokens", digits=0)] if tokens else []
    columns += [Column(TASKS[task], 100.0, better=better) for task in tasks]  # type: ignore[arg-type]
    if "mean/acc" in found:
        columns.append(Column(mean, 100.0, better=better))  # type: ignore[arg-type]
    if compare:
        columns.append(Column(f"vs. {compare}", 100.0, signed=True))
    columns += [Column(_perplexity_title(m), digits=None, better="low" if one_model else None) for m in perplexities]
    table = Table(data.exhibit, title, data.caption, "Model" if not one_model else "Method", columns)
    for row in data.rows:
        cells, partial = _cells([(row, metric) for metric in metrics])
        if tokens:
            cells.insert(0, Estimate(float(row.tokens), None, row.planned, None))
            partial.insert(0, False)
        if compare:
            reference = data.row(f"{row.group}/{compare}" if row.group else compare)
            same = reference is row
            cells.append(None if same else difference(row.estimate("mean/acc"), _estimate(reference, "mean/acc")))
            partial.append(False)
        more, more_partial = _cells([(row, metric) for metric in perplexities])
        line = Line(row.label, cells + more, partial + more_partial, diverged=row.diverged, name=row.row)
        table.lines.append(line)
    _add_published(table, data.published)
    return table


def _cells(wanted: Sequence[tuple[ExhibitRow | None, str]]) -> tuple[list[Estimate | None], list[bool]]:
    cells = [_estimate(row, metric) for row, metric in wanted]
    partial = [row is not None and row.is_partial(metric) for row, metric in wanted]
    return cells, partial


def _estimate(row: ExhibitRow | None, metric: str) -> Estimate | None:
    return None if row is None else row.estimate(metric)


def _perplexities(data: ExhibitData) -> list[str]:
    return sorted(metric for metric in data.metrics() if metric.endswith(":perplexity"))


def _perplexity_title(metric: str) -> str:
    name = metric.partition(":")[0]
    return "PPL" if name == "heldout" else f"PPL ({name})"


def _add_published(table: Table, published: pd.DataFrame) -> None:
    """Quoted rows below ours, each number in the column of the same title; columns that only they have are added."""
    for column in dict.fromkeys(published.column):
        if column not in [c.title for c in table.columns]:
            scale = 1.0 if column.startswith(("PPL", "Tokens", "Dense PPL", "SparseForge PPL")) else 100.0
            table.columns.append(Column(column, scale, digits=None if "PPL" in column else 2))
            for line in table.lines:
                line.cells.append(None)
                line.partial.append(False)
    titles = [column.title for column in table.columns]
    for row, numbers in published.groupby("row", sort=False):
        cells: list[Estimate | None] = [None] * len(titles)
        for number in numbers.itertuples():
            index = titles.index(number.column)
            if number.value is not None and not pd.isna(number.value):
                cells[index] = Estimate(float(number.value) / table.columns[index].scale, None, 1, None)
        source = numbers.source.iloc[0]
        table.lines.append(Line(str(row), cells, [False] * len(titles), published=True, source=source))
