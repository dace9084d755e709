"""Executing a stage: claimed, run, recorded; and every way in which it may end instead. Real cells, a real store."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from flows import cycle
from flows.cycle import TRAIN, execute_stage, plan_grid
from flows.home import Home
from flows.provenance import here, machine_of, process_alive, provenance, state_of
from sparseforge_core import run
from sparseforge_core.errors import CellTaken, CheckpointMismatch, Interrupted, RecipeError
from sparseforge_core.identity import loads
from sparseforge_core.store.rows import Provenance, StageState
from sparseforge_core.store.store import ResultStore

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = Provenance(host=here(), pid=os.getpid())


class Workspace:
    """A home with a planned tiny grid; its pretraining cell is the one that needs no other."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root, f"sqlite:///{root / 'store.db'}", f"sqlite:///{root / 'mlflow.db'}")
        self.store = ResultStore(self.home.store_url)
        plan_grid(self.store, "tiny-smoke")
        self.first = next(s.cell_key for s in self.states() if not s.requires)
        self.dense = next(s.cell_key for s in self.states() if s.method == "dense")
        self.suite = next(s.stage for s in self.states() if s.cell_key == self.dense and s.stage != TRAIN)

    def states(self) -> list[StageState]:
        return self.store.work("tiny-smoke")

    def status(self, cell: str, stage: str = TRAIN) -> str:
        return next(s.status for s in self.states() if (s.cell_key, s.stage) == (cell, stage))

    def execute(self, cell: str, stage: str = TRAIN, **options: Any) -> None:
        execute_stage(self.store, self.home, cell, stage, ORIGIN, **options)


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def stopper(after: int) -> dict[str, Any]:
    """Options that ask a training to stop after some steps."""
    seen: list[int] = []
    return {"on_step": lambda progress: seen.append(progress.step), "should_stop": lambda: len(seen) >= after}


def test_a_stage_is_run_recorded_and_never_run_again(space: Workspace) -> None:
    for cell, stage in ((space.first, TRAIN), (space.dense, TRAIN), (space.dense, space.suite)):
        space.execute(cell, stage)
        assert space.status(cell, stage) == "done"
        space.execute(cell, stage)
        assert len([a for a in space.store.attempts(cell) if a.stage == stage]) == 1


