"""When a checkpoint is due: always while saving is quick, and by its share of the time where it is slow."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparseforge_core.train import loop


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    return now


def save(saving: loop._Saving, clock: list[float], seconds: float) -> None:
    with saving.timed():
        clock[0] += seconds


def size(seconds: float) -> Callable[[], int]:
    return lambda: int(seconds * loop.SAVE_RATE)


def test_quick_checkpoints_are_never_passed_over(clock: list[float]) -> None:
    saving = loop._Saving(size(0.1), patient=True)
    assert saving.is_due()
    save(saving, clock, loop.SLOW_SAVE - 0.1)
    assert saving.is_due()


def test_the_first_one_is_judged_by_its_size(clock: list[float]) -> None:
    saving = loop._Saving(size(8.0), patient=True)
    clock[0] += 79.0
    assert not saving.is_due()
    clock[0] += 1.5
    assert saving.is_due()
    save(saving, clock, 0.2)
    assert saving.is_due(), "it was quicker than expected"


def test_a_slow_one_waits_until_it_is_a_tenth_of_the_time(clock: list[float]) -> None:
    saving = loop._Saving(size(0.1), patient=True)
    save(saving, clock, 7.0)
    clock[0] += 69.0
    assert not saving.is_due()
    clock[0] += 1.0
    assert saving.is_due()


def test_ranks_save_whenever_it_is_planned(clock: list[float]) -> None:
    saving = loop._Saving(size(100.0), patient=False)
    save(saving, clock, 7.0)
    assert saving.is_due()
