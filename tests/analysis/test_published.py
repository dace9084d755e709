"""The quoted numbers: complete, consistent with themselves, each with a source."""

from __future__ import annotations

import statistics

import pytest

from analysis.accuracy_tables import TASKS
from analysis.exhibits import EXHIBITS
from flows.grids.published import CAST_TASKS, PUBLISHED


def numbers(exhibit: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for number in PUBLISHED:
        if number.exhibit == exhibit:
            assert number.value is not None
            found.setdefault(number.row, {})[number.column] = number.value
    return found


def test_every_number_has_a_place_a_source_and_a_position_of_its_own() -> None:
    assert len({(n.exhibit, n.row, n.column) for n in PUBLISHED}) == len(PUBLISHED)
    assert [n.position for n in PUBLISHED] == list(range(len(PUBLISHED)))
    for number in PUBLISHED:
        assert number.exhibit in EXHIBITS
        assert any(word in number.source for word in ("arXiv", "commit"))
        assert number.text


def test_task_columns_carry_the_titles_of_our_tables() -> None:
    titles = {*TASKS.values(), "Mean", "Avg", "PPL", "Tokens"}
    for exhibit in ("table-2", "table-3", "table-4"):
        for row in numbers(exhibit).values():
            assert set(row) <= titles


def test_averages_of_table_2_are_those_of_their_rows() -> None:
    tasks = CAST_TASKS[1:-2]
    rows = [row for row in numbers("table-2").values() if "Avg" in row]
    assert len(rows) == 10
    for row in rows:
        assert statistics.fmean(row[task] for task in tasks) == pytest.approx(row["Avg"], abs=0.0051)


def test_printed_differences_are_those_of_their_pair_up_to_rounding() -> None:
    rows = numbers("table-1").values()
    assert len(rows) == 8
    for row in rows:
        assert row["SparseForge acc"] - row["Dense acc"] == pytest.approx(row["Difference"], abs=0.0101)
    assert not any("Difference" in row for row in numbers("table-5").values()), "nobody prints them"


def test_points_of_the_figure_are_rows_of_table_2() -> None:
    averages = {row["Avg"] for row in numbers("table-2").values() if "Avg" in row}
    points = numbers("accuracy-vs-tokens")
    assert {row["accuracy (cast-7)"] for row in points.values() if row} <= averages
    assert points["SparseForge/1250000000"] == {"accuracy (cast-7)": 55.96, "perplexity": 6.24}
    assert points["SparseForge/5000000000"] == {"accuracy (cast-7)": 57.27, "perplexity": 6.09}
