"""The one screen: what other processes run and how far they are, what failed, what it costs, until when."""

from __future__ import annotations

import datetime
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cycle import LEASE
from flows.estimates import Pace, clock, devices, makespan, seconds_taken
from flows.home import Home, shown_url
from flows.local import open_grid
from flows.provenance import here
from flows.status import is_over, screen, status_of, summary_line
from flows.watch import CLEAR, HOME, watch
from sparseforge_core.errors import RecipeError, StoreError
from sparseforge_core.store.rows import Attempt, AttemptRecord, Measurement, Provenance, StageState
from sparseforge_core.store.store import ResultStore
from sparseforge_core.tracking.tracker import Journal

GRID = "tiny-smoke"
HERE = Provenance(host=here(), pid=os.getpid())
NOW = datetime.datetime(2026, 5, 6, 12, 0, tzinfo=datetime.UTC)


class Space:
    """A planned tiny grid in a home of its own."""

    def __init__(self) -> None:
        self.home = Home.of()
        self.store, states = open_grid(self.home, GRID)
        self.first = next(s.cell_key for s in states if not s.requires)
        self.forge = next(s.cell_key for s in states if s.method == "sparseforge")

    def claim(self, cell: str, origin: Provenance = HERE) -> Attempt:
        return self.store.claim(cell, "train", origin)

    def see(self) -> dict[str, Any]:
        return status_of(self.home, GRID)


@pytest.fixture
def space(home: Path) -> Iterator[Space]:
    found = Space()
    yield found
    found.store.close()


def state(cell: str, stage: str, **about: Any) -> StageState:
    usual: dict[str, Any] = {
        "status": "pending", "attempts": 0, "error": "", "requires": (), "pool": "cpu", "cost_hours": 1.0, "seed": 0,
        "model": "llama-tiny", "method": "sparseforge", "variant": "SparseForge", "tokens": 1000,
    }  # fmt: skip
    return StageState(cell_key=cell, stage=stage, **(usual | about))


def attempt(cell: str, stage: str, seconds: float, status: Any = "done", **about: Any) -> AttemptRecord:
    end = NOW + datetime.timedelta(seconds=seconds)
    usual: dict[str, Any] = {"context": None, "error": "", "items_sha256": None, "provenance": HERE}
    ends = {"started": NOW, "heartbeat": end, "finished": None if status == "running" else end}
    return AttemptRecord(id=1, cell_key=cell, stage=stage, status=status, **(usual | ends | about))


def test_a_cell_that_another_process_runs_shows_step_loss_and_time_left(space: Space) -> None:
    attempt = space.claim(space.first)
    journal = Journal(space.home.cell(space.first) / "train" / "journal.jsonl")
    for step in range(1, 6):
        journal.scalars(step, {"loss/total": 3.0 - 0.1 * step})
    journal.close()
    seen = space.see()
    (row,) = seen["running"]
    assert (row["key"], row["stage"], row["step"], row["steps"]) == (space.first, "train", 5, 30)
    assert row["loss"] == pytest.approx(2.5)
    assert row["eta"] == pytest.approx(25 * row["step_seconds"], abs=0.1)
    text = "\n".join(screen(seen))
    assert "train 5/30 loss 2.500" in text
    assert "1 running, 3 pending" in text
    assert str(space.home.root) in text
    assert "5/30" in summary_line(seen)
    assert space.store.attempts(space.first)[0].id == attempt.id
    assert space.store.attempts(space.first)[0].status == "running", "asking changes nothing"


def test_a_running_cell_whose_process_is_gone_is_shown_as_lost(space: Space) -> None:
    space.claim(space.first, Provenance(host=here(), pid=2**22 + 1))
    seen = space.see()
    assert seen["counts"] == {"lost": 1, "pending": 3}
    assert seen["running"] == []
    assert seen["failed"][0]["cause"] == "lost worker"
    assert "its process is gone" in "\n".join(screen(seen))


