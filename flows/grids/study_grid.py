"""The study's main grid: Table 2, Table 3 and the figure on SmolLM2-135M, every method as its trials left it.

It was first run on books alone (`smollm2-books`: what of it was measured), where retraining at a high rate forgets
other text; since then every method reads modern prose beside them.

What is likely to change between sessions is data at the top: each method's tuned settings, who runs at every budget,
seeds. A bundle may carry any part of it: `sparseforge bundle smollm2-study --seed 0 --millions 12 --variant AST CAST`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flows.grids.planned import Grid, Planned, Slot
from flows.grids.study import (
    BOOKS,
    KL,
    MILLION,
    MIXED,
    PERMUTED,
    PERPLEXITIES,
    REPORTED,
    SEQUENCES,
    SPARSEGPT,
    WANDA,
    WIDE_SEQUENCES,
    Contender,
    contenders,
    plan,
    rate,
)
from sparseforge_core.data.corpora import TextFiles
from sparseforge_core.errors import RecipeError
from sparseforge_core.evaluate.suites import OFFLINE_9, Suite, limited
from sparseforge_core.methods import Dense, FrozenMask, MagnitudePruning, SparseForge
from sparseforge_core.objective import Distill, TaskOnly
from sparseforge_core.recipe import Recipe, Trained
from sparseforge_core.schedules import Constant
from sparseforge_core.sparsity.criteria import HessianOBD, Magnitude, WandaScore
from sparseforge_core.sparsity.permutation import ChannelPermutation
from sparseforge_core.sparsity.slorb import SLoRB

NAME, BOOKS_ALONE, UNORDERED_CHANNELS = "smollm2-study", "smollm2-books", "smollm2-unordered"

TUNED: dict[str, float] = {
    "dense-control": 1.2e-3,
    "naive": 2.4e-3,
    "frozen-wanda": 2.4e-3,
    "frozen-sparsegpt": 2.4e-3,
    "sr-ste": 2.4e-3,
    "ast": 6e-4,
    "ast-slorb": 6e-4,
    "cast": 1.2e-3,
    "maskllm": 6e-4,
    "paper": 2.4e-3,
    "improved": 2.4e-3,
}
"""The peak learning rate that each method's trials chose (`smollm2-trials`; results/README.md lists them), the same
number of trials each."""

MAIN, HALF = 12, 6
"""Budget of the tables, and of half the steps, in millions of tokens."""
BUDGETS = (3, 6, 12, 24, 48)
"""Of the figure."""
OTHER_BUDGETS = tuple(budget for budget in BUDGETS if budget != MAIN)
SEEDS = (0, 1, 2)
"""At the main budget."""
MORE_SEEDS = (5, 6, 7, 8)
"""Beside these at the main budget, since three leave intervals that touch. Planned for ours and for its nearest rival
on WikiText-2, after the three were seen and before any of the four was run (docs/lab-log.md, section 14)."""
MORE_SEEDS_OF = ("ast-slorb",)
"""Who has them beside ours (`Ours`), with its channels in order too (section 17)."""
RIVALS_IN_ORDER = ("frozen-sparsegpt", "ast-slorb")
"""The nearest rival on each text, shown at every budget with its channels in order too, as ours has them: so that
nobody has to ask whether the order alone wins. They count as rivals."""
FIGURE_SEEDS = (1,)
"""At the figure's other budgets: not the trials' seed, so that no cell that chose anything is shown."""
FIVE = ("improved", "frozen-sparsegpt", "frozen-wanda", "sr-ste", "ast-slorb")
"""Who runs at every budget: the five best of the trials."""

ITEMS = 1000
ZERO_SHOT = limited(OFFLINE_9, ITEMS)
"""Measured of what Table 2 shows; the other cells have no accuracy."""

WIDE_FROM = 24
"""Budget, in millions of tokens, from which `WIDE` take `WIDE_SEQUENCES` a step rather than twice the steps."""
WIDE = ("improved", "frozen-sparsegpt", "frozen-wanda", "sr-ste")
"""Whose WikiText-2 gains by that (docs/lab-log.md, section 12): tried were ours, which loses less of what it knew, the
frozen SparseGPT mask, with which the other two go, and AST with its branch, which gains nothing and stays as it is."""
ALSO_FASTER = ("frozen-sparsegpt", 48, 3.4e-3)
"""Who is also trained at a higher peak at one budget: books gain more than half a percent by it and WikiText-2 loses,
so that bars are judged by the better on each text (docs/lab-log.md, section 16)."""


def rival_seeds(name: str) -> tuple[int, ...]:
    """The seeds of a row beside ours at the main budget, the same with its channels in order."""
    return (*SEEDS, *MORE_SEEDS) if name in MORE_SEEDS_OF else SEEDS


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Which recipe fills our rows of Table 2 and of the figure."""

    permutation: ChannelPermutation | None
    """None: channels as they stand, the recipe that the ablations differ from."""
    seeds: tuple[int, ...]
    """At the main budget."""

    def contender(self, name: str, corpus: TextFiles = MIXED) -> Contender:
        """A method as these rows have it; only ours differs from what its trials chose."""
        found = tuned(name, corpus)
        return replace(found, permutation=self.permutation) if name == "improved" else found

    def main_seeds(self) -> dict[str, tuple[int, ...]]:
        """Rows of the main budget, and seeds."""
        return {name: self.seeds if name == "improved" else rival_seeds(name) for name in TUNED}


