"""The sentences under a table: what was measured, over how many seeds, what the marks mean, what is missing."""

from __future__ import annotations

from typing import Any

from analysis.frames import ExhibitData
from analysis.table import Table

DAGGER = "\N{DAGGER}"
LISTED = 8
"""Rows and seeds with missing results that a table names one by one."""


TEXTS = {
    "heldout": "held-out text of the training corpus",
    "wikitext2": "WikiText-2 raw test",
    "c4": "held-out C4",
    "named": "a text of the suite's own, apart from every training text",
}
SEEDS = "seeds (rough where seeds are two); none for a single seed"
REPEATS = "timed repeats, whose median is shown"


def standard_notes(table: Table, data: ExhibitData, *, over: str = SEEDS) -> list[str]:
    """Every note that a table of measurements needs, in reading order; `over` says what its intervals are over."""
    seeds = seed_notes(data) if over == SEEDS else []
    return [
        *suite_notes(data),
        *_contamination_notes(data),
        *_mark_notes(table, over),
        *_divergence_notes(data),
        *seeds,
        *_missing_notes(data),
    ]


def suite_notes(data: ExhibitData) -> list[str]:
    """One sentence for each suite: its tasks or text, its limit, the harness."""
    return [_suite_sentence(suite, data.contexts.get(name, {})) for name, suite in sorted(data.suites.items())]


def _suite_sentence(suite: dict[str, Any], context: dict[str, str]) -> str:
    name, limit = suite["name"], suite.get("limit")
    if suite["kind"] == "zero-shot":
        harness = f"lm-eval {context['harness_version']}" if context.get("harness_version") else "lm-eval"
        items = "all items" if limit is None else f"the first {limit:,} items"
        return (
            f"Suite {name}: zero-shot acc by {harness} on {items} of each of {len(suite['tasks'])} tasks, in percent."
        )
    if suite["kind"] == "perplexity":
        text = TEXTS.get(suite["text"], suite["text"])
        windows = "all windows" if limit is None else f"the first {limit:,} windows"
        return f"Suite {name}: perplexity on {windows} of {suite['window']:,} tokens, stride the same; {text}."
    if suite["kind"] != "throughput":
        return f"Suite {name}: {suite['kind']}; it is in the store and in no column here."
    where = ", ".join(context[part] for part in ("engine", "device") if context.get(part))
    return f"Suite {name}: greedy decoding, batch {suite['batch']}, {suite['repeats']} timed repeats" + (
        f" ({where})." if where else "."
    )


def _contamination_notes(data: ExhibitData) -> list[str]:
    """How many items of which task stood in a text that some row was retrained on, and which rows nobody scanned."""
    worst: dict[str, tuple[int, int]] = {}
    for row in data.rows:
        for task, found in row.contaminated.items():
            worst[task] = max(worst.get(task, (0, found[1])), found)
    notes = []
    if worst:
        hits = [f"{task} {count:,} of {of:,} items" for task, (count, of) in sorted(worst.items()) if count]
        said = ", ".join(hits) or f"no item of {len(worst)} tasks"
        notes.append(f"Found in the retraining corpus of a row by a scan for shared word sequences: {said}.")
    for reason in dict.fromkeys(row.unscanned for row in data.rows if row.unscanned):
        labels = ", ".join(row.label for row in data.rows if row.unscanned == reason)
        notes.append(f"Contamination {reason} ({labels}).")
    return notes


def _mark_notes(table: Table, over: str) -> list[str]:
    cells = [cell for line in table.lines for cell in line.cells]
    notes = []
    if any(table.marked):
        notes.append(
            "Bold: the best sparse row of the column and every row not shown to be worse than it (paired tests on "
            "single items, over seeds where there are several; Holm over all pairs, 5 %). No bold where all tie."
        )
    elif any(column.better for column in table.columns) and not table.untested:
        worse = "in no column is a sparse row shown to be worse than the best (paired tests, Holm, 5 %)"
        alone = "no column has two sparse rows with all their seeds, so nothing is tested"
        notes.append(f"No bold: {worse if table.contested else alone}.")
    if table.untested:
        notes.append(
            "Columns without a mark: the store has no outcomes of single items for some rows, so nothing can be tested."
        )
    if any(cell.estimate is not None and cell.estimate.half is not None for cell in cells):
        notes.append(f"\N{PLUS-MINUS SIGN}: half the 95 % t interval over {over}.")
    if any(cell.diverged for cell in cells):
        notes.append("Diverged: training or evaluation of that many seeds gave no finite number; they are in no mean.")
    if any(cell.partial for cell in cells):
        notes.append(f"{DAGGER}: fewer seeds than planned (n of planned in brackets).")
    return notes


def _divergence_notes(data: ExhibitData) -> list[str]:
    """Which rows and seeds diverged, and why."""
    said = [f"{row.label} seed {seed} ({why})" for row in data.rows for seed, why in sorted(row.reasons.items())]
    more = f"; and {len(said) - LISTED} more" if len(said) > LISTED else ""
    return [f"Diverged, and kept so: {'; '.join(said[:LISTED])}{more}."] if said else []


def seed_notes(data: ExhibitData) -> list[str]:
    """How many seeds stand behind the rows, or are to stand there, by label where rows differ."""
    seeds = "Seeds planned" if any(row.missing for row in data.rows) else "Seeds"
    by_count: dict[int, list[str]] = {}
    for row in data.rows:
        by_count.setdefault(len(row.seeds), []).append(row.label.removeprefix(row.group).strip() or row.label)
    if len(by_count) < 2:
        return [f"{seeds}: {count}." for count in by_count]
    groups = [f"{count} for {', '.join(dict.fromkeys(labels))}" for count, labels in sorted(by_count.items())]
    return [f"{seeds}: {'; '.join(groups)}."]


def _missing_notes(data: ExhibitData) -> list[str]:
    """What is not in, one entry for each row and seed."""
    gaps: dict[str, list[str]] = {}
    for row in data.rows:
        for cell, stage, status in row.missing:
            seed = cell.rpartition("-s")[2]
            gaps.setdefault(f"{row.label} seed {seed}", []).append(f"{_stage_name(stage)} {status}")
    if not gaps:
        return []
    named = [f"{who} ({', '.join(what)})" for who, what in list(gaps.items())[:LISTED]]
    more = f"; and {len(gaps) - LISTED} more" if len(gaps) > LISTED else ""
    return [f"Partial, not in yet: {'; '.join(named)}{more}."]


def _stage_name(stage: str) -> str:
    return stage if stage == "train" else stage.rpartition("-")[0]
