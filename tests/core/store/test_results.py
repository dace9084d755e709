"""The read side: records that are the same from SQLite and PostgreSQL, and an import that stays light."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from sparseforge_core.errors import StoreError
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import PlannedSlot, PublishedNumber
from sparseforge_core.store.store import ResultStore
from tests.stores import PERPLEXITY, PROVENANCE, ZERO_SHOT, plan, planned_cell, planned_slot, record, value

DENSE, WANDA, WANDA_1, ODD = (
    planned_cell("dense"),
    planned_cell("wanda"),
    planned_cell("wanda", 1),
    planned_cell("\u00c4rger_Zwei & co"),
)
CAPTION = PlannedSlot(grid="g", exhibit="table-2", row="__caption__", label="", position=-1, note="What it shows.")
SLOTS = [
    planned_slot(ODD, position=2),
    planned_slot(WANDA, position=1, seeds=(0, 1)),
    planned_slot(DENSE, position=1, suite_keys=(PERPLEXITY.key,)),
    planned_slot(DENSE, exhibit="table-1", position=0),
    CAPTION,
]
QUOTED = [
    PublishedNumber(exhibit="table-2", row=r, column=c, value=1.5, text="1.5", source="s", position=p)
    for p, r, c in ((1, "b", "z"), (1, "b", "A"), (0, "z", "m"), (1, "B", "z"))
]


def fill(url: str) -> Results:
    """A store with done, failed, diverged and pending stages."""
    store = ResultStore(url)
    plan(store, [ODD, WANDA, WANDA_1, DENSE], SLOTS, published=QUOTED)
    plan(store, [WANDA], [planned_slot(WANDA, grid="other")], grid="other")
    context = {"torch": "2.13.0", "device": "cpu", "batch_size": 16, "a": {"z": 1, "b": [{"y": 2.5, "x": None}]}}
    record(store, DENSE, "train", value("coverage", 0.0, n=10), value("final_loss", 3.25), **context)
    record(store, DENSE, PERPLEXITY.key, value("perplexity", 1 / 3, 0.01, 128, window=128, text="heldout"), **context)
    record(store, DENSE, ZERO_SHOT.key, value("piqa/acc", 0.5), value("arc_easy/acc", 0.25), **context)
    for cell, number in ((WANDA, 40.0), (WANDA_1, 41.5)):
        record(store, cell, "train", value("final_loss", number / 10), **context)
        record(store, cell, PERPLEXITY.key, value("perplexity", number, n=128), **context)
    record(store, ODD, "train", value("final_loss", None, status="diverged"), **context)
    store.fail(store.claim(ODD.key, PERPLEXITY.key, PROVENANCE), "Diverged: step 3")
    store.claim(WANDA.key, ZERO_SHOT.key, PROVENANCE)
    store.close()
    return Results(url)


@pytest.fixture
def results(store_url: str) -> Iterator[Results]:
    opened = fill(store_url)
    yield opened
    opened.close()


def records(results: Results) -> dict[str, list[object]]:
    return {
        "slots": results.slots("g"),
        "measurements": results.measurements("g"),
        "missing": results.missing("g"),
        "published": results.published("table-2"),
        "tidy": results.tidy("g"),
    }


def test_both_databases_give_the_same_records(sqlite_url: str, postgres_url: str) -> None:
    ours, theirs = records(fill(sqlite_url)), records(fill(postgres_url))
    for name, found in ours.items():
        assert found
        assert list(map(repr, found)) == list(map(repr, theirs[name])), "to the last bit, type and key order"


def test_measurements_are_tidy_and_ordered(results: Results) -> None:
    found = results.measurements("g")
    shown = [(m.exhibit, m.row, m.seed, m.suite, m.metric) for m in found]
    train, zero = "train", "zero-shot-7"
    assert shown == [
        ("table-1", "dense", 0, "heldout", "perplexity"),
        ("table-1", "dense", 0, train, "coverage"),
        ("table-1", "dense", 0, train, "final_loss"),
        ("table-1", "dense", 0, zero, "arc_easy/acc"),
        ("table-1", "dense", 0, zero, "piqa/acc"),
        ("table-2", "dense", 0, "heldout", "perplexity"),
        ("table-2", "dense", 0, train, "coverage"),
        ("table-2", "dense", 0, train, "final_loss"),
        ("table-2", "wanda", 0, "heldout", "perplexity"),
        ("table-2", "wanda", 0, train, "final_loss"),
        ("table-2", "wanda", 1, "heldout", "perplexity"),
        ("table-2", "wanda", 1, train, "final_loss"),
        ("table-2", ODD.variant, 0, train, "final_loss"),
    ]
    first, last = found[0], found[-1]
    assert (first.value, first.stderr, first.n, first.stage) == (1 / 3, 0.01, 128, PERPLEXITY.key)
    assert first.detail == {"text": "heldout", "window": 128}
    assert (first.context["torch"], first.cell_key) == ("2.13.0", DENSE.key)
    assert last.value is None
    assert last.detail["status"] == "diverged"


def test_seeds_that_only_another_grid_planned_are_left_out(results: Results) -> None:
    assert {m.seed for m in results.measurements("other")} == {0}


def test_only_the_metrics_that_are_asked_for_are_read_beside_the_training(results: Results) -> None:
    found = {(m.suite, m.metric) for m in results.measurements("g", ["perplexity", "nowhere"])}
    assert found == {("heldout", "perplexity"), ("train", "coverage"), ("train", "final_loss")}


def test_every_measurement_is_tidy_once_whoever_shows_it(results: Results) -> None:
    found = results.tidy("g")
    assert len({(m.cell_key, m.suite, m.metric) for m in found}) == len(found) == 10
    first = next(m for m in found if m.cell_key == DENSE.key and m.metric == "perplexity")
    assert (first.model, first.tokens, first.suite, first.value) == ("tiny-llama", 1_000_000, "heldout", 1 / 3)


def test_an_unfinished_stage_gives_no_number_and_is_missing_with_its_state(results: Results) -> None:
    missing = results.missing("g")
    assert missing == [
        ("table-2", "wanda", WANDA.key, ZERO_SHOT.key, "running"),
        ("table-2", "wanda", WANDA_1.key, ZERO_SHOT.key, "pending"),
        ("table-2", ODD.variant, ODD.key, PERPLEXITY.key, "failed"),
        ("table-2", ODD.variant, ODD.key, ZERO_SHOT.key, "pending"),
    ]


def test_slots_keep_captions_and_lists(results: Results) -> None:
    slots = {(slot.exhibit, slot.row): slot for slot in results.slots("g")}
    caption = slots["table-2", "__caption__"]
    assert (caption.note, caption.recipe_key, caption.seeds) == ("What it shows.", None, [])
    assert slots["table-2", "wanda"].seeds == [0, 1]


def test_published_numbers_keep_the_papers_order(results: Results) -> None:
    found = [(number.row, number.column) for number in results.published("table-2")]
    assert found == [("z", "m"), ("B", "z"), ("b", "A"), ("b", "z")]
    assert results.published("table-9") == []


def test_grids_are_listed_the_last_planned_one_last(results: Results, store_url: str) -> None:
    assert results.grids() == ["g", "other"]
    assert results.grid(None) == {"name": "other", "title": "Grid other", "published": False}
    store = ResultStore(store_url)
    plan(store, [ODD, WANDA, WANDA_1, DENSE], SLOTS)
    store.close()
    assert results.grids() == ["other", "g"]
    with pytest.raises(StoreError, match=r"unknown grid in this store 'othre'\. Did you mean 'other'"):
        results.grid("othre")


def test_suites_are_known_by_key(results: Results) -> None:
    assert results.suites() == {PERPLEXITY.key: "heldout", ZERO_SHOT.key: "zero-shot-7"}
    assert results.suite_specs()[ZERO_SHOT.key] == {"kind": "zero-shot", "limit": 40}


def test_a_grid_without_results_gives_nothing(store_url: str) -> None:
    store = ResultStore(store_url)
    plan(store, [DENSE])
    store.close()
    results = Results(store_url)
    assert results.measurements("g") == results.slots("g") == results.curves("g") == []
    assert results.stage_statuses()[DENSE.key, "train"] == "pending"


def test_reading_imports_nothing_heavy() -> None:
    code = "import sys, sparseforge_core.store.results; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "prefect", "mlflow", "datasets", "lm_eval", "alembic", "pandas"} & set(loaded)
