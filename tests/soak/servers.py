"""MLflow and Prefect killed while a grid runs: it costs no result and no time, and what MLflow missed is filled in."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.mirror import lacking
from sparseforge_core import run
from sparseforge_core.identity import loads
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore
from sparseforge_core.tracking.tracker import Journal, read_journal
from tests.processes import processes_of
from tests.soak.grid import GRID
from tests.soak.kills import Tree
from tests.soak.world import DONE, Counts, Reference, World, end_of, fork

COST_STEPS = 400
"""Enough for the journal to be written every tenth step, as in any training of a real length."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def states_of(world: World) -> list[StageState]:
    store = ResultStore(world.home.store_url)
    try:
        return store.work(GRID)
    finally:
        store.close()


def prepared_mlflow(scratch: Path) -> Path:
    """An empty MLflow database: making one takes longer than a run."""
    from sparseforge_core.tracking.mlflow_tracker import prepare

    folder = scratch / "mlflow"
    folder.mkdir(parents=True)

    def work() -> None:
        prepare(f"sqlite:///{folder / 'mlflow.db'}", folder)

    code = end_of(fork(work, scratch / "mlflow.log"), 300)
    if code != DONE:
        raise AssertionError(f"MLflow cannot be prepared: {(scratch / 'mlflow.log').read_text()[-400:]}")
    return folder / "mlflow.db"


def mlflow_killed(reference: Reference, scratch: Path, chance: random.Random, counts: Counts) -> None:
    """A real MLflow server is killed in the middle of a run, which ends as if nothing were; a later run fills it in."""
    from tests.integration.test_mlflow import _server as mlflow_server

    world, port = World(scratch / "with-mlflow"), free_port()
    address = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    with mlflow_server(port, scratch):  # killed with SIGKILL where the block ends
        tree = Tree(world, "--workers", "1", **address)
        _until_training(world, tree)
        time.sleep(chance.uniform(0.0, reference.seconds))
    code = tree.process.wait(300)
    counts.add(counts.faults, "MLflow killed in a run")
    if code:
        counts.lost_results += 1
        counts.say(f"without MLflow the run ended with {code}: {tree.log.read_text()[-400:]}")
    counts.compare(world, reference)
    with mlflow_server(port, scratch):
        again = Tree(world, "--workers", "1", **address)
        if again.process.wait(300):
            counts.lost_results += 1
            counts.say(f"MLflow could not be filled in: {again.log.read_text()[-400:]}")
        log = scratch / "filled.log"
        if end_of(fork(lambda: _filled(world, address["MLFLOW_TRACKING_URI"]), log), 120) != DONE:
            counts.lost_results += 1
            counts.say(f"MLflow lacks what the journals hold: {log.read_text()[-400:]}")


