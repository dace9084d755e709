"""The `sparseforge` command. Heavy libraries are imported by the subcommand that needs them.

Exit codes: 0 done; 1 some cells failed or something is partial; 2 bad input; 130 stopped, go on with the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from flows.arguments import parser
from flows.home import Home, be_quiet
from flows.running import BAD_INPUT, FAILED, INTERRUPTED, OK, execute, last_line, require_workers, say_links, show
from sparseforge_core.errors import RecipeError, SparseForgeError


def main(arguments: list[str] | None = None) -> int:
    """Parse, dispatch, and turn our own errors into one sentence and exit code 2."""
    be_quiet()
    known = parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next, and takes no other answer
        import argcomplete

        argcomplete.autocomplete(known)
    options = known.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    home = Home.of(options.home, options.db)
    try:
        return int(HANDLERS[options.command](options, home))
    except SparseForgeError as error:
        print(f"sparseforge: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("sparseforge: stopped; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, for instance `| head`
        sys.stderr.close()
        return OK
    except OSError as error:
        if error.filename is None:  # no file that a person named
            raise
        print(f"sparseforge: {error.filename} cannot be read or written: {error.strerror}", file=sys.stderr)
        return BAD_INPUT


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _run(options: argparse.Namespace, home: Home) -> int:
    code, summary = execute(options, home)
    say_links(options, home)
    if options.json:
        print(last_line(summary, home))
    return code


def _demo(options: argparse.Namespace, home: Home) -> int:
    from analysis.make_tables import make_tables
    from sparseforge_core.store.results import Results

    code, summary = execute(options, home)
    if code == INTERRUPTED:
        if options.json:
            print(last_line(summary, home))
        return code
    folder = home.grid("demo")
    files = make_tables(Results(home.store_url), "demo", folder).files
    if not (options.quiet or options.json):
        print("\n" + (folder / "tables" / "table-2.md").read_text())
        print(f"Tables  {folder / 'tables'}\nFigure  {folder / 'figures' / 'accuracy-vs-tokens.png'}")
    say_links(options, home)
    if options.json:
        print(last_line(summary, home, files=len(files), folder=str(folder)))
    return code


def _plan_memory(options: argparse.Namespace) -> int:
    from flows.memory import CALIBRATION, plan, table
    from sparseforge_core.memory import ADAM_BYTES, EIGHT_BIT_BYTES, TEACHER_BYTES, Spread

    spreads = [
        Spread(
            gpus=gpus,
            sharded=gpus > 1 and not options.eight_bit_moments and not options.from_one_shot,
            micro_batch=options.micro_batch,
            length=options.length,
            recompute=recompute,
            teacher=0 if options.no_teacher else TEACHER_BYTES,
            moment_bytes=EIGHT_BIT_BYTES if options.eight_bit_moments else ADAM_BYTES,
            starts=options.from_one_shot,
            calibration=CALIBRATION if options.from_one_shot else 0,
        )
        for gpus in options.gpus
        for recompute in (False, True)
    ]
    rows = plan(options.memory, spreads=spreads, gpu_gib=options.gpu_memory)
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    if any(row["refusal"] is None for row in rows):
        return OK
    raise RecipeError(f"placement: {rows[-1]['refusal']}")


def _plan(options: argparse.Namespace, home: Home) -> int:
    if options.memory:
        return _plan_memory(options)
    if not options.grid:
        raise RecipeError("plan: name a grid (`sparseforge grids` lists them), or a model with --memory")
    from flows.devices import default_workers
    from flows.grids import grid_named
    from flows.grids.planned import expand
    from flows.listing import plan_lines, plan_rows, stages_done
    from flows.planning import bill, history_of

    require_workers(options.workers)
    plan, done = expand(grid_named(options.grid)), stages_done(home)
    workers, history = options.workers or default_workers(), history_of(home, options.grid)
    found = bill(plan, options.grid, home, workers=workers, done=done, history=history, rows=plan_rows(plan, done))
    if options.out:
        from sparseforge_core.files import write_text

        for cell in plan.cells:
            write_text(options.out / f"{cell.key}.json", cell.cell_json)
        for suite in plan.suites:
            write_text(options.out / "suites" / f"{suite.key}.json", suite.spec_json)
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        print("\n".join([*(() if options.quiet else plan_lines(found.rows)), *found.lines()]))
    if found.disk.warning:
        print(f"warning: {found.disk.warning}", file=sys.stderr)
    return OK


def _bundle(options: argparse.Namespace, home: Home) -> int:
    from flows.bundle import Only, choose, settled, write_bundle

    only = Only(
        pool=options.pool,
        variants=tuple(options.variant or ()),
        seeds=tuple(options.seed or ()),
        millions=tuple(options.millions or ()),
        without=settled(home) if options.missing else frozenset(),
    )
    chosen = choose(options.what, grid=options.grid, only=only)
    count = write_bundle(chosen, options.out, there=options.there, slurm=options.slurm)
    file = options.out / "bundle.json"
    if options.json:
        print(json.dumps({"grids": list(chosen.grids), "file": str(file), "cells": count}))
    elif not options.quiet:
        print(f"{file}: {count} cells")
        if options.slurm:
            print(f"{options.out / 'submit.sh'}: submits them level after level; options for every job follow it")
    return OK


def _ingest(options: argparse.Namespace, home: Home) -> int:
    from flows.benched import GRID, ingest_decode, read_results
    from flows.ingesting import bring, checked
    from flows.unpacking import unpacked
    from sparseforge_core.store.store import ResultStore

    given = options.folder
    if given.suffix == ".json":
        read_results(given)  # what is refused makes no store
        store = ResultStore(home.store_url)
        count = ingest_decode(store, given)
        store.close()
        if options.json:
            print(json.dumps({"folder": str(given), "grid": GRID, "recorded": count}))
        elif not options.quiet:
            print(f"{GRID}: {count} stages recorded; see `sparseforge tables --grid {GRID}`")
        return OK
    with contextlib.nullcontext(given) if given.is_dir() else unpacked(given) as folder:
        carried = checked(folder)
        store = ResultStore(home.store_url)
        found = bring(store, home, carried)
    store.close()
    if options.json:
        print(json.dumps({"folder": str(given), **dataclasses.asdict(found)}))
    elif not options.quiet:
        other = f", {found.other} of another model than the recorded one left out" if found.other else ""
        print(
            f"{given}: {found.recorded} stages recorded, {found.known} known before, "
            f"{found.unfinished} not finished yet{other}"
        )
        for why in found.failed:
            print(f"  failed there: {why}")
    return OK


def _status(options: argparse.Namespace, home: Home) -> int:
    from flows.status import screen, status_of
    from flows.watch import watch

    if options.watch:
        if options.every is not None and not 0 < options.every <= 86_400:
            raise SparseForgeError(f"--every {options.every:g}: seconds between two looks, more than 0")
        seen = watch(lambda: status_of(home, options.grid), sys.stdout, every=options.every, as_json=options.json)
        return FAILED if seen is not None and seen["failed"] else OK
    status = status_of(home, options.grid)
    show(options, status, lambda: screen(status, width=_columns()))
    return FAILED if status["failed"] else OK


def _columns() -> int:
    """Width of the terminal; a file takes whole lines."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def _explain(options: argparse.Namespace, home: Home) -> int:
    from flows.explaining import explain
    from flows.explanation import explanation_lines

    found = explain(options.cell, home)
    show(options, found, lambda: explanation_lines(found))
    return OK