UNORDERED = Ours(permutation=None, seeds=SEEDS)
ORDERED = Ours(permutation=PERMUTED, seeds=(*SEEDS, *MORE_SEEDS))
"""Channels in order, as the preset has them (docs/lab-log.md, sections 14 and 15)."""
OURS = ORDERED
"""What the study shows."""

ON_BOOKS: dict[str, tuple[int, ...]] = {name: (0,) if name in ("maskllm", "paper") else SEEDS for name in TUNED}
"""Rows of the main budget on books alone, and seeds."""
LONGEST_ON_BOOKS = ("improved", "frozen-sparsegpt")
"""Who was trained for the figure's last budget there."""


WHOLE = Slot(exhibit="table-3", row="full", label="SparseForge (full)", suites=PERPLEXITIES)
HALF_STEPS = Slot(exhibit="table-3", row="half-steps", label="w/ half the steps", suites=PERPLEXITIES)


def tuned(name: str, corpus: TextFiles = MIXED) -> Contender:
    """A method with the settings that its trials chose."""
    return replace(contenders(TUNED[name])[name], corpus=corpus)


def at_budget(name: str, millions: int, ours: Ours = OURS) -> tuple[Contender, Recipe]:
    """A method of the figure at a budget: as its trials chose, with wide steps where these were found better.

    The tokens are whole steps of either width, so that they are equal for all.
    """
    wide = WIDE_SEQUENCES if millions >= WIDE_FROM else SEQUENCES
    contender = ours.contender(name)
    if name in WIDE:
        contender = replace(contender, sequences=wide)
    return contender, contender.recipe(plan(millions * MILLION, Constant(value=0.0), wide).tokens)


def put_in_order(contender: Contender) -> Contender:
    """The same with its channels put in order as ours are."""
    return replace(contender, label=f"{contender.label} (in order)", permutation=PERMUTED)


def untrained(corpus: TextFiles = MIXED) -> dict[str, tuple[Contender, tuple[int, ...]]]:
    """What needs no retraining, and seeds: only calibration depends on them."""
    return {
        "dense": (Contender(label="Dense", method=Dense(), corpus=corpus), (0,)),
        "magnitude": (Contender(label="Magnitude", method=MagnitudePruning(), corpus=corpus), (0,)),
        "wanda": (Contender(label="Wanda", method=WANDA, corpus=corpus), SEEDS),
        "sparsegpt": (Contender(label="SparseGPT", method=SPARSEGPT, corpus=corpus), SEEDS),
    }


