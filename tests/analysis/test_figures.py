from __future__ import annotations

import csv
import io
import struct
from pathlib import Path

import pytest

from analysis.aggregate import Estimate
from analysis.figures import AccuracyVsTokens, Point, accuracy_vs_tokens, chance, series, short, ticks
from analysis.frames import ExhibitData, exhibit_data
from analysis.make_tables import make_tables
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import PublishedNumber
from tests.analysis.filled import Filled, curve, scores

FIGURE = "accuracy-vs-tokens"


def quoted(row: str, column: str, value: float, position: int) -> PublishedNumber:
    return PublishedNumber(
        exhibit=FIGURE, row=row, column=column, value=value, text=str(value), source="A Paper", position=position
    )


PUBLISHED = [
    quoted("CAST/400000", "accuracy (zero-shot-7)", 57.0, 0),
    quoted("CAST/400000", "perplexity", 22.0, 1),
    quoted("CAST/800000", "accuracy (cast-7)", 58.0, 2),
]


def data_of(url: str) -> ExhibitData:
    results = Results(url)
    frames = results.slots("demo"), results.measurements("demo"), results.missing("demo"), results.published(FIGURE)
    return exhibit_data(FIGURE, *frames, results.suite_specs())


def drawing_of(data: ExhibitData) -> AccuracyVsTokens:
    found = accuracy_vs_tokens({FIGURE: data}, [])
    assert found is not None
    return found


@pytest.fixture
def data(sqlite_url: str) -> ExhibitData:
    curve(Filled()).write(sqlite_url, PUBLISHED).close()
    return data_of(sqlite_url)


def test_one_series_a_method_in_order_of_tokens(data: ExhibitData) -> None:
    drawn = series(data)
    assert list(drawn) == ["Wanda", "SparseForge", "CAST"]
    assert [point.tokens for point in drawn["SparseForge"]] == [50_000, 100_000, 200_000]
    first = drawn["SparseForge"][0]
    assert first.accuracy is not None
    assert [value.mean for value in first.perplexities.values()] == [40.5]
    assert first.accuracy.mean == pytest.approx(30.5)


def test_a_method_that_diverged_at_a_budget_has_a_cross_there_and_a_row(sqlite_url: str) -> None:
    filled = curve(Filled())
    lost = scores([None, None], [None, None], [None, None])
    filled.row(FIGURE, "SparseForge/400000", "SparseForge", lost, tokens=400_000, seeds=(0, 1))
    filled.write(sqlite_url).close()
    data = data_of(sqlite_url)
    assert "SparseForge,400000,diverged,,,,2," in drawing_of(data).csv()
    drawn = [line for axes in drawing_of(data).draw().axes for line in axes.get_lines()]
    crosses = [line for line in drawn if line.get_label() == "SparseForge: diverged"]
    assert [line.get_marker() for line in crosses] == ["x", "x"]
    assert all(line.get_xdata()[0] == pytest.approx(400_000, rel=0.05) for line in crosses)


def test_a_quoted_accuracy_on_other_tasks_is_not_drawn_on_our_axis(data: ExhibitData) -> None:
    first, second = series(data)["CAST"]
    assert first.accuracy is not None
    assert first.accuracy.mean == 57.0
    assert (second.tokens, second.accuracy, second.perplexities) == (800_000, None, {})


def test_quoted_points_are_hollow_and_ours_are_not(data: ExhibitData) -> None:
    figure = drawing_of(data).draw()
    lines = {line.get_label(): line for axes in figure.axes for line in axes.containers}
    faces = {label: container.lines[0].get_markerfacecolor() for label, container in lines.items()}
    assert faces["CAST (published)"] == "white"
    assert faces["SparseForge"] != "white"


def test_the_axis_shows_every_budget_and_guessing(data: ExhibitData) -> None:
    figure = drawing_of(data).draw()
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["50k", "100k", "200k", "400k", "800k"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["SparseForge", "CAST (published)", "Wanda", "uniform guessing"]


def test_labels_of_crowded_budgets_do_not_touch() -> None:
    assert ticks([1_000, 2_000, 2_100, 2_200, 4_000, 8_000]) == [1_000, 2_000, 4_000, 8_000]
    assert ticks([5_000]) == [5_000]


def test_guessing_counts_each_task_by_its_answers() -> None:
    assert chance(["arc_easy", "boolq"]) == 37.5


def test_the_numbers_behind_the_figure(data: ExhibitData) -> None:
    rows = list(csv.DictReader(io.StringIO(drawing_of(data).csv())))
    ours = [row for row in rows if row["method"] == "SparseForge" and row["quantity"] == "perplexity"]
    assert [(row["tokens"], row["mean"], row["n"]) for row in ours] == [
        ("50000", "40.5", "2"),
        ("100000", "30.5", "2"),
        ("200000", "25.5", "2"),
    ]
    assert {row["published in"] for row in rows if row["method"] == "CAST"} == {"A Paper"}


def test_more_methods_than_colours_all_appear(sqlite_url: str) -> None:
    grid = Filled()
    for number in range(12):
        grid.row(FIGURE, f"M{number}/50000", f"M{number}", scores([0.3], [0.4], [20.0 + number]), tokens=50_000)
    grid.write(sqlite_url).close()
    figure = drawing_of(data_of(sqlite_url)).draw()
    styles = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in figure.axes[0].containers}
    assert len(styles) == 12


