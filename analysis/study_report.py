"""The study's report: prose with its numbers filled in from the store, tables, bars, claims; absent rows said to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis import study_trials
from analysis.accuracy_tables import MEAN, table_2, table_3
from analysis.frames import ExhibitData, ExhibitRow
from analysis.make_tables import collect
from analysis.render import escape_markdown, to_markdown
from analysis.study_bars import bars
from analysis.study_claims import NOT_TESTED, claims
from analysis.study_data import DENSE, FULL, OURS, Study, millions, number
from analysis.verdicts import Verdict, verdicts
from sparseforge_core.store.results import Results

HEAD = """# The study: every method at equal tokens on SmolLM2-135M

*Written by `python analysis/study.py` from the results store; no number here is typed by hand. {state}*

{title}. {caption}

Everything below can be made again from `{store}`: `python analysis/make_tables.py --db sqlite:///{store} --grid {grid}`
writes all tables and figures, `python analysis/measurements.py` the CSV, `python analysis/study.py` this page, and
`sparseforge --db sqlite:///{store} verify` proves that the numbers follow from their single items.
"""

SECTIONS = {
    "bars": """## The bars, set before the study was run

A bar is met or not by the numbers as they are; "so far" says that planned seeds or rows are still missing. A difference
of perplexity is relative, with a 95 % bootstrap interval over items and seeds in brackets; without brackets where a row
still lacks seeds: no interval and no test is made of a part.
""",
    "significance": """### Against {reference}: what is significant

Paired tests of each row on the same windows and questions, over seeds where there are several, with Holm's correction
in each column, at 5 %. Differences of perplexity are of its logarithm (0.01 is about 1 %); *better* and *worse* are the
row's.
""",
    "trials": """## The trials

Each method's settings were chosen by the perplexity of held-out documents of the training shards, which no table shows;
the lowest is bold and was frozen. Numbers before the colon are the peak learning rate and what else differs.
""",
    "budgets": """## Perplexity against retraining tokens

Mean over seeds, ± half the 95 % t interval where there are several. The lowest of a column is bold.
""",
    "divergence": """## Distance to the dense model, output by output

KL(dense || model) per token in nats and the share of positions with the same most likely token, on held-out documents
of the training text.
""",
    "cost": """## What a method costs

Of one cell: training speed in tokens a second, GPU-minutes of its steps, and of the whole training stage with
calibration, one-shot solutions (what they took where they were made, if a cell read another's), compilation and writing
the model. *Beside* says how many other processes worked beside each seed's when it began: they shared the machine and
its time, of which each counts all; only rows with a 0 compare.
""",
    "claims": """## The paper's claims, in small

The paper's numbers are of LLaMA-2-7B. A claim *holds* where the difference points its way and is significant (5 %, not
corrected over claims) on every measure named, *does not hold* where it points the other way everywhere and is
significant, else it is *undecided*. Nothing is tested, and so nothing decided, while a row lacks seeds: *so far*.
""",
}


def report(results: Results, grid: str, *, store: str, figure: str = "", trials_grid: str = "") -> str:
    """The whole page as Markdown.

    `store` is how the page names the store's file, `figure` the figure's file, relative to the page; empty: none.
    `trials_grid` is the grid of the trials; empty: none.
    """
    material = collect(results, grid)
    study = Study(material.exhibits)
    caption = study.table_2.caption
    parts = [HEAD.format(state=_state(results, grid), title=material.title, caption=caption, store=store, grid=grid)]
    parts += [SECTIONS["bars"], _bars(study)]
    parts += ["## Table 2\n", to_markdown(table_2(study.table_2))]
    parts += _significance(study.table_2, OURS, [("accuracy", MEAN), *study.texts])
    parts += [SECTIONS["budgets"], _budgets(study)]
    if figure:
        parts.append(f"![Perplexity and accuracy against retraining tokens]({figure})\n")
    parts.append(escape_markdown(study.figure.caption))
    parts += ["\n## Table 3\n", to_markdown(table_3(study.table_3))]
    parts += _significance(study.table_3, FULL, study.texts)
    parts += [SECTIONS["divergence"], _divergences(results, study)]
    parts += _trials(results, trials_grid)
    parts += [SECTIONS["cost"], _costs(results, grid, study)]
    parts += [SECTIONS["claims"], _claims(study)]
    parts += [_diverged(study), _missing(study), _provenance(results, grid)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _state(results: Results, grid: str) -> str:
    statuses = results.stage_statuses(grid)
    done = sum(status == "done" for status in statuses.values())
    cells = {cell for cell, _ in statuses}
    whole = sum(all(s == "done" for (c, _), s in statuses.items() if c == cell) for cell in cells)
    return f"{whole} of {len(cells)} cells are finished, {done} of {len(statuses)} stages."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 1) -> str:
    """A Markdown table whose columns from `right` on are numbers."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("| " + " | ".join(":---" if column < right else "---:" for column in range(len(head))) + " |")
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def _trials(results: Results, grid: str) -> list[str]:
    found = study_trials.table(results, grid)
    return [SECTIONS["trials"], found] if found else []


