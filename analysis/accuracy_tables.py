"""Tables 1 to 6: accuracies and perplexities, by model, by method and by ablation."""

from __future__ import annotations

from typing import Any

from analysis.aggregate import Estimate
from analysis.frames import ExhibitData, ExhibitRow
from analysis.notes import standard_notes
from analysis.table import EMPTY, Cell, Column, Line, Table, published_table
from analysis.verdicts import verdict_notes, verdicts

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
    "lambada_openai": "LAMBADA",
}
"""Tasks in the papers' order, with their names there; LAMBADA is in none of their tables."""

VARIANTS = {"dense": "Dense", "dense-control": "Dense control", "sparseforge": "SparseForge"}
"""Rows of one model in Tables 1, 4, 5 and 6, by the last part of their name."""

MEAN = "mean/acc"
PERCENT = 100.0


def table_1(data: ExhibitData) -> Table:
    """Models against variants: mean accuracy and perplexity, dense, control and SparseForge."""
    return _summary(data, "Table 1. SparseForge across models, 2:4")


def table_2(data: ExhibitData) -> Table:
    """Every method on one model."""
    return _by_task(data, "Table 2. Methods on one model", first="Method", mean="Avg", tokens=True)


def table_3(data: ExhibitData) -> Table:
    """Ablations of SparseForge on one model, with the difference to the full method."""
    return _by_task(data, "Table 3. Ablations", first="Variant", compare="full")


def table_4(data: ExhibitData) -> Table:
    """Table 1 task by task."""
    return _by_task(data, "Table 4. Zero-shot accuracy by task, 2:4", first="Model", perplexity=False, compare="dense")


def table_5(data: ExhibitData) -> Table:
    """Table 1 for block-16."""
    return _summary(data, "Table 5. SparseForge across models, block-16")


def table_6(data: ExhibitData) -> Table:
    """Table 5 task by task."""
    return _by_task(
        data, "Table 6. Zero-shot accuracy by task, block-16", first="Model", perplexity=False, compare="dense"
    )


def reproductions(data: ExhibitData) -> Table:
    """Perplexities that other papers print for models small enough to check."""
    return _by_task(data, "Reproductions. Published perplexities of small models", first="Model", tokens=True)


def _summary(data: ExhibitData, title: str) -> Table:
    variants = [v for v in VARIANTS if any(row.variant == v for row in data.rows)]
    perplexities = _perplexities(data)
    branch = _branch_columns(data)
    columns = [Column("Tokens", digits=0), Column("Masked %", PERCENT, digits=1), *(column for column, _ in branch)]
    columns += [Column(f"{VARIANTS[v]} acc", PERCENT) for v in variants]
    columns.append(Column("Difference", PERCENT, signed=True))
    columns += [Column(f"{VARIANTS[v]} {name}", digits=None) for name, _ in perplexities for v in variants]
    table = Table(data.exhibit, title, data.caption, "Model", columns)
    for group in dict.fromkeys(row.group for row in data.rows):
        rows = {v: data.row(f"{group}/{v}") for v in VARIANTS}
        sparse = rows["sparseforge"]
        cells = [_tokens(sparse), _cell(sparse, "coverage", averaged=False)]
        cells += [_cell(sparse, metric, averaged=False) for _, metric in branch]
        cells += [_cell(rows[v], MEAN) for v in variants]
        cells.append(_difference(sparse, rows["dense"], MEAN))
        cells += [_cell(rows[v], metric) for _, metric in perplexities for v in variants]
        table.lines.append(Line(group, group, cells))
    tested = [("Mean", MEAN), *perplexities] if any(row.plans & {MEAN} for row in data.rows) else perplexities
    return _finished(table, data, tested, "dense")


def _by_task(
    data: ExhibitData,
    title: str,
    *,
    first: str,
    mean: str = "Mean",
    tokens: bool = False,
    perplexity: bool = True,
    compare: str | None = None,
) -> Table:
    # Best marks across models would mean nothing: only tables about one model have them.
    contest = len({row.group for row in data.rows}) <= 1
    shown = _task_columns(data, mean, contest, perplexity)
    branch = _branch_columns(data)
    columns = [Column("Tokens", digits=0)] if tokens else []
    columns += [column for column, _ in branch]
    for column, _ in shown:
        columns += _with_difference(column, mean, compare)
    table = Table(data.exhibit, title, data.caption, first, columns)
    for row in data.rows:
        reference = data.row(f"{row.group}/{compare}" if row.group else str(compare)) if compare else None
        cells = [_tokens(row)] if tokens else []
        cells += [_cell(row, metric, averaged=False) for _, metric in branch]
        for column, metric in shown:
            cells.append(_cell(row, metric, tested=column.better is not None))
            if compare and _is_compared(column, mean):
                cells.append(EMPTY if reference is row else _difference(row, reference, metric))
        table.lines.append(Line(row.row, row.label, cells, reference=row.is_reference))
    tested = [(column.title, metric) for column, metric in shown if _is_compared(column, mean)]
    return _finished(table, data, tested, compare or "dense")


