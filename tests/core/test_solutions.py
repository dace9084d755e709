"""Kept solutions: found once, verified when read, and never to be told from those that a cell finds by itself."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseforge_core import files, solutions
from sparseforge_core.methods import (
    ALPS,
    BESA,
    METHODS,
    OWL,
    FrozenMask,
    MagnitudePruning,
    MaskLLM,
    Method,
    SparseForge,
    SparseGPT,
    Wanda,
)
from sparseforge_core.methods.base import Solved, Surroundings
from sparseforge_core.methods.one_shot import SolvedTrack, one_shot_track
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.opening import cell_folder
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.schedules import Constant
from sparseforge_core.solutions import DECIDING, KeptSolutions, code_hash
from sparseforge_core.sparsity.patterns import Pattern, Unstructured, nm
from sparseforge_core.sparsity.slorb import SLoRB
from tests.tiny import sites_of, tiny_model, tiny_source, tokens

PRIOR = SparseGPT(samples=4, length=16)
PRIORS = (
    PRIOR,
    Wanda(samples=4, length=16),
    ALPS(samples=4, length=16, iterations=20),
    BESA(samples=4, length=16, candidates=10),
    OWL(pruner=PRIOR, samples=4, length=16),
)

SOLVED = Solved(masks={"w": torch.tensor([True, False])}, weights={}, patterns={"w": nm(1, 2)}, findings={"a": 0.1})


def recipe_of(method: Method, **changes: Any) -> Recipe:
    source = tiny_source("llama")
    values: dict[str, Any] = {
        "model": source,
        "method": method,
        "corpus": source.tokenizer.corpus,  # type: ignore[attr-defined]
        "pattern": nm(2, 4),
        "train": TrainPlan(steps=3, sequences=2, length=16, lr=Constant(value=1e-3)),
    }
    return Recipe(**{**values, **changes})


def trained(recipe: Recipe, home: Path, seed: int = 0) -> dict[str, Any]:
    """The measurements file of a cell."""
    cell = Cell(recipe=recipe, seed=seed)
    body: dict[str, Any] = json.loads(train_cell(cell, cell_folder(home, cell) / "train", home).read_text())
    return body


def around_of(pattern: Pattern, **changes: Any) -> Surroundings:
    model = tiny_model("llama")
    values: dict[str, Any] = {
        "model": model,
        "sites": assign_patterns(sites_of(model), pattern),
        "slorb": None,
        "steps": 3,
        "calibration": lambda samples, _: list(tokens(samples, 16, seed=5).split(4)),
    }
    return Surroundings(**{**values, **changes})


def state_of(around: Surroundings) -> dict[str, torch.Tensor]:
    """Weights and masks, all of them."""
    return {name: value.clone() for name, value in around.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("slorb", [None, SLoRB()])
@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.kind)
@pytest.mark.parametrize("pattern", [nm(2, 4), Unstructured()], ids=lambda pattern: pattern.name)
def test_a_kept_solution_leaves_model_and_masks_as_the_method_does(
    prior: Method, pattern: Pattern, slorb: SLoRB | None, tmp_path: Path
) -> None:
    door = KeptSolutions(tmp_path, lambda: {"model": "tiny"})
    arounds = [around_of(pattern, slorb=slorb, solutions=keeper) for keeper in (None, door, door)]
    tracks = [one_shot_track(prior, around) for around in arounds]
    assert [use["reused"] for use in door.used] == [False, True]
    assert isinstance(tracks[2], SolvedTrack)
    plain, made, read = map(state_of, arounds)
    assert same(made, plain)
    assert same(read, plain)
    assert tracks[2].findings() == tracks[0].findings()
    assert [s.pattern for s in tracks[2].sites] == [s.pattern for s in tracks[0].sites]


@pytest.mark.parametrize(
    "method",
    [FrozenMask(prior=PRIOR), MaskLLM(prior=PRIOR), SparseForge(start_from=PRIOR, update_every=1)],
    ids=lambda method: method.kind,
)
def test_a_cell_ends_in_the_same_bits_with_and_without_a_kept_solution(method: Method, tmp_path: Path) -> None:
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    first = trained(recipe_of(FrozenMask(prior=PRIOR), train=TrainPlan(steps=1, sequences=2, length=16)), warm)
    bodies = [trained(recipe_of(method), home) for home in (cold, warm)]
    said = [body["context"]["solutions"] for body in (first, *bodies)]
    assert [[use["reused"] for use in uses] for uses in said] == [[False], [False], [True]]
    assert said[2][0]["key"] == said[0][0]["key"]
    assert said[2][0]["seconds"] == said[0][0]["seconds"] > 0
    assert bodies[0]["context"]["model_sha256"] == bodies[1]["context"]["model_sha256"]
    assert bodies[0]["cell"] == bodies[1]["cell"]
    timed = {"train_seconds", "tokens_per_second"}
    rows = [[row for row in body["measurements"] if row["metric"] not in timed] for body in bodies]
    assert rows[0] == rows[1]


def test_the_journal_says_where_a_solution_came_from(home: Path) -> None:
    recipe = recipe_of(FrozenMask(prior=PRIOR))
    trained(recipe, home)
    other = replace(recipe, train=replace(recipe.train, lr=Constant(value=2e-3)))
    trained(other, home)
    said = []
    for each in (recipe, other):
        lines = (cell_folder(home, Cell(recipe=each)) / "train" / "journal.jsonl").read_text().splitlines()
        said += [line["detail"] for line in map(json.loads, lines) if line.get("event") == "solution"]
    assert [use["reused"] for use in said] == [False, True]
    assert {use["method"] for use in said} == {"sparsegpt"}


def test_another_seed_pattern_method_or_text_is_another_solution(home: Path) -> None:
    plan = TrainPlan(steps=1, sequences=2, length=16)
    base = recipe_of(FrozenMask(prior=PRIOR), train=plan)
    longer = replace(base.corpus, documents_count=60)
    trained(base, home)
    for recipe, seed in (
        (base, 1),
        (replace(base, pattern=nm(4, 8)), 0),
        (replace(base, method=FrozenMask(prior=replace(PRIOR, damping=0.02))), 0),
        (replace(base, corpus=longer), 0),
    ):
        before = set((home / "solutions").glob("[!.]*"))
        (use,) = trained(recipe, home, seed)["context"]["solutions"]
        assert use["reused"] is False
        assert len(set((home / "solutions").glob("[!.]*")) - before) == 1


def test_what_uses_no_text_and_what_does_not_train_keeps_nothing(home: Path) -> None:
    trained(recipe_of(FrozenMask(prior=MagnitudePruning())), home)
    trained(recipe_of(PRIOR, train=TrainPlan(steps=0)), home)
    assert not (home / "solutions").exists()


@pytest.mark.parametrize("damage", ["bit", "short", "manifest", "renamed", "gone"])
def test_a_damaged_solution_is_reported_and_made_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    around = around_of(nm(2, 4), solutions=KeptSolutions(tmp_path, lambda: {"model": "tiny"}))
    one_shot_track(PRIOR, around)
    (folder,) = (tmp_path / "solutions").glob("[!.]*")
    file, manifest = folder / "solution.safetensors", folder / "manifest.json"
    body = bytearray(file.read_bytes())
    if damage == "bit":
        body[-1] ^= 1
        file.write_bytes(body)
    elif damage == "short":
        file.write_bytes(body[:-100])
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"seconds": ', '"seconds": 1'))
    elif damage == "renamed":
        elsewhere = around_of(nm(2, 4), solutions=KeptSolutions(tmp_path, lambda: {"model": "other"}))
        one_shot_track(PRIOR, elsewhere)
        (other,) = set((tmp_path / "solutions").glob("[!.]*")) - {folder}
        folder.rename(tmp_path / "aside")
        other.rename(folder)
    else:
        file.unlink()
    door = KeptSolutions(tmp_path, lambda: {"model": "tiny"})
    again = around_of(nm(2, 4), solutions=door)
    with caplog.at_level(logging.WARNING):
        one_shot_track(PRIOR, again)
    assert "is not usable and is made anew" in caplog.text
    assert door.used[0]["reused"] is False
    assert same(state_of(again), state_of(around))
    third = around_of(nm(2, 4), solutions=door)
    one_shot_track(PRIOR, third)
    assert door.used[1]["reused"] is True
    assert same(state_of(third), state_of(around))


def test_of_two_at_once_one_works_and_the_other_waits(tmp_path: Path) -> None:
    calls: list[float] = []

    def make() -> Solved:
        calls.append(time.monotonic())
        time.sleep(0.5)
        return SOLVED

    doors = [KeptSolutions(tmp_path, lambda: {"model": "tiny"}) for _ in range(3)]
    found: list[Solved] = []
    threads = [threading.Thread(target=lambda door=door: found.append(door(PRIOR, make))) for door in doors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(door.used[0]["reused"] for door in doors) == [False, True, True]
    assert all(torch.equal(each.masks["w"], SOLVED.masks["w"]) for each in found)
    assert all((each.patterns, each.findings) == (SOLVED.patterns, SOLVED.findings) for each in found)


def _dies_in_the_middle(home: Path) -> None:
    """Make a solution, and be killed between the tensors and the manifest."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    files.write_json = die
    KeptSolutions(home, lambda: {"model": "tiny"})(PRIOR, lambda: SOLVED)


