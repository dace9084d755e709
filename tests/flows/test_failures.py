"""Each class of failure and what its policy does: memory, one writer a folder, quarantine and release, stores away."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import multiprocessing
import os
import shlex
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flows import cycle, failures
from flows.cycle import execute_stage, ready
from flows.failures import is_out_of_memory, patiently, release_quarantined, reproducer
from flows.home import Home
from flows.stages import TRAIN
from sparseforge_core import files, run
from sparseforge_core.errors import (
    CellTaken,
    CheckpointMismatch,
    CurvatureUnavailable,
    DataError,
    Diverged,
    DoesNotFit,
    FolderHeld,
    NotFinite,
    OutOfMemory,
    RecipeError,
    SparseForgeError,
    StoreError,
    described,
)
from sparseforge_core.store.causes import POLICIES, cause_of
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore
from tests.flows.test_cycle import ORIGIN, Workspace, final_loss

OVERDUE = datetime.timedelta(seconds=-60)
"""A lease by which every heartbeat is too old."""


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def state_of(space: Workspace, cell: str, stage: str = TRAIN) -> StageState:
    return next(s for s in space.states() if (s.cell_key, s.stage) == (cell, stage))


def torch_allocation() -> BaseException:
    """What torch raises when the host has no memory for a tensor."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    return caught.value


class MissingCorpus(DataError):
    """A subclass from another room."""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OutOfMemory("x"), "out of memory"),
        (DoesNotFit("x"), "out of memory"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (Diverged("step 3: the loss is nan"), "diverged"),
        (NotFinite("curvature of 1 of 2 sites is not finite"), "diverged"),
        (CurvatureUnavailable("no gradient"), "bad input"),
        (RecipeError("pattern: needs one"), "bad input"),
        (CheckpointMismatch("of another cell"), "bad input"),
        (MissingCorpus("no such text"), "bad input"),
        (StoreError("locked"), "unavailable"),
        (FolderHeld("still being written"), "unavailable"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "unavailable"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "unavailable"),
        (ValueError("what"), "unknown"),
        (KeyError("what"), "unknown"),
    ],
)
def test_the_class_of_a_failure_is_told_from_what_the_store_keeps(error: BaseException, cause: str) -> None:
    assert cause_of("failed", described(error)) == cause


class OfflineModeIsEnabled(ConnectionError):
    """By this name the hub's client says that the user wants no network."""


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (ConnectionResetError("reset by peer"), "unavailable"),
        (TimeoutError("no answer"), "unavailable"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "unavailable"),
        (OfflineModeIsEnabled("offline"), "bad input"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), "bad input"),
        (ValueError("no JSON"), "bad input"),
    ],
)
def test_data_that_a_network_or_a_disk_withholds_may_come_later(reason: Exception, cause: str) -> None:
    with pytest.raises(DataError) as caught:
        raise DataError("the text cannot be read") from reason
    assert cause_of("failed", described(caught.value)) == cause


def test_how_an_attempt_ended_is_a_class_by_itself() -> None:
    assert cause_of("lost", "its process is gone") == "lost worker"
    assert cause_of("interrupted", "stopped") == "interrupted"
    assert cause_of("done", "") is cause_of("pending", "") is cause_of("running", "") is None
    assert cause_of("done", "Diverged: step 3") == "diverged"
    assert set(POLICIES) == {
        "out of memory",
        "diverged",
        "bad input",
        "lost worker",
        "interrupted",
        "unavailable",
        "unknown",
    }
    assert all(policy.says for policy in POLICIES.values())


def test_every_library_that_runs_out_of_memory_is_understood() -> None:
    assert is_out_of_memory(torch_allocation())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert not is_out_of_memory(RuntimeError("shape '[2, 3]' is invalid"))
    assert not is_out_of_memory(ValueError("out of memory is only a word here"))


# ---------------------------------------------------------------- memory


