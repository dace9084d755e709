"""The figures of training: drawn from the store's curves, with the numbers behind them, and absent without any."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from analysis.bands import GRID, LINES, Band, bands
from analysis.make_tables import collect, make_tables
from analysis.motivation import _lowest_first, ablations, deltas, hard_vs_soft, mask_histograms, mask_softness
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import Curve
from tests.analysis.filled import Filled, everything, scores
from tests.analysis.filled import ablations as table_3

STEPS = (1, 50, 100)
EDGES = (0.0, 0.5, 1.0)


def with_curves(filled: Filled) -> Filled:
    """Every cell of SparseForge gets a loss, a mask's two numbers, and histograms of two kinds of weight."""
    for number, cell in enumerate(filled.cells.values()):
        if cell.method != "sparseforge" or not cell.tokens:
            continue
        found = [
            Curve(name="loss/task", steps=STEPS, values=(4.0 + number, None, 2.0)),
            Curve(name="mask/mid_fraction", steps=STEPS, values=(0.9, 0.4, 0.01)),
            Curve(name="mask/soft_hard_gap", steps=STEPS, values=(0.3, 0.1, 0.001)),
        ]
        for kind in ("attention", "mlp"):
            name = f"histogram:mask/{kind}"
            found.append(Curve(name=name, steps=STEPS, values=([6, 4], [5, 5], [8, 2]), edges=EDGES))
        filled.curves[cell.key] = found
    return filled


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def results(sqlite_url: str) -> Results:
    with_curves(everything()).write(sqlite_url).close()
    return Results(sqlite_url)


def test_curves_of_seeds_meet_on_the_share_of_training(results: Results) -> None:
    (band,) = bands(results.curves("demo"), ("nowhere", "table-2"), ("missing", "loss/task"))
    assert (band.label, band.seeds, len(band.mean)) == ("SparseForge", 2, GRID)
    assert band.low[-1] == band.high[-1] == 2.0
    assert band.high[20] - band.low[20] > 0.5
    assert np.isnan(band.mean[0]), "nothing was logged before the first step"
    assert bands(results.curves("demo"), ("table-2",), ("missing",)) == []


def test_a_line_ends_where_its_first_seed_diverged(sqlite_url: str) -> None:
    filled = with_curves(everything())
    early = next(cell for cell in filled.cells.values() if cell.variant == "table-2:sparseforge" and cell.seed == 1)
    filled.curves[early.key] = [
        Curve(name="loss/task", steps=(1, 20), values=(5.0, 9.0)),
        Curve(name="diverged", steps=(20,), values=(100,)),
    ]
    filled.write(sqlite_url).close()
    curves = Results(sqlite_url).curves("demo")
    (band,) = bands(curves, ("table-2",), ("loss/task",))
    assert (band.row, band.label) == ("SparseForge", "SparseForge (1 diverged)")
    assert np.isfinite(band.mean[20])
    assert np.isnan(band.mean[21:]).all(), "a fifth of the way, not all of it"
    made = hard_vs_soft(collect(Results(sqlite_url), "demo").exhibits, curves)
    assert made is not None
    assert [label for _, label, _ in made.ends] == ["SparseForge"], "the row keeps its own name"
    assert max(float(row["share of training"]) for row in rows_of(made.csv()) if "diverged" in row["row"]) == 0.2


def test_every_figure_has_its_numbers(results: Results) -> None:
    material = collect(results, "demo")
    wanted = {
        hard_vs_soft: {"training loss"},
        mask_softness: {"mask/mid_fraction", "mask/soft_hard_gap"},
        ablations: {"accuracy, points", "perplexity, %"},
    }
    for builder, quantities in wanted.items():
        made = builder(material.exhibits, material.curves)
        assert made is not None
        assert {row["quantity"] for row in rows_of(made.csv())} == quantities
    made = mask_histograms(material.exhibits, material.curves)
    assert made is not None
    assert {(row["weights"], row["step"], row["count"]) for row in rows_of(made.csv())} >= {("mlp", "100", "8")}
    titles = [axes.get_title() for axes in made.draw().axes]
    assert titles == ["step 1", "step 50", "step 100"] * 2, "each moment once"


