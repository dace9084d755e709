"""What the page says of any of the study's grids: Markdown tables of significance, of distance to dense, of cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.accuracy_tables import MEAN
from analysis.frames import ExhibitData, ExhibitRow
from analysis.make_tables import collect
from analysis.render import escape_markdown
from analysis.study_bars import Bar
from analysis.study_data import DENSE, Study, millions, number
from analysis.verdicts import Verdict, verdicts
from sparseforge_core.store.results import Results

ABSENT = "{title}\n\nAbsent: the store has no plan of grid `{grid}`.\n"
"""The section of a grid that was asked for and is not there."""

SIGNIFICANCE = """### Against {reference}: what is significant

Each row's difference to it, paired on the same windows and questions, over seeds where there are several: of
perplexity in percent, of accuracy in points, with a 95 % bootstrap interval; *better* and *worse* are the row's, at 5 %
after Holm's correction in the column; *equivalent* is within 1 % or 1 point by two one-sided tests.
"""


def planned_study(results: Results, grid: str) -> Study | None:
    """A grid's rows; None if the store has no plan of it."""
    return Study(collect(results, grid).exhibits) if grid in results.grids() else None


def progress(results: Results, grid: str) -> str:
    """How much of a grid is there."""
    statuses = results.stage_statuses(grid)
    done = sum(status == "done" for status in statuses.values())
    return f"{done} of {len(statuses)} stages of grid `{grid}` are done."


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 1) -> str:
    """A Markdown table whose columns from `right` on are numbers."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("| " + " | ".join(":---" if column < right else "---:" for column in range(len(head))) + " |")
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {escape_markdown(line)}" for line in lines) + "\n"


def glance(study: Study) -> str:
    """Table 2 without its tasks: perplexities and mean accuracy of each row, with half the 95 % interval over seeds."""
    accuracy = any(MEAN in row.plans for row in study.table_2.rows)
    lines = []
    for row in study.table_2.rows:
        cells = [_number(row, metric) for _, metric in study.texts] + ([_number(row, MEAN)] if accuracy else [])
        lines.append((escape_markdown(row.label), *cells, str(len(row.seeds))))
    heads = [*(name for name, _ in study.texts), *(["mean accuracy, %"] if accuracy else []), "seeds planned"]
    return table(("Row", *map(escape_markdown, heads)), lines)


def _number(row: ExhibitRow, metric: str) -> str:
    """A mean over seeds; of a row all of whose seeds diverged, that."""
    estimate = row.estimate(metric)
    diverged = estimate is None and row.diverged.get(metric)
    return "diverged" if diverged else number(estimate, percent=metric == MEAN)


def bar_table(found: Iterable[Bar]) -> str:
    """Each bar with what was measured and whether it is met."""
    rows = [(escape_markdown(bar.asked), escape_markdown(bar.found), f"**{bar.verdict}**") for bar in found]
    return table(("Bar", "Measured", "Verdict"), rows, right=3)


def budget_tables(study: Study) -> str:
    """Perplexity against retraining tokens, a table for each text; the lowest of a column is bold."""
    parts = []
    for name, metric in study.texts:
        labels = list(dict.fromkeys(row.label for row in study.figure.rows if row.tokens))
        rows = {(row.label, row.tokens): row for row in study.figure.rows}
        lowest = {}
        for tokens in study.budgets:
            known = [e.mean for r in rows.values() if r.tokens == tokens and (e := r.estimate(metric)) is not None]
            lowest[tokens] = min(known, default=None)
        lines = []
        for label in labels:
            cells = [_marked(rows.get((label, tokens)), metric, lowest[tokens]) for tokens in study.budgets]
            lines.append((escape_markdown(label), *cells))
        parts.append(table((f"{name}", *map(millions, study.budgets)), lines))
    return "\n".join(parts)


def _marked(row: ExhibitRow | None, metric: str, lowest: float | None) -> str:
    if row is None:
        return ""
    estimate = row.estimate(metric)
    text = number(estimate) if not row.diverged.get(metric) or estimate else "diverged"
    return f"**{text}**" if estimate is not None and estimate.mean == lowest else text


def significance(data: ExhibitData, reference: str, columns: list[tuple[str, str]]) -> list[str]:
    """Every row against the row `reference`, a line each; a sentence where no comparison is possible yet."""
    found = verdicts(data, columns, reference)
    to = data.row(reference)
    text = SIGNIFICANCE.format(reference=to.label if to else reference)
    if not found:
        return [text, "No two rows have all their results yet.\n"]
    by_place = {(one.row, one.column): one for one in found}
    names = list(dict.fromkeys(one.column for one in found))
    labels = {one.row: one.label for one in found}
    lines = []
    for row, label in labels.items():
        cells = [_verdict(by_place.get((row, name))) for name in names]
        lines.append((escape_markdown(label), *cells))
    heads = [f"{name}, points" if name == "accuracy" else name.removeprefix("log ") + ", %" for name in names]
    return [text, table(("Row", *map(escape_markdown, heads)), lines)]


def _verdict(one: Verdict | None) -> str:
    """Difference, interval and verdict in one cell."""
    if one is None:
        return "absent"
    values = (one.found.difference, one.low, one.high)
    shown = [100 * (value if one.higher_is_better else math.expm1(value)) for value in values]
    digits = 2 if max(map(abs, shown)) < 100 else 0
    difference, low, high = (f"{value:+,.{digits}f}" for value in shown)
    p = "p < 0.001" if one.corrected < 0.001 else f"p {one.corrected:.2g}"
    return f"{difference} [{low}, {high}] {one.says}, {p}"


def divergences(results: Results, data: ExhibitData) -> str:
    """KL to the dense model and agreement with it, a line a row; a row without is said to be absent."""
    by_cell: dict[str, dict[str, float]] = {}
    for (cell, _, metric), (value, _) in results.values().items():
        if metric in ("kl_to_dense", "top1_agreement") and value is not None:
            by_cell.setdefault(cell, {})[metric] = value
    lines = []
    for row in data.rows:
        found = [by_cell[cell] for cell in cells_of(row) if cell in by_cell]
        if not found:
            lines.append((escape_markdown(row.label), "absent", "absent", "0"))
            continue
        kl, same = (sum(one[m] for one in found) / len(found) for m in ("kl_to_dense", "top1_agreement"))
        lines.append((escape_markdown(row.label), f"{kl:.4f}", f"{100 * same:.1f}", str(len(found))))
    return table(("Row", "KL to dense", "same token, %", "seeds"), lines)


def cells_of(row: ExhibitRow) -> list[str]:
    """Cells behind a row's numbers, by seed."""
    found = {seed: cell for places in row.sources.values() for seed, (cell, _) in places.items()}
    return [cell for _, cell in sorted(found.items())]


