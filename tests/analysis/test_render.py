from __future__ import annotations

import csv
import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from analysis.aggregate import Estimate
from analysis.items import Items
from analysis.render import escape_latex, escape_markdown, to_csv, to_latex, to_markdown
from analysis.table import EMPTY, Cell, Column, Line, Table, marks

PERCENT = Column("Acc_1", 100.0, better="high")
PPL = Column("PPL", digits=None, better="low")


def cell(mean: float, half: float | None = None, n: int = 1, planned: int = 1, diverged: int = 0) -> Cell:
    return Cell(Estimate(mean, None, n, half), planned, diverged)


def table(*lines: Line) -> Table:
    return Table("table-9", "Table 9. A & B", "50 % of all.", "Method", [PERCENT, PPL], list(lines))


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (25.5, 6.3531, "25.50 6.35"),
        (5.1983, 0.04, "5.198 0.040"),
        (412.54, 12.0, "412.5 12.0"),
        (54321.0, 9.4, "54,321 9"),
    ],
)
def test_perplexity_has_four_digits_and_its_interval_as_many_decimals(value: float, half: float, text: str) -> None:
    assert f"{PPL.number(value)} {PPL.number(half, beside=value)}" == text


def test_differences_carry_a_sign_but_their_intervals_do_not() -> None:
    column = Column("d", 100.0, signed=True)
    assert (column.number(0.0123), column.number(0.02, beside=0.0123)) == ("+1.23", "2.00")


def test_markdown_row() -> None:
    text = to_markdown(
        table(Line("a", "A|B", [cell(0.5, 0.01, 2, 2), cell(20.0)]), Line("b", "C", [cell(0.4), cell(30.0)]))
    )
    assert "| Method | Acc\\_1 | PPL |\n| :--- | ---: | ---: |\n" in text
    assert "| A\\|B | 50.00 \u00b1 1.00 | 20.00 |\n| C | 40.00 | 30.00 |\n" in text


def test_marks_are_bold_in_every_format() -> None:
    made = table(Line("a", "A", [answered(90), EMPTY]), Line("b", "B", [answered(20), EMPTY]))
    assert "| A | **90.00** |" in to_markdown(made)
    assert r"A & \textbf{90.00} &" in to_latex(made)


def test_latex_escapes_everything_that_latex_acts_on() -> None:
    assert escape_latex("a_b & 50 % #1 ${x} ~ ^ \\ <") == (
        r"a\_b \& 50 \% \#1 \$\{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \textless{}"
    )
    text = to_latex(table(Line("a", "x_y", [cell(0.5, 0.01, 2, 2), EMPTY])))
    assert r"\caption{Table 9. A \& B. 50 \% of all.}" in text
    assert r"x\_y & 50.00 $\pm$ 1.00 & -- \\" in text
    assert r"Method & Acc\_1 & PPL \\" in text
    assert "\u00b1" not in text


def test_markdown_escapes() -> None:
    assert escape_markdown("a_b|c*d<e") == r"a\_b\|c\*d&lt;e"


def test_partial_missing_and_diverged_cells_say_so() -> None:
    lines = [
        Line("a", "A", [cell(0.5, n=1, planned=2), Cell(planned=2)]),
        Line("b", "B", [EMPTY, Cell(planned=2, diverged=2)]),
        Line("c", "C", [cell(0.5, n=1, planned=2, diverged=1), cell(20.0)]),
    ]
    text = to_markdown(table(*lines))
    assert "| A | 50.00\u2020 (1/2) | \u2013\u2020 |" in text
    assert "| B | \u2013 | diverged |" in text
    assert "| C | 50.00 (1 diverged) | 20.00 |" in text


def answered(right: int, shift: int = 0, planned: int = 1, of: int = 100) -> Cell:
    """A cell whose items are right from `shift` on."""
    row = np.zeros((1, of))
    row[0, shift : shift + right] = 1
    return Cell(Estimate(right / of, None, 1, None), planned, items=Items((row,), ("same",)))


