"""The `sparseforge` command with one more grid: cells that take seconds, so that a test can interrupt them.

python -m tests.flows.command run long-smoke
"""

from __future__ import annotations

import sys

from flows import grids
from flows.grids.planned import Grid, Planned, Slot
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.evaluate.suites import PerplexitySuite
from sparseforge_core.methods import Dense, DenseControl
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.recipe import Recipe, Trained, TrainPlan
from sparseforge_core.schedules import WarmupLinear

GRID = "long-smoke"
STEPS = 600


def long_smoke() -> Grid:
    """A pretraining of some seconds that saves every 60 steps, and a dense row that waits for it."""
    corpus = Synthetic(documents_count=200)
    tiny = Tiny(
        architecture="llama",
        tokenizer=TrainedBPE(corpus=corpus, size=300),
        width=32,
        layers=2,
        heads=2,
        positions=64,
    )
    plan = TrainPlan(steps=STEPS, sequences=4, length=32, lr=WarmupLinear(peak=1e-2))
    pretraining = Recipe(model=tiny, method=DenseControl(), corpus=corpus, train=plan)
    dense = Recipe(model=Trained(recipe=pretraining), method=Dense(), corpus=corpus)
    text = PerplexitySuite(name="heldout", text="heldout", window=32, limit=8)
    entry = Planned(
        recipe=dense,
        variant="Dense",
        suites=(text,),
        slots=(Slot(exhibit="table-2", row="dense", label="Dense"),),
    )
    return Grid(name=GRID, title="Long smoke", entries=(entry,), captions={"table-2": "A test."})


def register() -> None:
    """Make the grid known in this process; workers read their cells from the store and need not know it."""
    grids.GRIDS[GRID] = long_smoke


if __name__ == "__main__":
    from flows.cli import main

    register()
    sys.exit(main())