def table_2(
    rows: Mapping[str, tuple[int, ...]], corpus: TextFiles = MIXED, *, ablated: bool = True, ours: Ours = OURS
) -> list[Planned]:
    """These methods with their seeds at the main budget, and what needs no retraining.

    `ablated` says that there is a Table 3, which shows the dense model too, and ours where ablations differ from it.
    """
    suites = (*REPORTED, ZERO_SHOT)
    shown = (*PERPLEXITIES, ZERO_SHOT)
    entries = []
    for row, (contender, seeds) in untrained(corpus).items():
        slots = [
            Slot(exhibit="table-2", row=row, label=contender.label, suites=shown),
            Slot(exhibit="accuracy-vs-tokens", row=f"{contender.label}/0", label=contender.label, suites=shown),
        ]
        if row == "dense" and ablated:
            slots.append(Slot(exhibit="table-3", row=row, label=contender.label, suites=PERPLEXITIES))
        entries.append(_planned(contender, contender.recipe(0), seeds, suites, slots))
    for row, seeds in rows.items():
        contender = ours.contender(row, corpus)
        recipe = contender.recipe(MAIN * MILLION)
        slots = [Slot(exhibit="table-2", row=row, label=contender.label, suites=shown)]
        if row in FIVE:
            slots.append(_point(contender, recipe, shown))
        if row == "improved" and ablated and ours.permutation is None:
            slots.append(WHOLE)
        entries.append(_planned(contender, recipe, seeds, suites, slots))
    return entries


def in_order() -> list[Planned]:
    """The nearest rivals with their channels in order, at every budget: points of the figure, one a row of Table 2."""
    entries = []
    for name in RIVALS_IN_ORDER:
        for budget in BUDGETS:
            plain, steps = at_budget(name, budget)
            contender = put_in_order(plain)
            recipe = contender.recipe(steps.train.tokens)
            if budget != MAIN:
                slots = [_point(contender, recipe, PERPLEXITIES)]
                entries.append(_planned(contender, recipe, FIGURE_SEEDS, REPORTED, slots))
                continue
            shown = (*PERPLEXITIES, ZERO_SHOT)
            row = Slot(exhibit="table-2", row=f"{name}-in-order", label=contender.label, suites=shown)
            slots = [row, _point(contender, recipe, shown)]
            entries.append(_planned(contender, recipe, rival_seeds(name), (*REPORTED, ZERO_SHOT), slots))
    return entries


def figure(ours: Ours = OURS, *, ablated: bool = True) -> list[Planned]:
    """The five at the figure's other budgets; half the steps of the ablations' recipe is a row of Table 3 too."""
    entries = []
    for name in FIVE:
        for budget in OTHER_BUDGETS:
            contender, recipe = at_budget(name, budget, ours)
            slots = [_point(contender, recipe, PERPLEXITIES)]
            seeds: tuple[int, ...] = FIGURE_SEEDS
            if (name, budget) == ("improved", HALF):
                slots += [HALF_STEPS] if ablated and ours.permutation is None else []
                seeds = SEEDS
            entries.append(_planned(contender, recipe, seeds, REPORTED, slots))
    return entries


def faster() -> list[Planned]:
    """The rival that takes a higher peak too, a point of the figure by itself."""
    name, budget, peak = ALSO_FASTER
    contender, recipe = at_budget(name, budget)
    contender = replace(contender, label=f"{contender.label} ({peak:g})", lr=rate(peak))
    recipe = contender.recipe(recipe.train.tokens)
    return [_planned(contender, recipe, FIGURE_SEEDS, REPORTED, [_point(contender, recipe, PERPLEXITIES)])]


def figure_on_books() -> list[Planned]:
    """What of the figure was measured on books alone."""
    return [
        _planned(contender, recipe, FIGURE_SEEDS, REPORTED, [_point(contender, recipe, PERPLEXITIES)])
        for name in FIVE
        for budget in OTHER_BUDGETS
        if budget != BUDGETS[-1] or name in LONGEST_ON_BOOKS
        for contender in [tuned(name, BOOKS)]
        for recipe in [contender.recipe(budget * MILLION)]
    ]