def test_a_cell_of_another_machine_shows_when_it_was_last_heard_of(space: Space) -> None:
    space.claim(space.first, Provenance(host="elsewhere", pid=1))
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    seen = status_of(space.home, GRID, now=later)
    assert "last heard of 9" in "\n".join(screen(seen))
    assert "on elsewhere" in "\n".join(screen(seen))
    silent = status_of(space.home, GRID, now=later + datetime.timedelta(hours=1))
    assert silent["counts"]["lost"] == 1


def test_a_claim_whose_lease_is_over_is_lost_though_a_process_has_its_number(space: Space) -> None:
    space.claim(space.first)  # as by this very process: by then, its number may be that of any other
    later = datetime.datetime.now(datetime.UTC) + LEASE + datetime.timedelta(minutes=2)
    seen = status_of(space.home, GRID, now=later)
    assert (seen["running"], seen["counts"]["lost"]) == ([], 1)
    said = r"it was not heard of for [67]:\d\d, longer than its lease; the next run of the grid goes on"
    assert re.search(said, seen["failed"][0]["error"])
    assert space.store.expire(LEASE) == 0, "by the clock of now it is held"
    assert space.see()["counts"]["running"] == 1


def test_what_failed_says_its_cause_and_what_waits_for_it_has_no_end(space: Space) -> None:
    space.store.fail(space.claim(space.first), "DataError: the corpus\nis empty")
    seen = space.see()
    (row,) = seen["failed"]
    assert (row["cause"], row["quarantined"], row["attempts"]) == ("bad input", True, 1)
    assert "sparseforge_core.run" in row["reproduce"]
    text = "\n".join(screen(seen, width=500))
    assert "nothing more can run" in text
    assert is_over(seen)
    assert "quarantined, tries 1: DataError: the corpus is empty" in text
    assert f"sparseforge run {GRID} --retry-failed" in text
    assert seen["eta"]["seconds"] == 0.0


def test_hours_used_come_from_the_attempts(space: Space) -> None:
    attempt = space.claim(space.first)
    row = Measurement(metric="tokens", value=1.0, stderr=None, n=1)
    space.store.finish(attempt, [row], {"wall_seconds": 7200.0})
    seen = space.see()
    assert seen["hours"]["used"]["cpu"] == pytest.approx(2.0)
    assert seen["eta"]["known"] == {"scaled": 3}
    assert "cpu: 2 worker-hours used" in "\n".join(screen(seen))


def test_the_grid_planned_last_is_meant_where_none_is_named(space: Space) -> None:
    assert status_of(space.home)["grid"] == GRID
    with pytest.raises(StoreError, match="never planned in this store"):
        status_of(space.home, "demo")
    with pytest.raises(RecipeError, match="Did you mean 'demo'"):
        status_of(space.home, "dem")


def test_a_screen_keeps_to_its_width_and_height(space: Space) -> None:
    for cell in {s.cell_key for s in space.store.work(GRID)}:
        space.claim(cell)
    lines = screen(space.see(), width=60, height=14)
    assert max(map(len, lines)) <= 60
    assert any("and 3 more" in line for line in lines)


def test_passwords_are_not_shown() -> None:
    assert shown_url("postgresql+psycopg://me:secret@db:5432/x") == "postgresql+psycopg://me:***@db:5432/x"
    assert shown_url("sqlite:////a/b.db") == "sqlite:////a/b.db"


def seen_as(**counts: int) -> dict[str, Any]:
    return {
        "grid": "g", "cells": sum(counts.values()), "counts": counts, "stages": {"done": 1, "total": 2}, "running": [],
        "failed": [], "diverged": [], "hours": {"used": {}, "left": {}}, "store": "s", "home": "h", "mlflow": "m",
        "eta": {"seconds": 60.0, "workers": {"cpu": 2}, "known": {"measured": 1} if "pending" in counts else {}},
    }  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_watching_a_terminal_redraws_in_place_until_the_grid_is_over() -> None:
    looks = iter([seen_as(done=1, pending=1), seen_as(done=2)])
    out = Terminal()
    assert watch(lambda: next(looks), out, every=0.0) == seen_as(done=2)
    assert out.getvalue().startswith(CLEAR)
    assert out.getvalue().count(HOME) == 3, "once to clear, once a look"


