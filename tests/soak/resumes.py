"""A training stopped at any step goes on to the same bits: weights, masks, moments, random state, curves."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparseforge_core import measured, run
from sparseforge_core.checkpoint import MANIFEST
from sparseforge_core.errors import Interrupted
from sparseforge_core.identity import loads
from sparseforge_core.methods import (
    AST,
    CAST,
    SRSTE,
    SSTE,
    DenseControl,
    FrozenMask,
    MaskLLM,
    Method,
    ProxSparse,
    SparseForge,
)
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.sparsity.slorb import SLoRB
from sparseforge_core.store.curves import curves_of
from sparseforge_core.tracking.tracker import read_journal
from tests.contract.test_methods import COMPENSATED, LITERAL, PUBLISHED
from tests.soak.grid import RETRAINING
from tests.soak.world import MACHINE, Counts, Reference

OURS: tuple[tuple[str, Method], ...] = (
    ("sparseforge", SparseForge()),
    ("literal", LITERAL),
    ("published", PUBLISHED),
    ("compensated", COMPENSATED),
)
RIVALS: tuple[Method, ...] = (
    DenseControl(), FrozenMask(), SRSTE(), SSTE(), AST(), CAST(), MaskLLM(), ProxSparse(),
)  # fmt: skip
SAVED = 50


def boundaries(method: SparseForge) -> list[int]:
    """The steps around which a phase of the annealing begins, the first, the last, and one that is saved anyway."""
    quench, freeze = (round(RETRAINING * share) for share in (method.quench_begin, method.freeze_at))
    return [1, quench - 1, quench, quench + 1, freeze - 1, freeze, freeze + 1, SAVED, RETRAINING - 1]


def resumes(reference: Reference, scratch: Path, chance: random.Random, counts: Counts, *, short: bool = False) -> None:
    """Every method stopped at random steps, ours also around each phase; the last of each stopped twice."""
    base = _recipe(reference)
    for name, method in OURS[: 1 if short else None]:
        steps = boundaries(method) if name == "sparseforge" else chance.sample(boundaries(method), 3)
        recipe = replace(base, method=method, slorb=SLoRB(k=8) if name == "literal" else None)
        _check(name, recipe, [[step] for step in steps[:: 4 if short else 1]], reference, scratch, counts)
    for method in RIVALS[: 1 if short else None]:
        recipe = replace(base, method=method, pattern=base.pattern if method.sparsifies else None)
        first, second = sorted(chance.sample(range(1, RETRAINING), 2))
        stops = [[chance.randrange(1, RETRAINING)], [first, second]]
        _check(type(method).__name__, recipe, stops, reference, scratch, counts)


def _recipe(reference: Reference) -> Recipe:
    cells = [loads(p.read_text()) for p in sorted((reference.world.root / "cells").glob("*/cell.json"))]
    return next(cell.recipe for cell in cells if isinstance(cell.recipe.method, SparseForge))


def _check(
    name: str, recipe: Recipe, plans: list[list[int]], reference: Reference, scratch: Path, counts: Counts
) -> None:
    straight = _train(Cell(recipe=recipe, seed=3), [], reference, scratch / "resume")
    for stops in plans:
        stopped = _train(Cell(recipe=recipe, seed=3), stops, reference, scratch / "resume")
        counts.resumes_checked += len(stops)
        if stopped != straight:
            counts.lost_results += 1
            differing = [part for part in straight if straight[part] != stopped[part]]
            counts.say(f"{name} stopped after {stops}: {differing} differ from the undisturbed run")


def _train(cell: Cell, stops: list[int], reference: Reference, folder: Path) -> dict[str, Any]:
    """Train a cell, stopped after these steps and begun again; everything that it leaves."""
    shutil.rmtree(folder, ignore_errors=True)
    home = reference.world.root
    for stop in stops:
        seen: list[int] = []

        def should_stop(seen: list[int] = seen, stop: int = stop) -> bool:
            return bool(seen) and seen[-1] >= stop

        try:
            run.train_cell(
                cell, folder, home, on_step=lambda p, seen=seen: seen.append(p.step), should_stop=should_stop
            )
        except Interrupted:
            continue
        raise AssertionError(f"it was not stopped after step {stop}")
    body = measured.read(run.train_cell(cell, folder, home))
    return {
        "files": json.loads((folder / "final" / MANIFEST).read_text()),
        "measurements": {m["metric"]: m["value"] for m in body["measurements"] if m["metric"] not in MACHINE},
        "curves": curves_of(read_journal(folder / measured.JOURNAL)[0]),
    }
