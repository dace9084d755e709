"""The exhibits by name, in the paper's order, and what builds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from analysis.accuracy_tables import reproductions, table_1, table_2, table_3, table_4, table_5, table_6
from analysis.figures import accuracy_vs_tokens, figure_csv
from analysis.frames import ExhibitData
from analysis.motivation import ablations, hard_vs_soft, mask_histograms, mask_softness
from analysis.table import Table
from analysis.throughput_table import table_7

TABLES: dict[str, Callable[[ExhibitData], Table]] = {
    "table-1": table_1,
    "table-2": table_2,
    "table-3": table_3,
    "table-4": table_4,
    "table-5": table_5,
    "table-6": table_6,
    "table-7": table_7,
    "reproductions": reproductions,
}
"""To add a table: a builder here, and slots in a grid."""

FIGURE = "accuracy-vs-tokens"


def _accuracy_vs_tokens(exhibits: Mapping[str, ExhibitData], _: Any) -> tuple[Any, str] | None:
    data = exhibits[FIGURE]
    return (accuracy_vs_tokens(data), figure_csv(data)) if data.rows or not data.published.empty else None


FIGURES: dict[str, Callable[[Mapping[str, ExhibitData], Any], tuple[Any, str] | None]] = {
    FIGURE: _accuracy_vs_tokens,
    "hard-vs-soft": hard_vs_soft,
    "ablations": ablations,
    "mask-softness": mask_softness,
    "mask-histograms": mask_histograms,
}
"""A figure and the CSV behind it, from the grid's exhibits and its training curves; None where there is nothing."""

SHOWN = (*TABLES, FIGURE)
"""Exhibits with slots of their own; the other figures are drawn from the same rows."""

EXHIBITS = (*TABLES, *FIGURES)
