"""Mutated cells: a cell, or a refusal in a sentence; never anything else, on the command line either."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from pathlib import Path

from flows.grids import grid_named
from flows.grids.planned import expand
from flows.placements import cost_hours, memory_gib, placement_for
from sparseforge_core import run, specs
from sparseforge_core.errors import SparseForgeError
from sparseforge_core.identity import cell_key, dumps, loads
from sparseforge_core.recipe import Cell
from tests.core.test_mutated_cells import mutate
from tests.soak.world import Counts

ON_THE_COMMAND_LINE = 20
"""One mutated cell in this many also goes through `python -m sparseforge_core.run train`."""


def mutated(scratch: Path, chance: random.Random, wanted: int, counts: Counts) -> None:
    """Read so many mutated cells, and plan those that are cells after all."""
    bodies = [json.loads(cell.cell_json) for cell in expand(grid_named("full")).cells[::20]]
    file = scratch / "mutated.json"
    for number in range(wanted):
        body = copy.deepcopy(chance.choice(bodies))
        mutate(body["cell"], chance)
        counts.mutated_configs += 1
        try:
            _plan(body)
            if number % ON_THE_COMMAND_LINE == 0:
                file.write_text(json.dumps(body))
                _on_the_command_line(file, scratch, counts)
        except SparseForgeError:
            continue
        except Exception as error:  # the soak counts what should have been a sentence
            counts.tracebacks += 1
            counts.say(f"a mutated cell: {type(error).__name__}: {error}: {json.dumps(body['cell'])[:300]}")


def _plan(body: dict[str, object]) -> None:
    cell = specs.decode(body["cell"], Cell, "cell")
    loads(dumps(cell))
    cost_hours(cell.recipe)
    memory_gib(cell.recipe)
    placement_for(cell.recipe)


def _on_the_command_line(file: Path, scratch: Path, counts: Counts) -> None:
    """A file whose key does not fit its content any more is refused with exit code 2 and one line."""
    body = json.loads(file.read_text())
    if cell_key(specs.decode(body["cell"], Cell, "cell")) == body["key"]:
        return  # the mutation said the same in another way: that would train
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = run.main(["--home", str(scratch / "none"), "train", str(file), str(scratch / "none" / "out")])
    if code != 2 or "Traceback" in said.getvalue() or "key: the file says" not in said.getvalue():
        counts.tracebacks += 1
        counts.say(f"the command line on a mutated cell: {code}: {said.getvalue()[-200:]}")
