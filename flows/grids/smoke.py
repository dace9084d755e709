"""Small real grids: a pretrained 135M model for the patient or a GPU, and the smallest one for tests."""

from __future__ import annotations

from dataclasses import replace

from flows.grids.planned import Grid, Planned, Slot
from sparseforge_core.data.corpora import Corpus, PythonDocs, Synthetic
from sparseforge_core.evaluate.suites import HELDOUT, ZERO_SHOT_7, PerplexitySuite, Suite, limited
from sparseforge_core.methods import Dense, DenseControl, Method, SparseForge, Wanda
from sparseforge_core.models.sources import ModelSource, Packaged, Tiny, TrainedBPE
from sparseforge_core.objective import Distill, TaskOnly
from sparseforge_core.recipe import Recipe, Trained, TrainPlan
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.criteria import WandaScore
from sparseforge_core.sparsity.patterns import nm


def _entries(
    model: ModelSource, corpus: Corpus, suites: tuple[Suite, ...], rows: tuple[tuple[str, Method], ...], plan: TrainPlan
) -> tuple[Planned, ...]:
    return tuple(
        Planned(
            recipe=Recipe(
                model=model,
                method=method,
                corpus=corpus,
                pattern=nm(2, 4) if method.sparsifies else None,
                objective=Distill() if method.trains else TaskOnly(),
                train=plan if method.trains else TrainPlan(),
            ),
            variant=label,
            suites=suites,
            slots=(Slot(exhibit="table-2", row=label.lower(), label=label),),
        )
        for label, method in rows
    )


def smollm2_smoke() -> Grid:
    """SmolLM2-135M on real text: dense, Wanda and a short annealing; perplexity and 50 items of each task."""
    suites: tuple[Suite, ...] = (limited(ZERO_SHOT_7, 50), replace(HELDOUT, window=512, limit=20))
    plan = TrainPlan(steps=20, sequences=4, length=128, lr=WarmupLinear(peak=3e-4))
    rows: tuple[tuple[str, Method], ...] = (
        ("Dense", Dense()),
        ("Wanda", Wanda(samples=16, length=512, sequential=False)),
        ("SparseForge", SparseForge(criterion=WandaScore(), calibration_samples=16, update_every=2)),
    )
    caption = (
        f"SmolLM2-135M, 2:4, {plan.tokens:,} retraining tokens: a smoke run of the whole path on a real model, far too "
        "short to recover what pruning costs. 50 items a task; perplexity on held-out documentation, window 512."
    )
    entries = _entries(Packaged(name="smollm2-135m"), PythonDocs(), suites, rows, plan)
    return Grid(name="smollm2-smoke", title="SmolLM2-135M smoke", entries=entries, captions={"table-2": caption})


def _tiny(pretraining_steps: int) -> tuple[Planned, ...]:
    corpus = Synthetic(documents_count=400)
    tiny = Tiny(
        architecture="llama",
        tokenizer=TrainedBPE(corpus=corpus, size=300),
        width=32,
        layers=2,
        heads=2,
        positions=64,
    )
    pretraining = Recipe(
        model=tiny,
        method=DenseControl(),
        corpus=corpus,
        train=TrainPlan(steps=pretraining_steps, sequences=4, length=32, lr=WarmupLinear(peak=1e-2)),
    )
    text = PerplexitySuite(name="heldout", text="heldout", window=32, limit=8)
    plan = TrainPlan(steps=20, sequences=4, length=32, lr=WarmupLinear(peak=5e-3))
    rows: tuple[tuple[str, Method], ...] = (
        ("Dense", Dense()),
        ("Wanda", Wanda(samples=4, length=32)),
        ("SparseForge", SparseForge()),
    )
    return _entries(Trained(recipe=pretraining), corpus, (text,), rows, plan)


def tiny_smoke() -> Grid:
    """One tiny LLaMA on synthetic sentences: the whole path in seconds."""
    caption = "A tiny model on synthetic sentences; it shows that the path works and nothing else."
    return Grid(name="tiny-smoke", title="Tiny smoke", entries=_tiny(30), captions={"table-2": caption})


def long_smoke() -> Grid:
    """The same with a first training that takes an hour: to try stopping, cancelling and watching on."""
    caption = "A tiny model on synthetic sentences, trained for long; something to stop."
    return Grid(name="long-smoke", title="Long smoke", entries=_tiny(100_000), captions={"table-2": caption})


GRIDS = {"smollm2-smoke": smollm2_smoke, "tiny-smoke": tiny_smoke, "long-smoke": long_smoke}