def test_a_stopped_training_is_interrupted_and_goes_on_to_the_same_end(space: Workspace, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        space.execute(space.first, **stopper(12))
    assert space.status(space.first) == "interrupted"
    steps: list[int] = []
    space.execute(space.first, on_step=lambda progress: steps.append(progress.step))
    assert steps == list(range(13, 31))
    straight = Workspace(tmp_path / "straight")
    straight.execute(straight.first)
    assert final_loss(space) == final_loss(straight)


def test_a_checkpoint_that_says_another_step_than_its_folder_is_refused(
    space: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        space.execute(space.first, **stopper(12))
    folder = space.home.cell(space.first) / TRAIN / "checkpoints"
    (folder / "step-00000012").rename(folder / "step-00000020")
    with pytest.raises(CheckpointMismatch, match="none of the 1 checkpoints"):
        space.execute(space.first)
    assert "step-00000020 says that it is of step 12" in caplog.text


def final_loss(space: Workspace) -> float:
    body = json.loads((space.home.cell(space.first) / TRAIN / "measurements.json").read_text())
    return next(float(m["value"]) for m in body["measurements"] if m["metric"] == "final_loss")


def test_what_was_finished_on_disk_but_not_recorded_is_recorded_and_not_run(space: Workspace) -> None:
    directory = space.home.cell(space.first) / TRAIN
    run.train_cell(loads(space.store.cell_body(space.first)), directory, space.home.root)
    space.execute(space.first, on_step=lambda _: pytest.fail("it was trained again"))
    space.execute(space.dense)
    space.execute(space.dense, space.suite)
    other = ResultStore(f"sqlite:///{space.home.root / 'another.db'}")
    plan_grid(other, "tiny-smoke")
    file = space.home.cell(space.dense) / space.suite / "measurements.json"
    written = file.stat().st_mtime_ns
    execute_stage(other, space.home, space.dense, space.suite, ORIGIN)
    assert file.stat().st_mtime_ns == written
    assert {a.status for a in other.attempts(space.dense)} == {"done"}


def test_what_a_killed_writer_of_a_suite_left_goes_with_the_next_try(space: Workspace) -> None:
    space.execute(space.first)
    space.execute(space.dense)
    left = space.home.cell(space.dense) / f".{space.suite}.json.999999.tmp"
    left.write_text("{")
    space.execute(space.dense, space.suite)
    assert not left.exists()


def test_files_of_another_cell_or_torn_ones_are_refused_with_what_to_do(space: Workspace) -> None:
    space.execute(space.first)
    file = space.home.cell(space.dense) / space.suite / "measurements.json"
    space.execute(space.dense)
    space.execute(space.dense, space.suite)
    fresh = ResultStore(f"sqlite:///{space.home.root / 'another.db'}")
    plan_grid(fresh, "tiny-smoke")
    text = file.read_text()
    for broken in (text.replace(space.dense, space.first), text[:40]):
        file.write_text(broken)
        with pytest.raises(CheckpointMismatch, match=r"wanted cell|delete"):
            execute_stage(fresh, space.home, space.dense, space.suite, ORIGIN)
    assert [a.status for a in fresh.attempts(space.dense)] == ["failed", "failed"]
    assert "CheckpointMismatch" in fresh.attempts(space.dense)[0].error


def test_a_stage_that_another_process_holds_is_taken(space: Workspace) -> None:
    space.store.claim(space.first, TRAIN, ORIGIN)
    with pytest.raises(CellTaken, match=f"process {os.getpid()}"):
        space.execute(space.first)


def test_a_stage_whose_requirement_is_missing_fails_with_a_sentence(space: Workspace) -> None:
    with pytest.raises(CheckpointMismatch, match="run its train stage first"):
        space.execute(space.dense)
    state = next(s for s in space.states() if (s.cell_key, s.stage) == (space.dense, TRAIN))
    assert state.status == "failed"
    assert space.first in state.error


def test_an_attempt_given_to_somebody_else_stops_and_records_nothing(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycle, "HEARTBEAT_SECONDS", 0.01)

    def lose(progress: Any) -> None:
        if progress.step == 2:
            space.store.expire(datetime.timedelta(seconds=-1))

    with pytest.raises(CellTaken, match=r"another process|no longer the live one"):
        space.execute(space.first, on_step=lose)
    assert space.status(space.first) == "lost"
    space.execute(space.first)
    assert space.status(space.first) == "done"


def test_a_stop_is_a_stop_though_the_store_is_away(space: Workspace, tmp_path: Path) -> None:
    moved = tmp_path / "moved.db"

    def stop() -> bool:
        if not moved.exists():
            (space.home.root / "store.db").rename(moved)
        return True

    with pytest.raises(Interrupted, match="stopped after step 1"):
        space.execute(space.first, should_stop=stop)
    moved.rename(space.home.root / "store.db")
    assert space.status(space.first) == "running", "nobody could be told; a dead process is found by the next run"


def test_a_result_waits_for_a_store_that_is_away(space: Workspace, tmp_path: Path) -> None:
    store, moved = space.home.root / "store.db", tmp_path / "moved.db"

    def take_away(progress: Any) -> None:
        if progress.step == progress.steps:
            store.rename(moved)
            threading.Timer(1.5, lambda: moved.rename(store)).start()

    space.execute(space.first, on_step=take_away)
    assert [a.status for a in space.store.attempts(space.first)] == ["done"]
    assert space.store.fsck() == []


def test_a_store_that_goes_away_right_after_the_claim_costs_no_attempt(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, moved, run = space.home.root / "store.db", tmp_path / "moved.db", cycle.run_stage

    def away(*given: Any) -> Path:
        store.rename(moved)
        threading.Timer(1.5, lambda: moved.rename(store)).start()
        return run(*given)

    monkeypatch.setattr(cycle, "run_stage", away)
    for stage in sorted({s.stage for s in space.store.work("tiny-smoke") if s.cell_key == space.first}, reverse=True):
        space.execute(space.first, stage)
        assert [a.status for a in space.store.attempts(space.first) if a.stage == stage] == ["done"], stage
    assert space.store.fsck() == []


def test_a_cell_for_many_gpus_is_refused_before_anything_is_loaded(space: Workspace) -> None:
    plan_grid(space.store, "table-2")
    cell = next(s.cell_key for s in space.store.work("table-2") if s.pool == "gpu-8")
    with pytest.raises(RecipeError, match="8 GPUs at once"):
        space.execute(cell)


def test_planning_again_changes_nothing(space: Workspace) -> None:
    space.execute(space.first)
    before = space.states()
    plan_grid(space.store, "tiny-smoke")
    assert space.states() == before


def test_provenance_says_what_made_an_attempt() -> None:
    origin = provenance()
    assert origin.pid == os.getpid()
    assert process_alive(origin.pid)
    assert len(origin.lock_sha) == 64
    assert not process_alive(2**22 + 1)


def test_results_kept_beside_the_code_are_no_change_of_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "results").mkdir()
    store, code = tmp_path / "results" / "store.db", tmp_path / "code.py"
    for path in (store, code):
        path.write_text("before\n")
    git("add", ".")
    git("commit", "-qm", "first")
    store.write_text("after\n")
    assert state_of(tmp_path) == (git("rev-parse", "HEAD"), "")
    code.write_text("after\n")
    assert len(state_of(tmp_path)[1]) == 64


def said_here(*before: str) -> str:
    """What a new process says of where it is."""
    command = [*before, sys.executable, "-c", "from flows.provenance import here; print(here())"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_a_namesake_is_another_machine_and_so_is_a_container_of_this_one(space: Workspace) -> None:
    """Process numbers mean nothing there: what it holds is left to its lease."""
    assert said_here() == here()
    assert machine_of(here()) == socket.gethostname()
    others = [f"{socket.gethostname()}/00000000", socket.gethostname()]  # another boot, a row of an earlier version
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:  # it takes a privilege
        others.append(said_here(*unshare))
    for number, other in enumerate(others):
        attempt = space.store.claim(space.first, TRAIN, Provenance(host=other, pid=2**22 + 1))
        assert space.store.release_dead(here(), process_alive) == 0, other
        assert space.status(space.first) == "running"
        assert space.store.expire(datetime.timedelta(seconds=-1)) == 1
        assert space.store.attempts(space.first)[number].id == attempt.id
    space.store.claim(space.first, TRAIN, Provenance(host=here(), pid=2**22 + 1))
    assert space.store.release_dead(here(), process_alive) == 1
