"""Every key and every resolved recipe of the paper's grid against the golden file."""

from __future__ import annotations

import json

import pytest

from flows.grids.golden import GOLDEN, golden, text_of
from sparseforge_core.identity import diff

REWRITE = "If that is meant, run `python -m flows.grids.golden` and commit the file with the change."


@pytest.fixture(scope="module")
def planned() -> dict[str, dict[str, object]]:
    return json.loads(text_of(golden()))


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, object]]:
    return json.loads(GOLDEN.read_text())


def test_no_recipe_means_something_else_under_its_old_key(planned, stored) -> None:
    changed = {key: diff(stored[key]["recipe"], planned[key]["recipe"]) for key in stored.keys() & planned.keys()}
    changed = {key: lines for key, lines in changed.items() if lines}
    assert not changed, (
        f"a default has changed under {len(changed)} unchanged keys, so finished cells would be taken for new ones: "
        f"{next(iter(changed.items()))}. Restore the default, or bump the revision of that part. {REWRITE}"
    )


def test_the_grid_plans_the_same_cells(planned, stored) -> None:
    new, gone = sorted(planned.keys() - stored.keys()), sorted(stored.keys() - planned.keys())
    assert not new, f"{len(new)} recipes are new or have another key, e.g. {new[:3]}; gone: {gone[:3]}. {REWRITE}"
    assert not gone, f"{len(gone)} recipes are no longer planned, e.g. {gone[:3]}. {REWRITE}"
    seeds = {key: (stored[key]["seeds"], planned[key]["seeds"]) for key in stored}
    assert all(before == now for before, now in seeds.values()), f"seeds differ: {seeds}. {REWRITE}"


def test_the_file_is_as_the_command_writes_it(stored) -> None:
    assert GOLDEN.read_text() == text_of(stored)
