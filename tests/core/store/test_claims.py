"""One live attempt per stage, and nothing recorded by an attempt that is no longer the live one."""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from sparseforge_core.errors import CellTaken, StoreError
from sparseforge_core.store.store import ResultStore
from tests.stores import PROVENANCE, plan, planned_cell, value

CELL = planned_cell("wanda")


@pytest.fixture
def store(store_url: str) -> Iterator[ResultStore]:
    opened = ResultStore(store_url)
    plan(opened, [CELL])
    yield opened
    opened.close()


def status(store: ResultStore, stage: str = "train") -> tuple[str, int]:
    state = next(s for s in store.work("g") if s.stage == stage)
    return state.status, state.attempts


def claim_once(url: str, rounds: int) -> list[int]:
    """Try to take each of `rounds` cells; which ones were won. Runs in a process of its own."""
    store = ResultStore(url)
    won = []
    for number in range(rounds):
        try:
            store.claim(planned_cell(f"cell {number}").key, "train", PROVENANCE)
        except CellTaken:
            continue
        won.append(number)
    store.close()
    return won


def test_eight_threads_claim_and_one_wins(store: ResultStore) -> None:
    together = threading.Barrier(8)

    def claim(_: int) -> bool:
        together.wait()
        try:
            store.claim(CELL.key, "train", PROVENANCE)
        except CellTaken:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(claim, range(8))) == [False] * 7 + [True]


def test_processes_share_the_cells_without_overlap(store: ResultStore, store_url: str) -> None:
    rounds = 30
    plan(store, [planned_cell(f"cell {number}") for number in range(rounds)])
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as processes:
        won = [number for part in processes.map(claim_once, [store_url] * 3, [rounds] * 3) for number in part]
    assert sorted(won) == list(range(rounds))


def test_a_taken_stage_says_by_whom(store: ResultStore) -> None:
    attempt = store.claim(CELL.key, "train", PROVENANCE)
    with pytest.raises(CellTaken, match=rf"held by attempt {attempt.id}, process 7 on here, last heard of 0 s ago"):
        store.claim(CELL.key, "train", PROVENANCE)
    store.finish(attempt, [value("loss", 1.0)], {})
    with pytest.raises(CellTaken, match="is done"):
        store.claim(CELL.key, "train", PROVENANCE)


def test_a_stage_that_nobody_plans_cannot_be_claimed(store: ResultStore) -> None:
    for key, stage in ((CELL.key, "no-such-suite"), ("0123456789ab-s0", "train")):
        with pytest.raises(StoreError, match="no grid in the store plans stage"):
            store.claim(key, stage, PROVENANCE)
    assert store.attempts(CELL.key) == []


def test_after_a_failure_the_stage_can_be_claimed_again(store: ResultStore) -> None:
    first = store.claim(CELL.key, "train", PROVENANCE)
    store.fail(first, "ValueError: bad \0 byte")
    assert status(store) == ("failed", 1)
    second = store.claim(CELL.key, "train", PROVENANCE)
    assert status(store) == ("running", 2)
    store.finish(second, [value("loss", 1.0)], {"device": "cpu"}, "c0ffee")
    assert status(store) == ("done", 2)
    failed, done = store.attempts(CELL.key)
    assert (failed.status, failed.error) == ("failed", "ValueError: bad \\0 byte")
    assert (done.status, done.context, done.items_sha256) == ("done", {"device": "cpu"}, "c0ffee")
    assert failed.provenance == done.provenance == PROVENANCE
    assert done.finished is not None
    assert done.started <= done.finished
    assert done.started.tzinfo is not None
    assert abs(done.started - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=5)


def test_an_interruption_is_no_attempt_that_counts(store: ResultStore) -> None:
    store.fail(store.claim(CELL.key, "train", PROVENANCE), "Ctrl-C", status="interrupted")
    assert status(store) == ("interrupted", 0)


def test_a_silent_attempt_expires_and_cannot_come_back(store: ResultStore) -> None:
    stale = store.claim(CELL.key, "train", PROVENANCE)
    assert store.expire(datetime.timedelta(hours=1)) == 0
    assert store.heartbeat(stale)
    assert store.expire(datetime.timedelta(seconds=-60)) == 1
    assert status(store) == ("lost", 1)
    assert not store.heartbeat(stale)
    fresh = store.claim(CELL.key, "train", PROVENANCE)
    with pytest.raises(CellTaken, match=f"attempt {stale.id} .* is lost and no longer the live one"):
        store.finish(stale, [value("loss", 9.0)], {})
    store.fail(stale, "too late")
    assert status(store) == ("running", 2)
    store.finish(fresh, [value("loss", 1.0)], {})
    with pytest.raises(CellTaken):
        store.finish(stale, [value("loss", 9.0)], {})
    assert store.fsck() == []


def test_attempts_of_dead_processes_of_this_machine_are_released(store: ResultStore) -> None:
    plan(store, [CELL, planned_cell("other"), planned_cell("elsewhere")])
    for name, pid, host in (("wanda", 7, "here"), ("other", 8, "here"), ("elsewhere", 9, "there")):
        store.claim(planned_cell(name).key, "train", dataclasses.replace(PROVENANCE, pid=pid, host=host))
    assert store.release_dead("here", lambda pid: pid == 8) == 1
    left = {s.cell_key: s.status for s in store.work("g") if s.stage == "train"}
    assert left == {
        CELL.key: "lost",
        planned_cell("other").key: "running",
        planned_cell("elsewhere").key: "running",
    }
    assert store.release_dead("here", lambda pid: pid == 8) == 0
