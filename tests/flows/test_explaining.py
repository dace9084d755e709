"""`sparseforge explain`: what a cell is, who wants it, why it ran or has not, and how to run it again."""

from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from flows import cli, doctor
from flows.explaining import UnknownCell, explain, log_tail, recipe_lines
from flows.explanation import explanation_lines
from flows.home import Home
from flows.stages import TRAIN
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import StoreError
from sparseforge_core.identity import key_of
from sparseforge_core.methods import DenseControl
from sparseforge_core.objective import Distill
from sparseforge_core.recipe import Cell, Recipe, Trained, TrainPlan
from tests.flows.test_cycle import ORIGIN, Workspace, stopper
from tests.tiny import tiny_source


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home")


def cell_of(space: Workspace, method: str) -> str:
    return next(s.cell_key for s in space.states() if s.method == method)


def whys(space: Workspace, cell: str) -> dict[str, str]:
    return {stage["stage"]: stage["why"] for stage in explain(cell, space.home)["stages"]}


def test_a_finished_cell_tells_its_recipe_its_readers_its_attempts_and_its_files(space: Workspace) -> None:
    with pytest.raises(Exception, match="stopped after step"):
        space.execute(space.first, **stopper(12))
    space.execute(space.first)
    found = explain(space.first, space.home)
    assert "method = dense-control" in found["recipe"]
    assert "train.steps = 30" in found["recipe"]
    assert not any(line.startswith("train.clip") for line in found["recipe"]), "only what differs from the defaults"
    assert set(found["wanted"]["cells"]) == {cell_of(space, m) for m in ("dense", "wanda", "sparseforge")}
    assert found["wanted"]["grids"] == ["tiny-smoke"]
    assert [(a["status"], a["cause"]) for a in found["attempts"]] == [("interrupted", "interrupted"), ("done", None)]
    assert found["stages"][0]["why"].startswith("done by attempt 2 on ")
    assert found["journal"][-1].startswith("step 30: loss/total ")
    assert "train/final/model.safetensors" in {file["path"] for file in found["files"]}
    assert "final_loss" in {row["metric"] for row in found["measurements"]}
    assert found["reproduce"][0].startswith("python -m sparseforge_core.run --home ")


def test_a_teacher_of_the_cell_s_own_seed_is_named_by_it() -> None:
    source = tiny_source("llama")
    control = Recipe(model=source, method=DenseControl(), corpus=Synthetic(), train=TrainPlan(steps=1))
    pupil = replace(control, objective=Distill(teacher=Trained(recipe=control, seed=None)))
    said = list(recipe_lines(Cell(recipe=pupil, seed=3)))
    assert f"objective.teacher = the model of cell {key_of(control)}-s3" in said


def test_a_cell_says_what_it_waits_for_and_how_it_differs_from_its_neighbour(space: Workspace) -> None:
    forge, wanda = cell_of(space, "sparseforge"), cell_of(space, "wanda")
    assert f"waits for the model of cell {space.first} (pending)" in whys(space, forge)[TRAIN]
    found = explain(forge, space.home)
    assert found["reproduce"][0].startswith(
        "sparseforge plan tiny-smoke --out cells && python -m sparseforge_core.run "
    )
    assert f"model = the model of cell {space.first}" in found["recipe"]
    assert {(row["exhibit"], row["row"]) for row in found["wanted"]["rows"]} == {("table-2", "sparseforge")}
    assert found["neighbour"]["grid"] == "tiny-smoke"
    near = explain(wanda, space.home)["neighbour"]
    assert near["recipe"] == cell_of(space, "dense").rpartition("-s")[0]
    assert near["changes"] == ["method: was dense, now wanda", "pattern: was null, now group-pattern"]
    space.execute(space.first)
    assert whys(space, wanda) == {
        TRAIN: "may run now: sparseforge run tiny-smoke",
        space.suite: "waits for this cell's own training, which is pending",
    }


