"""The study's grids: as many trials for every method, judged on nothing that is reported."""

from __future__ import annotations

import collections
import json
import re
from dataclasses import replace

import pytest

from flows.bundle import Only, _corpora, _not_carried, choose
from flows.grids import grid_named
from flows.grids.planned import expand
from flows.grids.study import (
    BOOKS,
    MIXED,
    OTHER_BOOKS,
    PEAKS,
    PERMUTED,
    PERPLEXITIES,
    REPORTED,
    TRIED_ON,
    contenders,
    rate,
)
from flows.grids.study_grid import (
    ALSO_FASTER,
    BOOKS_ALONE,
    FIGURE_SEEDS,
    FIVE,
    MORE_SEEDS,
    MORE_SEEDS_OF,
    NAME,
    ORDERED,
    OURS,
    RIVALS_IN_ORDER,
    SEEDS,
    TUNED,
    UNORDERED,
    UNORDERED_CHANNELS,
    WIDE,
    WIDE_FROM,
    ZERO_SHOT,
    ablations,
    at_budget,
    faster,
    study,
    tuned,
    unordered,
)
from flows.grids.study_lab import (
    COMBINED,
    ELSEWHERE,
    FASTER,
    FORGETTING,
    FORGOTTEN,
    HELD,
    IDEAS,
    LONG,
    LONGER,
    PERMUTING,
    PERMUTING_LONG,
    RATES,
    RETAUGHT,
    RETAUGHT_LONG,
    TEXTS,
    TWICE_AS_LONG,
    UNSHOWN,
    WIDER,
)
from flows.provenance import ROOT
from sparseforge_core import specs
from sparseforge_core.data.corpora import TextFiles
from sparseforge_core.errors import RecipeError
from sparseforge_core.evaluate.suites import Suite
from sparseforge_core.identity import key_of
from sparseforge_core.observe.curvature import Hutchinson
from sparseforge_core.presets import PAPER
from sparseforge_core.recipe import Recipe
from sparseforge_core.schedules import WarmupCosine
from sparseforge_core.store.results import Results


def test_every_method_has_the_same_trials_on_the_same_text_and_budget() -> None:
    entries = grid_named("smollm2-trials").entries
    trials = collections.Counter(entry.variant.rpartition(" ")[0] for entry in entries)
    assert set(trials.values()) == {len(PEAKS)}
    assert len(trials) == len(contenders(PEAKS[0]))
    assert {entry.recipe.train.tokens for entry in entries} == {184 * 16 * 1024}
    assert {entry.recipe.corpus for entry in entries} == {BOOKS}
    assert {entry.seeds for entry in entries} == {(0,)}


def test_trials_and_ideas_never_see_what_is_reported() -> None:
    for name, texts in (("smollm2-trials", {TRIED_ON}), ("smollm2-ideas", {TRIED_ON, FORGOTTEN, ELSEWHERE})):
        assert {suite for entry in grid_named(name).entries for suite in entry.suites} == texts
        assert not texts & set(REPORTED)
    for suite in (FORGOTTEN, ELSEWHERE):
        assert isinstance(suite.corpus, TextFiles)
        assert not {*suite.corpus.sha256} & {*BOOKS.sha256, *OTHER_BOOKS.sha256, *MIXED.sha256}
    assert not set(UNSHOWN) & {*SEEDS, *MORE_SEEDS, *FIGURE_SEEDS}
    assert not {*BOOKS.sha256} & {*OTHER_BOOKS.sha256}