COST = ("Row", "Tokens", "tokens/s", "steps, min", "stage, min", "beside", "device")


def costs(results: Results, grid: str, study: Study, first: Sequence[Sequence[str]] = ()) -> str:
    """What the training stage of each row took, a line each, after the lines `first`."""
    origins = results.origins(grid)
    lines = list(first)
    seen: set[object] = set()
    for row in (*study.table_2.rows, *study.table_3.rows):
        # A recipe that both tables show is said once, by its name in the first.
        name = row.label, row.tokens
        if row.row == DENSE or row.recipe in seen or name in seen:
            continue
        seen |= {row.recipe, name}
        stages = [origins[place] for cell in cells_of(row) if (place := (cell, "train")) in origins]
        speed, seconds = row.estimate("tokens_per_second"), row.estimate("train_seconds")
        means = [None if found is None else found.mean for found in (speed, seconds)]
        lines.append(cost(row.label, row.tokens, means[0], means[1], stages))
    return table(COST, lines)


def cost(
    label: str, tokens: int, speed: float | None, seconds: float | None, stages: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    """One line of the table of costs: means over the seeds whose training `stages` are in."""
    walls = [alone(stage["context"]) for stage in stages if "wall_seconds" in stage["context"]]
    beside = [str(stage["context"].get("companions", "not known")) for stage in stages]
    return (
        escape_markdown(label),
        millions(tokens) if tokens else "",
        f"{speed:,.0f}" if speed else "" if not tokens else "absent",
        f"{seconds / 60:.2f}" if seconds else "" if not tokens else "absent",
        f"{sum(walls) / len(walls) / 60:.2f}" if walls else "absent",
        ", ".join(beside) or "absent",
        escape_markdown(", ".join(sorted({str(stage["context"].get("device", "")) for stage in stages}))),
    )


def alone(context: Mapping[str, Any]) -> float:
    """Seconds of a training stage with those that a solution took which it only read."""
    reused = [used["seconds"] for used in context.get("solutions", ()) if used["reused"]]
    return float(context["wall_seconds"]) + sum(map(float, reused))
