from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.exhibits import TABLES
from analysis.make_tables import collect, make_tables
from analysis.terminal import to_text
from sparseforge_core.store.results import Results
from tests.analysis.filled import Filled, everything, scores
from tests.analysis.test_tables import PUBLISHED


def test_a_table_is_aligned_and_marked(sqlite_url: str) -> None:
    everything().write(sqlite_url, PUBLISHED).close()
    table = TABLES["table-2"](collect(Results(sqlite_url), "demo").exhibits["table-2"])
    plain, bold = to_text(table, color=False), to_text(table, color=True)
    lines = plain.splitlines()
    head = next(line for line in lines if line.startswith("Method"))
    row = next(line for line in lines if line.startswith("SparseForge"))
    assert head.index("Tokens") + len("Tokens") == row.index("98,304") + len("98,304")
    assert "*26.00* ± 6.35" in row
    assert "\033[1m" in bold
    assert "*26.00*" not in bold
    assert "Published (not measured here)" in plain
    assert "[2] Another_Paper" in plain


def test_a_column_without_seeds_is_empty_and_said(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    grid.row("table-2", "a", "A", {}, done=(), seeds=(0, 1))
    grid.row("table-2", "b", "B", scores([None, None], [0.2, 0.3], [5.0, 6.0]), seeds=(0, 1))
    grid.write(sqlite_url).close()
    report = make_tables(Results(sqlite_url), None, tmp_path, ["table-2"])
    text = (tmp_path / "tables" / "table-2.md").read_text()
    assert "| A | 0 | \u2013\u2020 |" in text
    assert "| B | 0 | diverged |" in text
    assert report.partial


@pytest.mark.parametrize(("width", "blocks"), [(30, 5), (60, 2), (120, 1)])
def test_columns_that_do_not_fit_go_on_below(sqlite_url: str, width: int, blocks: int) -> None:
    everything().write(sqlite_url, PUBLISHED).close()
    table = TABLES["table-2"](collect(Results(sqlite_url), "demo").exhibits["table-2"])
    table = replace(table, published=None)
    whole, lines = to_text(table, color=False).splitlines(), to_text(table, color=False, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("Method ") for line in lines) == blocks
    for name in ("Method ", "SparseForge "):
        row = next(line for line in whole if line.startswith(name))
        found = [word for line in lines if line.startswith(name) for word in line.split()[1:]]
        assert found == row.split()[1:], "every column once, in order"
