"""The contract of every estimator inside a run: it drives masks to the exact pattern and resumes to the bit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from sparseforge_core import specs
from sparseforge_core.errors import CurvatureUnavailable, Interrupted
from sparseforge_core.methods import SparseForge
from sparseforge_core.methods.annealing import SparseForgeTrack
from sparseforge_core.models.heads import split
from sparseforge_core.observe.curvature import ESTIMATORS, Curvature, FiniteDifference, Hutchinson
from sparseforge_core.sparsity.patterns import check_weight
from sparseforge_core.train.loop import train
from tests.contract.test_methods import STEPS, recipe_of, start
from tests.tiny import sites_of

STOP = 9


def small(kind: str) -> Curvature:
    """The estimator with as little work as it allows, looking at some steps only."""
    cls = ESTIMATORS[kind]
    if cls in (Hutchinson, FiniteDifference):
        return cls(probes=1, every=4)  # type: ignore[call-arg]
    return cls() if kind in ("fisher", "adam-second-moment") else cls(every=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_run_by_each_estimator_ends_in_the_pattern_and_resumes_to_the_bit(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(SparseForge(curvature=small(kind), update_every=2))
    whole = start(recipe, tmp_path / "whole")
    train(whole)
    seen: list[int] = []
    with pytest.raises(Interrupted, match=f"after step {STOP} of {STEPS}"):
        train(
            start(recipe, tmp_path / "parts"),
            on_step=lambda p: seen.append(p.step),
            should_stop=lambda: seen[-1] == STOP,
        )
    torch.manual_seed(99)  # nothing of the second process's random state may matter
    second = start(recipe, tmp_path / "parts")
    train(second)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    whole.track.finish()
    for site in sites_of(whole.model):
        check_weight(site.matrix(site.weight), recipe.pattern, site.name)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [kind for kind in ESTIMATORS if kind != "fisher"])
def test_observing_alone_changes_nothing_that_trains(kind: str, tmp_path: Path) -> None:
    """Until the first mask update, a run that looks on is the run that does not, to the bit."""
    losses: list[list[float]] = []
    for spec in ("fisher", kind):
        run = start(recipe_of(SparseForge(curvature=small(spec), update_every=6)), tmp_path / spec)
        losses.append([])
        with pytest.raises(Interrupted):
            train(run, on_step=lambda p: losses[-1].append(p.loss), should_stop=lambda: len(losses[-1]) == 5)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_every_estimator_survives_a_cell_file(kind: str) -> None:
    method = SparseForge(curvature=small(kind))
    text = json.dumps(specs.encode(method))
    assert specs.decode(json.loads(text), SparseForge, "method") == method


def test_seeds_give_runs_of_their_own(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        recipe = recipe_of(SparseForge(curvature=small("gauss-newton-bartlett")))
        run = start(recipe, tmp_path / str(seed), seed=seed)
        assert isinstance(run.track, SparseForgeTrack)
        assert run.track.curvature is not None
        with pytest.raises(Interrupted):
            train(run, should_stop=lambda: True)
        found.append(run.track.curvature.of(run.track.sites[0]))
    assert not torch.equal(*found)


def test_an_estimator_that_cannot_answer_stops_the_run_before_a_mask_moves(tmp_path: Path) -> None:
    run = start(recipe_of(SparseForge(curvature=small("fisher"), update_every=2)), tmp_path)
    blind = run.track.sites[3]
    blind.weight.requires_grad_(False)
    with pytest.raises(CurvatureUnavailable, match=rf"no gradient for 1 of 14 sites \({re.escape(blind.name)}\)"):
        train(run)
    assert all(bool((site.mask.mask == 1).all()) for site in run.track.sites)
    assert run.checkpoints.steps() == []


@pytest.mark.parametrize("kind", ["micro-batch-fisher", "finite-difference", "hutchinson"])
def test_a_model_split_for_its_vocabulary_is_observed_like_a_whole_one(kind: str, tmp_path: Path) -> None:
    found = []
    for divided in (False, True):
        run = start(recipe_of(SparseForge(curvature=small(kind))), tmp_path / str(divided))
        if divided:
            run = dataclasses.replace(run, forward=split(run.model), teacher=split(run.teacher))
        assert isinstance(run.track, SparseForgeTrack)
        with pytest.raises(Interrupted):
            train(run, should_stop=lambda: True)
        assert run.track.curvature is not None
        found.append([run.track.curvature.of(site) for site in run.track.sites])
    for whole, parts in zip(*found, strict=True):
        assert float((whole - parts).norm() / whole.norm()) < 1e-3
