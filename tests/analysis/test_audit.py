"""The auditor: the known errors of the paper, planted ones of every kind, and none where rounding explains it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.aggregate import Estimate
from analysis.audit import audit_numbers, audit_table, numbers_of, report_lines
from analysis.exhibits import TABLES
from analysis.make_tables import collect
from analysis.table import Cell, Table
from flows.grids.published import FIGURE_2, NOT_AT_HAND, PUBLISHED, TWICE
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store.results import Results
from tests.analysis.filled import everything

KNOWN = {
    ("table-2", "Dense", "PPL", "5.12", "5.1983"),
    ("table-5", "GPT-2-Medium", "Dense acc", "41.01", "40.97"),
    ("table-5", "GPT-2-Large", "Dense acc", "42.65", "42.76"),
    ("table-5", "Qwen3-1.7B", "Dense acc", "56.47", "56.51"),
    ("table-5", "LLaMA-2-7B", "Dense acc", "59.70", "59.71"),
    ("figure-2", "SparseForge (Dolmino)", "Mean", "59.20", "59.22"),
    ("table-4", "LLaMA-2-7B AST", "Mean", "57.68", "57.69"),
    ("table-1", "Qwen3-1.7B", "SparseForge PPL", "10.54", "at least 15.56"),
    ("table-1", "Qwen3-8B", "SparseForge PPL", "8.03", "at least 8.97"),
    ("table-1", "Qwen3-14B", "SparseForge PPL", "7.17", "at least 7.89"),
}
"""table, row, column, printed, recomputed."""


@dataclass(frozen=True)
class Number:
    exhibit: str
    row: str
    column: str
    text: str


def row(**texts: str) -> list[Number]:
    return [Number("t", "r", column.replace("_", " "), text) for column, text in texts.items()]


def test_the_papers_numbers_give_the_known_errors_and_no_other() -> None:
    found = audit_numbers([*PUBLISHED, FIGURE_2], TWICE)
    assert {(f.table, f.row, f.column, f.printed, f.recomputed) for f in found} == KNOWN
    assert len(found) == len(KNOWN)
    assert all("known" in sentence for sentence in NOT_AT_HAND)
    assert set(found[0].as_json()) >= {"table", "row", "column", "printed", "recomputed"}


def test_every_place_that_is_stated_twice_exists() -> None:
    known = {(n.exhibit, n.row, n.column) for n in [*PUBLISHED, FIGURE_2]}
    assert {place for pair in TWICE for place in pair} <= known


def test_a_wrong_mean_and_a_wrong_difference_are_found() -> None:
    tasks = {"HellaSwag": "50.00", "PIQA": "60.00", "RACE": "40.00"}
    assert audit_numbers(row(**tasks, Avg="50.01")) == []
    (found,) = audit_numbers(row(**tasks, Avg="50.02"))
    assert (found.kind, found.printed, found.recomputed) == ("mean", "50.02", "50.00")
    pair = {"Dense_acc": "42.65", "SparseForge_acc": "41.87"}
    assert audit_numbers(row(**pair, Difference="-0.78")) == []
    (found,) = audit_numbers(row(**pair, Difference="-0.89"))
    assert (found.kind, found.recomputed) == ("difference", "-0.78")
    assert "printed -0.89, recomputed -0.78" in "\n".join(report_lines([found]))
    assert report_lines([]) == ["everything adds up"]


HEAD = "table,row,column,text\n"


def test_a_table_typed_off_a_page_is_audited(tmp_path: Path) -> None:
    """What the paper's Table 4 and Table 5 would need: its tasks, its mean, its pair and its difference."""
    page = tmp_path / "page.csv"
    tasks = "".join(f"table-4,a model,{task},{60 + n}.00\n" for n, task in enumerate(("BoolQ", "RTE", "OBQA")))
    pair = "table-5,another,Dense acc,42.65\ntable-5,another,SparseForge acc,41.87\ntable-5,another,Difference,-0.87\n"
    page.write_text(f"{HEAD}{tasks}table-4,a model,Mean,61.40\n{pair}")
    mean, difference = audit_numbers(numbers_of(page))
    assert (mean.row, mean.kind, mean.printed, mean.recomputed) == ("a model", "mean", "61.40", "61.00")
    assert (difference.table, difference.kind, difference.recomputed) == ("table-5", "difference", "-0.78")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "begins with nothing; the head must be table,row,column,text"),
        ("row,column\n", "begins with row,column; the head must be"),
        (f"{HEAD}t,r,Mean,fifty\n", "line 2: 't,r,Mean,fifty' .*could not convert"),
        (f"{HEAD}t,r,Mean,nan\n", "line 2: .*nan is no number that could be printed"),
        (f"{HEAD}t,r,Mean,1.0\nt,r,1.0\n", "line 3: 't,r,1.0' .*not enough values"),
    ],
)
def test_a_page_that_cannot_be_read_is_refused_by_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    page = tmp_path / "page.csv"
    page.write_text(text)
    with pytest.raises(SparseForgeError, match=sentence):
        numbers_of(page)
    with pytest.raises(SparseForgeError, match=r"nowhere\.csv cannot be read"):
        numbers_of(tmp_path / "nowhere.csv")


def test_a_mean_of_other_tasks_is_not_judged() -> None:
    assert audit_numbers(row(HellaSwag="50.00", PIQA="60.00", Avg="70.00")) == []


@given(st.lists(st.floats(0, 100), min_size=3, max_size=7), st.floats(0, 100), st.floats(0, 100))
def test_rounding_is_never_an_error(values: list[float], dense: float, sparse: float) -> None:
    names = ["HellaSwag", "RACE", "PIQA", "WinoGrande", "ARC-e", "ARC-c", "OBQA"]
    texts = {name: f"{value:.2f}" for name, value in zip(names, values, strict=False)}
    texts["Mean"] = f"{sum(values) / len(values):.2f}"
    texts |= {"Dense acc": f"{dense:.2f}", "SparseForge acc": f"{sparse:.2f}", "Difference": f"{sparse - dense:+.2f}"}
    assert audit_numbers([Number("t", "r", column, text) for column, text in texts.items()]) == []


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    url = f"sqlite:///{tmp_path_factory.mktemp('audit') / 'store.db'}"
    everything().write(url).close()
    exhibits = collect(Results(url), "demo").exhibits
    return {name: TABLES[name](exhibits[name]) for name in ("table-1", "table-2", "table-3", "table-4", "table-7")}


def test_our_own_tables_add_up(own: dict[str, Table]) -> None:
    assert [finding for table in own.values() for finding in audit_table(table)] == []


def test_an_own_difference_that_was_tampered_with_is_found(own: dict[str, Table]) -> None:
    table = own["table-1"]
    index = [column.title for column in table.columns].index("Difference")
    line = table.lines[0]
    before = line.cells[index]
    line.cells[index] = Cell(Estimate(0.5, None, 2, None), planned=2)
    (found,) = audit_table(table)
    line.cells[index] = before
    assert (found.kind, found.column, found.row) == ("difference", "Difference", "LLaMA")


def test_a_mark_on_a_worse_row_is_found(own: dict[str, Table]) -> None:
    table = replace(own["table-2"])
    wrong = [set(marked) for marked in own["table-2"].marked]
    index = [column.title for column in table.columns].index("PPL")
    wrong[index] = {1}
    table.__dict__["marked"] = wrong
    (found,) = audit_table(table)
    assert (found.kind, found.row, found.printed) == ("rank", "SparseForge", "Magnitude")