def ablations() -> dict[str, tuple[str, Recipe]]:
    """Table 3: row, label and recipe of each one-line difference; one that makes no difference is left out."""
    ours = tuned("improved")
    method, objective = ours.method, ours.objective
    if not isinstance(method, SparseForge) or not isinstance(objective, Distill):
        raise RecipeError("improved: the ablations are written for SparseForge with Distill; write them anew")
    full = ours.recipe(MAIN * MILLION)
    hard = replace(
        method,
        temperature=Constant(value=0.05),
        structure_mix=Constant(value=1.0),
        mask_rate=Constant(value=1.0),
    )
    fixed = replace(objective, correction=None)
    teacher = Trained(recipe=tuned("dense-control").recipe(MAIN * MILLION), seed=None)
    changed = {
        "magnitude": ("w/ magnitude score", replace(full, method=replace(method, criterion=Magnitude()))),
        "wanda": ("w/ Wanda score", replace(full, method=replace(method, criterion=WandaScore()))),
        "fisher": ("w/ Fisher score", replace(full, method=replace(method, criterion=HessianOBD()))),
        "no-annealing": ("w/o annealing", replace(full, method=hard)),
        "slorb": ("w/ SLoRB", replace(full, slorb=SLoRB(k=16))),
        "no-distillation": ("w/o distillation", replace(full, objective=TaskOnly())),
        "frozen": ("w/o moving masks", replace(full, method=FrozenMask(prior=SPARSEGPT))),
        "equal-rates": ("w/ one rate for all weights", replace(full, train=replace(full.train, unmasked_rate=1.0))),
        "fixed-teacher": ("w/ fixed teacher", replace(full, objective=fixed)),
        "retrained-teacher": ("w/ retrained, fixed teacher", replace(full, objective=replace(fixed, teacher=teacher))),
        "books-alone": ("w/ books alone", replace(full, corpus=BOOKS)),
    }
    return {row: (label, recipe) for row, (label, recipe) in changed.items() if recipe != full}


def whole(ours: Ours = OURS) -> list[Planned]:
    """What the ablations differ from, and half its steps, where ours is not these itself but a difference of them."""
    if ours.permutation is None:
        return []
    base, contender = tuned("improved"), ours.contender("improved")
    order = Slot(exhibit="table-3", row="in-order", label="w/ channels in order", suites=PERPLEXITIES)
    return [
        _planned(replace(base, label=WHOLE.label), base.recipe(MAIN * MILLION), SEEDS, REPORTED, [WHOLE]),
        _planned(replace(base, label=HALF_STEPS.label), base.recipe(HALF * MILLION), SEEDS, REPORTED, [HALF_STEPS]),
        _planned(contender, contender.recipe(MAIN * MILLION), ours.seeds, REPORTED, [order]),
    ]


def table_3() -> list[Planned]:
    """The ablations at the main budget; KL to dense is on a recipe's own text, and so says nothing of other text."""
    entries = []
    for row, (label, recipe) in ablations().items():
        suites = tuple(suite for suite in REPORTED if suite != KL or row != "books-alone")
        slot = Slot(exhibit="table-3", row=row, label=label, suites=PERPLEXITIES)
        entries.append(Planned(recipe=recipe, variant=label, seeds=SEEDS, suites=suites, slots=(slot,)))
    return entries


def _planned(
    contender: Contender, recipe: Recipe, seeds: tuple[int, ...], suites: tuple[Suite, ...], slots: list[Slot]
) -> Planned:
    return Planned(recipe=recipe, variant=contender.label, seeds=seeds, suites=suites, slots=tuple(slots))


def _point(contender: Contender, recipe: Recipe, suites: tuple[Suite, ...]) -> Slot:
    row = f"{contender.label}/{recipe.train.tokens}"
    return Slot(exhibit="accuracy-vs-tokens", row=row, label=contender.label, suites=suites)


def study(ours: Ours = OURS) -> Grid:
    """All of it."""
    rows = table_2(ours.main_seeds(), ours=ours)
    return Grid(
        name=NAME,
        title="The study: SmolLM2-135M, all block linears 2:4",
        entries=(*rows, *in_order(), *figure(ours), *faster(), *whole(ours), *table_3()),
        captions=captions(ours),
    )


def unordered() -> Grid:
    """Table 2 and the figure as the study was before channels were put in order, as far as it was measured."""
    return Grid(
        name=UNORDERED_CHANNELS,
        title="The study with channels as they stand: SmolLM2-135M, all block linears 2:4",
        entries=(*table_2(UNORDERED.main_seeds(), ablated=False, ours=UNORDERED), *figure(UNORDERED, ablated=False)),
        captions={
            "table-2": CAPTIONS["table-2"],
            "accuracy-vs-tokens": f"{CAPTIONS['accuracy-vs-tokens']} {_steps(UNORDERED)}",
        },
    )


