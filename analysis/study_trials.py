"""What every method tried before its settings were frozen, and what the held-out text said of it."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.render import escape_markdown
from analysis.study_data import millions
from sparseforge_core.store.results import Results

ALWAYS = ("train.lr.peak", "train.lr.last")
"""Settings that every trial varies: the first is shown, the second follows from it."""


@dataclass(frozen=True)
class Trial:
    """One try of a method: settings by their path in the recipe, and the held-out perplexity if it is in."""

    settings: Mapping[str, Any]
    tokens: int
    text: str
    perplexity: float | None
    done: bool


def trials(results: Results, grid: str) -> dict[str, list[Trial]]:
    """Every planned trial of a grid, by method, the best first."""
    measured: dict[str, tuple[str, float | None]] = {
        row.cell_key.rpartition("-s")[0]: (row.suite, row.value)
        for row in results.tidy(grid)
        if row.metric == "perplexity"
    }
    found: dict[str, list[Trial]] = defaultdict(list)
    for key, (variant, body) in results.recipes(grid).items():
        recipe = json.loads(body)
        text, value = measured.get(key, ("", None))
        train = recipe["train"]
        tokens = train["steps"] * train["sequences"] * train["length"]
        found[_method(variant)].append(Trial(_flat(recipe), tokens, text, value, key in measured))
    for tried in found.values():
        tried.sort(key=lambda trial: (trial.settings.get("train.lr.peak", 0.0), repr(sorted(trial.settings.items()))))
    return dict(sorted(found.items(), key=lambda pair: (_least(pair[1]), pair[0])))


def _method(variant: str) -> str:
    """The method of a cell that is named for it and its peak rate."""
    name, _, last = variant.rpartition(" ")
    return name if re.fullmatch(r"[0-9.e-]+", last) else variant


def _least(tried: list[Trial]) -> float:
    best = chosen(tried)
    return math.inf if best is None or best.perplexity is None else best.perplexity


def chosen(tried: list[Trial]) -> Trial | None:
    """The one with the lowest finite perplexity."""
    known = [trial for trial in tried if trial.perplexity is not None and math.isfinite(trial.perplexity)]
    return min(known, key=lambda trial: trial.perplexity or math.inf) if known else None


def table(results: Results, grid: str) -> str:
    """All trials as Markdown, the best of each method bold; empty where none is planned in the store."""
    found = trials(results, grid) if grid in results.grids() else {}
    if not found:
        return ""
    size = max(len(tried) for tried in found.values())
    every = [trial for tried in found.values() for trial in tried]
    budgets = sorted({trial.tokens for trial in every})
    texts = sorted({trial.text for trial in every if trial.text})
    head = f"Tokens: {', '.join(millions(tokens) for tokens in budgets)}. Text: {', '.join(texts) or 'none yet'}.\n\n"
    lines = [f"| Method |{' Trial |' * size}", f"|:---|{':---|' * size}"]
    for method, tried in found.items():
        best, differing = chosen(tried), _differing(tried)
        cells = [_cell(trial, differing, trial is best) for trial in tried]
        lines.append("| " + " | ".join([escape_markdown(method), *cells, *[""] * (size - len(cells))]) + " |")
    return head + "\n".join(lines) + "\n"


def _cell(trial: Trial, differing: list[str], best: bool) -> str:
    peak = trial.settings.get("train.lr.peak")
    said = [f"{peak:g}"] if peak is not None else []
    said += [f"{path.rpartition('.')[2]} {_short(trial.settings.get(path))}" for path in differing]
    value = f"{trial.perplexity:.2f}" if trial.perplexity is not None else "diverged" if trial.done else "absent"
    return f"{', '.join(said)}: " + (f"**{value}**" if best else value)


def _differing(tried: list[Trial]) -> list[str]:
    """Settings in which trials of a method differ, besides the rate.

    One that some have and others lack is none: the field came after these were planned.
    """
    paths = sorted({path for trial in tried for path in trial.settings} - set(ALWAYS))
    return [
        path for path in paths if len({repr(trial.settings[path]) for trial in tried if path in trial.settings}) > 1
    ]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(body: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a recipe by its path."""
    if isinstance(body, dict):
        inner = (_flat(value, f"{path}.{name}" if path else name) for name, value in body.items())
        return {place: value for part in inner for place, value in part.items()}
    return {path: json.dumps(body) if isinstance(body, list) else body}
