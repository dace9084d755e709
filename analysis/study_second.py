"""The page's section on the second model: its table, whether the winner wins there, what its pretraining cost."""

from __future__ import annotations

import json

from analysis.accuracy_tables import table_2
from analysis.make_tables import collect
from analysis.render import escape_markdown, to_markdown
from analysis.study_bars import Bar, main_bars
from analysis.study_data import DENSE, OURS, Study, millions, number
from analysis.study_parts import cost, costs, divergences, significance, table
from sparseforge_core.store.results import Results

HEAD = """## A second model, no setting chosen anew

Was the winner tuned to one model? The same contenders, with the settings that the first model's trials chose, on
another architecture, tokenizer and pretraining. {state}
"""
ABSENT = "## A second model, no setting chosen anew\n\nAbsent: the store has no plan of grid `{grid}`.\n"
PRETRAINING = "pretraining"
"""The variant of a cell that makes the model of others."""


def second_study(results: Results, grid: str) -> Study | None:
    """The second model's rows; None if the store has no plan of its grid."""
    return Study(collect(results, grid).exhibits) if grid in results.grids() else None


def section(results: Results, grid: str, study: Study | None) -> list[str]:
    """The section as parts of Markdown; a store without the grid, or a row without results, is said to be."""
    if study is None:
        return [ABSENT.format(grid=grid)]
    statuses = results.stage_statuses(grid)
    done = sum(status == "done" for status in statuses.values())
    made = table_2(study.table_2)
    made.title = "The second model"
    bars = [(escape_markdown(bar.asked), escape_markdown(bar.found), f"**{bar.verdict}**") for bar in main_bars(study)]
    line, said = _pretraining(results, grid, study)
    return [
        HEAD.format(state=f"{done} of {len(statuses)} stages of grid `{grid}` are done."),
        escape_markdown(said) + "\n",
        "The first model's bars, asked of this one; a rival with one seed has no interval, only its number:\n",
        table(("Bar", "Measured", "Verdict"), bars, right=3),
        to_markdown(made),
        *significance(study.table_2, OURS, study.texts),
        "Distance to the dense model, and what each row cost, as below for the first model:\n",
        divergences(results, study.table_2),
        costs(results, grid, study, [line]),
    ]


def wins(study: Study) -> Bar:
    """Whether ours has the lowest perplexity on the second model."""
    return main_bars(study)[0]


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
