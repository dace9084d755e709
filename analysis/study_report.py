"""The study's report: prose with its numbers filled in from the store, tables, bars, claims; absent rows said to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from analysis import study_earlier, study_second, study_summary, study_trials
from analysis.accuracy_tables import MEAN, table_2, table_3
from analysis.make_tables import collect
from analysis.render import escape_markdown, to_markdown
from analysis.study_bars import bars
from analysis.study_claims import NOT_TESTED, claims
from analysis.study_data import FULL, OURS, Study, millions
from analysis.study_parts import (
    bar_table,
    budget_tables,
    bullets,
    costs,
    divergences,
    glance,
    planned_study,
    significance,
    table,
)
from sparseforge_core.store.results import Results

HEAD = """# The study: every method at equal tokens on SmolLM2-135M

*Written by `python analysis/study.py` from the results store; no number here is typed by hand. {state}*

{caption}

Everything below can be made again from `{store}`: `python analysis/make_tables.py --db sqlite:///{store} --grid {grid}`
writes all tables and figures, `python analysis/measurements.py` the CSV, `python analysis/study.py` this page, and
`sparseforge --db sqlite:///{store} verify` proves that the numbers follow from their single items.
"""

SECTIONS = {
    "bars": """## The bars, set before the study was run

A bar is met or not by the numbers as they are; "so far" says that planned seeds are still missing, or rows that other
budgets have. A difference of perplexity is relative, with a 95 % bootstrap interval over items and seeds in brackets;
without brackets where a row still lacks seeds: then it is over the seeds that both have, and no interval and no test is
made of a part. An interval over three seeds is 2.5 of their standard deviations wide to either side; where two touch,
what pairing by window and seed says is given with them.
""",
    "trials": """## The trials

Each method's settings were chosen by the perplexity of held-out documents of the books, which no table shows; the
lowest is bold and was frozen. The trials read books alone; no setting was chosen anew when modern prose came to them.
Numbers before the colon are the peak learning rate and what else differs.
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
its time, of which each counts all. Until 1 December 2026 these were processes of the cell's own bundle, and up to three
bundles shared a GPU: a 0 does not say that a cell was alone. Speeds of two rows therefore compare only roughly.
""",
    "claims": """## The paper's claims, in small

The paper's numbers are of LLaMA-2-7B. A claim *holds* where the difference points its way and is significant (5 %, not
corrected over claims) on every measure named, *does not hold* where it points the other way everywhere and is
significant, else it is *undecided*. Nothing is tested, and so nothing decided, while a row lacks seeds: *so far*.
""",
}


def report(
    results: Results,
    grid: str,
    *,
    store: str,
    figure: str = "",
    ablations: str = "",
    trials_grid: str = "",
    unordered_grid: str = "",
    books_grid: str = "",
    second_grid: str = "",
) -> str:
    """The whole page as Markdown.

    `store` is how the page names the store's file; `figure` and `ablations` are the pictures' files, relative to the
    page; empty: none.
    `trials_grid` is the grid of the trials, `unordered_grid` that of ours with channels as they stand, which has a
    section where ours is another recipe by now, `books_grid` that on books alone, `second_grid` that of the second
    model; empty: none.
    """
    material = collect(results, grid)
    study = Study(material.exhibits)
    caption = study.table_2.caption
    parts = [HEAD.format(state=_state(results, grid), caption=caption, store=store, grid=grid)]
    found, second = bars(study), planned_study(results, second_grid)
    before = [(books_grid, planned_study(results, books_grid), study_earlier.BOOKS_ALONE)] if books_grid else []
    unordered = planned_study(results, unordered_grid)
    if unordered and study.ours and unordered.ours and study.ours.recipe != unordered.ours.recipe:
        before.insert(0, (unordered_grid, unordered, study_earlier.UNORDERED))
    short = study_summary.summary(study, found)
    short += [study_earlier.short(one, earlier) for _, one, earlier in before]
    short += [study_second.short(second)] if second_grid else []
    parts += [study_summary.HEAD, bullets(short), SECTIONS["bars"], bar_table(found)]
    parts += ["## Every method at one budget\n", glance(study), "## Table 2\n", to_markdown(table_2(study.table_2))]
    parts += significance(study.table_2, OURS, [("accuracy", MEAN), *study.texts])
    parts += [SECTIONS["budgets"], budget_tables(study)]
    if figure:
        parts.append(f"![Perplexity and accuracy against retraining tokens]({figure})\n")
    parts.append(escape_markdown(study.figure.caption))
    parts += ["\n## Table 3\n", to_markdown(table_3(study.table_3))]
    if ablations:
        parts.append(f"![Change of perplexity without a part of the method, or with another one]({ablations})\n")
    parts += significance(study.table_3, FULL, study.texts)
    for name, one, earlier in before:
        parts += study_earlier.section(results, name, one, earlier, store=store)
    if second_grid:
        parts += study_second.section(results, second_grid, second)
    parts += [SECTIONS["divergence"], divergences(results, study.table_2)]
    parts += _trials(results, trials_grid)
    parts += [SECTIONS["cost"], costs(results, grid, study)]
    parts += [SECTIONS["claims"], _claims(study)]
    parts += [_diverged(study), _missing(study), _provenance(results, grid)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _state(results: Results, grid: str) -> str:
    statuses = results.stage_statuses(grid)
    done = sum(status == "done" for status in statuses.values())
    cells = {cell for cell, _ in statuses}
    whole = sum(all(s == "done" for (c, _), s in statuses.items() if c == cell) for cell in cells)
    return f"{whole} of {len(cells)} cells are finished, {done} of {len(statuses)} stages."


def _trials(results: Results, grid: str) -> list[str]:
    found = study_trials.table(results, grid)
    return [SECTIONS["trials"], found] if found else []


def _claims(study: Study) -> str:
    rows = [(escape_markdown(one.claim), escape_markdown(one.found), f"**{one.verdict}**") for one in claims(study)]
    return table(("Claim", "Measured here", "Verdict"), rows, right=3) + "\nNot tested here:\n\n" + bullets(NOT_TESTED)


def _diverged(study: Study) -> str:
    lines = [
        f"{row.label}, {millions(row.tokens)}, seed {seed}: {why}"
        for data in (study.table_2, study.table_3, study.figure)
        for row in data.rows
        for seed, why in sorted(row.reasons.items())
    ]
    lines = list(dict.fromkeys(lines))
    return "## Runs that diverged\n\n" + (bullets(lines) if lines else "None of those that were run.\n")


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
    return "## What is absent\n\n" + (bullets(lines) if lines else "Nothing: every planned row is in.\n")


def _provenance(results: Results, grid: str) -> str:
    origins = results.origins(grid)
    entries, head = results.log_head()
    lines = [f"results log: {entries} entries, the last {head}"]
    for name, key in (("device", "device"), ("torch", "torch"), ("transformers", "transformers")):
        lines.append(f"{name}: {_listed(o['context'].get(key) for o in origins.values())}")
    lines.append(f"recorded by commits {_listed(str(o['git_sha'])[:12] for o in origins.values())}")
    return "## Where it comes from\n\n" + bullets(lines)


def _listed(values: Iterable[Any]) -> str:
    counted: dict[str, int] = {}
    for value in values:
        counted[str(value or "unknown")] = counted.get(str(value or "unknown"), 0) + 1
    return _counts(counted) or "nothing is recorded yet"


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} stages)" for name, count in sorted(counted.items()))
