"""The grid of the soak: a microscopic model, two checkpoints in its pretraining, items behind every number."""

from __future__ import annotations

from flows import grids
from flows.grids.planned import Grid, Planned, Slot
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.evaluate.suites import LastWordSuite, PerplexitySuite
from sparseforge_core.methods import Dense, DenseControl, Method, SparseForge, Wanda
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.objective import Distill, TaskOnly
from sparseforge_core.recipe import Recipe, Trained, TrainPlan
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.patterns import nm

GRID = "soak"
PRETRAINING, RETRAINING = 110, 60
"""Steps; checkpoints come every 50."""

CORPUS = Synthetic(documents_count=200)
SUITES = (
    PerplexitySuite(name="heldout", text="heldout", window=32, limit=4),
    LastWordSuite(name="last-word", words=16, limit=4),
)


def tiny() -> Tiny:
    """About ten thousand parameters."""
    tokenizer = TrainedBPE(corpus=CORPUS, size=300)
    return Tiny(architecture="llama", tokenizer=tokenizer, width=16, layers=1, heads=2, positions=32)


def soak() -> Grid:
    """One pretraining and three rows on top of it."""
    plan = TrainPlan(steps=PRETRAINING, sequences=2, length=16, lr=WarmupLinear(peak=1e-2))
    pretraining = Recipe(model=tiny(), method=DenseControl(), corpus=CORPUS, train=plan)
    retraining = TrainPlan(steps=RETRAINING, sequences=2, length=16, lr=WarmupLinear(peak=5e-3))
    rows: tuple[tuple[str, Method], ...] = (
        ("Dense", Dense()),
        ("Wanda", Wanda(samples=2, length=16)),
        ("SparseForge", SparseForge()),
    )
    entries = tuple(
        Planned(
            recipe=Recipe(
                model=Trained(recipe=pretraining),
                method=method,
                corpus=CORPUS,
                pattern=nm(2, 4) if method.sparsifies else None,
                objective=Distill() if method.trains else TaskOnly(),
                train=retraining if method.trains else TrainPlan(),
            ),
            variant=label,
            suites=SUITES,
            slots=(Slot(exhibit="table-2", row=label.lower(), label=label),),
        )
        for label, method in rows
    )
    return Grid(name=GRID, title="Soak", entries=entries, captions={"table-2": "A model for the soak."})


def register() -> None:
    """Make the grid known in this process."""
    grids.GRIDS[GRID] = soak
