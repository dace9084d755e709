"""A cell that diverges is a result: recorded once with its curve and a sentence, kept in tables, never run again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis.make_tables import make_tables
from analysis.verify import verify
from flows import grids
from flows.cycle import ready
from flows.grids.smoke import tiny_smoke
from flows.stages import TRAIN
from sparseforge_core import run
from sparseforge_core.errors import Diverged
from sparseforge_core.identity import loads
from sparseforge_core.methods import SparseForge
from sparseforge_core.observe.curvature import MicroBatchFisher
from sparseforge_core.opening import open_finished
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.store.results import Results
from tests.flows.test_cycle import Workspace

AT_STEP = 4
WIDEST = 200
"""Outputs of the widest layer below the head of the tiny model."""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A home whose pretraining is done."""
    made = Workspace(tmp_path_factory.mktemp("space"))
    made.execute(made.first)
    return made


@contextlib.contextmanager
def injected(where: str) -> Iterator[dict[str, Any]]:
    """From a step on, the head of what trains gives NaN, or NaN comes back through it: to the update, or beside it.

    The curvature of `MicroBatchFisher` has a backward of its own, after the one that the update is made from.
    """
    steps, passes = [0], [0]

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        head = isinstance(module, nn.Linear) and module.out_features > WIDEST
        if not (head and output.requires_grad and steps[0] >= AT_STEP):
            return output
        passes[0] += 1
        if where == "loss":
            return output * torch.nan
        if (passes[0] > 1) == (where == "curvature"):
            output.register_hook(poison)
        return output

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield {"on_step": lambda progress: steps.__setitem__(0, progress.step)}
    finally:
        handle.remove()


@pytest.fixture
def micro_batch_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny grid with an annealing that looks at each step's micro-batches."""
    whole = tiny_smoke()
    method = SparseForge(curvature=MicroBatchFisher(every=1))
    entries = [
        dataclasses.replace(entry, recipe=dataclasses.replace(entry.recipe, method=method))
        if isinstance(entry.recipe.method, SparseForge)
        else entry
        for entry in whole.entries
    ]
    grid = dataclasses.replace(whole, entries=tuple(entries))
    monkeypatch.setitem(grids.GRIDS, "tiny-smoke", lambda: grid)


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("loss", r"step 5: the loss is nan.*step 4 was the last good one"),
        ("gradient", r"step 5: the gradient norm is nan.*step 4 was the last good one"),
        ("curvature", r"curvature of .* is not finite.*step 4 was the last good one"),
    ],
)
def test_nan_anywhere_in_training_ends_as_diverged_with_its_curve(
    tmp_path: Path, space: Workspace, micro_batch_fisher: None, where: str, sentence: str
) -> None:
    own = Workspace(tmp_path)
    own.home.cell(own.first).parent.mkdir()
    own.home.cell(own.first).symlink_to(space.home.cell(space.first))
    own.execute(own.first)  # recorded, not run
    forge = next(s.cell_key for s in own.states() if s.method == "sparseforge")
    with injected(where) as options:
        own.execute(forge, **options)
    for stage in (TRAIN, own.suite):
        own.execute(forge, stage)
    states = [s for s in own.states() if s.cell_key == forge]
    assert [(s.status, s.cause, s.attempts) for s in states] == [("done", "diverged", 1)] * 2
    assert re.search(sentence, states[0].error), states[0].error
    assert states[0].error.startswith("Diverged: ")
    assert forge not in {cell.key for cell in ready(own.states())}
    assert own.store.fsck() == []
    results = Results(own.home.store_url)
    assert verify(results, own.home.root / "cells").problems == []
    curves = results.curves("tiny-smoke")
    loss = next(one.curve for one in curves if (one.cell_key, one.name) == (forge, "loss/total"))
    assert loss.steps[-1] == AT_STEP
    make_tables(results, "tiny-smoke", tmp_path / "out", ["table-2"])
    text = (tmp_path / "out" / "tables" / "table-2.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| SparseForge"))
    assert "diverged" in row
    assert re.search(f"SparseForge seed 0.*{sentence}", text), text


def test_a_recipe_that_explodes_is_measured_as_diverged_without_any_store(tmp_path: Path, space: Workspace) -> None:
    base = loads(space.store.cell_body(space.first)).recipe
    plan = TrainPlan(steps=12, sequences=2, length=16, lr=WarmupLinear(peak=1e30))
    cell = Cell(recipe=Recipe(model=base.model, method=base.method, corpus=base.corpus, train=plan))
    folder = tmp_path / "cells" / "exploded" / "train"
    path = run.train_cell(cell, folder, space.home.root)
    body = json.loads(path.read_text())
    assert "the loss is" in body["diverged"] or "gradient norm" in body["diverged"]
    values = {row["metric"]: row["value"] for row in body["measurements"]}
    assert values["final_loss"] is None
    assert values["total_parameters"] > 0
    assert not (folder / "final").exists()
    written = path.stat().st_mtime_ns
    assert run.train_cell(cell, folder, space.home.root) == path
    assert path.stat().st_mtime_ns == written, "a divergence is not run again"


def test_a_cell_that_reads_the_model_of_one_that_diverged_says_so(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    with injected("loss") as options:
        space.execute(space.first, **options)
    with pytest.raises(Diverged, match=f"cell {space.first} made no model, it diverged"):
        open_finished(loads(space.store.cell_body(space.first)), space.home.root)
    for stage in (TRAIN, space.suite):
        space.execute(space.dense, stage)
    states = {s.stage: s for s in space.states() if s.cell_key == space.dense}
    assert {s.cause for s in states.values()} == {"diverged"}
    assert space.first in states[TRAIN].error
