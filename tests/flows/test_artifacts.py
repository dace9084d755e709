"""What the table of a grid shows, and its links; the real server is asked in tests/integration/test_prefect.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.artifacts import MAX_ROWS, LiveGrid, key, summary_line, table
from flows.home import Home
from sparseforge_core import files
from sparseforge_core.errors import StoreError
from sparseforge_core.store.rows import StageState
from sparseforge_core.store.store import ResultStore


def _state(cell: str, stage: str, status: Any, error: str = "") -> StageState:
    return StageState(
        cell_key=cell, stage=stage, status=status, attempts=1, error=error, requires=(), pool="cpu", cost_hours=0.1,
        model="LLaMA-tiny", method="wanda", variant="Wanda", seed=0, tokens=0,
    )  # fmt: skip


def _home(tmp_path: Path, uri: str) -> Home:
    return Home(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", uri)


STATES = [
    _state("a-s0", "train", "done"),
    _state("a-s0", "heldout", "done"),
    _state("b-s0", "train", "done"),
    _state("b-s0", "heldout", "failed", "DataError: no text\nmore"),
    _state("c-s0", "train", "running"),
    _state("c-s0", "heldout", "pending"),
    _state("d-s0", "train", "pending"),
]


def test_what_runs_and_what_failed_comes_first(tmp_path: Path) -> None:
    rows = table(_home(tmp_path, "sqlite:///mlflow.db"), STATES)
    found = [(row["cell"], row["state"], row["stages"]) for row in rows]
    assert found == [
        ("c-s0", "running", "0 of 2"),
        ("b-s0", "failed", "1 of 2"),
        ("d-s0", "waiting", "0 of 1"),
        ("a-s0", "done", "2 of 2"),
    ]
    assert [row["cause"] for row in rows] == ["", "DataError: no text", "", ""]
    assert summary_line("demo", STATES) == "4 cells of demo: 1 running, 1 failed, 1 waiting, 1 done"


def test_a_large_grid_is_cut_and_says_so(tmp_path: Path) -> None:
    states = [_state(f"{number}-s0", "train", "done") for number in range(MAX_ROWS + 1)]
    assert len(table(_home(tmp_path, "sqlite:///mlflow.db"), states)) == MAX_ROWS
    assert summary_line("full", states).endswith(f"; the first {MAX_ROWS} are shown")


def test_a_mirrored_cell_is_linked_where_a_browser_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEFORGE_MLFLOW_UI", raising=False)
    files.write_json(tmp_path / "cells" / "a-s0" / "mlflow.json", {"run": "r1", "experiment": "7"})
    files.write_json(tmp_path / "cells" / "b-s0" / "mlflow.json", {"run": "r2"})  # written by an earlier version

    def links(uri: str) -> set[str]:
        return {row["MLflow"] for row in table(_home(tmp_path, uri), STATES)}

    assert links("sqlite:///mlflow.db") == {""}
    assert links("http://127.0.0.1:5000/") == {"", "http://127.0.0.1:5000/#/experiments/7/runs/r1"}
    monkeypatch.setenv("SPARSEFORGE_MLFLOW_UI", "http://localhost:5999")
    assert links("http://mlflow:5000") == {"", "http://localhost:5999/#/experiments/7/runs/r1"}


def test_a_store_that_is_away_leaves_the_table_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = _home(tmp_path, "sqlite:///mlflow.db")

    def ask() -> list[StageState]:
        return ResultStore(home.store_url, create=False).work("demo")

    with pytest.raises(StoreError, match="is away"):
        ask()
    LiveGrid(home, "demo").show(ask, now=True)
    assert "the grid's table stays as it is for now" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("grid", ["full", "full-shrunk-2", "a_b.c", "Table 2"])
def test_keys_are_what_prefect_takes(grid: str) -> None:
    found = key("grid", grid)
    assert found.startswith("grid-")
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