def _bars(study: Study) -> str:
    rows = [(escape_markdown(bar.asked), escape_markdown(bar.found), f"**{bar.verdict}**") for bar in bars(study)]
    return _table(("Bar", "Measured", "Verdict"), rows, right=3)


def _claims(study: Study) -> str:
    rows = [(escape_markdown(one.claim), escape_markdown(one.found), f"**{one.verdict}**") for one in claims(study)]
    return _table(("Claim", "Measured here", "Verdict"), rows, right=3) + "\nNot tested here:\n\n" + _list(NOT_TESTED)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines) + "\n"


def _significance(data: ExhibitData, reference: str, columns: list[tuple[str, str]]) -> list[str]:
    """Every row against ours, a line each; nothing where no comparison is possible yet."""
    found = verdicts(data, columns, reference)
    to = data.row(reference)
    text = SECTIONS["significance"].format(reference=to.label if to else reference)
    if not found:
        return [text, "No two rows have all their results yet.\n"]
    head = ("Row", "Column", "Difference", "95 %", "p (Holm)", "Verdict")
    return [text, _table(head, map(_verdict_line, found), right=2)]


def _verdict_line(one: Verdict) -> tuple[str, ...]:
    scale, digits = (100.0, 2) if one.higher_is_better else (1.0, 4)
    numbers = [f"{value * scale:+.{digits}f}" for value in (one.found.difference, one.low, one.high)]
    span = f"[{numbers[1]}, {numbers[2]}]"
    column = f"{one.column}{', points' if one.higher_is_better else ''}"
    return escape_markdown(one.label), escape_markdown(column), numbers[0], span, f"{one.corrected:.2g}", one.says


def _budgets(study: Study) -> str:
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
        parts.append(_table((f"{name}", *map(millions, study.budgets)), lines))
    return "\n".join(parts)


def _marked(row: ExhibitRow | None, metric: str, lowest: float | None) -> str:
    if row is None:
        return ""
    estimate = row.estimate(metric)
    text = number(estimate) if not row.diverged.get(metric) or estimate else "diverged"
    return f"**{text}**" if estimate is not None and estimate.mean == lowest else text


def _divergences(results: Results, study: Study) -> str:
    values = results.values()
    by_cell: dict[str, dict[str, float]] = {}
    for (cell, _, metric), (value, _) in values.items():
        if metric in ("kl_to_dense", "top1_agreement") and value is not None:
            by_cell.setdefault(cell, {})[metric] = value
    lines = []
    for row in study.table_2.rows:
        found = [by_cell[cell] for cell in _cells(row) if cell in by_cell]
        if not found:
            lines.append((escape_markdown(row.label), "absent", "absent", "0"))
            continue
        kl, same = (sum(one[m] for one in found) / len(found) for m in ("kl_to_dense", "top1_agreement"))
        lines.append((escape_markdown(row.label), f"{kl:.4f}", f"{100 * same:.1f}", str(len(found))))
    return _table(("Row", "KL to dense", "same token, %", "seeds"), lines)


