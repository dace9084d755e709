"""The study's grids: as many trials for every method, judged on nothing that is reported."""

from __future__ import annotations

import collections
import json

from flows.bundle import _corpora, _not_carried, choose
from flows.grids import grid_named
from flows.grids.planned import expand
from flows.grids.study import BOOKS, IDEAS, OTHER_BOOKS, PEAKS, REPORTED, TRIED_ON, contenders
from sparseforge_core import specs
from sparseforge_core.evaluate.suites import Suite


def test_every_method_has_the_same_trials_on_the_same_text_and_budget() -> None:
    entries = grid_named("smollm2-trials").entries
    trials = collections.Counter(entry.variant.rpartition(" ")[0] for entry in entries)
    assert set(trials.values()) == {len(PEAKS)}
    assert len(trials) == len(contenders(PEAKS[0]))
    assert {entry.recipe.train.tokens for entry in entries} == {367 * 16 * 1024}
    assert {entry.recipe.corpus for entry in entries} == {BOOKS}
    assert {entry.seeds for entry in entries} == {(0,)}


def test_trials_and_ideas_never_see_what_is_reported() -> None:
    for name in ("smollm2-trials", "smollm2-ideas"):
        assert {suite for entry in grid_named(name).entries for suite in entry.suites} == {TRIED_ON}
    assert TRIED_ON not in REPORTED
    assert not {*BOOKS.sha256} & {*OTHER_BOOKS.sha256}


def test_every_idea_is_a_recipe_of_its_own() -> None:
    plan = expand(grid_named("smollm2-ideas"))
    assert len({cell.recipe_key for cell in plan.cells}) == len(IDEAS)


def test_the_text_of_a_suite_travels_with_a_bundle() -> None:
    chosen = choose(["smollm2-ideas"])
    assert chosen.cells
    suites = [specs.decode(json.loads(json.dumps(specs.encode(suite))), Suite, "suite") for suite in REPORTED]
    assert OTHER_BOOKS in _corpora(suites)
    assert not any("books" in said for said in _not_carried(suites))
