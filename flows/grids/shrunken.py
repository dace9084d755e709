"""A grid in miniature: the same exhibits, methods and dependencies on tiny models, to try a stack with.

`full-shrunk-3` is the grid `full` with at most three rows an exhibit, one seed, random tiny models of the same
families, sentences of a small grammar, a few steps, two items a task. Its numbers mean nothing; that they arrive in
every table, through whatever databases and workers there are, does.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import Counter
from dataclasses import replace
from typing import Any

from flows.grids.planned import Grid, Planned
from sparseforge_core import specs
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import RecipeError
from sparseforge_core.evaluate.suites import DivergenceSuite, HarnessSuite, PerplexitySuite, Suite, ThroughputSuite
from sparseforge_core.models.sources import Architecture, Hub, ModelSource, Packaged, Tiny, TrainedBPE
from sparseforge_core.recipe import Recipe, Trained
from sparseforge_core.schedules import WarmupLinear

STEPS = 8
"""Of the longest training; shorter ones keep their share of it, two steps at least."""
LENGTH, WIDTH = 16, 32
CORPUS = Synthetic()
"""What vocabularies are trained on."""
FAMILIES: dict[str, Architecture] = {
    "gpt2": "gpt2",
    "opt": "opt",
    "llama": "llama",
    "qwen": "qwen3",
    "deepseek": "deepseek_moe",
    "smollm": "llama",
}
"""What a model's name has in it -> the architecture that stands for it."""


def shrunk_name(grid: str, rows: int) -> str:
    """What `grid_named` knows the miniature of a grid by."""
    return f"{grid}-shrunk-{rows}"


def shrunk(grid: Grid, rows: int) -> Grid:
    """At most `rows` rows of each exhibit. Raises RecipeError for a number below 1, or a grid of an unknown model."""
    if rows < 1:
        raise RecipeError(f"grid {grid.name}: shrink={rows}: must be at least 1")
    longest = max(entry.recipe.train.steps for entry in grid.entries)
    filled: Counter[str] = Counter()
    kept: list[Planned] = []
    for entry in grid.entries:
        slots = tuple(slot for slot in entry.slots if filled[slot.exhibit] < rows)
        if not slots:
            continue
        filled.update(slot.exhibit for slot in slots)
        kept.append(
            replace(
                entry,
                recipe=_recipe(entry.recipe, longest),
                seeds=entry.seeds[:1],
                suites=tuple(dict.fromkeys(map(_suite, entry.suites))),
                slots=tuple(replace(s, suites=tuple(dict.fromkeys(map(_suite, s.suites)))) for s in slots),
            )
        )
    captions = dict.fromkeys(grid.captions, f"A miniature of {grid.name}: it shows that the path works, nothing else.")
    title = f"{grid.title}, in miniature"
    return Grid(name=shrunk_name(grid.name, rows), title=title, entries=tuple(kept), captions=captions)


def _recipe(recipe: Recipe, longest: int) -> Recipe:
    plan = recipe.train
    if plan.steps:
        steps = max(2, round(STEPS * min(1.0, plan.steps / longest)))  # a pretraining may be longer than all entries
        # A recipe's own rate is that of a large model, and a miniature's loss must stay finite under every method.
        plan = replace(plan, steps=steps, sequences=2, length=LENGTH, lr=WarmupLinear(peak=1e-3))
        plan = replace(plan, compute_dtype="float32")
    objective, teacher = recipe.objective, getattr(recipe.objective, "teacher", None)
    if teacher is not None:
        objective = replace(objective, teacher=_model(teacher, longest))  # type: ignore[type-var]
    return replace(
        recipe,
        model=_model(recipe.model, longest),
        method=_calibrated(recipe.method),
        corpus=Synthetic(seed=_number(recipe.corpus)),
        objective=objective,
        train=plan,
        permutation=None if recipe.permutation is None else _calibrated(recipe.permutation),
        slorb=None if recipe.slorb is None else replace(recipe.slorb, k=8),
    )


def _model(source: ModelSource, longest: int) -> ModelSource:
    """A tiny model of the same family; the seed of its weights tells the models of one family apart."""
    if isinstance(source, Trained):
        return replace(source, recipe=_recipe(source.recipe, longest))
    if isinstance(source, Tiny) and source.width > WIDTH:
        tokenizer = TrainedBPE(corpus=CORPUS, size=300)
        return replace(source, tokenizer=tokenizer, width=WIDTH, layers=2, heads=2, positions=512, mlp=None)
    if not isinstance(source, Hub | Packaged):
        return source
    name = (source.id if isinstance(source, Hub) else source.name).lower()
    for part, architecture in FAMILIES.items():
        if part in name:
            tokenizer = TrainedBPE(corpus=CORPUS, size=300)
            return Tiny(
                architecture=architecture,
                tokenizer=tokenizer,
                width=WIDTH,
                layers=2,
                heads=2,
                positions=512,  # as long as the longest question
                init_seed=_number(source),
            )
    raise RecipeError(f"no tiny model stands for {name!r}; known: {', '.join(FAMILIES)}")


def _number(spec: Any) -> int:
    """A seed that follows from what a model or corpus says: two that differ stay two."""
    return zlib.crc32(json.dumps(specs.encode(spec), sort_keys=True).encode()) % 10_000


def _calibrated(method: Any) -> Any:
    """The method, or a search for an order of channels, and any that it builds on, with two calibration texts."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name in ("samples", "calibration_samples"):
            changes[field.name] = 2
        elif field.name == "length" and isinstance(value, int):
            changes[field.name] = LENGTH
        elif field.name in ("prior", "start_from", "compensation") and dataclasses.is_dataclass(value):
            changes[field.name] = _calibrated(value)
    return replace(method, **changes)


def _suite(suite: Suite) -> Suite:
    """The suite on two items or windows; without RACE, whose items no package carries, and on text at hand."""
    if isinstance(suite, HarnessSuite):
        return replace(suite, tasks=tuple(task for task in suite.tasks if task != "race"), limit=2)
    if isinstance(suite, PerplexitySuite):
        return replace(suite, text="heldout", corpus=None, window=LENGTH, limit=2)
    if isinstance(suite, DivergenceSuite):
        return replace(suite, window=LENGTH, limit=2)
    if isinstance(suite, ThroughputSuite):
        return replace(suite, prompt_output=((4, 4),), repeats=1)
    return replace(suite, limit=2)  # type: ignore[type-var]