def test_every_idea_is_a_recipe_of_its_own() -> None:
    plan = expand(grid_named("smollm2-ideas"))
    groups = (IDEAS, LONG, FORGETTING, RATES, TEXTS, COMBINED, HELD, WIDER, PERMUTING, RETAUGHT)
    longer = (TWICE_AS_LONG, LONGER, PERMUTING_LONG, RETAUGHT_LONG, FASTER)
    teachers = {required for cell in plan.cells for required in cell.requires}
    recipes = {cell.recipe_key for cell in plan.cells if cell.key not in teachers}
    assert len(recipes) == sum(map(len, (*groups, *longer)))
    assert len(teachers) == 3, "of both seeds at 12 M tokens, of one at 24"
    assert {key.partition("-")[0] for key in teachers} >= {key_of(tuned("dense-control").recipe(12_000_000))}
    for cell in plan.cells:
        for required in cell.requires:
            taught_by = next(one for one in plan.cells if one.key == required)
            assert (taught_by.seed, taught_by.tokens) == (cell.seed, cell.tokens)


def test_the_text_of_a_suite_travels_with_a_bundle() -> None:
    chosen = choose(["smollm2-ideas"])
    assert chosen.cells
    suites = [specs.decode(json.loads(json.dumps(specs.encode(suite))), Suite, "suite") for suite in REPORTED]
    assert OTHER_BOOKS in _corpora(suites)
    assert not any("books" in said for said in _not_carried(suites))


def test_the_grid_has_every_method_at_the_main_budget_with_three_seeds_and_four_more_of_the_nearest_rival() -> None:
    rows = {slot.row: entry for entry in grid_named(NAME).entries for slot in entry.slots if slot.exhibit == "table-2"}
    ordered = {f"{name}-in-order": name for name in RIVALS_IN_ORDER}
    assert set(rows) == {"dense", "magnitude", "wanda", "sparsegpt", *contenders(PEAKS[0]), *ordered}
    for row, name in ordered.items():
        assert rows[row].seeds == rows[name].seeds
        assert replace(rows[row].recipe, permutation=None) == rows[name].recipe
    for name in contenders(PEAKS[0]):
        more = name in MORE_SEEDS_OF or (name == "improved" and OURS == ORDERED)
        assert rows[name].seeds == ((0, 1, 2, 5, 6, 7, 8) if more else (0, 1, 2))
        assert rows[name].recipe.train.tokens == 733 * 16 * 1024
    assert {entry.suites for entry in rows.values()} == {(*REPORTED, ZERO_SHOT)}
    assert set(TUNED) == set(contenders(PEAKS[0]))


def test_what_is_tuned_is_what_the_committed_trials_chose() -> None:
    """The grid's peaks are those of the lowest held-out perplexity in the store, the figure's five the best."""
    results = Results(f"sqlite:///{ROOT / 'results/smollm2/store.db'}")
    try:
        rows = results.tidy("smollm2-trials")
    finally:
        results.close()
    plan = {cell.key: cell.variant for cell in expand(grid_named("smollm2-trials")).cells}
    names = {contender.label: name for name, contender in contenders(PEAKS[0]).items()}
    found: dict[str, dict[float, float]] = collections.defaultdict(dict)
    for row in rows:
        if row.metric == "perplexity" and row.value is not None:
            label, _, peak = plan[row.cell_key].rpartition(" ")
            found[names[label]][float(peak)] = row.value
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(TUNED, len(PEAKS))
    assert {name: min(values, key=values.__getitem__) for name, values in found.items()} == TUNED
    sparse = sorted((name for name in found if name != "dense-control"), key=lambda name: min(found[name].values()))
    assert set(FIVE) == set(sparse[:5])


