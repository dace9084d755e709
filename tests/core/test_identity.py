"""Identity: keys that mean what they say, cell files that notice an edit."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core import specs
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import RecipeError
from sparseforge_core.identity import canonical, cell_key, diff, dumps, key_of, loads, required_cells
from sparseforge_core.methods import Dense, DenseControl, SparseForge
from sparseforge_core.objective import Distill
from sparseforge_core.recipe import Cell, Recipe, Trained, TrainPlan
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.sparsity.slorb import SLoRB
from tests.tiny import tiny_source

CORPUS = Synthetic(documents_count=10)
PRETRAINING = Recipe(model=tiny_source("llama"), method=DenseControl(), corpus=CORPUS, train=TrainPlan(steps=3))
RECIPE = Recipe(
    model=Trained(recipe=PRETRAINING),
    method=SparseForge(),
    corpus=CORPUS,
    pattern=nm(2, 4),
    objective=Distill(),
    train=TrainPlan(steps=20),
)


def test_a_cell_survives_its_file() -> None:
    cell = Cell(recipe=RECIPE, seed=3)
    assert loads(dumps(cell)) == cell
    assert cell_key(cell) == f"{key_of(RECIPE)}-s3"


def test_a_cell_file_says_every_field_whichever_way_it_was_put_together() -> None:
    cell = Cell(recipe=RECIPE, seed=7)
    plainly = {"key": cell_key(cell), "cell": specs.encode(cell, omit_defaults=False)}
    assert dumps(cell) == json.dumps(plainly, indent=1, sort_keys=True) + "\n"


def test_fields_equal_to_their_default_do_not_change_the_key() -> None:
    same = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, clip=1.0))
    other = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, clip=2.0))
    assert key_of(same) == key_of(RECIPE) != key_of(other)
    assert "clip" not in canonical(RECIPE)


def test_a_model_made_by_another_cell_carries_its_whole_recipe() -> None:
    longer = dataclasses.replace(PRETRAINING, train=TrainPlan(steps=4))
    assert key_of(dataclasses.replace(RECIPE, model=Trained(recipe=longer))) != key_of(RECIPE)
    assert required_cells(Cell(recipe=RECIPE)) == (Cell(recipe=PRETRAINING, seed=0),)


def test_a_model_of_the_reader_s_own_seed() -> None:
    taught = dataclasses.replace(RECIPE, objective=Distill(teacher=Trained(recipe=PRETRAINING, seed=None)))
    assert key_of(taught) != key_of(dataclasses.replace(RECIPE, objective=Distill(teacher=Trained(recipe=PRETRAINING))))
    for seed in (0, 5):
        found = required_cells(Cell(recipe=taught, seed=seed))
        assert found == tuple(dict.fromkeys(Cell(recipe=PRETRAINING, seed=one) for one in (0, seed)))
    assert specs.decode(specs.encode(taught), Recipe) == taught


def test_a_cell_file_edited_by_hand_is_refused() -> None:
    body = json.loads(dumps(Cell(recipe=RECIPE)))
    body["cell"]["recipe"]["train"]["steps"] = 21
    with pytest.raises(RecipeError, match=r"key: the file says .* edited by hand"):
        loads(json.dumps(body))
    with pytest.raises(RecipeError, match="not JSON"):
        loads("{")
    with pytest.raises(RecipeError, match="exactly 'key' and 'cell'"):
        loads("{}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("recipe", "method", "kind"), "sparsforge", "Did you mean 'sparseforge'"),
        (("recipe", "train", "stepz"), 3, "Did you mean 'steps'"),
        (("recipe", "train", "steps"), "many", "expected int"),
        (("recipe", "train", "steps"), True, "expected int"),
        (("recipe", "pattern", "keep"), 4, "keep=4"),
        (("recipe", "method", "quench_begin"), 0.99, "quench_begin"),
        (("recipe", "objective", "temperature"), -1.0, "temperature=-1.0"),
        (("seed",), -1, "seed=-1"),
    ],
)
def test_a_bad_field_is_refused_by_its_path(path: tuple[str, ...], value: object, message: str) -> None:
    body = specs.encode(Cell(recipe=RECIPE), omit_defaults=False)
    target = body
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    with pytest.raises(RecipeError, match=message):
        specs.decode(body, Cell)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_mutated_cell_is_read_or_refused_with_a_sentence(data: st.DataObject) -> None:
    body = specs.encode(Cell(recipe=RECIPE), omit_defaults=False)
    nodes: list[tuple[dict[str, object], str]] = []

    def collect(node: object) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                nodes.append((node, name))
                collect(child)

    collect(body)
    owner, name = data.draw(st.sampled_from(nodes))
    owner[name] = data.draw(
        st.one_of(
            st.none(),
            st.integers(-5, 5),
            st.floats(allow_nan=False),
            st.text(max_size=5),
            st.lists(st.none(), max_size=2),
        )
    )
    refusal = ""
    try:
        read: object = specs.decode(body, Cell)
    except RecipeError as error:
        read, refusal = None, str(error)
    assert isinstance(read, Cell) or refusal.startswith("cell")


def test_recipes_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(RecipeError, match="pattern: method 'sparseforge' needs one"):
        dataclasses.replace(RECIPE, pattern=None)
    with pytest.raises(RecipeError, match="keeps every weight"):
        dataclasses.replace(PRETRAINING, pattern=nm(2, 4))
    with pytest.raises(RecipeError, match="does not train"):
        Recipe(model=tiny_source("llama"), method=Dense(), corpus=CORPUS, train=TrainPlan(steps=1))
    with pytest.raises(RecipeError, match=r"train\.steps=0"):
        dataclasses.replace(RECIPE, train=TrainPlan())
    with pytest.raises(RecipeError, match="slorb"):
        dataclasses.replace(PRETRAINING, slorb=SLoRB())


def test_differences_name_the_field() -> None:
    a, b = specs.encode(RECIPE), specs.encode(dataclasses.replace(RECIPE, train=TrainPlan(steps=30)))
    assert diff(a, b) == ["train.steps: was 20, now 30"]
    assert RECIPE.train.tokens == 20 * 8 * 128