def books_alone() -> Grid:
    """The same methods with the same settings on books alone, as far as it was measured."""
    table, points = CAPTIONS["table-2"], CAPTIONS["accuracy-vs-tokens"]
    captions = {"table-2": table.replace(f" {MIXTURE}", " public-domain books"), "accuracy-vs-tokens": points}
    return Grid(
        name=BOOKS_ALONE,
        title="The study on books alone: SmolLM2-135M, all block linears 2:4",
        entries=(*table_2(ON_BOOKS, BOOKS, ablated=False, ours=UNORDERED), *figure_on_books()),
        captions=captions,
    )


MIXTURE = "public-domain books and modern prose"
_TOKENS = f"{plan(MAIN * MILLION, Constant(value=0.0)).tokens:,}"
_TEXT = (
    "Perplexity at window 2048, on nine books that no cell trains on (books-2048) and on the raw WikiText-2 test set; "
    f"accuracy zero-shot, the first {ITEMS:,} items a task. Every method had the same number of trials, on other text."
)


def _steps(ours: Ours, in_order_too: tuple[str, ...] = ()) -> str:
    """Who has how many seeds, and the width of steps; `in_order_too` are rivals with their channels in order."""
    seeds = ours.main_seeds()
    more = [tuned(name).label for name in TUNED if len(seeds[name]) > len(SEEDS)]
    more += [put_in_order(tuned(name)).label for name in in_order_too if len(rival_seeds(name)) > len(SEEDS)]
    named = " and ".join([", ".join(more[:-1]), more[-1]] if len(more) > 1 else more)
    return (
        f"Of {named} there are {len(SEEDS) + len(MORE_SEEDS)} at the main budget, "
        f"of ours {len(SEEDS)} at {HALF} M tokens. Steps are of {SEQUENCES} sequences of 1,024 tokens; from "
        f"{WIDE_FROM} M tokens on of {WIDE_SEQUENCES} for all but AST with its branch, which gained nothing by that "
        "where it was tried (docs/lab-log.md, section 12)."
    )


def _faster() -> str:
    """What the point of `faster` is."""
    name, budget, peak = ALSO_FASTER
    return (
        f"{tuned(name).label} ({peak:g}): the same with a peak learning rate of {peak:g} rather than {TUNED[name]:g}, "
        f"at {budget} M tokens alone, a rival like the others."
    )


CAPTIONS = {
    "table-2": (
        f"SmolLM2-135M, all block linears 2:4, {_TOKENS} retraining tokens of {MIXTURE} for the "
        f"retrained rows, read in the same order by every method of a seed. {_TEXT} The dense control had the same "
        "tokens and teacher and is no sparse model."
    ),
    "table-3": (
        f"Ablations of SparseForge (improved), {_TOKENS} tokens unless said. Without annealing: hard masks from the "
        "first update on, chosen again at every later one by the same score. Without moving masks: SparseGPT's, as it "
        "is. A fixed teacher takes no steps on the text; the retrained one is the dense control of the same seed, "
        "which has seen the same tokens once more. Books alone: five shards of books, no modern prose. No larger "
        "model with this tokenizer is at hand, so that there is no row with a larger teacher."
    ),
    "accuracy-vs-tokens": (
        "SmolLM2-135M, retraining tokens against perplexity on books no cell trains on and on WikiText-2; accuracy"
        f" at the main budget alone. {len(SEEDS)} seeds at the main budget, {len(FIGURE_SEEDS)} at the others."
    ),
}


def captions(ours: Ours = OURS) -> dict[str, str]:
    """Of the study's exhibits."""
    has_order = " SparseForge (improved) has its channels so too." if ours.permutation else ""
    order = (
        'Rows that end in "(in order)": the channels of the dense model were first put into an order in which groups '
        f"of four lose least, which is no part of those methods as published.{has_order}"
    )
    base = (
        " The whole method is the recipe with channels as they stand: with channels in order it is SparseForge "
        "(improved) of Table 2."
    )
    return {
        "table-2": f"{CAPTIONS['table-2']} {order}",
        "table-3": CAPTIONS["table-3"] + (base if ours.permutation else ""),
        "accuracy-vs-tokens": f"{CAPTIONS['accuracy-vs-tokens']} {_steps(ours, RIVALS_IN_ORDER)} {_faster()}",
    }
