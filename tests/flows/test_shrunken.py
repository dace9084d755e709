"""The miniature of a grid keeps its exhibits, methods and dependencies, and nothing of its size."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from flows.grids import grid_named, paper
from flows.grids.planned import CAPTION, expand
from flows.grids.shrunken import LENGTH, STEPS, WIDTH, shrunk_name
from sparseforge_core.errors import RecipeError
from sparseforge_core.models.sources import Tiny


@pytest.mark.parametrize("name", ["full", "ablations", "smollm2-smoke", "smollm2-study", "gpt2-study"])
def test_every_exhibit_stays_and_everything_runs_anywhere(name: str) -> None:
    whole, small = grid_named(name), grid_named(shrunk_name(name, 2))
    plan = expand(small)
    assert small.name == f"{name}-shrunk-2"
    rows = Counter(slot.exhibit for slot in plan.slots if slot.row != CAPTION)
    assert set(rows) == set(whole.captions)
    assert max(rows.values()) <= 2
    assert {cell.pool for cell in plan.cells} == {"cpu"}
    sources = [getattr(entry.recipe.model, "recipe", entry.recipe).model for entry in small.entries]
    assert all(isinstance(source, Tiny) and source.width == WIDTH for source in sources)
    assert {cell.tokens > 0 for cell in plan.cells if cell.variant == "pretraining"} <= {True}
    assert all(len(entry.seeds) == 1 for entry in small.entries)
    assert max(cell.tokens for cell in plan.cells) <= STEPS * 2 * LENGTH


def test_with_enough_rows_every_method_of_the_paper_is_in_it() -> None:
    whole, small = expand(paper.full()), expand(grid_named("full-shrunk-99"))
    assert {cell.method for cell in small.cells} == {cell.method for cell in whole.cells}
    assert {cell.pattern for cell in small.cells} == {cell.pattern for cell in whole.cells}
    assert len(small.slots) == len(whole.slots)
    assert not any("race" in json.loads(suite.spec_json).get("tasks", ()) for suite in small.suites)


def test_whatever_is_calibrated_is_calibrated_by_two_texts() -> None:
    recipes = list(expand(grid_named("smollm2-study-shrunk-99")).recipes.values())
    ordered = [recipe.permutation for recipe in recipes if recipe.permutation is not None]
    begun = [recipe.method.start_from for recipe in recipes if getattr(recipe.method, "start_from", None) is not None]
    assert ordered
    assert begun
    assert {(part.samples, part.length) for part in (*ordered, *begun)} == {(2, LENGTH)}


def test_half_the_tokens_stay_fewer_tokens() -> None:
    tokens = {cell.variant: cell.tokens for cell in expand(grid_named("ablations-shrunk-99")).cells}
    assert 0 < tokens["w/ half the steps"] < tokens["SparseForge (full)"]


@pytest.mark.parametrize(("name", "said"), [("full-shrunk-0", "shrink=0"), ("ful-shrunk-2", "Did you mean 'full'")])
def test_what_cannot_be_shrunk_is_said(name: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        grid_named(name)
