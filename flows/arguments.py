"""The arguments of the `sparseforge` command. Imports nothing heavy: `--help` is instant."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from sparseforge_core import __version__


class Parser(argparse.ArgumentParser):
    """Suggests the nearest name for a mistyped command."""

    def error(self, message: str) -> Any:
        if "invalid choice" in message and "'" in message:
            tried = message.split("'")[1]
            near = difflib.get_close_matches(tried, COMMANDS, n=1)
            message += f". Did you mean {near[0]!r}?" if near else ""
        super().error(message)


COMMANDS = (
    "demo", "plan", "run", "status", "tables", "doctor", "methods", "families", "suites", "grids", "bundle", "ingest",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The whole command line; `options.command` says which subcommand was given."""
    top = Parser(
        prog="sparseforge",
        description="Make language models 2:4 sparse, measure every rival under one harness, and get the tables.",
        epilog="Exit codes: 0 done, 1 something failed or is partial, 2 bad input, 130 stopped (run again to go on).",
    )
    top.add_argument("--version", action="version", version=f"sparseforge {__version__}")
    top.set_defaults(home=None, db=None)
    _add_places(top)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_running(commands)
    _add_carrying(commands)
    _add_reading(commands)
    for command in commands.choices.values():
        _add_places(command)
    return top


def _add_places(parser: argparse.ArgumentParser) -> None:
    """Before or after the command, as people type it; only what is given is set."""
    home = "folder for everything that runs make (default $SPARSEFORGE_HOME or runs)"
    parser.add_argument("--home", type=Path, default=argparse.SUPPRESS, help=home)
    db = "results store (default $SPARSEFORGE_DB or sqlite:///HOME/store.db)"
    parser.add_argument("--db", metavar="URL", default=argparse.SUPPRESS, help=db)


def _add_running(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole path on tiny models: train, evaluate, tables, figure",
        description="Run the demo grid, then write its tables and figure. Running it again goes on where it stopped.",
        epilog="example: sparseforge demo --workers 2",
    )
    run = commands.add_parser(
        "run",
        help="run what is not done of a grid on this machine",
        description="Plan a grid and run every stage that is not done. A finished cell is never run twice.",
        epilog="example: sparseforge run smollm2-smoke",
    )
    run.add_argument("grid", help="a grid's name; `sparseforge grids` lists them")
    run.add_argument("--prefect", action="store_true", help="record each stage as a Prefect task run")
    run.add_argument("--pool", help="only the cells placed there, whatever devices this machine has: cpu, gpu-1, gpu-8")
    demo.add_argument("--no-prefect", dest="prefect", action="store_false", help="leave Prefect out of it")
    for command in (demo, run):
        command.add_argument("--workers", type=int, help="worker processes (default: one a GPU, else one a core)")
        command.add_argument("--quiet", action="store_true", help="no progress")
    demo.set_defaults(grid="demo", pool=None)
    plan = commands.add_parser(
        "plan",
        help="every cell of a grid: key, tokens, placement, device hours, state",
        description="Show what a grid would run and what it costs, without running anything.",
        epilog="example: sparseforge plan full",
    )
    plan.add_argument("grid")
    plan.add_argument("--json", action="store_true", help="machine-readable")
    plan.add_argument(
        "--out", type=Path, help="also write each cell and suite as a file for `python -m sparseforge_core.run`"
    )


def _add_carrying(commands: Any) -> None:
    bundle = commands.add_parser(
        "bundle",
        help="write the cells of a grid for a machine without a store",
        description="Write OUT/bundle.json. There: python -m sparseforge_core.run --home HOME bundle OUT. Then copy "
        "HOME/cells into the home here and run `sparseforge ingest GRID`.",
        epilog="example: sparseforge bundle smollm2-smoke --out carried",
    )
    bundle.add_argument("grid")
    bundle.add_argument("--out", type=Path, required=True, help="folder for bundle.json")
    bundle.add_argument("--pool", help="only the cells placed there, and what they need")
    ingest = commands.add_parser(
        "ingest",
        help="record finished cells that were copied into the home",
        description="Record every stage of a grid that is finished under HOME/cells and not in the store.",
        epilog="example: sparseforge ingest smollm2-smoke",
    )
    ingest.add_argument("grid")


def _add_reading(commands: Any) -> None:
    status = commands.add_parser(
        "status", help="done, running, failed, pending of a grid", epilog="example: sparseforge status demo --json"
    )
    status.add_argument("grid")
    status.add_argument("--json", action="store_true", help="machine-readable")
    tables = commands.add_parser(
        "tables",
        help="write Tables 1-7 and the figure from the store",
        epilog="example: sparseforge tables --grid demo --only table-2",
    )
    tables.add_argument("--grid", help="default: the grid planned last")
    tables.add_argument("--out", type=Path, help="folder (default HOME/GRID)")
    tables.add_argument("--only", action="append", help="an exhibit, such as table-2; may be repeated")
    tables.add_argument("--strict", action="store_true", help="exit 2 when anything is partial")
    doctor = commands.add_parser("doctor", help="check this machine and installation, say what to do")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    for name, what in (
        ("methods", "pruning methods"),
        ("families", "model families"),
        ("suites", "evaluation suites"),
        ("grids", "grids"),
    ):
        listing = commands.add_parser(name, help=f"list the {what}")
        listing.add_argument("--json", action="store_true", help="machine-readable")