def test_watching_a_file_writes_a_line_for_each_change() -> None:
    looks = iter([seen_as(done=1, pending=1), seen_as(done=1, pending=1), seen_as(done=2)])
    out = io.StringIO()
    watch(lambda: next(looks), out, every=0.0)
    assert [line.partition(", about")[0] for line in out.getvalue().splitlines()] == [
        "g: 2 cells: 1 done, 1 pending",
        "g: 2 cells: 2 done",
    ]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("when", [0, 1])
def test_ctrl_c_ends_the_watching_and_is_no_error(when: int) -> None:
    looks = [seen_as(pending=1)] * when

    def look() -> dict[str, Any]:
        if not looks:
            raise KeyboardInterrupt
        return looks.pop()

    found = watch(look, io.StringIO(), every=0.0)
    assert found == (seen_as(pending=1) if when else None)


def test_watching_as_json_gives_an_object_a_line(
    space: Space, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import cli

    before = status_of(space.home)
    space.store.fail(space.claim(space.first), "DataError: no text")
    looks = iter([before, status_of(space.home)])
    monkeypatch.setattr("flows.status.status_of", lambda *_: next(looks))
    assert cli.main(["status", "--watch", "--json", "--every", "0.001"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [is_over(line) for line in lines] == [False, True]
    assert cli.main(["status", "--watch", "--every", "0"]) == 2


def test_stages_take_what_their_kind_took_else_what_the_plan_says() -> None:
    states = [state("a", "train", status="done"), state("a", "text-1", status="done"), state("b", "train", seed=1)]
    states += [state("b", "text-1", seed=1), state("c", "train", variant="other"), state("c", "text-1")]
    pace = Pace(states, [attempt("a", "train", 100.0), attempt("a", "text-1", 8.0)])
    assert pace.of(states[2]) == pace.of(states[2]).__class__(100.0, "measured")
    assert pace.of(states[3]).seconds == 8.0
    other = pace.of(states[4])
    assert other.how == "scaled"
    assert other.seconds == pytest.approx(0.8 * 3600 * 108.0 / 3600.0)
    assert Pace(states[2:], []).of(states[2]).seconds == pytest.approx(0.8 * 3600)
    assert Pace(states[2:], []).of(states[3]).how == "planned"


def test_seconds_are_those_of_the_attempts_that_a_result_rests_on() -> None:
    found = seconds_taken(
        [
            attempt("a", "train", 50.0, "interrupted"),
            attempt("a", "train", 30.0, "failed"),
            attempt("a", "train", 20.0, context={"wall_seconds": 19.0}),
            attempt("b", "train", 0.1, context={"wall_seconds": 500.0}),
            attempt("c", "train", 9.0, "running"),
        ]
    )
    assert found == {("a", "train"): 70.0, ("b", "train"): 500.0}


def test_the_queue_is_played_to_its_end() -> None:
    assert makespan({}, {}, 2) == 0.0
    assert makespan({"a": 3.0, "b": 2.0, "c": 1.0}, {}, 2) == 3.0
    assert makespan({"a": 3.0, "b": 2.0, "c": 1.0}, {}, 1) == 6.0
    chain = {"b": ("a",), "c": ("b",), "d": ("gone",)}
    assert makespan({"a": 1.0, "b": 1.0, "c": 1.0, "d": 2.5}, chain, 8) == 3.0


def test_durations_and_devices_for_people() -> None:
    assert [clock(s) for s in (7, 750, 11_100, 180_000)] == ["0:07", "12:30", "3 h 05 min", "2 days 2 h"]
    assert [devices(pool) for pool in ("cpu", "gpu-1", "gpu-8", "gpu-big")] == [1, 1, 8, 1]


def test_a_store_without_a_grid_says_how_to_fill_it(home: Path) -> None:
    ResultStore(Home.of().store_url).close()
    with pytest.raises(StoreError, match="holds no grid yet"):
        status_of(Home.of())