def _results(options: argparse.Namespace, home: Home) -> int:
    from flows.tabulating import COMMANDS

    return COMMANDS[options.command](options, home)


def _completion(options: argparse.Namespace, _home: Home) -> int:
    from argcomplete.shell_integration import shellcode

    script = shellcode(["sparseforge"], shell=options.shell)
    show(options, {"shell": options.shell, "script": script}, lambda: [script])
    return OK


def _doctor(options: argparse.Namespace, home: Home) -> int:
    if options.model is not None:
        from flows.outlook import outlook

        found, lines = outlook(options)
        show(options, found, lambda: lines)
        return OK
    from flows.doctor import doctor

    return doctor(home, as_json=options.json, quiet=options.quiet)


def _export(options: argparse.Namespace, home: Home) -> int:
    from flows.exporting import export_to, generation, verification

    if options.command == "generate":
        found, text, notes = generation(options)
        if not options.quiet:
            print(notes, file=sys.stderr)
        print(json.dumps(found) if options.json else text)
        return OK
    found, text = export_to(options, home) if options.command == "export" else verification(options)
    show(options, found, lambda: [text])
    return OK


def _bench(options: argparse.Namespace, home: Home) -> int:
    import importlib

    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / f"{options.benchmark}.py").is_file():
        raise SparseForgeError(
            f"bench {options.benchmark}: {root / 'benchmarks'} has no {options.benchmark}.py. Benchmarks belong to the "
            "repository, not of an installed package; run this from a clone"
        )
    sys.path.insert(0, str(root))
    manners = [f"--{name}" for name in ("json", "quiet") if getattr(options, name)]
    return int(importlib.import_module(f"benchmarks.{options.benchmark}").main([*options.arguments, *manners]))


def _serve(options: argparse.Namespace, _home: Home) -> int:
    from flows.serving import serve

    def announce(where: dict[str, str]) -> None:
        if options.json:
            print(json.dumps(where), flush=True)

    serve(options, announce)
    return OK


def _list(options: argparse.Namespace, home: Home) -> int:
    from flows.listing import listing

    rows = listing(options.command)
    show(options, rows, lambda: [f"{row['name']:<18}{row['about']}" for row in rows])
    return OK


HANDLERS = {
    "demo": _demo,
    "run": _run,
    "plan": _plan,
    "bundle": _bundle,
    "ingest": _ingest,
    "status": _status,
    "explain": _explain,
    **dict.fromkeys(("tables", "report", "verify", "audit"), _results),
    "completion": _completion,
    "doctor": _doctor,
    "bench": _bench,
    **dict.fromkeys(("export", "verify-export", "generate"), _export),
    "serve": _serve,
    **dict.fromkeys(("methods", "presets", "families", "suites", "grids"), _list),
}
"""What each subcommand does."""


if __name__ == "__main__":
    sys.exit(main())
