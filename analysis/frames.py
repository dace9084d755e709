"""One exhibit's data: its rows in order, and each row's values by metric, seed by seed, checked for mixtures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sparseforge_core.errors import SparseForgeError

from analysis.aggregate import Estimate, over_seeds

CAPTION = "__caption__"


class MixedSuites(SparseForgeError):
    """One column would hold numbers of two suites or harness versions, which do not compare."""


@dataclass
class ExhibitRow:
    """A row: what it is, how many seeds it should have, and its values."""

    row: str
    label: str
    tokens: int
    planned: int
    values: dict[str, list[float]] = field(default_factory=dict)
    diverged: bool = False

    @property
    def group(self) -> str:
        """The part of the row's name before the last slash: rows of one model belong together."""
        return self.row.rpartition("/")[0]

    @property
    def variant(self) -> str:
        """The part behind it."""
        return self.row.rpartition("/")[2]

    def estimate(self, metric: str) -> Estimate | None:
        """Over the seeds that have the metric."""
        return over_seeds(self.values.get(metric, []))

    def is_partial(self, metric: str) -> bool:
        """Whether fewer seeds than planned have the metric, though some do."""
        return 0 < len(self.values.get(metric, [])) < self.planned


@dataclass
class ExhibitData:
    """What a builder gets."""

    exhibit: str
    caption: str
    rows: list[ExhibitRow]
    suites: dict[str, str]
    """Name of the suite behind each metric."""
    published: pd.DataFrame
    missing: list[tuple[str, str, str, str]]
    """(row, cell, stage, status) of what is not done."""
    labels: dict[str, Any] = field(default_factory=dict)

    def row(self, name: str) -> ExhibitRow | None:
        """A row by name."""
        return next((row for row in self.rows if row.row == name), None)

    def metrics(self) -> set[str]:
        """Every metric that some row has."""
        return {metric for row in self.rows for metric in row.values}


def metric_name(record: Any) -> str:
    """Perplexities of different suites are different columns; everything else goes by the task's name."""
    return f"{record.suite}:perplexity" if record.metric == "perplexity" else str(record.metric)


def exhibit_data(
    exhibit: str, slots: pd.DataFrame, measured: pd.DataFrame, missing: pd.DataFrame, published: pd.DataFrame
) -> ExhibitData:
    """Collect an exhibit. Raises MixedSuites naming the column and the two versions."""
    own_slots = slots[slots.exhibit == exhibit]
    caption = " ".join(own_slots[own_slots.row == CAPTION].note)
    rows = [
        ExhibitRow(slot.row, slot.label, 0 if pd.isna(slot.tokens) else int(slot.tokens), len(slot.seeds))
        for slot in own_slots.itertuples()
        if slot.row != CAPTION
    ]
    by_name = {row.row: row for row in rows}
    versions: dict[str, tuple[str, str]] = {}
    suites: dict[str, str] = {}
    for record in measured[measured.exhibit == exhibit].itertuples():
        metric = metric_name(record)
        if record.stage != "train":
            _refuse_mixture(exhibit, metric, record, versions)
            suites[metric] = str(record.suite)
        if record.value is None or pd.isna(record.value):
            by_name[record.row].diverged = True
            continue
        by_name[record.row].values.setdefault(metric, []).append(float(record.value))
    own = missing[missing.exhibit == exhibit]
    gaps = [(m.row, m.cell_key, m.stage, m.status) for m in own.itertuples()]
    return ExhibitData(exhibit, caption, rows, suites, published, gaps)


def _refuse_mixture(exhibit: str, metric: str, record: Any, versions: dict[str, tuple[str, str]]) -> None:
    harness = str((record.context or {}).get("harness_version", ""))
    found = (str(record.stage), harness)
    known = versions.setdefault(metric, found)
    if known != found:
        raise MixedSuites(
            f"{exhibit}, column {metric}: rows were measured by {known[0]} (lm-eval {known[1] or '-'}) and by {found[0]} "
            f"(lm-eval {found[1] or '-'}); evaluate all rows with one suite and one harness"
        )