def test_the_figure_has_five_methods_and_the_nearest_rivals_in_order_at_five_budgets() -> None:
    points = collections.defaultdict(set)
    for entry in grid_named(NAME).entries:
        for slot in entry.slots:
            if slot.exhibit == "accuracy-vs-tokens" and not slot.row.endswith("/0"):
                points[slot.label].add(entry.recipe.train.tokens // 1_000_000)
    name, budget, peak = ALSO_FASTER
    assert points.pop(f"{tuned(name).label} ({peak:g})") == {budget}
    labels = [tuned(name).label for name in FIVE]
    labels += [f"{tuned(name).label} (in order)" for name in RIVALS_IN_ORDER]
    assert {label: {3, 6, 12, 24, 48} for label in labels} == points


def test_a_rival_in_order_differs_by_its_order_alone_at_every_budget() -> None:
    entries = {(entry.variant, entry.recipe.train.tokens): entry for entry in grid_named(NAME).entries}
    for name in RIVALS_IN_ORDER:
        for budget in (3, 6, 12, 24, 48):
            contender, recipe = at_budget(name, budget)
            ordered = entries[f"{contender.label} (in order)", recipe.train.tokens]
            assert ordered.recipe == replace(recipe, permutation=PERMUTED)
            plain = entries[contender.label, recipe.train.tokens]
            assert (ordered.seeds, ordered.suites) == (plain.seeds, plain.suites)
            for one in (ordered, plain):
                points = [slot.suites for slot in one.slots if slot.exhibit == "accuracy-vs-tokens"]
                assert points == [(*PERPLEXITIES, ZERO_SHOT) if budget == 12 else PERPLEXITIES]


def test_captions_name_who_has_more_seeds() -> None:
    said = {name: grid_named(name).captions["accuracy-vs-tokens"] for name in (NAME, UNORDERED_CHANNELS)}
    assert " Of AST + SLoRB there are 7 at the main budget" in said[UNORDERED_CHANNELS]
    wanted = " Of AST + SLoRB, SparseForge (improved) and AST + SLoRB (in order) there are 7 at the main budget"
    assert wanted in said[NAME]


def test_the_rival_that_is_faster_too_differs_in_its_peak_alone() -> None:
    name, budget, peak = ALSO_FASTER
    assert [(entry.seeds, entry.suites) for entry in faster()] == [(FIGURE_SEEDS, REPORTED)]
    recipes = [entry.recipe for entry in faster()]
    expected = at_budget(name, budget)[1]
    assert [replace(one, train=replace(one.train, lr=expected.train.lr)) for one in recipes] == [expected]
    assert [one.train.lr for one in recipes] == [rate(peak)]
    assert recipes[0].train.lr != expected.train.lr


def test_at_a_budget_all_of_the_figure_see_as_many_tokens_and_wide_steps_change_nothing_else() -> None:
    tokens = collections.defaultdict(set)
    for name in FIVE:
        for budget in (3, 6, 24, 48):
            contender, recipe = at_budget(name, budget)
            tokens[budget].add(recipe.train.tokens)
            narrow = OURS.contender(name).recipe(budget * 1_000_000)
            wide = name in WIDE and budget >= WIDE_FROM
            assert recipe.train.sequences == narrow.train.sequences * (2 if wide else 1)
            assert replace(recipe, train=narrow.train) == narrow
            assert contender.label == tuned(name).label
    assert {len(found) for found in tokens.values()} == {1}


def test_ours_trained_anew_differs_by_its_order_alone_and_the_ablations_stay_what_they_are() -> None:
    """What the store has of ours stays planned, as the whole method that ablations differ from or as it was shown."""
    before, anew, shown = expand(study(UNORDERED)), expand(study(ORDERED)), expand(unordered())
    assert expand(grid_named(UNORDERED_CHANNELS)) == shown
    keys = [{cell.key for cell in plan.cells} for plan in (before, anew, shown)]
    assert keys[2] <= keys[0] <= keys[1] | keys[2]
    new = [cell for cell in anew.cells if cell.key in keys[1] - keys[0]]
    assert {cell.variant for cell in new} == {"SparseForge (improved)"}
    seeds = sorted((cell.tokens // 1_000_000, cell.seed) for cell in new)
    assert seeds == [(3, 1), *((6, s) for s in SEEDS), *((12, s) for s in (*SEEDS, *MORE_SEEDS)), (24, 1), (48, 1)]
    known = {cell.recipe_key for cell in before.cells}
    assert {key_of(replace(anew.recipes[cell.recipe_key], permutation=None)) for cell in new} <= known
    rows = [[slot.row for slot in plan.slots if slot.exhibit == "table-3"] for plan in (before, anew)]
    assert set(rows[1]) - set(rows[0]) == {"in-order"}
    assert not set(rows[0]) - set(rows[1])


def test_an_ablation_differs_from_the_full_recipe_and_none_twice() -> None:
    full = tuned("improved").recipe(12_000_000)
    recipes = [recipe for _, recipe in ablations().values()]
    assert full not in recipes
    assert len(set(map(key_of, recipes))) == len(recipes)
    rows = {slot.row for entry in grid_named(NAME).entries for slot in entry.slots if slot.exhibit == "table-3"}
    assert rows == {"dense", "full", "half-steps", *(["in-order"] if OURS == ORDERED else []), *ablations()}


def test_the_grid_on_books_alone_is_finished_and_differs_in_its_text_alone() -> None:
    results = Results(f"sqlite:///{ROOT / 'results/smollm2/store.db'}")
    try:
        statuses = results.stage_statuses()
    finally:
        results.close()
    plan = expand(grid_named(BOOKS_ALONE))
    assert {statuses[key, stage] for key, stages in plan.stages.items() for stage in stages} == {"done"}
    assert set(map(_but_for_text_and_steps, plan.recipes.values())) <= set(
        map(_but_for_text_and_steps, expand(study(UNORDERED)).recipes.values())
    )


def _but_for_text_and_steps(recipe: Recipe) -> tuple[str, int]:
    """A recipe without its text and the width of its steps, and its budget in millions of tokens."""
    train = replace(recipe.train, steps=1, sequences=1) if recipe.train.steps else recipe.train
    return key_of(replace(recipe, corpus=BOOKS, train=train)), recipe.train.tokens // 1_000_000


def test_the_retrained_teacher_comes_along_and_a_part_of_the_grid_can_be_carried() -> None:
    chosen = choose([NAME], only=Only(variants=("w/ Retrained, fixed Teacher",), seeds=(1,)))
    assert [(cell.variant, cell.seed) for cell in chosen.cells.values()] == [
        ("Dense control", 1),
        ("w/ retrained, fixed teacher", 1),
    ]
    one_shot = choose([NAME], only=Only(millions=(0,), seeds=(0,)))
    assert {cell.variant for cell in one_shot.cells.values()} == {"Dense", "Magnitude", "Wanda", "SparseGPT"}
    left = choose([NAME], only=Only(millions=(0,), without=frozenset(one_shot.cells)))
    assert {(cell.variant, cell.seed) for cell in left.cells.values()} == {
        (name, seed) for name in ("Wanda", "SparseGPT") for seed in (1, 2)
    }


@pytest.mark.parametrize(
    ("only", "sentence"),
    [
        (Only(variants=("AST", "CASt.")), "unknown variant 'CASt.'. Did you mean 'CAST'"),
        (Only(seeds=(3,)), "unknown seed '3'"),
        (Only(millions=(13,)), "unknown millions of tokens '13'"),
        (Only(variants=("AST",), millions=(0,)), "has no cell with all that was asked for"),
    ],
)
def test_a_part_that_the_grid_does_not_have_is_refused(only: Only, sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        choose([NAME], only=only)


def test_the_papers_row_is_the_papers_preset_but_for_the_peak_and_the_pace_of_its_curvature() -> None:
    recipe = contenders(PEAKS[-1])["paper"].recipe(12_000_000)
    assert isinstance(PAPER.method.curvature, Hutchinson)
    method = replace(PAPER.method, curvature=replace(PAPER.method.curvature, every=10))
    assert (recipe.method, recipe.objective, recipe.slorb) == (method, PAPER.objective, PAPER.slorb)
    assert (recipe.train.weight_decay, recipe.train.decayed) == (0.1, "all")
    lr = recipe.train.lr
    assert isinstance(lr, WarmupCosine)
    assert isinstance(PAPER.lr, WarmupCosine)
    assert (lr.peak, lr.last) == (PEAKS[-1], PEAKS[-1] / 10)
    assert lr.warmup == PAPER.lr.warmup
