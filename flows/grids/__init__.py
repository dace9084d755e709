"""The grids, by name. A grid is data: recipes with seeds and suites, and their rows in the exhibits."""

from __future__ import annotations

import re
from collections.abc import Callable

from flows.grids.planned import Grid
from sparseforge_core.errors import RecipeError, unknown

__all__ = ["GRIDS", "Grid", "grid_named"]


def _demo() -> Grid:
    from flows.grids.demo import demo

    return demo()


def _paper(name: str) -> Callable[[], Grid]:
    def build() -> Grid:
        from flows.grids import paper

        return paper.GRIDS[name]()

    return build


def _smoke(name: str) -> Callable[[], Grid]:
    def build() -> Grid:
        from flows.grids import smoke

        return smoke.GRIDS[name]()

    return build


def _trials() -> Grid:
    from flows.grids.study import trials

    return trials()


def _ideas() -> Grid:
    from flows.grids.study_lab import ideas

    return ideas()


def _study_grid() -> Grid:
    from flows.grids.study_grid import study

    return study()


def _books_alone() -> Grid:
    from flows.grids.study_grid import books_alone

    return books_alone()


def _unordered() -> Grid:
    from flows.grids.study_grid import unordered

    return unordered()


def _second() -> Grid:
    from flows.grids.study_gpt2 import second

    return second()


def _reproductions() -> Grid:
    from flows.grids.reproductions import reproductions

    return reproductions()


PAPER = ("full", "table-1", "table-2", "table-3", "table-4", "table-5", "table-6", "table-7", "ablations", "figure")

GRIDS: dict[str, Callable[[], Grid]] = {
    "demo": _demo,
    **{name: _paper(name) for name in PAPER},
    "reproductions": _reproductions,
    "smollm2-trials": _trials,
    "smollm2-ideas": _ideas,
    "smollm2-study": _study_grid,
    "smollm2-books": _books_alone,
    "smollm2-unordered": _unordered,
    "gpt2-study": _second,
    **{name: _smoke(name) for name in ("smollm2-smoke", "tiny-smoke", "long-smoke")},
}
"""Builders by grid name; recipes are made only when a grid is asked for."""


SHRUNK = re.compile(r"(?P<grid>[^/]+)-shrunk-(?P<rows>\d{1,4})")
"""The name of a grid's miniature (`flows/grids/shrunken.py`)."""


def grid_named(name: str) -> Grid:
    """A grid by name, `NAME-shrunk-ROWS` being its miniature. Raises RecipeError, naming the nearest."""
    if miniature := SHRUNK.fullmatch(name):
        from flows.grids.shrunken import shrunk

        return shrunk(grid_named(miniature["grid"]), int(miniature["rows"]))
    if name not in GRIDS:
        raise RecipeError(unknown("grid", name, GRIDS))
    return GRIDS[name]()
