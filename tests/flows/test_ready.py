"""What may run now: a pure function of rows, so its promises are checked on any grid that hypothesis can think of."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.cycle import TRAIN, ready
from sparseforge_core.store.causes import POLICIES
from sparseforge_core.store.rows import StageState

TIMED = "decode-aaaaaa"
MAX_ATTEMPTS = POLICIES["unknown"].tries or 0
SUITES = ("heldout-bbbbbb", "zero-shot-cccccc", TIMED)


def state(cell: str, stage: str = TRAIN, **changes: Any) -> StageState:
    values: dict[str, Any] = {
        "cell_key": cell,
        "stage": stage,
        "status": "pending",
        "attempts": 0,
        "error": "",
        "requires": (),
        "pool": "cpu",
        "cost_hours": 1.0,
        "model": "m",
        "method": "dense",
        "variant": "v",
        "seed": 0,
        "tokens": 0,
    }
    return StageState(**{**values, **changes})


@st.composite
def grids(draw: st.DrawFn) -> list[StageState]:
    """Up to eight cells, each with any suites, each requiring any of those before it."""
    states = []
    for number in range(draw(st.integers(1, 8))):
        required = draw(st.sets(st.integers(0, number - 1), max_size=2)) if number else set()
        about = {
            "requires": tuple(f"c{i}" for i in sorted(required)),
            "cost_hours": draw(st.floats(0, 10)),
        }
        for stage in (TRAIN, *draw(st.lists(st.sampled_from(SUITES), unique=True))):
            states.append(state(f"c{number}", stage, **about))
    return states


class Runner:
    """Plays a run: starts what is ready, ends it in any order, well or badly."""

    def __init__(self, states: list[StageState], seed: int, failures: int) -> None:
        self.states, self.random, self.failures = states, random.Random(seed), failures
        self.running: dict[str, list[str]] = {}
        self.started: set[tuple[str, str]] = set()

    def change(self, cell: str, stage: str, **changes: Any) -> None:
        self.states = [
            dataclasses.replace(s, **changes) if (s.cell_key, s.stage) == (cell, stage) else s for s in self.states
        ]

    def status(self, cell: str, stage: str) -> str:
        return next(s.status for s in self.states if (s.cell_key, s.stage) == (cell, stage))

    def start(self) -> None:
        found = ready(self.states, busy=frozenset(self.running), alone=frozenset({TIMED}))
        for cell in found[: self.random.randint(1, 3)]:
            requires = next(s.requires for s in self.states if s.cell_key == cell.key)
            assert all(self.status(required, TRAIN) == "done" for required in requires)
            assert TRAIN not in cell.stages[1:], "training comes first"
            assert cell.stages[0] == TRAIN or self.status(cell.key, TRAIN) == "done"
            assert all(self.status(cell.key, stage) != "done" for stage in cell.stages)
            if TIMED in cell.stages:
                assert not self.running, "what measures time has the machine to itself"
            self.running[cell.key] = list(cell.stages)
            self.started |= {(cell.key, stage) for stage in cell.stages}
            timed = [key for key, stages in self.running.items() if TIMED in stages]
            assert not timed or len(self.running) == 1

    def end_one(self) -> None:
        cell = self.random.choice(sorted(self.running))
        for stage in self.running.pop(cell):
            attempts = 1 + next(s.attempts for s in self.states if (s.cell_key, s.stage) == (cell, stage))
            if self.failures and self.random.random() < 0.5 and attempts < MAX_ATTEMPTS:
                self.failures -= 1
                self.change(cell, stage, status="failed", attempts=attempts)
                return
            self.change(cell, stage, status="done", attempts=attempts)

    def run(self) -> None:
        self.start()
        while self.running:
            self.end_one()
            self.start()


@given(grids(), st.integers(0, 1000), st.integers(0, 5))
def test_every_stage_runs_once_its_requirements_are_done(states: list[StageState], seed: int, failures: int) -> None:
    runner = Runner(states, seed, failures)
    runner.run()
    assert {s.status for s in runner.states} == {"done"}
    assert runner.started == {(s.cell_key, s.stage) for s in states}


@given(grids(), st.sampled_from(["running", "skipped", "spent"]))
def test_nothing_of_a_cell_or_behind_it_starts_when_its_training_cannot(states: list[StageState], why: str) -> None:
    first = states[0].cell_key
    skip = frozenset({(first, TRAIN)}) if why == "skipped" else frozenset()
    changes: dict[str, Any] = {
        "running": {"status": "running"},
        "spent": {"attempts": MAX_ATTEMPTS, "status": "failed", "error": "ValueError: what"},
    }.get(why, {})
    states = [dataclasses.replace(s, **changes) if (s.cell_key, s.stage) == (first, TRAIN) else s for s in states]
    found = {cell.key for cell in ready(states, skip=skip)}
    assert first not in found
    assert all(first not in s.requires for s in states if s.cell_key in found)


def keys(states: Sequence[StageState], **options: Any) -> list[str]:
    return [cell.key for cell in ready(states, **options)]


def test_cells_that_others_wait_for_come_first_then_the_costly_ones() -> None:
    states = [
        state("cheap", cost_hours=1.0),
        state("costly", cost_hours=9.0),
        state("pretraining", cost_hours=0.1),
        state("waits", requires=("pretraining",)),
    ]
    assert keys(states) == ["pretraining", "costly", "cheap"]


def test_a_suite_that_failed_does_not_stand_before_the_others() -> None:
    states = [
        state("c", status="done"),
        state("c", "heldout-b", status="failed", attempts=1),
        state("c", "zero-shot-c"),
    ]
    assert ready(states)[0].stages == ("zero-shot-c", "heldout-b")


def test_a_suite_that_was_given_up_leaves_the_others() -> None:
    states = [state("c", status="done"), state("c", "a-1", attempts=MAX_ATTEMPTS, status="failed"), state("c", "b-2")]
    assert ready(states)[0].stages == ("b-2",)


@pytest.mark.parametrize(
    ("status", "error", "attempts", "again"),
    [
        ("failed", "ValueError: nobody knows", MAX_ATTEMPTS - 1, True),
        ("failed", "ValueError: nobody knows", MAX_ATTEMPTS, False),
        ("failed", "RecipeError: cannot be executed", 1, False),
        ("failed", "Diverged: step 3: the loss is nan", 1, False),  # of a store from before divergence was a result
        ("failed", "OutOfMemory: CUDA out of memory; next, with 2 of 4", 9, True),
        ("failed", "DoesNotFit: CUDA out of memory; nothing is left to halve", 2, False),
        ("failed", "StoreError: locked", 4, True),
        ("failed", "StoreError: locked", 5, False),
        ("lost", "its process is gone", 9, True),
        ("lost", "its process is gone", 10, False),
        ("interrupted", "stopped", 99, True),
    ],
)
def test_each_class_of_failure_has_its_number_of_tries(status: Any, error: str, attempts: int, again: bool) -> None:
    states = [state("c", status=status, error=error, attempts=attempts)]
    assert keys(states) == (["c"] if again else [])
    assert states[0].quarantined is not again


def test_what_ran_out_of_memory_waits_until_nothing_else_runs_or_can() -> None:
    scarce = state("a", status="failed", error="OutOfMemory: next, with 2 of 4", attempts=1, cost_hours=9.0, alone=True)
    others = [state("b"), state("c")]
    assert keys([scarce, *others]) == ["b", "c"]
    done = [dataclasses.replace(s, status="done") for s in others]
    assert keys([scarce, *done], busy=frozenset({"c"})) == []
    assert keys([scarce, *done]) == ["a"]
    both = [scarce, dataclasses.replace(scarce, cell_key="d")]
    assert len(keys([*both, *done])) == 1, "one by one"