def test_a_maker_that_is_killed_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_dies_in_the_middle, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "solutions").rglob("solution.safetensors")), "it was not killed in the middle"
    door = KeptSolutions(tmp_path, lambda: {"model": "tiny"})
    assert torch.equal(door(PRIOR, lambda: SOLVED).masks["w"], SOLVED.masks["w"])
    assert door.used[0]["reused"] is False
    assert len(list((tmp_path / "solutions").rglob("solution.safetensors"))) == 1


def test_a_maker_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    door = KeptSolutions(tmp_path, lambda: {"model": "tiny"})

    def fail() -> Solved:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        door(PRIOR, fail)
    assert not list((tmp_path / "solutions").glob("[!.]*"))
    assert door.used == []


@pytest.mark.parametrize(
    "method",
    [cls for cls in METHODS.values() if cls.sparsifies and not cls.trains],
    ids=lambda cls: cls.kind,
)
def test_one_shot_methods_say_what_they_read_and_change(method: type[Method]) -> None:
    asked: list[int] = []

    def calibration(samples: int, _: int) -> list[torch.Tensor]:
        asked.append(samples)
        return [tokens(4, 16, seed=5)]

    made = method()
    around = around_of(nm(2, 4), calibration=calibration)
    dense = {site.name: site.weight.detach().clone() for site in around.sites}
    random = torch.get_rng_state()
    track = made.start(around)
    assert torch.equal(torch.get_rng_state(), random), "with a kept solution the random state would be another"
    assert made.calibrates() is bool(asked)
    moved = [not torch.equal(site.weight, dense[site.name]) for site in track.sites]
    assert any(moved) is made.moves_weights()


def test_the_key_covers_the_code_that_decides(tmp_path: Path) -> None:
    root = tmp_path / "sparseforge_core"
    shutil.copytree(Path(solutions.__file__).parent, root)
    assert all((root / name).exists() for name in DECIDING)
    whole = code_hash.__wrapped__(root)
    assert whole == code_hash()
    (root / "evaluate" / "suites.py").write_text("# measures")
    assert code_hash.__wrapped__(root) == whole
    with (root / "sparsity" / "second_order.py").open("a") as file:
        file.write("# decides\n")
    assert code_hash.__wrapped__(root) != whole
