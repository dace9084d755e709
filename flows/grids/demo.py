"""The demo grid: the paper's tables in miniature, on models that are trained from scratch within it.

Five tiny models of the five families are pretrained on English that every installation has, then made sparse. It
fills every exhibit with real training and real evaluation in minutes on two CPU cores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from flows.grids.planned import Grid, Planned, Slot
from sparseforge_core.data.corpora import PythonDocs
from sparseforge_core.evaluate.suites import (
    CAST_6,
    HELDOUT,
    ZERO_SHOT_7,
    PerplexitySuite,
    ThroughputSuite,
    limited,
)
from sparseforge_core.methods import Dense, DenseControl, FrozenMask, MagnitudePruning, Method, SparseForge, Wanda
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.objective import Distill, Objective, TaskOnly
from sparseforge_core.recipe import Recipe, Trained, TrainPlan
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.criteria import Magnitude
from sparseforge_core.sparsity.patterns import BLOCK_16, GroupPattern, nm
from sparseforge_core.sparsity.slorb import SLoRB

Architecture = Literal["llama", "gpt2", "opt", "qwen3", "deepseek_moe"]

SEQUENCES, LENGTH = 8, 128
"""Batch: 1,024 tokens a step."""
PRETRAIN_STEPS = {"llama": 2000, "gpt2": 200, "opt": 200, "qwen3": 200, "deepseek_moe": 200}
"""The LLaMA, on which methods are compared, is trained until they can be told apart; the others just beyond chance."""
BUDGETS = (30, 60, 120)
"""Retraining steps of the curve; the middle one is the budget of every table."""
ITEMS = 20
"""Items of each zero-shot task."""
SEEDS = (0, 1)

CORPUS = PythonDocs()
VOCABULARY = TrainedBPE(corpus=CORPUS, size=2048)
SEVEN = limited(ZERO_SHOT_7, ITEMS)
SIX = limited(CAST_6, ITEMS)
TEXT: PerplexitySuite = replace(HELDOUT, window=128, limit=160)
SPEED = ThroughputSuite(name="decode-cpu", prompt_output=((32, 32), (32, 128), (128, 32), (128, 128)))

NAMES: dict[Architecture, str] = {
    "llama": "LLaMA-tiny",
    "gpt2": "GPT-2-tiny",
    "opt": "OPT-tiny",
    "qwen3": "Qwen3-tiny",
    "deepseek_moe": "DeepSeek-MoE-tiny",
}


def pretrained(architecture: Architecture) -> Trained:
    """The tiny model of a family after its pretraining cell."""
    recipe = Recipe(
        model=Tiny(architecture=architecture, tokenizer=VOCABULARY),
        method=DenseControl(),
        corpus=CORPUS,
        train=TrainPlan(
            steps=PRETRAIN_STEPS[architecture], sequences=SEQUENCES, length=LENGTH, lr=WarmupLinear(peak=4e-3)
        ),
    )
    return Trained(recipe=recipe, seed=0)


def recipe_for(
    architecture: Architecture,
    method: Method,
    *,
    steps: int = 0,
    pattern: GroupPattern | None = None,
    objective: Objective | None = None,
    slorb: SLoRB | None = None,
) -> Recipe:
    """A recipe on a pretrained tiny model; retraining distils from that model unless told otherwise."""
    return Recipe(
        model=pretrained(architecture),
        method=method,
        corpus=CORPUS,
        pattern=(pattern or nm(2, 4)) if method.sparsifies else None,
        objective=objective or (Distill() if method.trains else TaskOnly()),
        train=TrainPlan(steps=steps, sequences=SEQUENCES, length=LENGTH, lr=WarmupLinear(peak=2e-3)),
        slorb=slorb,
    )


FORGE = SparseForge(update_every=2)
WANDA = Wanda(samples=32, length=LENGTH)
MIDDLE = BUDGETS[1]


def demo() -> Grid:
    """The whole demo."""
    entries = (*_llama(), *_families(), *_block_16(), *_ablations())
    return Grid(name="demo", title="Demo: every exhibit on tiny models", entries=entries, captions=CAPTIONS)


def _llama() -> list[Planned]:
    """Table 2 and the figure: every method on one model, the dense control and SparseForge at three budgets."""
    dense = Planned(
        recipe=recipe_for("llama", Dense()),
        variant="dense",
        suites=(SEVEN, SIX, TEXT, SPEED),
        slots=(
            *_pair("llama", "dense", "Dense"),
            Slot(exhibit="table-2", row="dense", label="Dense", suites=(SIX, TEXT)),
            Slot(exhibit="table-3", row="dense", label="Dense", suites=(SEVEN, TEXT)),
            Slot(exhibit="accuracy-vs-tokens", row="Dense, untouched/0", label="Dense", suites=(SEVEN, TEXT)),
            Slot(exhibit="table-7", row="llama/dense", label="LLaMA-tiny dense", suites=(SPEED,)),
            *_pair("llama", "dense", "Dense", exhibits=("table-5", "table-6")),
        ),
    )
    one_shot = [
        Planned(
            recipe=recipe_for("llama", method),
            variant=label,
            seeds=seeds,
            suites=(SEVEN, SIX, TEXT),
            slots=(
                Slot(exhibit="table-2", row=row, label=label, suites=(SIX, TEXT)),
                Slot(exhibit="accuracy-vs-tokens", row=f"{label}/0", label=label, suites=(SEVEN, TEXT)),
            ),
        )
        for method, row, label, seeds in (
            (MagnitudePruning(), "magnitude", "Magnitude", (0,)),
            (WANDA, "wanda", "Wanda", SEEDS),
        )
    ]
    return [dense, *one_shot, *(entry for steps in BUDGETS for entry in _trained(steps))]


def _trained(steps: int) -> list[Planned]:
    main = steps == MIDDLE
    tokens = steps * SEQUENCES * LENGTH
    contenders: list[tuple[Method, str, str]] = [(DenseControl(), "dense-control", "Dense control")]
    if main:
        # The hard mask that the soft one is set against; at one budget, so that the demo stays short.
        contenders.append((FrozenMask(prior=WANDA), "frozen-wanda", "Frozen Wanda mask + KD"))
    contenders.append((FORGE, "sparseforge", "SparseForge"))
    found = []
    for method, row, label in contenders:
        slots = [Slot(exhibit="accuracy-vs-tokens", row=f"{label}/{tokens}", label=label, suites=(SEVEN, TEXT))]
        if main:
            slots.append(Slot(exhibit="table-2", row=row, label=label, suites=(SIX, TEXT)))
        if main and row in ("dense-control", "sparseforge"):
            slots.extend(_pair("llama", row, label))
        if main and row == "sparseforge":
            slots.append(Slot(exhibit="table-3", row="full", label="SparseForge (full)", suites=(SEVEN, TEXT)))
            slots.append(Slot(exhibit="table-7", row="llama/sparseforge", label="LLaMA-tiny 2:4", suites=(SPEED,)))
        if steps == BUDGETS[0] and row == "sparseforge":
            slots.append(Slot(exhibit="table-3", row="half-steps", label="w/ half the steps", suites=(SEVEN, TEXT)))
        found.append(
            Planned(
                recipe=recipe_for("llama", method, steps=steps),
                variant=f"{label} {tokens / 1000:.3g}k",
                seeds=SEEDS,
                suites=(SEVEN, SIX, TEXT, SPEED) if main and row == "sparseforge" else (SEVEN, SIX, TEXT),
                slots=tuple(slots),
            )
        )
    return found


def _families() -> list[Planned]:
    """Tables 1 and 4: the other families, dense against SparseForge."""
    entries = []
    for architecture in NAMES:
        if architecture == "llama":
            continue
        block = ("table-5", "table-6") if architecture == "gpt2" else ()
        dense_slots = (*_pair(architecture, "dense", "Dense"), *_pair(architecture, "dense", "Dense", exhibits=block))
        entries += [
            Planned(recipe=recipe_for(architecture, Dense()), variant="dense", suites=(SEVEN, TEXT), slots=dense_slots),
            Planned(
                recipe=recipe_for(architecture, FORGE, steps=MIDDLE),
                variant="SparseForge",
                seeds=SEEDS,
                suites=(SEVEN, TEXT),
                slots=_pair(architecture, "sparseforge", "SparseForge"),
            ),
        ]
    return entries


def _block_16() -> list[Planned]:
    """Tables 5 and 6: half of every 16 x 16 tile."""
    return [
        Planned(
            recipe=recipe_for(architecture, FORGE, steps=MIDDLE, pattern=BLOCK_16),
            variant="SparseForge block-16",
            seeds=SEEDS,
            suites=(SEVEN, TEXT),
            slots=_pair(architecture, "sparseforge", "SparseForge", exhibits=("table-5", "table-6")),
        )
        for architecture in ("llama", "gpt2")
    ]


def _ablations() -> list[Planned]:
    """Table 3: one-line differences of the full recipe."""
    full = recipe_for("llama", FORGE, steps=MIDDLE)
    changed = {
        "magnitude": ("w/ magnitude score", replace(full, method=replace(FORGE, criterion=Magnitude()))),
        "slorb": ("w/ SLoRB", replace(full, slorb=SLoRB(k=16))),
        "no-distillation": ("w/o distillation", replace(full, objective=TaskOnly())),
    }
    return [
        Planned(
            recipe=recipe,
            variant=f"SparseForge {label}",
            seeds=SEEDS,
            suites=(SEVEN, TEXT),
            slots=(Slot(exhibit="table-3", row=row, label=label, suites=(SEVEN, TEXT)),),
        )
        for row, (label, recipe) in changed.items()
    ]


def _pair(
    architecture: Architecture, variant: str, label: str, *, exhibits: tuple[str, ...] = ("table-1", "table-4")
) -> tuple[Slot, ...]:
    """The same row in a summary table and in its per-task twin."""
    name = NAMES[architecture]
    return tuple(
        Slot(exhibit=exhibit, row=f"{name}/{variant}", label=f"{name} {label}", suites=(SEVEN, TEXT))
        for exhibit in exhibits
    )


_TOKENS = f"{MIDDLE * SEQUENCES * LENGTH:,}"
_TINY = (
    f"Tiny models (about 1 M parameters; the LLaMA pretrained here on {PRETRAIN_STEPS['llama'] * SEQUENCES * LENGTH:,} "
    f"tokens, the others on {PRETRAIN_STEPS['gpt2'] * SEQUENCES * LENGTH:,}), so accuracy on {ITEMS} items a task is "
    f"near chance and says nothing; perplexity (held-out text, window {TEXT.window}) tells the story."
)
_CONTROL = (
    "The untouched dense model is undertrained and keeps improving with more tokens, so a retrained sparse model may "
    "end below it; the dense control, given the same tokens, teacher and data, is the fair reference."
)

CAPTIONS = {
    "table-1": f"Dense against SparseForge 2:4, five families, {_TOKENS} retraining tokens. {_TINY} {_CONTROL}",
    "table-2": (
        f"Every method on LLaMA-tiny, {_TOKENS} tokens for the retrained ones, CAST's tasks without RACE (no offline "
        f"data). {_TINY} {_CONTROL}"
    ),
    "table-3": f"Ablations of SparseForge on LLaMA-tiny, 2:4, {_TOKENS} tokens unless said. {_TINY}",
    "table-4": f"Table 1 task by task. {_TINY} {_CONTROL}",
    "table-5": f"Block-16 (128 of 256 in each 16 x 16 tile), two families, {_TOKENS} retraining tokens. {_TINY}",
    "table-6": f"Table 5 task by task. {_TINY}",
    "table-7": (
        "Decoding on this CPU with dense kernels: zeros bring no speed here, and the table shows the harness and the "
        "weight bytes of the packed 2:4 layout (counted). Tokens per second, batch 1."
    ),
    "accuracy-vs-tokens": (
        "LLaMA-tiny, retraining tokens against perplexity and mean accuracy; bars are 95 % intervals over seeds. "
        f"{_TINY}"
    ),
}
