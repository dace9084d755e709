"""The grids as data: every row has its recipe, every recipe its cells, and nothing claims a place twice."""

from __future__ import annotations

import collections
import dataclasses
import json

import pytest

from flows.grids import GRIDS, grid_named, paper
from flows.grids.planned import CAPTION, Grid, Plan, Planned, Slot, expand
from flows.grids.published import PUBLISHED
from flows.placements import CPU_FLOPS, GPU_FLOPS, card_of, cost_hours, flops, memory_gib, model_name, placement_for
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import RecipeError
from sparseforge_core.evaluate.suites import CAST_7, HELDOUT, ZERO_SHOT_7, PerplexitySuite, suite_key
from sparseforge_core.identity import diff, key_of, loads, recipe_spec
from sparseforge_core.methods import Dense, DenseControl, SparseForge
from sparseforge_core.models.sources import Hub, Tiny, TrainedBPE
from sparseforge_core.objective import Distill
from sparseforge_core.recipe import Recipe, Trained, TrainPlan
from sparseforge_core.sparsity.patterns import BLOCK_16, nm
from tests.calls import calls

TABLES = {f"table-{n}" for n in range(1, 8)}
EVERYTHING = TABLES | {"accuracy-vs-tokens"}

TEXT = Synthetic(documents_count=20)
TINY = Tiny(architecture="llama", tokenizer=TrainedBPE(corpus=TEXT, size=300), width=32, heads=2)
DENSE = Recipe(model=TINY, method=Dense(), corpus=TEXT)


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: expand(grid_named(name)) for name in GRIDS}


@pytest.fixture(scope="module")
def full(plans: dict[str, Plan]) -> Plan:
    return plans["full"]


def _rows(plan: Plan, exhibit: str) -> list[str]:
    slots = [slot for slot in plan.slots if slot.exhibit == exhibit and slot.row != CAPTION]
    return [slot.row for slot in sorted(slots, key=lambda slot: slot.position)]


def _grid(*entries: Planned) -> Grid:
    return Grid(name="g", title="", entries=entries, captions={})


# ------------------------------------------------------------------------------------------- what holds of every grid


@pytest.mark.parametrize("name", GRIDS)
def test_every_slot_has_cells_that_run_its_suites(plans: dict[str, Plan], name: str) -> None:
    plan = plans[name]
    cells = {cell.key for cell in plan.cells}
    suites = {suite.key for suite in plan.suites}
    assert set(plan.stages) == cells
    for slot in plan.slots:
        if slot.row == CAPTION:
            assert slot.note
            continue
        assert slot.seeds
        assert slot.suite_keys
        assert set(slot.suite_keys) <= suites
        for seed in slot.seeds:
            assert set(slot.suite_keys) <= set(plan.stages[f"{slot.recipe_key}-s{seed}"])


@pytest.mark.parametrize("name", GRIDS)
def test_required_cells_are_planned_before_those_that_need_them(plans: dict[str, Plan], name: str) -> None:
    plan = plans[name]
    order = {cell.key: place for place, cell in enumerate(plan.cells)}
    for cell in plan.cells:
        assert plan.stages[cell.key][0] == "train"
        for required in cell.requires:
            assert order[required] < order[cell.key]


@pytest.mark.parametrize("name", GRIDS)
def test_positions_and_captions(plans: dict[str, Plan], name: str) -> None:
    by_exhibit = collections.defaultdict(list)
    for slot in plans[name].slots:
        by_exhibit[slot.exhibit].append(slot)
    for exhibit, slots in by_exhibit.items():
        assert len({slot.position for slot in slots}) == len(slots), exhibit
        assert [slot.row for slot in slots].count(CAPTION) == 1, f"{exhibit} of {name} has no caption"


@pytest.mark.parametrize("name", ["demo", "tiny-smoke", "table-7"])
def test_cell_files_read_back_under_the_same_key(plans: dict[str, Plan], name: str) -> None:
    for cell in plans[name].cells:
        again = loads(cell.cell_json)
        assert again.seed == cell.seed
        assert recipe_spec(again.recipe) == json.loads(cell.spec_json)
        assert again.recipe.train.tokens == cell.tokens


def test_unknown_grid_suggests_the_near_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'demo'"):
        grid_named("dem")