def _task_columns(data: ExhibitData, mean: str, contest: bool, perplexity: bool) -> list[tuple[Column, str]]:
    """(column, metric) of every number by task that the rows' suites define, measured yet or not."""
    planned = {task for suite in data.of_kind("zero-shot") for task in suite["tasks"]}
    high: Any = "high" if contest else None
    low: Any = "low" if contest else None
    tasks: list[str] = [task for task in TASKS if task in planned]
    found = [(Column(TASKS[task], PERCENT, better=high), f"{task}/acc") for task in tasks]
    if tasks:
        found.append((Column(mean, PERCENT, better=high), MEAN))
    if perplexity:
        found += [(Column(name, digits=None, better=low), metric) for name, metric in _perplexities(data)]
    normalised = [task for task in tasks if f"{task}/acc_norm" in data.metrics()]
    return found + [(Column(f"{TASKS[t]} norm", PERCENT, in_print=False), f"{t}/acc_norm") for t in normalised]


def _branch_columns(data: ExhibitData) -> list[tuple[Column, str]]:
    """(column, metric) of what a dense side branch adds at inference; none where no row has one."""
    found = [row.estimate("extra_parameters") for row in data.rows]
    if not any(estimate and estimate.mean for estimate in found):
        return []
    return [
        (Column("Branch params", digits=0), "extra_parameters"),
        (Column("Branch bytes", digits=0), "extra_bytes"),
        (Column("Branch FLOP/token", digits=0), "extra_flops_per_token"),
    ]


def _is_compared(column: Column, mean: str) -> bool:
    return column.title == mean or column.title.startswith("PPL")


def _with_difference(column: Column, mean: str, compare: str | None) -> list[Column]:
    if compare is None or not _is_compared(column, mean):
        return [column]
    title = f"vs. {compare}" if column.title == mean else f"{column.title} vs. {compare}"
    return [column, Column(title, column.scale, signed=True)]


def _perplexities(data: ExhibitData) -> list[tuple[str, str]]:
    """(title, metric) of each perplexity; the title names the suite where there are several."""
    names = [str(suite["name"]) for suite in data.of_kind("perplexity")]
    titles = ["PPL"] if len(names) == 1 else [f"PPL ({name})" for name in names]
    return [(title, f"{name}:perplexity") for title, name in zip(titles, names, strict=True)]


def _cell(row: ExhibitRow | None, metric: str, *, averaged: bool = True, tested: bool = False) -> Cell:
    """A row's metric, empty if its suites have none such; one that is not `averaged` is the same for every seed.

    A `tested` one brings its items along.
    """
    if row is None or (averaged and metric not in row.plans):
        return EMPTY
    if not averaged:
        known = row.estimate(metric)
        estimate = None if known is None else Estimate(known.mean, None, 1, None)
        return Cell(estimate, planned=1, sources=row.places(metric))
    return Cell(
        row.estimate(metric),
        planned=len(row.seeds),
        diverged=row.diverged.get(metric, 0),
        items=row.items(metric) if tested else None,
        sources=row.places(metric),
    )


def _tokens(row: ExhibitRow | None) -> Cell:
    return EMPTY if row is None else Cell(Estimate(float(row.tokens), None, 1, None))


def _difference(row: ExhibitRow | None, reference: ExhibitRow | None, metric: str) -> Cell:
    if row is None or reference is None or metric not in row.plans & reference.plans:
        return EMPTY
    single = 1 in (len(row.seeds), len(reference.seeds))
    pairs = max(len(row.seeds), len(reference.seeds)) if single else len({*row.seeds} & {*reference.seeds})
    places = (*row.places(metric), *reference.places(metric))
    return Cell(row.versus(reference, metric), planned=pairs, sources=places)


def _finished(table: Table, data: ExhibitData, tested: list[tuple[str, str]], reference: str) -> Table:
    table.verdicts = verdicts(data, tested, reference)
    table.notes += standard_notes(table, data)
    for title, metric in tested:
        if metric == MEAN or metric.endswith(":perplexity"):
            table.notes += verdict_notes(table.verdicts, title if metric == MEAN else f"log {title}")
    table.published = published_table(table, data.published)
    return table
