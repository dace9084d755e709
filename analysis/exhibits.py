"""The exhibits by name, in the paper's order, and what builds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from analysis.accuracy_tables import reproductions, table_1, table_2, table_3, table_4, table_5, table_6
from analysis.figures import FIGURE, accuracy_vs_tokens
from analysis.frames import ExhibitData
from analysis.motivation import ablations, hard_vs_soft, mask_histograms, mask_softness
from analysis.table import Table
from analysis.throughput_table import table_7
from sparseforge_core.store.shown import ShownCurve

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


class Drawing(Protocol):
    """The numbers of a figure: small and plain, so that another process can draw them."""

    def draw(self) -> Any:
        """The figure, in matplotlib's class."""

    def csv(self) -> str:
        """The numbers behind it."""


FIGURES: dict[str, Callable[[Mapping[str, ExhibitData], Sequence[ShownCurve]], Drawing | None]] = {
    FIGURE: accuracy_vs_tokens,
    "hard-vs-soft": hard_vs_soft,
    "ablations": ablations,
    "mask-softness": mask_softness,
    "mask-histograms": mask_histograms,
}
"""What a figure is drawn from, out of the grid's exhibits and its training curves; None where there is nothing."""

SHOWN = (*TABLES, FIGURE)
"""Exhibits with slots of their own; the other figures are drawn from the same rows."""

EXHIBITS = (*TABLES, *FIGURES)
