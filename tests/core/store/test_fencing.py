"""An attempt that was paused past its lease, or that races with its own expiry, cannot commit: real processes."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import sqlalchemy as sa

from sparseforge_core.errors import CellTaken
from sparseforge_core.store import engine, schema
from sparseforge_core.store.rows import Attempt
from sparseforge_core.store.store import ResultStore
from tests.stores import PROVENANCE, plan, planned_cell, value

CELL = planned_cell("wanda")
OVERDUE = datetime.timedelta(seconds=-60)
"""A lease by which every heartbeat is too old."""


@pytest.fixture
def store(store_url: str) -> Iterator[ResultStore]:
    opened = ResultStore(store_url)
    plan(opened, [CELL])
    yield opened
    opened.close()


def recorded_losses(store: ResultStore, key: str = CELL.key) -> list[tuple[int, float | None]]:
    table = schema.measurement
    with store.engine.connect() as connection:
        rows = connection.execute(sa.select(table.c.attempt_id, table.c.value).where(table.c.cell_key == key))
        return [(row.attempt_id, row.value) for row in rows]


def claim_then_finish(url: str, connection: Connection) -> None:
    """Claim, tell the attempt, and when told so try to commit loss 9; answer how that went."""
    store = ResultStore(url)
    attempt = store.claim(CELL.key, "train", PROVENANCE)
    connection.send(attempt.id)
    connection.recv()
    try:
        store.finish(attempt, [value("loss", 9.0)], {})
    except CellTaken as error:
        connection.send(str(error))
    else:
        connection.send("recorded")
    store.close()


@pytest.mark.postgres
@pytest.mark.parametrize("wrong", [datetime.timedelta(hours=1), datetime.timedelta(hours=-1)], ids=["fast", "slow"])
def test_a_machine_whose_clock_is_wrong_takes_nothing_from_others(
    postgres_url: str, wrong: datetime.timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(tz) + wrong

    lease = datetime.timedelta(minutes=5)
    right, other = ResultStore(postgres_url), ResultStore(postgres_url)
    plan(right, [CELL])
    attempt = right.claim(CELL.key, "train", PROVENANCE)
    monkeypatch.setattr(engine, "datetime", types.SimpleNamespace(datetime=Wrong, UTC=datetime.UTC))
    assert other.expire(lease) == 0
    assert other.heartbeat(attempt)
    monkeypatch.undo()
    assert right.expire(lease) == 0, "a heartbeat that came from the past"
    assert right.expire(datetime.timedelta(seconds=-1)) == 1, "a heartbeat that came from the future"
    right.close()
    other.close()


@pytest.mark.parametrize("successor", ["finished", "running", "none"])
def test_a_process_stopped_past_its_lease_cannot_commit(store: ResultStore, store_url: str, successor: str) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=claim_then_finish, args=(store_url, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a child that dies is an EOFError here and not a wait for ever
    try:
        stale = ours.recv()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        ours.send("finish")
        assert store.expire(OVERDUE) == 1
        fresh = None if successor == "none" else store.claim(CELL.key, "train", PROVENANCE)
        if fresh and successor == "finished":
            store.finish(fresh, [value("loss", 1.0)], {})
        os.kill(process.pid, signal.SIGCONT)
        assert f"attempt {stale} of stage train of cell {CELL.key} is lost" in ours.recv()
        process.join(30)
    finally:
        process.kill()
    if fresh is None:
        assert recorded_losses(store) == []
        fresh = store.claim(CELL.key, "train", PROVENANCE)
    if successor != "finished":
        store.finish(fresh, [value("loss", 1.0)], {})
    assert recorded_losses(store) == [(fresh.id, 1.0)]
    assert store.fsck() == []


def commit_with(together: threading.Barrier, store: ResultStore, attempt: Attempt) -> bool:
    """Whether a commit begun at the same moment as something else was recorded."""
    together.wait()
    try:
        store.finish(attempt, [value("loss", 1.0)], {})
    except CellTaken:
        return False
    return True


def expire_with(together: threading.Barrier, store: ResultStore) -> int:
    together.wait()
    return store.expire(OVERDUE)


def test_a_commit_that_races_with_its_expiry_is_recorded_or_lost_and_never_both(store: ResultStore) -> None:
    cells = [planned_cell(f"racing {number}") for number in range(12)]
    plan(store, cells)
    for cell in cells:
        attempt = store.claim(cell.key, "train", PROVENANCE)
        together = threading.Barrier(2)
        with ThreadPoolExecutor(2) as threads:
            committed = threads.submit(commit_with, together, store, attempt)
            lost = threads.submit(expire_with, together, store)
            assert committed.result() == (lost.result() == 0)
        assert recorded_losses(store, cell.key) == ([(attempt.id, 1.0)] if committed.result() else [])
    assert store.fsck() == []
