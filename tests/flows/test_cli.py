"""The command line: sentences, exit codes, machine-readable answers; nothing written by asking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows import cli
from flows.arguments import COMMANDS
from flows.local import Summary
from flows.running import say_end


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
        (["report"], "there is no store at"),
        (
            ["ingest", "nowhere"],
            "there is no such folder, archive or part of one; `python -m sparseforge_core.run pack",
        ),
        (["ingest", "nowhere.json"], "is no results file of benchmarks/decode.py"),
        (["verify"], "there is no store at"),
        (["audit", "demo"], "there is no store at"),
        (["tables"], "there is no store at"),
        (["completion", "powershell"], "invalid choice"),
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
    found = json.loads(capsys.readouterr().out)
    rows = found["cells"]
    assert [row["status"] for row in rows] == ["pending"] * 4
    assert (found["planned"], found["done"]) == (4, 0)
    assert found["disk"]["fits"]
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


@pytest.mark.parametrize("what", ["methods", "presets", "families", "suites", "grids"])
def test_listings(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(what, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["name"] and row["about"] for row in rows)
    assert run(what) == 0
    assert all(row["name"] in line for row, line in zip(rows, capsys.readouterr().out.splitlines(), strict=True))


def test_families_are_listed_as_their_tiny_models_are(capsys: pytest.CaptureFixture[str]) -> None:
    from sparseforge_core.models.families import FAMILIES

    assert run("families", "--json") == 0
    rows = {row["model_type"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() > set(FAMILIES)
    mixture = rows["qwen2_moe"]
    assert mixture["family"] == "qwen2_moe"
    assert mixture["sites_by_rule"] == {"attention": 8, "experts": 4, "shared-experts": 6}
    assert mixture["sites"] == 18
    assert mixture["excluded"]["router"] == ["model.layers.#.mlp.gate.weight"]
    assert mixture["excluded"]["shared-gate"] == ["model.layers.#.mlp.shared_expert_gate.weight"]
    assert rows["mpt"]["family"] == "automatic"
    assert all(0.6 < row["coverage"] < 1.0 for row in rows.values())


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
    assert say_end(summary, "make demo") == code
    said = capsys.readouterr()
    assert sentence in said.out + said.err


@pytest.mark.parametrize("words", [("bundle", "tiny-smoke"), ("plan", "tiny-smoke", "--quiet")])
def test_a_place_that_cannot_be_written_is_a_sentence(
    home: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words, "--out", "/proc/nowhere/at-all") == 2
    assert "sparseforge: /proc/nowhere cannot be read or written: No such file or directory" in capsys.readouterr().err


def test_a_machine_without_gpus_leaves_their_cells_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("run", "table-7", "--quiet") == 1
    said = capsys.readouterr()
    assert "0 cells executed now" in said.out
    assert "which this run does not serve" in said.err


def test_a_table_typed_off_a_page_is_audited(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.csv"
    page.write_text("table,row,column,text\nt,r,Dense acc,50.00\nt,r,SparseForge acc,49.00\nt,r,Difference,-1.00\n")
    assert run("audit", str(page)) == 0
    assert capsys.readouterr().out == "everything adds up\n"
    page.write_text(page.read_text().replace("-1.00", "-1.10"))
    assert run("audit", str(page), "--json") == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["table"], found["printed"], found["recomputed"]) == ("t", "-1.10", "-1.00")


def test_the_papers_numbers_are_audited(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "published", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert {"table", "row", "column", "printed", "recomputed"} <= set(found[0])
    assert ("table-2", "Dense", "PPL") in {(f["table"], f["row"], f["column"]) for f in found}
    assert run("audit", "published") == 1
    assert "not checked: Table 4, Qwen3-8B" in capsys.readouterr().out
    assert list(home.iterdir()) == []


@pytest.fixture
def filled(home: Path) -> Path:
    """A home whose store was filled by hand."""
    from tests.analysis.filled import everything

    everything().write(f"sqlite:///{home / 'store.db'}").close()
    return home


def test_a_table_is_shown_in_the_terminal(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("tables", "--only", "table-2") == 0
    shown = capsys.readouterr().out
    assert "Table 2. Methods on one model" in shown
    assert "*26.00* ± 6.35" in shown
    assert "\033[" not in shown, "no terminal, no colours"
    assert run("tables", "--only", "table-2", "--quiet") == 0
    assert "Table 2" not in capsys.readouterr().out
    assert run("tables", "--only", "table-2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["grid"] == "demo"


def test_colours_need_a_terminal_and_nobody_who_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from analysis.make_tables import may_color

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert may_color()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not may_color()


def test_a_store_is_audited_verified_and_reported(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "demo") == 0
    assert capsys.readouterr().out == "everything adds up\n"
    assert run("verify") == 0
    assert "everything matches" in capsys.readouterr().out
    assert run("verify", "table-2", "SparseForge", "Avg") == 0
    assert "table-2, SparseForge, Avg: 0.3225 (n 2)" in capsys.readouterr().out
    assert run("report") == 0
    assert str(filled / "demo" / "report.html") in capsys.readouterr().out
    assert (filled / "demo" / "report.html").read_text().startswith("<!doctype html>")


def test_verify_names_what_was_changed_and_exits_1(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sqlite3

    with sqlite3.connect(filled / "store.db") as connection:
        connection.execute("UPDATE measurement SET value = 0.99 WHERE metric = 'mean/acc'")
    assert run("verify", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["sound"] is False
    assert any("mean/acc" in problem for problem in found["problems"])


@pytest.mark.parametrize("arguments", [["verify", "table-2"], ["verify", "table-2", "x", "Avg"], ["audit", "dem"]])
def test_a_place_that_is_not_there_is_bad_input(
    filled: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith("sparseforge: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_every_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", shell) == 0
    assert "sparseforge" in capsys.readouterr().out


def test_a_shell_that_asks_gets_the_commands(home: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    line = "sparseforge ver"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"), "_ARGCOMPLETE_SHELL": "bash"}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "flows.cli"]
    subprocess.run(command, cwd=root, env={**os.environ, **asked}, capture_output=True, timeout=60, check=False)
    assert "verify" in (tmp_path / "answer").read_text().split()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_its_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "Exit codes: 0" in capsys.readouterr().out


def test_methods_say_their_source_kind_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {row["kind"] for row in rows.values()} == {"dense", "one-shot", "retraining"}
    assert rows["sparsegpt"]["kind"] == "one-shot"
    assert "2301.00774" in rows["sparsegpt"]["source"]
    assert rows["sparsegpt"]["fields"]["damping"] == {"type": "float", "default": 0.01}
    assert rows["owl"]["fields"]["pruner"]["default"]["kind"] == "wanda"
