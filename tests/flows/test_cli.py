"""The command line: sentences, exit codes, machine-readable answers; nothing written by asking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flows import cli
from flows.arguments import COMMANDS
from flows.local import Summary


def run(*arguments: str | Path) -> int:
    """Exit code of a command in this process."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:  # argparse
        return int(ended.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"usage: sparseforge {command}" in capsys.readouterr().out
    assert command in cli.HANDLERS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rum", "demo"], "Did you mean 'run'?"),
        (["run", "dem"], "Did you mean 'demo'?"),
        (["plan", "ful"], "Did you mean 'full'?"),
        (["status", "tiny-smok"], "Did you mean 'tiny-smoke'?"),
        (["run", "demo", "--workers", "0"], "--workers 0: needs at least 1"),
        (["run", "demo", "--prefect", "--pool", "cpu"], "with Prefect, the work pools choose"),
        (["status", "demo"], "sparseforge: "),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_gets_a_sentence_and_exit_code_2(
    home: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert list(home.iterdir()) == [], "nothing is made for a question or a mistake"


def test_plan_lists_every_cell_and_needs_no_store(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "tiny-smoke", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["pending"] * 4
    assert {"key", "model", "method", "tokens", "pool", "device_hours", "requires"} <= set(rows[0])
    assert run("plan", "tiny-smoke") == 0
    text = capsys.readouterr().out
    assert all(row["key"] in text for row in rows)
    assert "4 cells, 0 done" in text
    assert list(home.iterdir()) == []


def test_plan_writes_files_that_the_core_reads(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseforge_core import specs
    from sparseforge_core.evaluate.suites import Suite, suite_key
    from sparseforge_core.identity import cell_key, loads

    assert run("plan", "tiny-smoke", "--out", home / "files") == 0
    cells = sorted((home / "files").glob("*.json"))
    assert len(cells) == 4
    assert all(cell_key(loads(path.read_text())) == path.stem for path in cells)
    (path,) = (home / "files" / "suites").glob("*.json")
    assert suite_key(specs.decode(json.loads(path.read_text()), Suite, "suite")) == path.stem


def test_status_of_a_planned_grid(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.home import Home
    from flows.local import open_grid
    from sparseforge_core.store.rows import Provenance

    store, states = open_grid(Home.of(), "tiny-smoke")
    attempt = store.claim(states[0].cell_key, "train", Provenance())
    store.fail(attempt, "DataError: no text")
    assert run("status", "tiny-smoke", "--json") == 1
    status = json.loads(capsys.readouterr().out)
    assert status["counts"] == {"failed": 1, "pending": 3}
    assert status["failed"][0]["error"] == "DataError: no text"
    assert run("status", "tiny-smoke", "--db", f"sqlite:///{home / 'store.db'}") == 1
    assert "DataError: no text" in capsys.readouterr().out


def test_places_are_taken_before_and_after_the_command(tmp_path: Path) -> None:
    from flows.arguments import parser

    before = parser().parse_args(["--home", "a", "--db", "b", "status", "demo"])
    after = parser().parse_args(["status", "demo", "--home", "a", "--db", "b"])
    assert (before.home, before.db) == (after.home, after.db) == (Path("a"), "b")
    neither = parser().parse_args(["status", "demo"])
    assert (neither.home, neither.db) == (None, None)


@pytest.mark.parametrize("what", ["methods", "families", "suites", "grids"])
def test_listings(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(what, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["name"] and row["about"] for row in rows)
    assert run(what) == 0
    assert all(row["name"] in line for row, line in zip(rows, capsys.readouterr().out.splitlines(), strict=True))


@pytest.mark.parametrize(
    ("summary", "code", "sentence"),
    [
        (Summary("g", total=3, executed_cells={"a"}), 0, "1 cells executed now, 3 planned"),
        (Summary("g", total=3, failed={"k-s0": "DataError: no text"}), 1, "failed k-s0: DataError: no text"),
        (Summary("g", total=3, interrupted=True), 130, "stopped; nothing is lost. Go on with: make demo"),
        (Summary("g", total=3, blocked=2, unserved={"gpu-8": 2}), 1, "2 cells are placed on gpu-8"),
        (Summary("g", total=3, blocked=3, unserved={"gpu-8": 2}), 1, "1 cells are not done: `sparseforge status g`"),
    ],
)
def test_how_a_run_ended(summary: Summary, code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._say(summary, "make demo") == code
    said = capsys.readouterr()
    assert sentence in said.out + said.err


@pytest.mark.slow
def test_cells_carried_to_another_machine_come_home(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparseforge_core.run import Execution, run_bundle

    assert run("bundle", "tiny-smoke", "--out", tmp_path / "carried") == 0
    assert "4 cells" in capsys.readouterr().out
    run_bundle(tmp_path / "carried", tmp_path / "there", Execution(), lambda: False)
    shutil.copytree(tmp_path / "there" / "cells", home / "cells")
    assert run("ingest", "tiny-smoke") == 0
    assert "7 stages recorded" in capsys.readouterr().out
    assert run("ingest", "tiny-smoke") == 0
    assert "0 stages recorded" in capsys.readouterr().out
    assert run("run", "tiny-smoke") == 0
    assert "0 cells executed now, 4 planned" in capsys.readouterr().out


def test_a_machine_without_gpus_leaves_their_cells_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("run", "table-7", "--quiet") == 1
    said = capsys.readouterr()
    assert "0 cells executed now" in said.out
    assert "which this machine cannot serve" in said.err


def test_methods_say_their_source_kind_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {row["kind"] for row in rows.values()} == {"dense", "one-shot", "retraining"}
    assert rows["sparsegpt"]["kind"] == "one-shot"
    assert "2301.00774" in rows["sparsegpt"]["source"]
    assert rows["sparsegpt"]["fields"]["damping"] == {"type": "float", "default": 0.01}
    assert rows["owl"]["fields"]["pruner"]["default"]["kind"] == "wanda"
