"""Real workers that run out of memory, and a real grid with a cell in quarantine, as a user meets them."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from flows import cli, grids
from flows.grids.planned import Grid, Planned, expand
from flows.home import Home
from flows.pool import WorkerPool
from sparseforge_core.data.corpora import Synthetic, TextFiles
from sparseforge_core.methods import DenseControl
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.recipe import Recipe, TrainPlan
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.store.store import ResultStore

pytestmark = pytest.mark.slow

TEXT = Synthetic(documents_count=200)
ROOM = 900 * 2**20
"""Bytes that a worker may take besides what it has when a stage begins."""


def training(corpus: Any, sequences: int, steps: int) -> Recipe:
    tokenizer = TrainedBPE(corpus=TEXT, size=300)
    tiny = Tiny(architecture="llama", tokenizer=tokenizer, width=32, layers=2, heads=2, positions=64)
    plan = TrainPlan(steps=steps, sequences=sequences, length=64, lr=WarmupLinear(peak=1e-3))
    return Recipe(model=tiny, method=DenseControl(), corpus=corpus, train=plan)


def grid_of(*recipes: Recipe) -> Grid:
    entries = tuple(Planned(recipe=recipe, variant=f"number {n}") for n, recipe in enumerate(recipes))
    return Grid(name="troubled", title="Troubled", entries=entries, captions={})


def home_of(root: Path) -> Home:
    return Home(root, f"sqlite:///{root / 'store.db'}", "http://127.0.0.1:9")


def size_of(pid: int) -> int:
    """Bytes of address space that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def test_memory_that_ends_in_a_worker_ends_the_worker_and_half_as_much_runs_in_a_fresh_one(tmp_path: Path) -> None:
    home, plan = home_of(tmp_path), expand(grid_of(training(TEXT, 2400, 1)))
    store = ResultStore(home.store_url)
    store.plan("troubled", "Troubled", plan.cells, plan.suites, plan.slots, plan.stages)
    (cell,) = (cell.key for cell in plan.cells)

    def crowd(_: Any) -> None:
        for pid in pool.pids():  # the kernel's own limit on this process
            resource.prlimit(pid, resource.RLIMIT_AS, (size_of(pid) + ROOM, resource.RLIM_INFINITY))

    pool, outcomes, pids = WorkerPool(home, 2, crowd), [], []
    try:
        for _ in range(8):
            outcomes.append(pool.execute(cell, ("train",)))
            pids.append(store.attempts(cell)[-1].provenance.pid)
            if outcomes[-1].status == "done":
                break
            assert pool.pids() == [], "the process in which memory ran out is gone"
    finally:
        pool.stop()
    assert outcomes[-1].status == "done", outcomes
    assert len(outcomes) > 1
    assert {(o.status, o.cause) for o in outcomes[:-1]} == {("failed", "out of memory")}
    assert "next, with 1200 of 2400 sequences at once, alone and in a fresh process" in outcomes[0].error
    assert len(set(pids)) == len(pids)
    assert [a.cause for a in store.attempts(cell)] == ["out of memory"] * (len(outcomes) - 1) + [None]
    store.close()


def test_a_cell_in_quarantine_stays_there_until_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(list(TEXT.all_documents(tmp_path))[:50]))
    grid = grid_of(training(TextFiles.of(text), 4, 5))
    monkeypatch.setitem(grids.GRIDS, "troubled", lambda: grid)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = text.rename(tmp_path / "elsewhere.txt")
    command = ["run", "troubled", "--workers", "1", "--quiet", "--home", str(tmp_path / "home")]
    (bad,) = (cell.key for cell in expand(grid).cells)
    for _ in ("it fails", "nobody tries it again"):
        assert cli.main(command) == 1
        said = capsys.readouterr()
        assert "troubled: 0 cells executed now, 1 planned" in said.out
        assert f"failed {bad}: DataError: " in said.err
        assert f"reproduce with: python -m sparseforge_core.run --home {tmp_path / 'home'} train " in said.err
        assert "1 cells are in quarantine" in said.err
        assert "Once the cause is gone: sparseforge run troubled --retry-failed" in said.err
    assert cli.main(["status", "troubled", "--home", str(tmp_path / "home")]) == 1
    said = capsys.readouterr()
    assert "reproduce with: python -m sparseforge_core.run" in said.out
    away.rename(text)
    assert cli.main([*command, "--retry-failed"]) == 0
    assert "troubled: 1 cells executed now, 1 planned" in capsys.readouterr().out
    store = ResultStore(f"sqlite:///{tmp_path / 'home' / 'store.db'}")
    assert [a.status for a in store.attempts(bad) if not a.is_mark] == ["failed", "done"]
    store.close()
