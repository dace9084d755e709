from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from analysis.frames import CAPTION, MixedSuites
from analysis.make_tables import make_tables
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import PublishedNumber
from tests.analysis import filled
from tests.analysis.filled import SPEED, TEXT, ZERO_SHOT, Filled, everything, scores, suite

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = [
    PublishedNumber(exhibit="table-2", row=row, column=column, value=float(text), text=text, source=source, position=i)
    for i, (row, column, text, source) in enumerate(
        [
            ("Wanda", "HellaSwag", "41.05", "Some Paper, Table 2"),
            ("Wanda", "PPL", "11.2900", "Some Paper, Table 2"),
            ("CAST", "RACE", "40.48", "Another_Paper"),
        ]
    )
]


def tables(url: str, out: Path, *only: str) -> Path:
    make_tables(Results(url), None, out, only)
    return out / "tables"


def text_of(url: str, out: Path, exhibit: str) -> str:
    return (tables(url, out, exhibit) / f"{exhibit}.md").read_text()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of the whole hand-filled store."""
    folder = tmp_path_factory.mktemp("filled")
    url = f"sqlite:///{folder / 'store.db'}"
    everything().write(url, PUBLISHED).close()
    return tables(url, folder)


@pytest.mark.parametrize("exhibit", ["table-1", "table-2", "table-3", "table-4", "table-7"])
@pytest.mark.parametrize("ending", [".md", ".tex", ".csv", ".html", ".tests.csv"])
def test_a_hand_filled_store_gives_the_stored_files(written: Path, exhibit: str, ending: str) -> None:
    """With SPARSEFORGE_WRITE_GOLDEN=1 the stored files are written anew; read the difference before keeping it."""
    if (exhibit, ending) == ("table-7", ".tests.csv"):
        assert not (written / "table-7.tests.csv").exists()
        return
    made = _body((written / exhibit).with_suffix(ending))
    stored = GOLDEN / f"{exhibit}{ending}"
    if os.environ.get("SPARSEFORGE_WRITE_GOLDEN") == "1":
        stored.write_text(made)
    assert made == stored.read_text()


def _body(path: Path) -> str:
    """A file's text; of a page only what is its own, so that a change of style changes no golden file."""
    text = path.read_text()
    return text if path.suffix != ".html" else text[text.index("<main>") : text.index("</main>") + 7] + "\n"


def test_both_databases_give_the_same_bytes(store_url: str, tmp_path: Path) -> None:
    everything().write(store_url, PUBLISHED).close()
    folder = tables(store_url, tmp_path)
    for stored in GOLDEN.iterdir():
        assert _body(folder / stored.name) == stored.read_text()


