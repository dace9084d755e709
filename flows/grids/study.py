"""The study: every method at equal tokens on a real pretrained model, SmolLM2-135M, retrained on books.

The corpus is named relative to $SPARSEFORGE_DATA, a folder with the shards of public-domain books.
"""

from __future__ import annotations

from dataclasses import replace

from flows.grids.planned import Grid, Planned, Slot
from sparseforge_core.data.corpora import TextFiles
from sparseforge_core.evaluate.suites import HELDOUT, WIKITEXT2_1024, Suite
from sparseforge_core.methods import Dense, DenseControl, FrozenMask, Method, SparseForge, Wanda
from sparseforge_core.models.sources import Packaged
from sparseforge_core.objective import Distill, TaskOnly
from sparseforge_core.recipe import Recipe, TrainPlan
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.criteria import WandaScore
from sparseforge_core.sparsity.patterns import nm

BOOKS = TextFiles(
    paths=("train-00.txt.xz", "train-01.txt.xz"),
    sha256=(
        "2342a1fa22cbdacf099dbb3b9b2b78dead81f5a0b1a7589ecb0a0bad545d67de",
        "6aed54802f87ed5d68fcdda7f30860a927a288412b6eddd40c3e58d4a2a03911",
    ),
)
"""Two shards of public-domain books, about 22 M tokens."""

SUITES: tuple[Suite, ...] = (replace(HELDOUT, window=1024, limit=200), WIKITEXT2_1024)
STEPS = 183
"""At 32,768 tokens a step: 6 M tokens."""
PLAN = TrainPlan(steps=STEPS, sequences=32, length=1024, lr=WarmupLinear(peak=3e-4), compute_dtype="bfloat16")
WANDA = Wanda(samples=64, length=1024)

METHODS: dict[str, tuple[str, Method]] = {
    "dense": ("Dense, untouched", Dense()),
    "dense-control": ("Dense control", DenseControl()),
    "wanda": ("Wanda", WANDA),
    "frozen-wanda": ("Frozen Wanda mask + KD", FrozenMask(prior=WANDA)),
    "sparseforge": ("SparseForge (Fisher)", SparseForge()),
    "sparseforge-wanda": (
        "SparseForge (Wanda score)",
        SparseForge(criterion=WandaScore(), calibration_samples=64, update_every=2),
    ),
}


def study() -> Grid:
    """One table: methods at 6 M tokens, one seed."""
    entries = tuple(
        Planned(
            recipe=Recipe(
                model=Packaged(name="smollm2-135m"),
                method=method,
                corpus=BOOKS,
                pattern=nm(2, 4) if method.sparsifies else None,
                objective=Distill() if method.trains else TaskOnly(),
                train=PLAN if method.trains else TrainPlan(),
            ),
            variant=label,
            suites=SUITES,
            slots=(Slot(exhibit="table-2", row=row, label=label),),
        )
        for row, (label, method) in METHODS.items()
    )
    caption = (
        "SmolLM2-135M, 2:4, 6 M retraining tokens of public-domain books, distilled from the dense model; perplexity "
        "at window 1024 on held-out books and on the raw WikiText-2 test set. One seed: no interval, no claim of order "
        "between neighbours."
    )
    return Grid(name="smollm2-study", title="SmolLM2-135M on books", entries=entries, captions={"table-2": caption})