# ------------------------------------------------------------------------------------------- expansion


def test_two_entries_of_one_recipe_are_one_cell_with_the_suites_of_both() -> None:
    other = PerplexitySuite(name="other", text="heldout", window=16)
    plan = expand(
        _grid(
            Planned(
                recipe=DENSE, variant="dense", suites=(HELDOUT,), slots=(Slot(exhibit="table-1", row="a", label="A"),)
            ),
            Planned(
                recipe=DENSE, variant="dense", suites=(other,), slots=(Slot(exhibit="table-2", row="a", label="A"),)
            ),
        )
    )
    assert len(plan.cells) == 1
    assert plan.stages[plan.cells[0].key] == ("train", suite_key(HELDOUT), suite_key(other))
    assert [slot.suite_keys for slot in plan.slots] == [(suite_key(HELDOUT),), (suite_key(other),)]


def test_a_chain_of_trained_models_is_planned_whole() -> None:
    def control(model: Tiny | Trained, steps: int) -> Recipe:
        return Recipe(model=model, method=DenseControl(), corpus=TEXT, train=TrainPlan(steps=steps))

    first = Trained(recipe=control(TINY, 10), seed=3)
    second = Trained(recipe=control(first, 20))
    third = Recipe(model=TINY, method=SparseForge(), pattern=nm(2, 4), corpus=TEXT, train=TrainPlan(steps=30),
                   objective=Distill(teacher=second))  # fmt: skip
    plan = expand(_grid(Planned(recipe=third, variant="SparseForge", seeds=(0, 1))))
    assert [(cell.tokens // 1024, cell.seed) for cell in plan.cells] == [(10, 3), (20, 0), (30, 0), (30, 1)]
    assert [cell.variant for cell in plan.cells] == ["pretraining", "pretraining", "SparseForge", "SparseForge"]
    assert [len(cell.requires) for cell in plan.cells] == [0, 1, 1, 1]


def test_each_seed_may_be_taught_by_a_model_of_its_own_seed() -> None:
    control = Recipe(model=TINY, method=DenseControl(), corpus=TEXT, train=TrainPlan(steps=10))
    taught = Recipe(model=TINY, method=SparseForge(), pattern=nm(2, 4), corpus=TEXT, train=TrainPlan(steps=30),
                    objective=Distill(teacher=Trained(recipe=control, seed=None)))  # fmt: skip
    plan = expand(_grid(Planned(recipe=taught, variant="SparseForge", seeds=(1, 2))))
    (teacher, pupil) = key_of(control), key_of(taught)
    assert {cell.key: list(cell.requires) for cell in plan.cells} == {
        f"{teacher}-s1": [], f"{teacher}-s2": [], f"{pupil}-s1": [f"{teacher}-s1"], f"{pupil}-s2": [f"{teacher}-s2"],
    }  # fmt: skip


def test_two_recipes_for_one_row_are_refused() -> None:
    slot = Slot(exhibit="table-1", row="a", label="A")
    other = dataclasses.replace(DENSE, corpus=Synthetic(documents_count=30))
    entries = [Planned(recipe=recipe, variant="dense", suites=(HELDOUT,), slots=(slot,)) for recipe in (DENSE, other)]
    with pytest.raises(RecipeError, match="two recipes claim row 'a' of table-1"):
        expand(_grid(*entries))


def test_a_row_cannot_show_a_suite_that_its_recipe_does_not_run() -> None:
    slot = Slot(exhibit="table-1", row="a", label="A", suites=(CAST_7,))
    with pytest.raises(RecipeError, match=r"shows \['cast-7'\]"):
        expand(_grid(Planned(recipe=DENSE, variant="dense", suites=(HELDOUT,), slots=(slot,))))


# ------------------------------------------------------------------------------------------- the paper and the demo


@pytest.mark.parametrize("name", ["full", "demo"])
def test_every_exhibit_has_rows(plans: dict[str, Plan], name: str) -> None:
    assert {slot.exhibit for slot in plans[name].slots} == EVERYTHING
    assert all(len(_rows(plans[name], exhibit)) >= 2 for exhibit in EVERYTHING)


@pytest.mark.parametrize("name", ["full", "demo"])
def test_cross_model_rows_come_in_pairs_and_detail_tables_repeat_their_summaries(
    plans: dict[str, Plan], name: str
) -> None:
    for summary, detail in (("table-1", "table-4"), ("table-5", "table-6")):
        rows = _rows(plans[name], summary)
        assert sorted(rows) == sorted(_rows(plans[name], detail))
        groups = {row.rpartition("/")[0] for row in rows}
        assert {f"{group}/{variant}" for group in groups for variant in ("dense", "sparseforge")} <= set(rows)


def test_the_paper_names_its_models_and_seeds(full: Plan) -> None:
    rows = {row.rpartition("/")[0] for row in _rows(full, "table-1")}
    assert rows == {model_name(model) for model in paper.CROSS_MODEL}
    assert len(rows) == 9
    assert len(_rows(full, "table-5")) == 2 * len(paper.BLOCK_MODELS) == 16
    recipes = collections.defaultdict(set)
    for cell in full.cells:
        recipes[cell.recipe_key].add((cell.method, cell.seed))
    for found in recipes.values():
        method = next(iter(found))[0]
        assert {seed for _, seed in found} == ({0} if method in ("dense", "magnitude") else {0, 1, 2})


def test_every_model_of_the_paper_is_pinned(full: Plan) -> None:
    for cell in full.cells:
        model = loads(cell.cell_json).recipe.model
        assert isinstance(model, Hub)
        assert len(model.revision) == 40, f"{model.id} is at {model.revision!r}"
        assert set(model.revision) <= set("0123456789abcdef")


ONE_CHANGE = {
    "dolmino": "corpus",
    "half-steps": "train.steps",
    "magnitude": "method.criterion",
    "no-slorb": "slorb",
    "teacher-13b": "objective.teacher",
    "no-distillation": "objective",
}


@pytest.mark.parametrize("row", ONE_CHANGE)
def test_an_ablation_changes_one_thing(row: str) -> None:
    changes = diff(recipe_spec(paper.FULL), recipe_spec(paper.ABLATIONS[row][1]))
    assert changes
    assert all(line.startswith(ONE_CHANGE[row]) for line in changes), changes


def test_controls_differ_from_sparseforge_by_their_mask_alone() -> None:
    by_row = {entry.slots[0].row: entry.recipe for entry in paper.table_2()}
    ours = by_row["sparseforge"]
    for row, allowed in (("dense-control", {"method", "pattern"}), ("frozen-wanda", {"method"})):
        rival = by_row[row]
        changed = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(rival, f.name)}
        assert changed == allowed, row


@pytest.mark.parametrize("tokens", [paper.TOKENS, paper.LONG_TOKENS])
@pytest.mark.parametrize("model", paper.CROSS_MODEL, ids=model_name)
def test_budgets_are_the_papers(model: Hub, tokens: int) -> None:
    plan = paper.plan(model, tokens)
    assert plan.tokens == pytest.approx(tokens, rel=1e-3)
    assert plan.length <= card_of(model).context


def test_block_16_is_the_appendix_pattern(full: Plan) -> None:
    keys = {slot.recipe_key for slot in full.slots if slot.exhibit == "table-5" and slot.row.endswith("/sparseforge")}
    cells = [cell for cell in full.cells if cell.recipe_key in keys]
    assert {cell.pattern for cell in cells} == {BLOCK_16.name}


def test_the_demo_orders_budgets_and_gives_the_control_what_sparseforge_gets(plans: dict[str, Plan]) -> None:
    cells = {cell.recipe_key: loads(cell.cell_json).recipe for cell in plans["demo"].cells}
    points = collections.defaultdict(list)
    for slot in plans["demo"].slots:
        if slot.exhibit == "accuracy-vs-tokens" and slot.row != CAPTION and slot.recipe_key:
            points[slot.label].append(cells[slot.recipe_key])
    ours, control = points["SparseForge"], points["Dense control"]
    assert len(ours) == len(control) == 3
    for sparse, dense in zip(ours, control, strict=True):
        for part in ("model", "train", "objective", "corpus"):
            assert getattr(sparse, part) == getattr(dense, part)


def test_the_demo_covers_every_family(plans: dict[str, Plan]) -> None:
    assert {cell.family for cell in plans["demo"].cells} == {"llama", "gpt2", "opt", "qwen3", "deepseek_moe"}


def test_tiny_accuracy_is_labelled_as_near_chance() -> None:
    captions = grid_named("demo").captions
    for exhibit in sorted(EVERYTHING - {"table-7"}):
        assert "near chance" in captions[exhibit], exhibit


# ------------------------------------------------------------------------------------------- placements


def test_flops_of_a_distilled_sparse_cell() -> None:
    """7 N for the student with its mask, 2 N for the teacher, and the evaluation: worked by hand for LLaMA-2-7B."""
    recipe = paper.forge(paper.zoo.LLAMA2_7B)
    expected = 9 * 6738.4e6 * recipe.train.tokens + 2 * 6738.4e6 * 1.5e6
    assert flops(recipe) == pytest.approx(expected)
    assert cost_hours(recipe) == pytest.approx(expected / GPU_FLOPS / 3600)


def test_a_larger_teacher_and_chosen_experts_count() -> None:
    assert flops(paper.ABLATIONS["teacher-13b"][1]) > flops(paper.FULL) > flops(paper.ABLATIONS["no-distillation"][1])
    assert memory_gib(paper.ABLATIONS["teacher-13b"][1]) > memory_gib(paper.FULL)
    experts = card_of(paper.zoo.DEEPSEEK_MOE_16B)
    assert experts.active is not None
    assert flops(paper.forge(paper.zoo.DEEPSEEK_MOE_16B)) < 9 * experts.parameters * paper.TOKENS


def test_pools(plans: dict[str, Plan]) -> None:
    assert {cell.pool for name in ("demo", "tiny-smoke") for cell in plans[name].cells} == {"cpu"}
    # Hours of a core, though it could: whoever has a GPU pool wants them there.
    trials = expand(grid_named("smollm2-trials")).cells
    assert {cell.pool for cell in (*trials, *plans["smollm2-smoke"].cells)} == {"gpu-1"}
    assert max(cell.cost_hours for cell in trials) < 0.1
    assert placement_for(paper.forge(paper.zoo.GPT2)).pool == "gpu-1"
    assert placement_for(paper.forge(paper.zoo.LLAMA2_7B)).gpus == 8
    assert CPU_FLOPS < GPU_FLOPS


def test_a_hub_model_without_a_card_says_where_to_add_it() -> None:
    recipe = Recipe(model=Hub(id="someone/else", revision="main"), method=Dense(), corpus=TEXT)
    with pytest.raises(RecipeError, match=r"flows/placements\.py"):
        placement_for(recipe)


# ------------------------------------------------------------------------------------------- size


def _sized(recipes: int, first: int) -> Grid:
    full = paper.FULL
    return _grid(
        *(
            Planned(
                recipe=dataclasses.replace(full, train=dataclasses.replace(full.train, steps=first + i)),
                variant="SparseForge",
                seeds=(0, 1, 2),
                suites=(ZERO_SHOT_7,),
                slots=(Slot(exhibit="table-2", row=str(i), label=str(i)),),
            )
            for i in range(recipes)
        )
    )


def test_ten_times_as_many_cells_are_ten_times_the_work() -> None:
    expand(_sized(1, 100))
    few, many = _sized(50, 1_000), _sized(500, 2_000)
    found: list[Plan] = []
    once = calls(lambda: found.append(expand(few)))
    assert calls(lambda: found.append(expand(many))) <= 10 * once
    assert [len({cell.key for cell in plan.cells}) for plan in found] == [150, 1_500]


# ------------------------------------------------------------------------------------------- reproductions


def test_every_published_number_of_the_reproductions_has_its_row_and_the_other_way_round(
    plans: dict[str, Plan],
) -> None:
    labels = {slot.label for slot in plans["reproductions"].slots if slot.row != CAPTION}
    quoted = {number.row for number in PUBLISHED if number.exhibit == "reproductions"}
    assert labels == quoted
    assert len(labels) == 30


def test_reproductions_run_at_the_papers_budget_and_window(plans: dict[str, Plan]) -> None:
    by_name = {(cell.model, cell.variant): cell for cell in plans["reproductions"].cells}
    assert by_name["GPT-2", "AST"].tokens == by_name["OPT-125M", "AST + SLoRB"].tokens == 40_000 * 128 * 1024
    windows = {suite.name for suite in plans["reproductions"].suites}
    assert len(windows) == 3