@contextlib.contextmanager
def room_for(sequences: int) -> Iterator[list[int]]:
    """A machine on which the head's output of more sequences finds no memory: torch's own allocator refuses.

    Gives the numbers of sequences that passed, or tried to.
    """
    seen: list[int] = []

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(module, nn.Linear) and module.out_features > 200 and torch.is_grad_enabled():
            seen.append(output.shape[0])
            if output.shape[0] > sequences:
                torch.empty(2**58)
        return output

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def test_memory_that_runs_out_halves_the_micro_batch_down_to_what_fits(space: Workspace, tmp_path: Path) -> None:
    with room_for(1) as seen:
        for size, left in ((4, 2), (2, 1)):
            with pytest.raises(OutOfMemory, match=f"next, with {left} of {size} sequences at once, alone"):
                space.execute(space.first)
            assert (state_of(space, space.first).cause, state_of(space, space.first).alone) == ("out of memory", True)
            assert not state_of(space, space.first).quarantined
        space.execute(space.first)
    assert seen[:2] == [4, 2]
    assert set(seen[2:]) == {1}
    assert [a.cause for a in space.store.attempts(space.first)] == ["out of memory", "out of memory", None]
    straight = Workspace(tmp_path / "straight")
    straight.execute(straight.first)
    assert final_loss(space) == pytest.approx(final_loss(straight), rel=1e-4)


def test_a_cell_that_fits_at_no_size_is_given_up_with_the_arithmetic(space: Workspace) -> None:
    with room_for(0):
        for _ in range(2):
            with pytest.raises(OutOfMemory, match="next, with"):
                space.execute(space.first)
        with pytest.raises(DoesNotFit, match=r"1 sequence at once.*about 0\.00 GiB.*and there are \d+\.\d\d GiB"):
            space.execute(space.first)
    found = state_of(space, space.first)
    assert (found.cause, found.quarantined, found.attempts) == ("out of memory", True, 3)
    assert ready(space.states()) == [], "nobody runs it, nor what waits for it"
    release_quarantined(space.store, "tiny-smoke", ORIGIN)
    assert not state_of(space, space.first).alone
    with room_for(4) as seen:
        space.execute(space.first)
    assert seen[0] == 4, "after a release it begins anew with everything at once"


# ---------------------------------------------------------------- quarantine


def test_what_used_up_its_tries_stays_away_until_it_is_released(space: Workspace) -> None:
    for number in range(3):
        assert [cell.key for cell in ready(space.states())] == [space.first]
        space.store.fail(space.store.claim(space.first, TRAIN, ORIGIN), f"ValueError: try {number}")
    assert ready(space.states()) == []
    assert state_of(space, space.first).quarantined
    assert release_quarantined(space.store, "tiny-smoke", ORIGIN) == 1
    assert release_quarantined(space.store, "tiny-smoke", ORIGIN) == 0
    found = state_of(space, space.first)
    assert (found.status, found.attempts, found.quarantined) == ("interrupted", 0, False)
    space.store.fail(space.store.claim(space.first, TRAIN, ORIGIN), "ValueError: once more")
    assert state_of(space, space.first).attempts == 1
    space.execute(space.first)
    assert space.status(space.first) == "done"
    assert space.store.release([(space.first, TRAIN)], ORIGIN) == 0, "what is done is left alone"
    assert space.store.fsck() == []


def test_a_release_is_kept_by_both_databases(store_url: str) -> None:
    from tests.stores import PROVENANCE, plan, planned_cell

    store, cell = ResultStore(store_url), planned_cell("wanda")
    plan(store, [cell])
    store.fail(store.claim(cell.key, TRAIN, PROVENANCE), "RecipeError: no")
    assert next(s for s in store.work("g") if s.stage == TRAIN).quarantined
    assert store.release([(cell.key, TRAIN)], PROVENANCE) == 1
    assert not any(s.quarantined for s in store.work("g"))
    store.finish(store.claim(cell.key, TRAIN, PROVENANCE), [], {}, error="Diverged: step\0 3")
    found = next(s for s in store.work("g") if s.stage == TRAIN)
    assert (found.status, found.cause, found.error) == ("done", "diverged", "Diverged: step\\0 3")
    assert store.release([(cell.key, TRAIN)], PROVENANCE) == 0
    store.close()