def _cells(row: ExhibitRow) -> list[str]:
    """Cells behind a row's numbers, by seed."""
    found = {seed: cell for places in row.sources.values() for seed, (cell, _) in places.items()}
    return [cell for _, cell in sorted(found.items())]


def _costs(results: Results, grid: str, study: Study) -> str:
    origins = results.origins(grid)
    lines = []
    seen = set()
    for row in (*study.table_2.rows, *study.table_3.rows):
        name = (row.label, row.tokens)
        if row.row in (DENSE, FULL) or name in seen:
            continue
        seen.add(name)
        stages = [origins[place] for cell in _cells(row) if (place := (cell, "train")) in origins]
        walls = [_alone(stage["context"]) for stage in stages if "wall_seconds" in stage["context"]]
        beside = [str(stage["context"].get("companions", "not known")) for stage in stages]
        speed, seconds = row.estimate("tokens_per_second"), row.estimate("train_seconds")
        lines.append(
            (
                escape_markdown(row.label),
                millions(row.tokens) if row.tokens else "",
                f"{speed.mean:,.0f}" if speed else "" if not row.tokens else "absent",
                f"{seconds.mean / 60:.2f}" if seconds else "" if not row.tokens else "absent",
                f"{sum(walls) / len(walls) / 60:.2f}" if walls else "absent",
                ", ".join(beside) or "absent",
                escape_markdown(", ".join(sorted({str(stage["context"].get("device", "")) for stage in stages}))),
            )
        )
    return _table(("Row", "Tokens", "tokens/s", "steps, min", "stage, min", "beside", "device"), lines)


def _alone(context: Mapping[str, Any]) -> float:
    """Seconds of a training stage with those that a solution took which it only read."""
    reused = [used["seconds"] for used in context.get("solutions", ()) if used["reused"]]
    return float(context["wall_seconds"]) + sum(map(float, reused))


def _diverged(study: Study) -> str:
    lines = [
        f"{row.label}, {millions(row.tokens)}, seed {seed}: {why}"
        for data in (study.table_2, study.table_3, study.figure)
        for row in data.rows
        for seed, why in sorted(row.reasons.items())
    ]
    lines = list(dict.fromkeys(lines))
    return "## Runs that diverged\n\n" + (_list(lines) if lines else "None of those that were run.\n")


def _missing(study: Study) -> str:
    lines = []
    for data in (study.table_2, study.figure, study.table_3):
        for row in data.rows:
            if row.missing:
                cells = {cell for cell, *_ in row.missing}
                states = sorted({status for *_, status in row.missing})
                stages = f"{len(row.missing)} stages of {len(cells)} cells"
                at = f" at {millions(row.tokens)}" if row.tokens else ""
                lines.append(f"{data.exhibit}, {row.label}{at}: {stages} ({', '.join(states)})")
    return "## What is absent\n\n" + (_list(lines) if lines else "Nothing: every planned row is in.\n")


def _provenance(results: Results, grid: str) -> str:
    origins = results.origins(grid)
    entries, head = results.log_head()
    lines = [f"results log: {entries} entries, the last {head}"]
    for name, key in (("device", "device"), ("torch", "torch"), ("transformers", "transformers")):
        lines.append(f"{name}: {_listed(o['context'].get(key) for o in origins.values())}")
    lines.append(f"recorded by commits {_listed(str(o['git_sha'])[:12] for o in origins.values())}")
    return "## Where it comes from\n\n" + _list(lines)


def _listed(values: Iterable[Any]) -> str:
    counted: dict[str, int] = {}
    for value in values:
        counted[str(value or "unknown")] = counted.get(str(value or "unknown"), 0) + 1
    return _counts(counted) or "nothing is recorded yet"


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} stages)" for name, count in sorted(counted.items()))
