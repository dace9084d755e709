"""Many processes that race for the same cells: each cell is won once, and recorded once."""

from __future__ import annotations

import os
from pathlib import Path

import sqlalchemy as sa

from sparseforge_core.errors import CellTaken
from sparseforge_core.store import schema
from sparseforge_core.store.store import ResultStore
from tests.soak.world import DONE, Counts, end_of, fork
from tests.stores import PROVENANCE, plan, planned_cell, value


def race(url: str, scratch: Path, racers: int, cells: int, counts: Counts) -> None:
    """Let `racers` processes claim every one of `cells` cells in the same order, and record what they won."""
    planned = [planned_cell(f"racing {number}") for number in range(cells)]
    store = ResultStore(url)
    plan(store, planned)
    store.close()
    reader, writer = os.pipe()

    def work(racer: int) -> None:
        os.close(writer)
        mine = ResultStore(url)
        os.read(reader, 1)  # all start when the parent closes its end
        for cell in planned:
            try:
                attempt = mine.claim(cell.key, "train", PROVENANCE)
            except CellTaken:
                continue
            mine.finish(attempt, [value("winner", float(racer))], {})
        mine.close()

    log = scratch / "race.log"
    pids = [fork(lambda racer=number: work(racer), log) for number in range(racers)]  # type: ignore[misc]
    os.close(reader)
    os.close(writer)
    codes = [end_of(pid, 600) for pid in pids]
    if codes != [DONE] * racers:
        counts.tracebacks += sum(code != DONE for code in codes)
        counts.say(f"racers ended with {codes}: {log.read_text()[-400:]}")
    store = ResultStore(url)
    try:
        with store.engine.connect() as connection:
            table = schema.attempt
            rows = connection.execute(sa.select(table.c.cell_key).where(table.c.status == "done")).scalars().all()
        counts.double_commits += len(rows) - len(set(rows))
        counts.lost_results += cells - len(set(rows))
        counts.broken(store.fsck())
    finally:
        store.close()
    counts.racing[url.partition(":")[0]] = racers * cells
