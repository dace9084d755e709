"""The exhibits by name, in the paper's order, and what builds each."""

from __future__ import annotations

from collections.abc import Callable

from analysis.accuracy_tables import reproductions, table_1, table_2, table_3, table_4, table_5, table_6
from analysis.frames import ExhibitData
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

EXHIBITS = (*TABLES, FIGURE)
