"""Planning again and again says what is wanted: no result is lost, and no key changes its meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from sparseforge_core.errors import RecipeDrift, StoreError
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import PlannedSuite, PublishedNumber
from sparseforge_core.store.store import ResultStore
from tests.stores import PERPLEXITY, PROVENANCE, ZERO_SHOT, plan, planned_cell, planned_slot, record, value

BASE = planned_cell("dense", pool="gpu-8", cost_hours=2.5)
SPARSE = planned_cell("wanda", requires=(BASE.key,))


@pytest.fixture
def store(store_url: str) -> Iterator[ResultStore]:
    opened = ResultStore(store_url)
    yield opened
    opened.close()


def number(row: str, position: int) -> PublishedNumber:
    return PublishedNumber(
        exhibit="table-2", row=row, column="mean", value=57.5, text="57.5", source="a paper", position=position
    )


def test_work_says_everything_in_planned_order(store: ResultStore) -> None:
    plan(store, [BASE, SPARSE])
    states = store.work("g")
    stages = ["train", PERPLEXITY.key, ZERO_SHOT.key]
    assert [(s.cell_key, s.stage) for s in states] == [(c.key, stage) for c in (BASE, SPARSE) for stage in stages]
    assert {s.status for s in states} == {"pending"}
    first, last = states[0], states[-1]
    assert (first.pool, first.cost_hours, first.requires) == ("gpu-8", 2.5, ())
    assert (last.requires, last.model, last.variant, last.seed) == ((BASE.key,), "tiny-llama", "wanda", 0)
    assert store.work("another") == []
    assert store.cell_body(BASE.key) == BASE.cell_json
    assert store.suite_spec(ZERO_SHOT.key) == ZERO_SHOT.spec_json
    for ask in (store.cell_body, store.suite_spec):
        with pytest.raises(StoreError, match=r"the store has no (cell|suite) 'nothing'; plan a grid that has it first"):
            ask("nothing")


def test_planning_again_changes_nothing_and_keeps_results(store: ResultStore, store_url: str) -> None:
    slots = [planned_slot(BASE), planned_slot(SPARSE)]
    plan(store, [BASE, SPARSE], slots)
    record(store, BASE, "train", value("loss", 1.0))
    before, measured = store.work("g"), Results(store_url).measurements("g")
    plan(store, [BASE, SPARSE], slots)
    assert store.work("g") == before
    assert Results(store_url).measurements("g") == measured
    assert store.fsck() == []


def test_a_smaller_plan_drops_slots_and_stages_but_no_results(store: ResultStore, store_url: str) -> None:
    plan(store, [BASE, SPARSE], [planned_slot(BASE), planned_slot(SPARSE)])
    plan(store, [SPARSE], [planned_slot(SPARSE, grid="h")], grid="h")
    record(store, SPARSE, "train", value("loss", 1.0))
    plan(store, [BASE], [planned_slot(BASE)])
    assert {s.cell_key for s in store.work("g")} == {BASE.key}
    assert [slot.row for slot in Results(store_url).slots("g")] == ["dense"]
    assert [m.value for m in Results(store_url).measurements("h")] == [1.0]


def test_a_changed_default_under_an_old_key_is_drift_and_nothing_is_written(store: ResultStore) -> None:
    old = planned_cell("wanda", spec={"objective": {"kind": "distill", "temperature": 2.0}, "list": [{"a": 1}], "x": 1})
    plan(store, [old])
    new = planned_cell("wanda", spec={"objective": {"kind": "distill", "temperature": 1.0}, "list": [{"a": 2}], "x": 1})
    with pytest.raises(RecipeDrift) as caught:
        plan(store, [new, planned_cell("another")], grid="h")
    sentence = str(caught.value)
    assert f"recipe {old.recipe_key} is stored with" in sentence
    assert "objective.temperature = 2.0 and now resolves to 1.0" in sentence
    assert "list[0].a = 1 and now resolves to 2" in sentence
    assert "bump the part's revision" in sentence
    assert "x =" not in sentence
    assert store.work("h") == []
    with pytest.raises(StoreError):
        store.cell_body(planned_cell("another").key)


def test_a_new_field_at_its_default_is_no_drift_but_its_later_change_is(store: ResultStore) -> None:
    plan(store, [planned_cell("wanda", spec={"steps": 10, "removed": 0})])
    plan(store, [planned_cell("wanda", spec={"steps": 10, "part": {"warmup": 5}})])
    with pytest.raises(RecipeDrift, match=r"part\.warmup = 5 and now resolves to 6"):
        plan(store, [planned_cell("wanda", spec={"steps": 10, "part": {"warmup": 6}})])


def test_the_same_json_written_otherwise_is_no_drift(store: ResultStore) -> None:
    plan(store, [planned_cell("wanda", spec_json=json.dumps({"a": 1, "b": [1.0]}))])
    plan(store, [planned_cell("wanda", spec_json=json.dumps({"b": [1.0], "a": 1}, indent=1))])


def test_a_suite_may_not_change_under_its_key(store: ResultStore) -> None:
    plan(store, [BASE])
    other = PlannedSuite(key=PERPLEXITY.key, name="heldout", spec_json='{"kind":"perplexity","window":64}')
    with pytest.raises(RecipeDrift, match=f"suite {PERPLEXITY.key} is stored with window = 128 and now resolves to 64"):
        store.plan("g", "", [BASE], [other], [], {BASE.key: ("train",)})


def test_quoted_numbers_are_replaced_together_and_only_if_given(store: ResultStore, store_url: str) -> None:
    plan(store, [BASE], published=[number("zeta", 0), number("alpha", 1)])
    plan(store, [BASE], grid="h")
    results = Results(store_url)
    assert [number.row for number in results.published("table-2")] == ["zeta", "alpha"]
    assert (results.grid("g")["published"], results.grid("h")["published"]) == (True, False)
    plan(store, [BASE], published=[number("beta", 0)])
    assert [number.row for number in results.published("table-2")] == ["beta"]


def test_ten_thousand_cells_are_planned_and_listed(store: ResultStore) -> None:
    spec = {"part": {f"field {i}": i for i in range(40)}}
    cells = [planned_cell(f"cell {i // 3}", i % 3, spec) for i in range(10_000)]
    plan(store, cells)
    store.claim(cells[0].key, "train", PROVENANCE)
    states = store.work("g")
    assert len(states) == 30_000


def test_grids_that_share_cells_each_keep_their_own_names(store_url: str) -> None:
    """Also of two seeds that one grid calls by different names, and whoever was planned last."""
    store = ResultStore(store_url)
    cells = [planned_cell("shared", seed) for seed in (0, 1)]
    plan(store, cells)
    plan(store, [replace(cell, variant=f"an idea, seed {cell.seed}") for cell in cells], grid="ideas")
    for cell in cells:
        record(store, cell, "train", value("final_loss", 3.0))
    names = {grid: [state.variant for state in store.work(grid) if state.stage == "train"] for grid in ("g", "ideas")}
    assert names == {"g": ["shared", "shared"], "ideas": ["an idea, seed 0", "an idea, seed 1"]}
    store.close()
    results = Results(store_url)
    assert {grid: [row.preset for row in results.tidy(grid)] for grid in names} == names
    assert [results.recipes(grid)[cells[0].recipe_key][0] for grid in names] == ["shared", "an idea, seed 0"]
    assert [row[2] for row in results.cells_like("")] == ["an idea, seed 0", "an idea, seed 1"], "the latest grid's"
    assert results.dossier(cells[1].key).about["variant"] == "an idea, seed 1"
    results.close()
