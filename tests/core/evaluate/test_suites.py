"""Suites: stable keys, limits, and names that suggest the nearest."""

from __future__ import annotations

import pytest

from sparseforge_core import specs
from sparseforge_core.errors import RecipeError
from sparseforge_core.evaluate.suites import (
    CAST_6,
    CAST_7,
    SUITES,
    ZERO_SHOT_7,
    HarnessSuite,
    Suite,
    limited,
    suite_key,
    suite_named,
)


def test_the_papers_suites_are_the_papers() -> None:
    assert set(ZERO_SHOT_7.tasks) - set(CAST_7.tasks) == {"boolq", "rte"}
    assert set(CAST_7.tasks) - set(ZERO_SHOT_7.tasks) == {"race", "piqa"}
    assert set(CAST_7.tasks) - set(CAST_6.tasks) == {"race"}


def test_a_key_tells_suites_apart_that_measure_differently() -> None:
    keys = {suite_key(suite) for suite in SUITES.values()}
    assert len(keys) == len(SUITES)
    assert suite_key(limited(ZERO_SHOT_7, 20)) != suite_key(ZERO_SHOT_7)
    assert suite_key(limited(ZERO_SHOT_7, 20)) == suite_key(limited(ZERO_SHOT_7, 20))


def test_results_that_are_stored_keep_their_keys() -> None:
    stored = {
        "zero-shot-7": "4f7b6e", "cast-7": "5c3ca7", "cast-6": "339907", "wikitext2-1024": "5342a6",
        "wikitext2-2048": "b7a0ab", "wikitext2-4096": "e739e0", "heldout": "e24ce7", "decode": "1d90a1",
    }  # fmt: skip
    assert {name: suite_key(SUITES[name]) for name in stored} == {n: f"{n}-{key}" for n, key in stored.items()}


@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_suite_survives_its_json(name: str) -> None:
    suite = SUITES[name]
    assert specs.decode(specs.encode(suite, omit_defaults=False), Suite) == suite


def test_unknown_tasks_and_suites_suggest_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'hellaswag'"):
        HarnessSuite(name="mine", tasks=("helaswag",))
    with pytest.raises(RecipeError, match="Did you mean 'zero-shot-7'"):
        suite_named("zero-shot")
    with pytest.raises(RecipeError, match="limit=1"):
        limited(ZERO_SHOT_7, 1)
