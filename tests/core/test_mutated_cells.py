"""Whatever a cell file holds, reading it gives a cell or an error of ours: seeded mutations of real cells."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from flows.grids import grid_named
from flows.grids.planned import expand
from sparseforge_core import specs
from sparseforge_core.errors import RecipeError, SparseForgeError
from sparseforge_core.identity import cell_key, loads
from sparseforge_core.recipe import Cell

MUTATIONS = 10_000

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 2**63, 1e308, 0.5, -0.0, float("inf"), float("nan"), "", "x", "\ud800", [], [1], {},
    {"kind": []}, {"kind": "dense"},
)  # fmt: skip


def places(body: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside a JSON body, as its container and its name there."""
    if not isinstance(body, dict | list):
        return
    for name, inner in list(body.items() if isinstance(body, dict) else enumerate(body)):
        yield body, name
        yield from places(inner)


def mutate(body: Any, chance: random.Random) -> None:
    """Replace, delete or add one value somewhere in a body."""
    container, name = chance.choice(list(places(body)))
    what = chance.random()
    if what < 0.1:
        del container[name]
    elif what < 0.2 and isinstance(container, dict):
        container[str(chance.random())] = chance.choice(STRANGE)
    else:
        container[name] = copy.deepcopy(chance.choice(STRANGE))


def test_a_mutated_cell_is_a_cell_or_a_refusal() -> None:
    chance = random.Random(5)
    bodies = [json.loads(cell.cell_json) for cell in expand(grid_named("full")).cells[::40]]
    accepted = refused = 0
    for _ in range(MUTATIONS):
        body = copy.deepcopy(chance.choice(bodies))
        mutate(body["cell"], chance)
        try:
            cell = specs.decode(body["cell"], Cell, "cell")
        except SparseForgeError:
            refused += 1
            continue
        accepted += 1
        if cell_key(cell) != body["key"]:
            with pytest.raises(RecipeError, match="key: the file says"):
                loads(json.dumps(body))
    assert accepted + refused == MUTATIONS
    assert min(accepted, refused) > MUTATIONS // 100, "the mutations are all alike"


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"key": 1, "cell": %s}' % ("9" * 5000), "{", "null"])
def test_a_file_that_is_no_cell_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        loads(text)


def test_a_number_that_no_float_holds_is_refused_by_its_field() -> None:
    body = json.loads(expand(grid_named("tiny-smoke")).cells[0].cell_json)["cell"]
    body["recipe"]["train"]["clip"] = 10**400
    with pytest.raises(RecipeError, match=r"cell\.recipe\.train\.clip: expected float"):
        specs.decode(body, Cell, "cell")