def test_a_method_far_above_the_curves_is_named_and_its_line_does_not_press_them_together(sqlite_url: str) -> None:
    grid = Filled()
    for name, tokens, ppl in (("Magnitude", 0, 2740.0), ("Wanda", 0, 40.0), ("A", 50_000, 30.0), ("B", 50_000, 28.0)):
        grid.row(FIGURE, f"{name}/{tokens}", name, scores([0.3], [0.4], [ppl]), tokens=tokens)
    grid.write(sqlite_url).close()
    figure = drawing_of(data_of(sqlite_url)).draw()
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["above the axis:\nMagnitude 2,740"]
    assert left.get_ylim()[1] < 100
    across = {line.get_label(): line.get_color() for line in left.get_lines() if not line.get_label().startswith("_")}
    assert set(across) == {"Wanda"}
    assert "Magnitude" in {line.get_label() for line in right.get_lines()}, "its accuracy has a place"
    assert across["Wanda"] not in {container.lines[0].get_color() for container in left.containers}
    assert "Magnitude,0,perplexity,2740" in drawing_of(data_of(sqlite_url)).csv()


def test_each_text_has_a_panel_and_the_legend_the_place_that_is_left() -> None:
    def estimate(mean: float) -> Estimate:
        return Estimate(mean, None, 1, None)

    points = {
        "Dense": [Point(0, {"books": estimate(34.0), "wiki": estimate(12.0)}, estimate(41.0))],
        "Wanda": [Point(0, {"books": estimate(300.0), "wiki": estimate(35.0)}, estimate(34.0))],
        "A": [Point(t, {"books": estimate(b), "wiki": estimate(w)}, None) for t, b, w in ((1, 40, 30), (2, 30, 28))],
    }
    drawing = AccuracyVsTokens(points, None, ("books", "wiki"))
    figure = drawing.draw()
    books, wiki, accuracy, free = figure.axes
    titles = [axes.get_title() for axes in (books, wiki, accuracy)]
    assert titles == [
        *("Perplexity on books (lower is better)", "Perplexity on wiki (lower is better)"),
        "Mean zero-shot accuracy, %",
    ]
    assert [text.get_text() for text in books.texts] == ["above the axis:\nWanda 300"]
    assert [text.get_text() for text in wiki.texts] == ["below the axis:\nDense 12.0"]
    assert {text.get_text() for text in free.get_legend().get_texts()} == set(points)
    assert not figure.legends
    dashes = [
        {line._unscaled_dash_pattern for line in axes.get_lines() if line.get_label() == "Wanda"}
        for axes in (wiki, accuracy)
    ]
    assert dashes[0] == dashes[1]
    rows = list(csv.DictReader(io.StringIO(drawing.csv())))
    assert {row["quantity"] for row in rows} == {"perplexity on books", "perplexity on wiki", "accuracy"}


def test_a_budget_in_whole_steps_is_labelled_by_what_it_is_called() -> None:
    assert [short(tokens) for tokens in (3_014_656, 12_009_472, 1_250_000_000, 30_720)] == [
        *("3M", "12M", "1.25B", "30.7k"),
    ]


def test_a_figure_without_any_result_is_still_written(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    grid.row(FIGURE, "SparseForge/50000", "SparseForge", {}, done=(), tokens=50_000)
    grid.write(sqlite_url).close()
    report = make_tables(Results(sqlite_url), None, tmp_path)
    assert report.partial
    png = (tmp_path / "figures" / f"{FIGURE}.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (1480, 740)


def test_files_carry_neither_date_nor_version(sqlite_url: str, tmp_path: Path) -> None:
    curve(Filled()).write(sqlite_url).close()
    make_tables(Results(sqlite_url), None, tmp_path)
    assert b"Software" not in (tmp_path / "figures" / f"{FIGURE}.png").read_bytes()
    svg = (tmp_path / "figures" / f"{FIGURE}.svg").read_text()
    assert "<dc:date>" not in svg