def test_masks_are_shown_of_a_run_that_softens_them(sqlite_url: str) -> None:
    grid = Filled()
    for row, moves in (("frozen", False), ("sparseforge", True)):
        grid.row("table-2", row, row, scores([0.3], [0.4], [9.0]), method=row, tokens=5)
        cell = next(one for one in grid.cells.values() if one.method == row)
        middle = (0, 8, 0) if moves else (0, 0, 0)
        values = tuple([5, count, 5] for count in middle)
        edges = (0.0, 0.1, 0.9, 1.0)
        grid.curves[cell.key] = [Curve(name="histogram:mask/mlp", steps=STEPS, values=values, edges=edges)]
    grid.write(sqlite_url).close()
    curves = Results(sqlite_url).curves("demo")
    made = mask_histograms({}, curves)
    fixed = mask_histograms({}, [one for one in curves if one.row == "frozen"])
    assert made is not None
    assert fixed is not None
    assert (made.label, fixed.label) == ("sparseforge", "frozen"), "a fixed mask is shown where there is no other"


def test_without_curves_there_is_nothing_to_draw(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled(with_items=False)
    grid.row("table-2", "sparseforge", "SparseForge", scores([0.3], [0.4], [9.0]), tokens=5)
    grid.write(sqlite_url).close()
    material = collect(Results(sqlite_url), "demo")
    for builder in (hard_vs_soft, mask_softness, ablations, mask_histograms):
        assert builder(material.exhibits, material.curves) is None
    report = make_tables(Results(sqlite_url), None, tmp_path)
    assert {"hard-vs-soft", "ablations", "mask-softness", "mask-histograms"} <= set(report.empty)


def test_deltas_are_tested_where_items_are_known(sqlite_url: str) -> None:
    table_3(Filled()).write(sqlite_url).close()
    found = deltas(collect(Results(sqlite_url), "demo").exhibits["table-3"])
    assert [(d.label, d.quantity) for d in found] == [
        ("w/o distillation", "accuracy, points"),
        ("w/o distillation", "perplexity, %"),
    ]
    assert found[0].value == pytest.approx(-0.5)
    assert found[1].value == pytest.approx(100 * (np.sqrt(27 * 28 / (25 * 26)) - 1)), "as the tables say it"
    assert all(d.low is not None and d.low <= d.value + 1e-9 for d in found)


def test_deltas_without_items_have_no_interval(sqlite_url: str) -> None:
    table_3(Filled(with_items=False)).write(sqlite_url).close()
    found = deltas(collect(Results(sqlite_url), "demo").exhibits["table-3"])
    assert [d.low for d in found] == [None, None]
    assert found[0].value == pytest.approx(-0.5)
    assert not any(d.significant for d in found)


@pytest.mark.slow
def test_files_are_the_same_twice_and_name_no_date(results: Results, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_tables(results, None, tmp_path / name, ["hard-vs-soft", "mask-histograms"])
    files = sorted((tmp_path / "one" / "figures").iterdir())
    assert {path.suffix for path in files} == {".csv", ".pdf", ".png", ".svg"}
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / "figures" / path.name).read_bytes()
        assert b"CreationDate" not in path.read_bytes()


def test_of_many_rows_the_lowest_are_drawn() -> None:
    found = [Band(row=f"row {i}", label="", seeds=1, done=(), mean=(), low=(), high=()) for i in range(LINES + 2)]
    means = {band.row: float(i) for i, band in enumerate(reversed(found))} | {"row 3": 99.0}
    shown = [band.row for band in _lowest_first(found, means)]
    assert shown[:LINES] == [f"row {i}" for i in range(1, LINES + 2) if i != 3]
    assert shown[LINES:] == ["row 0", "row 3"]
    assert _lowest_first(found, {})[:LINES] == found[:LINES]