def test_a_cell_that_is_held_failed_or_in_quarantine_says_so(space: Workspace) -> None:
    attempt = space.store.claim(space.first, TRAIN, ORIGIN)
    assert f"claimed by attempt {attempt.id}, process {ORIGIN.pid} on {ORIGIN.host}" in whys(space, space.first)[TRAIN]
    space.store.fail(attempt, "StoreError: locked")
    assert "failed (unavailable: the store or a disk was away" in whys(space, space.first)[TRAIN]
    space.store.fail(space.store.claim(space.first, TRAIN, ORIGIN), "DataError: no such text")
    said = whys(space, space.first)[TRAIN]
    assert said.startswith("in quarantine after 2 tries (bad input")
    assert said.endswith("Once the cause is gone: sparseforge run tiny-smoke --retry-failed")
    assert explain(space.first, space.home)["stages"][0]["status"] == "quarantined"
    assert f"cell {space.first} (in quarantine (bad input))" in whys(space, cell_of(space, "dense"))[TRAIN]


def test_a_claim_of_a_process_that_is_gone_is_recognised(space: Workspace) -> None:
    import dataclasses

    space.store.claim(space.first, TRAIN, dataclasses.replace(ORIGIN, pid=2**22 + 1))
    assert whys(space, space.first)[TRAIN].endswith("that process is gone, so the next run takes it over")


def test_a_beginning_of_a_key_is_enough_and_an_unclear_one_names_candidates(space: Workspace) -> None:
    assert explain(space.first[:9], space.home)["key"] == space.first
    with pytest.raises(UnknownCell, match=r"'' stands for 4 cells: .*llama-tiny.*Give more of the key"):
        explain("", space.home)
    with pytest.raises(UnknownCell, match=f"no cell of this store begins with .*Near it: .*{space.first}"):
        explain(space.first[:-4] + "x-s0", space.home)
    with pytest.raises(UnknownCell, match="no cell of this store begins with '%'"):
        explain("%", space.home)


def test_asking_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        explain("0123", Home.of(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_asking_changes_no_store(space: Workspace, tmp_path: Path) -> None:
    space.store.close()  # so that the file is whole
    (tmp_path / "sent").mkdir()
    sent = shutil.copy(space.home.root / "store.db", tmp_path / "sent" / "store.db")
    with sqlite3.connect(sent) as older:
        older.execute("PRAGMA user_version = 0")  # as one that was made before stores had numbers
    before = Path(sent).read_bytes()
    home = Home(tmp_path / "none", f"sqlite:///{sent}", "sqlite://")
    assert explain(space.first, home)["key"] == space.first
    assert doctor.store(home).status == "ok"
    assert Path(sent).read_bytes() == before
    assert {path.name for path in Path(sent).parent.iterdir()} <= {"store.db", "store.db-wal", "store.db-shm"}


def test_the_log_of_a_cell_is_found_among_those_of_others(space: Workspace) -> None:
    logs = space.home.root / "logs"
    logs.mkdir()
    lines = [
        "begins: cell aa-s0, stage train",
        "of aa",
        "begins: cell bb-s0, stage train",
        *(f"bb {i}" for i in range(9)),
    ]
    (logs / "worker-0.log").write_text("\n".join(f"12:00 flows.worker INFO {line}" for line in lines) + "\n")
    assert [line.rpartition(" INFO ")[2] for line in log_tail(space.home, "aa-s0")] == lines[:2]
    assert [line.rpartition(" INFO ")[2] for line in log_tail(space.home, "bb-s0")] == lines[-5:]
    assert log_tail(space.home, "cc-s0") == []


def test_the_command_shows_a_page_or_json(space: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--home", str(space.home.root)]
    assert cli.main(["explain", space.first, "--json", *place]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["explain", space.first[:8], *place]) == 0
    shown = capsys.readouterr().out
    assert shown == "\n".join(explanation_lines(found)) + "\n"
    assert shown.startswith(
        f"cell {space.first}: pretraining (dense-control, dense) on llama-tiny, 3,840 tokens, seed 0"
    )
    for title in ("recipe, where it differs from the defaults:", "wanted by:", "stages:", "reproduce with:"):
        assert f"\n{title}\n" in shown
    assert cli.main(["explain", "nothing", *place]) == 2
    assert "no cell of this store begins with 'nothing'" in capsys.readouterr().err