def test_the_one_line_reproducer_runs_the_stage_again_elsewhere(space: Workspace) -> None:
    space.execute(space.first)
    space.execute(space.dense)
    space.execute(space.dense, space.suite)
    measured = space.home.cell(space.dense) / space.suite / "measurements.json"
    for key, stage in ((space.first, TRAIN), (space.dense, space.suite)):
        words = shlex.split(reproducer(space.home, state_of(space, key, stage)))
        assert words[:3] == ["python", "-m", "sparseforge_core.run"]
        assert run.main(words[3:]) == 0
        again = space.home.root / "reproduced" / key / stage / "measurements.json"
        assert again.is_file()
    one, other = (json.loads(path.read_text())["measurements"] for path in (measured, again))
    assert one == other


def test_the_reproducer_takes_as_much_at_once_as_the_stage_had(space: Workspace) -> None:
    state = state_of(space, space.first)
    assert "--micro-batch" not in reproducer(space.home, state)
    assert " train --micro-batch 4 " in reproducer(space.home, dataclasses.replace(state, pool="gpu-1"))
    last = dataclasses.replace(state, status="failed", error="DoesNotFit: no memory")
    assert " train --micro-batch 1 " in reproducer(space.home, last)


# ---------------------------------------------------------------- a store that is away


def test_a_store_that_is_away_is_asked_again_and_then_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", slept.append)
    answers = [StoreError("away"), StoreError("away"), "here"]

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask) == "here"
    assert slept == [1.0, 2.0]
    answers[:] = [StoreError("away")] * 6
    with pytest.raises(StoreError):
        patiently(ask)
    assert slept == [1.0, 2.0, 1.0, 2.0, 4.0, 8.0, 16.0]


# ---------------------------------------------------------------- one writer a folder


def test_a_folder_has_one_writer_and_who_comes_second_is_told_whom(tmp_path: Path) -> None:
    with files.held(tmp_path / "train", seconds=0.0):
        with (
            pytest.raises(FolderHeld, match=f"still being written by process {os.getpid()} on .*kill -CONT"),
            files.held(tmp_path / "train", seconds=0.0),
        ):
            pytest.fail("two writers")
        with files.held(tmp_path / "suite", seconds=0.0):
            assert isinstance(FolderHeld(""), SparseForgeError)
    with files.held(tmp_path / "train", seconds=0.0):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".suite.held", ".train.held"]


def execute_and_tell(home: Home, key: str, connection: Connection) -> None:
    """Execute the training, telling when it has made a step, and how it ended."""
    cycle.HEARTBEAT_SECONDS = 0.05
    store = ResultStore(home.store_url)
    told: list[int] = []

    def tell(progress: Any) -> None:
        if not told:
            connection.send(progress.step)
            connection.recv()
        told.append(progress.step)

    try:
        execute_stage(store, home, key, TRAIN, ORIGIN, on_step=tell)
    except CellTaken as error:
        connection.send(str(error))
    else:
        connection.send("done")
    store.close()


@pytest.mark.slow
def test_a_process_stopped_past_its_lease_keeps_its_folder_and_spoils_nothing(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycle, "FOLDER_SECONDS", 0.3)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=execute_and_tell, args=(space.home, space.first, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.recv() == 1
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        ours.send("go on")  # which it will hear when it may
        assert space.store.expire(OVERDUE) == 1
        with pytest.raises(FolderHeld, match=f"process {process.pid}"):
            space.execute(space.first)
        assert state_of(space, space.first).cause == "unavailable"
        os.kill(process.pid, signal.SIGCONT)
        assert "another process" in (said := ours.recv()) or "no longer the live one" in said
        process.join(30)
    finally:
        process.kill()
    space.execute(space.first)
    assert [a.status for a in space.store.attempts(space.first)] == ["lost", "failed", "done"]
    straight = Workspace(tmp_path / "straight")
    straight.execute(straight.first)
    assert final_loss(space) == final_loss(straight)
    one, other = (s.home.cell(s.first) / TRAIN / "final" / "model.safetensors" for s in (space, straight))
    assert files.sha256(one) == files.sha256(other)