def test_the_best_alone_is_marked_where_every_other_is_shown_to_be_worse() -> None:
    cells = [answered(90), answered(60), answered(30), answered(95)]
    assert marks(PERCENT, cells, [True, True, True, False]) == {0}, "the last is no rival"
    assert marks(PERCENT, [answered(99, planned=2), *cells[:3]], [True] * 4) == {1}, "the first lacks a seed"


def test_statistical_ties_share_the_mark_and_a_tie_of_all_has_none() -> None:
    cells = [answered(90), answered(88, shift=1), answered(30)]
    assert marks(PERCENT, cells, [True] * 3) == {0, 1}
    assert marks(PERCENT, cells[:2], [True] * 2) == set()
    assert marks(PERCENT, cells[:1], [True]) == set()


def test_lower_perplexity_is_better() -> None:
    low = Cell(Estimate(10.0, None, 1, None), 1, items=Items((np.linspace(2.2, 2.4, 50)[None],), ("w",)))
    high = Cell(Estimate(20.0, None, 1, None), 1, items=Items((np.linspace(2.9, 3.1, 50)[None] + 0.01,), ("w",)))
    assert marks(PPL, [high, low], [True, True]) == {1}


@pytest.mark.parametrize(
    "odd",
    [cell(0.3), answered(30, of=50), Cell(Estimate(0.3, None, 1, None), 1, items=Items((np.ones((1, 100)),), ("x",)))],
)
def test_what_cannot_be_tested_is_not_marked_and_said(odd: Cell) -> None:
    lines = [Line("a", "A", [answered(90), EMPTY]), Line("b", "B", [odd, EMPTY])]
    assert table(*lines).marks() == [set(), set()]
    assert table(*lines).untested
    assert not table(lines[0]).untested


def test_csv_holds_unrounded_numbers_and_hidden_columns() -> None:
    hidden = Column("norm", 100.0, in_print=False)
    wide = Table(
        "table-9", "T", "", "Method", [PERCENT, hidden], [Line("a", "A", [cell(1 / 3, 0.01, 2, 3), cell(0.5)])]
    )
    rows = list(csv.DictReader(io.StringIO(to_csv(wide))))
    assert rows[0]["Acc_1"] == "33.3333333333"
    assert (rows[0]["Acc_1 ci95"], rows[0]["Acc_1 n"], rows[0]["Acc_1 planned"]) == ("1", "2", "3")
    assert rows[0]["norm"] == "50"
    assert "norm" not in to_markdown(wide)


def test_groups_are_set_apart_in_latex() -> None:
    rows = [Line(name, name, [cell(0.5), EMPTY]) for name in ("m/dense", "m/sparse", "n/dense")]
    assert to_latex(table(*rows)).count(r"\addlinespace") == 1


def test_latex_is_balanced_and_every_row_has_its_columns() -> None:
    made = to_latex(table(Line("a", "A_1 & B", [answered(90), EMPTY]), Line("b", "B", [answered(20), cell(2.0)])))
    assert made.count("{") - made.count(r"\{") == made.count("}") - made.count(r"\}")
    for name in ("table", "tabular"):
        assert made.count(rf"\begin{{{name}}}") == made.count(rf"\end{{{name}}}") == 1
    assert [made.count(rf"\{rule}") for rule in ("toprule", "midrule", "bottomrule")] == [1, 1, 1]
    rows = [line for line in made.splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {2}


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="no pdflatex on this machine: the tables were not compiled"
)
def test_latex_compiles_with_booktabs(tmp_path: Path) -> None:
    golden = sorted((Path(__file__).parent / "golden").glob("*.tex"))
    inputs = "\n".join(rf"\input{{{path}}}" for path in golden)
    text = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "all.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "all.pdf").read_bytes().startswith(b"%PDF")
