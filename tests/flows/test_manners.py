"""What every subcommand owes its user, from one table: a command that is missing in it fails the first test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from analysis import make_tables, measurements, study
from flows import cli
from flows.arguments import COMMANDS, EXIT_CODES, MANNERS, parser
from flows.home import Home
from flows.local import open_grid
from sparseforge_core.identity import cell_key
from sparseforge_core.recipe import Cell
from tests.analysis.filled import everything
from tests.flows.test_cli import run
from tests.flows.test_exporting import trained  # noqa: F401 - a fixture

Words = Callable[[str, str], list[str]]
ROOT = Path(__file__).resolve().parents[2]
NEXT = re.compile(r"`[^`]+`|--\w|Known|known are|Did you mean|needs at least|name a CSV file|choose from|give a ")
"""What a sentence of refusal holds that can be typed next: a command, an option, or the names to choose from."""


@dataclass(frozen=True)
class Manner:
    """How a command is tried; KEY, FOLDER and OUT in words stand for a cell, an export and a new path."""

    asked: str
    """What it answers, or "" where that takes minutes or never ends: `why` says where it is tried instead."""
    refused: str
    """What it cannot do."""
    code: int = 0
    quiet: str = ""
    """A pattern of what --quiet leaves on standard output."""
    trained: bool = False
    """It needs a finished cell instead of a filled store."""
    why: str = ""


MISSING = r"  table-\d: \d planned results are missing\n.*fill what is missing with: sparseforge run demo\n"
TABLE = {
    "demo": Manner("", "--workers 0", why="tests/integration"),
    "run": Manner("table-7", "dem", code=1, quiet=r"table-7: 0 cells executed now, \d+ planned\n"),
    "plan": Manner("tiny-smoke", "", quiet=r"tiny-smoke: 4 cells, 0 done.*"),
    "status": Manner("demo", "dem"),
    "explain": Manner("KEY", "zzzz"),
    "tables": Manner("--grid demo --only table-2", "--only table-9", quiet=MISSING),
    "report": Manner("--grid demo", "--grid dem"),
    "verify": Manner("--grid demo table-2 SparseForge Avg", "table-2 SparseForge Avvg"),
    "audit": Manner("demo", "nowhere.csv"),
    "doctor": Manner("--model smollm2-135m", "--model smollm3"),
    "methods": Manner("", "more"),
    "presets": Manner("", "more"),
    "families": Manner("", "more"),
    "suites": Manner("", "more"),
    "grids": Manner("", "more"),
    "bundle": Manner("table-7 --out OUT --there", "dem --out OUT"),
    "ingest": Manner("benchmarks/results/decode.json", "nowhere"),
    "export": Manner("KEY --format packed --out OUT", "KEY --format pack", trained=True),
    "verify-export": Manner("FOLDER", "nowhere", trained=True),
    "generate": Manner("FOLDER --prompt cat --tokens 3", "nowhere --prompt cat", trained=True, quiet=r".+"),
    "serve": Manner("", "nowhere", why="tests/flows/test_serving.py"),
    "bench": Manner("train --tiny --parts mask_update --device cpu", "trai"),
    "completion": Manner("bash", "powershell"),
}
ANSWERING = [name for name in COMMANDS if not TABLE[name].why]


@pytest.fixture
def words(home: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Words:
    """Makes the command line of a command, and what it needs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(ROOT)

    def made(name: str, text: str) -> list[str]:
        known = {"OUT": str(tmp_path / "out")}
        if TABLE[name].trained:
            cell, place = request.getfixturevalue("trained")
            known |= exported(cell, place)
            monkeypatch.setenv("SPARSEFORGE_HOME", str(place))
        else:
            everything().write(f"sqlite:///{home / 'store.db'}").close()
            store, states = open_grid(Home.of(), "tiny-smoke")
            store.close()
            known["KEY"] = states[0].cell_key
        return [name, *(known.get(word, word) for word in text.split())]

    return made


def exported(cell: Cell, home: Path) -> dict[str, str]:
    """The cell's key, and its export."""
    key, folder = cell_key(cell), home / "packed"
    if not folder.is_dir():
        assert run("export", key, "--format", "packed", "--home", home, "--out", folder, "--quiet") == 0
    return {"KEY": key, "FOLDER": str(folder)}


def test_the_table_has_every_command() -> None:
    choices = next(iter(action.choices for action in parser()._subparsers._group_actions))  # type: ignore[union-attr]
    assert set(COMMANDS) == set(choices or ()) == set(cli.HANDLERS) == set(TABLE) == set(MANNERS)
    assert set(EXIT_CODES) - {""} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_does_and_how_it_ends(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(option in said for option in ("--json", "--quiet", "--home", "--db", "Exit codes: 0"))
    assert all(" ".join(text.split()) in said for text in MANNERS[name])


@pytest.mark.parametrize("name", ANSWERING)
def test_json_is_all_of_standard_output(name: str, words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    line = words(name, TABLE[name].asked)
    capsys.readouterr()
    assert run(line[0], "--json", *line[1:]) == TABLE[name].code, capsys.readouterr().err
    out = capsys.readouterr().out
    assert json.loads(out) not in (None, {}), "an answer"


@pytest.mark.parametrize("name", ANSWERING)
def test_quiet_leaves_the_exit_code(name: str, words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    line = words(name, TABLE[name].asked)
    capsys.readouterr()
    assert run(line[0], "--quiet", *line[1:]) == TABLE[name].code
    out = capsys.readouterr().out
    assert "\033[" not in out, "no terminal, no colours"
    assert re.fullmatch(TABLE[name].quiet, out, re.DOTALL), out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_refusal_says_what_to_type_next(name: str, words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    line = words(name, TABLE[name].refused)
    capsys.readouterr()
    assert run(line[0], "--json", *line[1:]) == 2
    said = capsys.readouterr()
    assert said.out == "", "standard output is for answers"
    assert "Traceback" not in said.err
    assert NEXT.search(said.err.splitlines()[-1]) or "usage: sparseforge" in said.err, said.err


@pytest.mark.parametrize("module", [make_tables, measurements, study])
def test_the_scripts_of_analysis_have_the_same_manners(
    module: ModuleType, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{home / 'store.db'}"
    places = ["--db", url, "--grid", "demo", "--out", str(tmp_path / "out")]
    assert module.main(places) == 2
    said = capsys.readouterr()
    assert (said.out, NEXT.search(said.err) is not None) == ("", True), said.err
    everything().write(url).close()
    assert module.main([*places, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert module.main([*places, "--quiet"]) == 0
    assert re.fullmatch(MISSING if module is make_tables else "", capsys.readouterr().out, re.DOTALL)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert all(text in said.out for text in ("--json", "--quiet", "Exit codes: 0"))