def test_columns_are_those_that_the_suites_plan(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    grid.row("table-2", "sparseforge", "SparseForge", {}, done=())
    grid.write(sqlite_url).close()
    text = text_of(sqlite_url, tmp_path, "table-2")
    assert "| Method | Tokens | HellaSwag | ARC-e | Avg | PPL |" in text
    assert "| SparseForge | 0 | \u2013\u2020 | \u2013\u2020 | \u2013\u2020 | \u2013\u2020 |" in text
    assert "Partial, not in yet: SparseForge seed 0 (train pending, zero-shot-7 pending, heldout pending)." in text


def test_suites_are_described_with_their_limits(written: Path) -> None:
    text = (written / "table-2.md").read_text()
    assert "zero-shot acc by lm-eval 0.4.13 on the first 25 items of each of 2 tasks" in text
    assert "perplexity on the first 160 windows of 128 tokens" in text


def test_published_numbers_stand_apart_as_printed_in_their_source(written: Path) -> None:
    own, _, quoted = (written / "table-2.md").read_text().partition("Published (not measured here)")
    assert "11.29" not in own
    assert "RACE" not in own
    assert "| Method | HellaSwag | PPL | RACE |" in quoted
    assert "| Wanda [1] | 41.05 | 11.2900 | \u2013 |" in quoted
    assert "- [2] Another\\_Paper." in quoted


def test_published_numbers_are_shown_only_where_the_grid_asks(sqlite_url: str, tmp_path: Path) -> None:
    everything().write(sqlite_url, PUBLISHED).close()
    other = Filled(grid="quiet")
    other.row("table-2", "alone", "Alone", scores([0.3], [0.4], [9.0]))
    other.write(sqlite_url).close()
    assert "Published" not in text_of(sqlite_url, tmp_path, "table-2")


def mixed(url: str, **second: object) -> None:
    grid = Filled()
    grid.row("table-2", "a", "A", scores([0.3], [0.4], [9.0]))
    grid.row("table-2", "b", "B", scores([0.3], [0.4], [9.0]), **second)  # type: ignore[arg-type]
    grid.write(url).close()


def test_two_harness_versions_in_a_column_are_refused(sqlite_url: str, tmp_path: Path) -> None:
    mixed(sqlite_url, context={"harness_version": "0.4.9"})
    with pytest.raises(MixedSuites, match=r"table-2, column .*lm-eval 0\.4\.13.* b with .*lm-eval 0\.4\.9"):
        tables(sqlite_url, tmp_path)
    assert not (tmp_path / "tables").exists()


def test_two_suites_of_one_name_in_an_exhibit_are_refused(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    grid.row("table-2", "a", "A", scores([0.3], [0.4], [9.0]))
    other = suite("zero-shot", "zero-shot-7", key="zero-shot-7-ffffff", tasks=["hellaswag"], limit=50)
    grid.row("table-2", "b", "B", {}, shown=(other, TEXT), done=())
    grid.write(sqlite_url).close()
    with pytest.raises(MixedSuites, match="two suites that are both called 'zero-shot-7'"):
        tables(sqlite_url, tmp_path)


def test_a_suite_that_the_store_has_lost_is_named_with_its_row(sqlite_url: str, tmp_path: Path) -> None:
    everything().write(sqlite_url).close()
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as store:
        (key,) = store.execute("SELECT key FROM suite WHERE name = 'zero-shot-7'").fetchone()
        store.execute("DELETE FROM suite WHERE key = ?", (key,))
    with pytest.raises(
        SparseForgeError, match=rf"table-1, row \S+: the store does not hold suite {key}.*sparseforge run"
    ):
        make_tables(Results(sqlite_url), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_task_of_two_suites_in_a_column_is_refused(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    grid.row("table-2", "a", "A", scores([0.3], [0.4], [9.0]))
    other = suite("zero-shot", "cast-6", tasks=["hellaswag"], limit=25)
    grid.row("table-2", "b", "B", {other.key: {"hellaswag/acc": [0.5]}}, shown=(other,))
    grid.write(sqlite_url).close()
    with pytest.raises(MixedSuites, match="column hellaswag/acc"):
        tables(sqlite_url, tmp_path)


def test_speeds_of_two_devices_are_refused(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    speed = {SPEED.key: {"decode_tokens_per_second/32x32": [100.0]}}
    grid.row("table-7", "m/dense", "Dense", speed, shown=(SPEED,))
    grid.row("table-7", "m/sparseforge", "2:4", speed, shown=(SPEED,), context={"device": "cuda"})
    grid.write(sqlite_url).close()
    with pytest.raises(MixedSuites, match=r"device cpu.*device cuda"):
        tables(sqlite_url, tmp_path)


def test_windows_of_two_lengths_are_two_columns(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    longer = suite("perplexity", "wikitext2-4096", text="wikitext2", window=4096, limit=None)
    grid.row("table-2", "a", "A", scores([0.3], [0.4], [9.0]), shown=(ZERO_SHOT, TEXT))
    grid.row("table-2", "b", "B", {longer.key: {"perplexity": [5.12]}}, shown=(longer,))
    grid.write(sqlite_url).close()
    text = text_of(sqlite_url, tmp_path, "table-2")
    assert "| PPL (heldout) | PPL (wikitext2-4096) |" in text
    assert "| B | 0 | \u2013 | \u2013 | \u2013 | \u2013 | 5.120 |" in text


def test_the_module_of_hand_filled_rows_names_the_caption_row_as_the_grids_do() -> None:
    from flows.grids.planned import CAPTION as PLANNED

    assert filled.CAPTION == CAPTION == PLANNED


def test_contamination_is_printed_under_the_table(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    measured = scores([0.3], [0.4], [9.0])
    measured[ZERO_SHOT.key] |= {"hellaswag/contaminated": [0.04], "arc_easy/contaminated": [0.0]}
    grid.row("table-2", "a", "A", measured, tokens=5)
    reason = "not scanned: the corpus is gone"
    grid.row("table-2", "b", "B", scores([0.3], [0.4], [9.0]), context={"contamination": reason})
    grid.write(sqlite_url).close()
    text = text_of(sqlite_url, tmp_path, "table-2")
    assert "by a scan for shared word sequences: hellaswag 1 of 25 items." in text
    assert "Contamination not scanned: the corpus is gone (B)." in text
    assert "contaminated |" not in text


def test_a_suite_of_another_kind_is_named_and_has_no_column(sqlite_url: str, tmp_path: Path) -> None:
    grid = Filled()
    flips = suite("flips", "flips", tasks=["hellaswag"])
    measured = {**scores([0.3], [0.4], [9.0]), flips.key: {"mean/flips": [0.1]}}
    grid.row("table-2", "a", "A", measured, shown=(ZERO_SHOT, TEXT, flips))
    grid.write(sqlite_url).close()
    text = text_of(sqlite_url, tmp_path, "table-2")
    assert "Suite flips: flips; it is in the store and in no column here." in text
    assert "| Method | Tokens | HellaSwag | ARC-e | Avg | PPL |" in text


@pytest.mark.parametrize(("exhibit", "row"), [("table-1", "LLaMA/sparseforge"), ("table-3", "full")])
def test_what_a_side_branch_costs_stands_beside_its_accuracy(
    sqlite_url: str, tmp_path: Path, exhibit: str, row: str
) -> None:
    store = Filled()
    dense = row.replace("sparseforge", "dense").replace("full", "dense")
    store.row(exhibit, dense, "LLaMA Dense", scores([0.30], [0.40], [20.0]), method="dense")
    store.row(exhibit, row, "LLaMA SparseForge", scores([0.28], [0.36], [25.0]), branch=(4096, 8192, 8704))
    store.write(sqlite_url).close()
    text = text_of(sqlite_url, tmp_path, exhibit)
    assert "Branch params | Branch bytes | Branch FLOP/token" in text
    assert "4,096 | 8,192 | 8,704" in text