def _filled(world: World, uri: str) -> None:
    """Every scalar of every journal is in MLflow, once."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    from sparseforge_core.tracking import mlflow_tracker

    states = states_of(world)
    home = type(world.home)(world.root, world.home.store_url, uri)
    assert not lacking(home, states), "cells are not mirrored"
    client = mlflow_tracker._client(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = {r.data.tags["cell_key"]: r for r in client.search_runs(experiments) if "cell_key" in r.data.tags}
    for key in {s.cell_key for s in states}:
        lines, _ = read_journal(world.root / "cells" / key / "train" / "journal.jsonl")
        steps = [line["step"] for line in lines if "scalars" in line]
        found = client.get_metric_history(runs[key].info.run_id, "loss/total") if steps else []
        assert [point.step for point in found] == steps, f"{key}: {len(found)} points for {len(steps)}"


def prefect_killed(reference: Reference, scratch: Path, chance: random.Random, counts: Counts) -> None:
    """The Prefect server of a run is killed; the run ends, somehow, and the grid is finished without it."""
    world = World(scratch / "with-prefect")
    tree = Tree(world, "--workers", "1", "--prefect")
    _until_training(world, tree)
    time.sleep(chance.uniform(0.0, reference.seconds / 2))
    killed = [pid for pid, command in processes_of(world.root) if "prefect" in command and "server" in command]
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if not killed:
        raise AssertionError("no Prefect server was found to kill")
    counts.add(counts.faults, "Prefect killed in a run")
    code = tree.ended(300)
    if code is None:
        tree.kill("tree")
        counts.lost_results += 1
        counts.say("a run whose Prefect server was killed did not end within 300 s")
    tree.gone()
    world.check(counts)
    last = Tree(world, "--workers", "1")
    if last.process.wait(300):
        counts.lost_results += 1
        counts.say(f"the grid could not be finished without Prefect: {last.log.read_text()[-400:]}")
    counts.compare(world, reference)


def _until_training(world: World, tree: Tree) -> None:
    deadline = time.monotonic() + 180
    while not list((world.root / "cells").glob("*/train/journal.jsonl")):
        if tree.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"it never trained: {tree.log.read_text()[-1000:]}")
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------- what losing it costs


def cost_of_losing_mlflow(reference: Reference, scratch: Path, pairs: int) -> dict[str, float]:
    """The trainer's seconds with MLflow lost over those without any, and the journal's share of them.

    Lost: beside the trainer a process tries, every second, to copy cells to a server that is gone; a run of a grid does
    so once for each cell that ends. Seconds are those of the processor: on a shared machine only they can be compared.
    """
    key = next(s.cell_key for s in states_of(reference.world) if s.method == "sparseforge")
    cell = loads((reference.world.root / "cells" / key / "cell.json").read_text())
    plan = replace(cell.recipe.train, steps=COST_STEPS, sequences=4, length=32)
    cell = replace(cell, recipe=replace(cell.recipe, train=plan))
    with_it, without, shares = [], [], []
    with _trying_in_vain(reference, scratch) as pause:
        for number in range(2 * pairs + 2):
            lost = number % 2 == 0
            pause(not lost)
            seconds, share = _timed(lambda n=number: run.train_cell(cell, scratch / f"cost-{n}", reference.world.root))  # type: ignore[misc]
            if number >= 2:  # the first two are warm-up
                (with_it if lost else without).append(seconds)
                shares.append(share)
    ratios = [lost / other for lost, other in zip(with_it, without, strict=True)]
    return {
        "trainer_seconds_mlflow_lost_over_without": statistics.median(ratios),
        "journal_share_of_trainer_seconds": statistics.median(shares),
    }


def _timed(work: Any) -> tuple[float, float]:
    """Processor seconds of a piece of work, and the share of its time that went into the journal."""
    spent, write = [0.0], Journal._write

    def timed(journal: Journal, body: dict[str, Any]) -> None:
        began = time.process_time()
        write(journal, body)
        spent[0] += time.process_time() - began

    Journal._write = timed  # type: ignore[method-assign]
    try:
        began = time.process_time()
        work()
        seconds = time.process_time() - began
    finally:
        Journal._write = write  # type: ignore[method-assign]
    return seconds, spent[0] / seconds


@contextlib.contextmanager
def _trying_in_vain(reference: Reference, scratch: Path) -> Iterator[Any]:
    """A process that mirrors a finished cell to a dead server again and again, and how to hold it still."""
    world = reference.world.copy(scratch / "mirrored")
    states = {s.cell_key: s for s in states_of(world)}
    uri = f"http://127.0.0.1:{free_port()}"

    def work() -> None:
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
        from sparseforge_core.tracking.mlflow_tracker import MirrorError, mirror_cell

        while True:
            for key, state in states.items():
                with contextlib.suppress(MirrorError):
                    mirror_cell(uri, world.root, world.home.cell(key), GRID, state)
                (scratch / "trying").touch()
                time.sleep(1.0)

    pid = fork(work, scratch / "trying.log")
    try:
        deadline = time.monotonic() + 120
        while not (scratch / "trying").exists():
            if time.monotonic() > deadline:
                raise AssertionError(f"it never tried: {(scratch / 'trying.log').read_text()[-400:]}")
            time.sleep(0.05)
        yield lambda still: os.kill(pid, signal.SIGSTOP if still else signal.SIGCONT)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
