"""The page's section on the second model: its table, whether the winner wins there, what its pretraining cost."""

from __future__ import annotations

import json

from analysis.accuracy_tables import table_2
from analysis.render import escape_markdown, to_markdown
from analysis.study_bars import main_bars
from analysis.study_data import DENSE, OURS, Study, millions, number
from analysis.study_parts import ABSENT, bar_table, cost, costs, divergences, progress, significance
from sparseforge_core.store.results import Results

TITLE = "## A second model, no setting chosen anew"
HEAD = """{title}

Was the winner tuned to one model? The same contenders, with the settings that the first model's trials chose, on
another architecture, tokenizer and pretraining. {state}
"""
PRETRAINING = "pretraining"
"""The variant of a cell that makes the model of others."""


def section(results: Results, grid: str, study: Study | None) -> list[str]:
    """The section as parts of Markdown; a store without the grid, or a row without results, is said to be."""
    if study is None:
        return [ABSENT.format(title=TITLE, grid=grid)]
    made = table_2(study.table_2)
    made.title = "The second model"
    line, said = _pretraining(results, grid, study)
    return [
        HEAD.format(title=TITLE, state=progress(results, grid)),
        escape_markdown(said) + "\n",
        "The first model's bars, asked of this one; a rival with one seed has no interval, only its number:\n",
        bar_table(main_bars(study)),
        to_markdown(made),
        *significance(study.table_2, OURS, study.texts),
        "Distance to the dense model, and what each row cost, as below for the first model:\n",
        divergences(results, study.table_2),
        costs(results, grid, study, [line]),
    ]


def short(second: Study | None) -> str:
    """In one line: whether ours has the lowest perplexity on the second model."""
    if second is None:
        return "A second model: absent."
    bar = main_bars(second)[0]
    said = f"{bar.verdict} ({bar.found})"
    return f"A second model, no setting chosen anew, lower perplexity than every other 2:4 row: {said}."


def _pretraining(results: Results, grid: str, study: Study) -> tuple[tuple[str, ...], str]:
    """The line of the table of costs, and a sentence: what making the model took, and how good it is."""
    recipes = [json.loads(body) for variant, body in results.recipes(grid).values() if variant == PRETRAINING]
    planned = sum(r["train"]["steps"] * r["train"]["sequences"] * r["train"]["length"] for r in recipes)
    rows = [row for row in results.tidy(grid) if row.preset == PRETRAINING and row.suite == "train"]
    measured = {row.metric: row.value for row in rows}
    origins = results.origins(grid)
    stages = [origins[place] for cell in {row.cell_key for row in rows} if (place := (cell, "train")) in origins]
    speed, seconds = measured.get("tokens_per_second"), measured.get("train_seconds")
    line = cost("Pretraining of the model", planned, speed, seconds, stages)
    took = "is absent"
    if speed and seconds:
        devices = ", ".join(sorted({str(stage["context"].get("device", "unknown device")) for stage in stages}))
        took = f"took {seconds / 60:.1f} minutes at {speed:,.0f} tokens a second ({devices})"
    dense = study.table_2.row(DENSE)
    texts = "; ".join(f"{name} {number(dense.estimate(metric) if dense else None)}" for name, metric in study.texts)
    return line, f"Its pretraining on {millions(planned)} tokens {took}. Perplexity of the dense model: {texts}."
