"""From a grid to the rows that the store keeps: cells, suites, slots, stages, and the cells these need first."""

from __future__ import annotations

import collections
import functools
import json
from dataclasses import dataclass, field
from typing import Any

from flows.placements import cost_hours, model_name, placement_for
from sparseforge_core import identity, specs
from sparseforge_core.errors import RecipeError
from sparseforge_core.evaluate.suites import Suite, suite_key
from sparseforge_core.models.sources import Tiny
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.store.rows import PlannedCell, PlannedSlot, PlannedSuite

CAPTION = "__caption__"
"""The row that carries an exhibit's caption in its note."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A row of an exhibit: `row` is '<group>/<variant>' where rows of a group belong together."""

    exhibit: str
    row: str
    label: str
    suites: tuple[Suite, ...] = ()
    """The suites whose numbers the row shows; empty shows all of the entry's."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A recipe that a grid wants, for these seeds, measured under these suites, shown in these slots."""

    recipe: Recipe
    variant: str
    """What people call it in a listing: 'SparseForge', 'dense'."""
    seeds: tuple[int, ...] = (0,)
    suites: tuple[Suite, ...] = ()
    slots: tuple[Slot, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A named list of planned recipes, with a caption for each exhibit that it fills."""

    name: str
    title: str
    entries: tuple[Planned, ...]
    captions: dict[str, str]
    published: bool = False
    """Whether the papers' own numbers are shown beside ours."""


@dataclass(frozen=True)
class Plan:
    """A grid as rows."""

    cells: tuple[PlannedCell, ...]
    suites: tuple[PlannedSuite, ...]
    slots: tuple[PlannedSlot, ...]
    stages: dict[str, tuple[str, ...]]
    recipes: dict[str, Recipe]
    """By key, as the cells were made from them."""


@dataclass
class _Rows:
    cells: dict[str, PlannedCell] = field(default_factory=dict)
    suites: dict[str, PlannedSuite] = field(default_factory=dict)
    slots: dict[tuple[str, str], PlannedSlot] = field(default_factory=dict)
    stages: dict[str, dict[str, None]] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    shown: collections.Counter[str] = field(default_factory=collections.Counter)
    """Rows by exhibit, so far."""


def expand(grid: Grid) -> Plan:
    """Rows of a grid, required cells included. Raises RecipeError if two recipes claim one row of an exhibit."""
    rows = _Rows()
    for exhibit, caption in grid.captions.items():
        rows.slots[exhibit, CAPTION] = PlannedSlot(
            grid=grid.name, exhibit=exhibit, row=CAPTION, label="", position=-1, note=caption
        )
        rows.shown[exhibit] += 1
    for entry in grid.entries:
        suite_keys = [_add_suite(rows, suite) for suite in entry.suites]
        for seed in entry.seeds:
            key = _add_cell(rows, Cell(recipe=entry.recipe, seed=seed), entry.variant)
            rows.stages[key].update(dict.fromkeys(suite_keys))
        for slot in entry.slots:
            _add_slot(rows, grid.name, entry, slot)
    stages = {key: tuple(names) for key, names in rows.stages.items()}
    return Plan(
        tuple(rows.cells.values()), tuple(rows.suites.values()), tuple(rows.slots.values()), stages, rows.recipes
    )


def _add_cell(rows: _Rows, cell: Cell, variant: str) -> str:
    recipe = cell.recipe
    recipe_key, spec_json, written = _resolved(recipe)
    key = f"{recipe_key}-s{cell.seed}"
    if key in rows.cells and variant in ("pretraining", rows.cells[key].variant):
        return key
    requires = [_add_cell(rows, required, "pretraining") for required in identity.required_cells(cell)]
    rows.cells[key] = PlannedCell(
        key=key,
        recipe_key=recipe_key,
        seed=cell.seed,
        model=model_name(recipe.model),
        family=_family(recipe),
        pattern=recipe.pattern.name if recipe.pattern else "dense",
        method=str(recipe.method.kind),  # type: ignore[attr-defined]
        variant=variant,
        tokens=recipe.train.tokens,
        spec_json=spec_json,
        cell_json=identity.dumps_written(cell, recipe_key, written),
        requires=tuple(requires),
        pool=placement_for(recipe).pool,
        cost_hours=cost_hours(recipe),
    )
    rows.stages.setdefault(key, {"train": None})
    rows.recipes[recipe_key] = recipe
    return key


@functools.lru_cache(maxsize=20_000)
def _resolved(recipe: Recipe) -> tuple[str, str, str]:
    """Key, resolved JSON and part of a cell file of a recipe: anew for every seed they would be most of planning."""
    return identity.key_of(recipe), _json(identity.recipe_spec(recipe)), identity.written(recipe)


_key_of_suite = functools.lru_cache(maxsize=1_000)(suite_key)


def _add_suite(rows: _Rows, suite: Suite) -> str:
    key = _key_of_suite(suite)
    if key not in rows.suites:
        rows.suites[key] = PlannedSuite(
            key=key, name=suite.name, spec_json=_json(specs.encode(suite, omit_defaults=False))
        )
    return key


def _add_slot(rows: _Rows, grid: str, entry: Planned, slot: Slot) -> None:
    if (slot.exhibit, slot.row) in rows.slots:
        raise RecipeError(f"grid {grid}: two recipes claim row {slot.row!r} of {slot.exhibit}")
    shown = slot.suites or entry.suites
    foreign = [suite.name for suite in shown if suite not in entry.suites]
    if foreign:
        raise RecipeError(
            f"grid {grid}: row {slot.row!r} of {slot.exhibit} shows {foreign}, which its recipe does not run"
        )
    rows.slots[slot.exhibit, slot.row] = PlannedSlot(
        grid=grid,
        exhibit=slot.exhibit,
        row=slot.row,
        label=slot.label,
        position=rows.shown[slot.exhibit],
        recipe_key=_resolved(entry.recipe)[0],
        seeds=entry.seeds,
        suite_keys=tuple(_key_of_suite(suite) for suite in shown),
        note=slot.note,
    )
    rows.shown[slot.exhibit] += 1


def _family(recipe: Recipe) -> str:
    source: Any = recipe.model
    while hasattr(source, "recipe"):
        source = source.recipe.model
    return source.architecture if isinstance(source, Tiny) else model_name(source)


def _json(body: Any) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))
