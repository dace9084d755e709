"""The contract of every method: it attaches, steps, ends in the exact pattern, and resumes to the bit."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.checkpoint import Checkpoints
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import CurvatureUnavailable, Diverged, Interrupted, PatternViolation, RecipeError
from sparseforge_core.methods import (
    METHODS,
    SRSTE,
    FrozenMask,
    MagnitudePruning,
    Method,
    SparseForge,
    SparseGPT,
    Wanda,
    method_named,
)
from sparseforge_core.methods.base import MaskedTrack, Surroundings
from sparseforge_core.methods.phases import Phases
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.objective import Distill
from sparseforge_core.observe.curvature import Batch, Fisher
from sparseforge_core.recipe import Recipe, TrainPlan
from sparseforge_core.schedules import Constant, Geometric, Linear, WarmupLinear
from sparseforge_core.sparsity.compensation import Compensation
from sparseforge_core.sparsity.criteria import (
    Criterion,
    HessianOBD,
    HessianRatio,
    Magnitude,
    SparseGPTScore,
    WandaScore,
    observed,
)
from sparseforge_core.sparsity.patterns import BLOCK_16, check_weight, nm
from sparseforge_core.sparsity.slorb import SLoRB
from sparseforge_core.tracking.tracker import MemoryTracker
from sparseforge_core.train.loop import Run, train
from sparseforge_core.train.optimizer import build_optimizer
from tests.tiny import ARCHITECTURES, MIXTURES, sites_of, tiny_model, tiny_source, tokens

STEPS = 20


LITERAL = SparseForge(
    threshold="exact-sum", order="push-only", cooling=0.9, project_on="scores", rescale_rows=True, first_update=0.2
)
"""Algorithm 1 to the letter where the text allows it, and what the defaults leave off."""
PUBLISHED = SparseForge(
    gate_scope="layer",
    push_target="gate",
    log_scores=False,
    quench_view="threshold",
    early_update_every=3,
    early_until=0.3,
    update_every=2,
    pruned_decay=Constant(value=1e-3),
    hysteresis=Constant(value=0.1),
)
"""What the published code does, in miniature."""
COMPENSATED = SparseForge(quench_begin=0.65, freeze_at=0.7, compensation=Compensation(samples=4, length=16))
"""A projection at once, with the survivors fitted to what it takes away."""
BEGUN = SparseForge(start_from=SparseGPT(samples=4, length=16), temperature=Constant(value=0.1))
"""Annealing from a one-shot solution instead of from m = 1."""


class Batches:
    """A stream of random tokens that is a pure function of the step."""

    def batch(self, step: int) -> torch.Tensor:
        return tokens(4, 16, seed=step)


def recipe_of(method: Method, architecture: str = "llama", **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": tiny_source(architecture),
        "method": method,
        "corpus": Synthetic(documents_count=10),
        "pattern": nm(2, 4) if method.sparsifies else None,
        "objective": Distill(),
        "train": TrainPlan(steps=STEPS, sequences=4, length=16, lr=WarmupLinear(peak=3e-3)),
        **changes,
    }
    if not method.trains:
        values["train"] = TrainPlan()
    return Recipe(**values)


def start(recipe: Recipe, folder: Path, seed: int = 0) -> Run:
    model = tiny_model(recipe.model.architecture)  # type: ignore[attr-defined]
    teacher = copy.deepcopy(model).requires_grad_(False)
    sites = assign_patterns(sites_of(model), recipe.pattern) if recipe.pattern else []
    around = Surroundings(
        model=model,
        sites=sites,
        slorb=recipe.slorb,
        steps=recipe.train.steps,
        calibration=lambda samples, length: [tokens(samples, min(length, 16), seed=1)],
        seed=seed,
    )
    track = recipe.method.start(around)
    return Run(
        recipe=recipe,
        model=model,
        forward=model,
        teacher=teacher,
        track=track,
        optimizer=build_optimizer(model, sites, recipe.train, track),
        stream=Batches(),  # type: ignore[arg-type]
        checkpoints=Checkpoints(folder, "cell"),
        tracker=MemoryTracker(),
        device=torch.device("cpu"),
        log_every=1,
        save_every=7,
        histogram_every=10,
    )


def every_method() -> list[Any]:
    variants: list[Method] = [cls() for cls in METHODS.values() if cls is not Wanda]
    variants += [
        Wanda(samples=4, length=16),
        FrozenMask(prior=Wanda(samples=4, length=16, sequential=False)),
        FrozenMask(prior=SparseGPT(samples=8, length=16)),
        SparseGPT(samples=8, length=16, true_sequential=True),
        SparseForge(criterion=Magnitude()),
        SparseForge(criterion=WandaScore(), calibration_samples=4),
        SparseForge(criterion=SparseGPTScore(), calibration_samples=4),
        BEGUN,
        SparseForge(threshold="nth", log_scores=False),
        SparseForge(mask_storage="int16", statistics_rows=4, curvature=Fisher(storage="bfloat16")),
        SparseForge(mask_storage="int16", statistics_of="last-update"),
        LITERAL,
        PUBLISHED,
        COMPENSATED,
    ]
    return [pytest.param(m, id=f"{m.kind}-{i}") for i, m in enumerate(variants)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", every_method())
def test_every_method_ends_in_the_exact_pattern(method: Method, tmp_path: Path) -> None:
    recipe = recipe_of(method)
    run = start(recipe, tmp_path)
    if recipe.train.steps:
        train(run)
    assert run.track.finish() == {}
    names = [name for name, _ in run.model.named_parameters()]
    assert names == [name for name, _ in tiny_model("llama").named_parameters()]
    if recipe.pattern is not None:
        assert {site.name for site in run.track.sites} == {site.name for site in sites_of(run.model)}
        for site in run.track.sites:
            check_weight(site.matrix(site.weight), site.pattern, site.name)
        kept = sum(int((site.weight != 0).sum()) for site in run.track.sites)
        assert kept <= 0.5 * sum(site.weight.numel() for site in run.track.sites)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", [nm(2, 4), BLOCK_16], ids=lambda p: p.name)
def test_sparseforge_anneals_every_family_to_the_exact_pattern(architecture: str, pattern: Any, tmp_path: Path) -> None:
    run = start(recipe_of(SparseForge(), architecture, pattern=pattern, slorb=SLoRB(k=8)), tmp_path)
    train(run)
    branches = run.track.finish()
    sites = sites_of(run.model)
    assert set(branches) == {site.name for site in sites}
    for site in sites:
        check_weight(site.matrix(site.weight), pattern, site.name)
        kept = float((site.weight != 0).float().mean())
        assert kept == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("method", [Wanda(samples=4, length=16), SparseForge()], ids=lambda m: m.kind)
def test_every_layout_of_experts_ends_in_the_exact_pattern(architecture: str, method: Method, tmp_path: Path) -> None:
    plan = TrainPlan(steps=3, sequences=4, length=16, lr=WarmupLinear(peak=3e-3))
    run = start(recipe_of(method, architecture, train=plan), tmp_path)
    dense = {site.name: site.weight.detach().clone() for site in run.track.sites}
    if run.recipe.train.steps:
        train(run)
    run.track.finish()
    for site in sites_of(run.model):
        check_weight(site.matrix(site.weight), nm(2, 4), site.name)
        assert float((site.weight != 0).float().mean()) == 0.5, site.name
        kept = site.weight[site.weight != 0]
        same = torch.equal(kept, dense[site.name][site.weight != 0])
        assert same != method.trains, f"{site.name}: one-shot weights do not move, trained ones do"


STOPS = (1, 6, 14, 15, 18)


def every_trained_method() -> list[Any]:
    """Trained methods with steps to stop at: all of them for methods with phases or saves to fall between, else two."""
    thorough = ("sparseforge", "dense-control")
    methods: list[Any] = [cls() for cls in METHODS.values() if cls.trains]
    methods += [LITERAL, PUBLISHED, COMPENSATED]
    pairs = [(i, m, stop) for i, m in enumerate(methods) for stop in (STOPS if m.kind in thorough else (6, 15))]
    return [pytest.param(m, stop, id=f"{m.kind}-{i}-{stop}") for i, m, stop in pairs]


@pytest.mark.parametrize(("method", "stop"), every_trained_method())
def test_a_stopped_run_resumes_to_the_bit(method: Method, stop: int, tmp_path: Path) -> None:
    begin: Any = "first-mask" if method is PUBLISHED else "quench"
    branch = SLoRB(k=8, begin=begin, projection="trained" if method is PUBLISHED else "fixed")
    recipe = recipe_of(method, slorb=branch if method.sparsifies and method.branches else None)
    whole = start(recipe, tmp_path / "whole")
    train(whole)
    first = start(recipe, tmp_path / "parts")
    seen: list[int] = []
    with pytest.raises(Interrupted, match=f"after step {stop} of {STEPS}"):
        train(first, on_step=lambda p: seen.append(p.step), should_stop=lambda: seen[-1] == stop)
    second = start(recipe, tmp_path / "parts")
    with torch.no_grad():
        for parameter in second.model.parameters():
            if parameter.is_floating_point():
                parameter.add_(1.0)  # whatever the fresh start held must not matter
    train(second)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    branches, again = whole.track.finish(), second.track.finish()
    assert set(branches) == set(again)
    for name, branch in branches.items():
        assert torch.equal(branch.values, again[name].values), name


def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_used(tmp_path: Path) -> None:
    recipe = recipe_of(SparseForge())
    whole = start(recipe, tmp_path / "whole")
    train(whole)
    seen: list[int] = []
    with pytest.raises(Interrupted):
        train(
            start(recipe, tmp_path / "parts"), on_step=lambda p: seen.append(p.step), should_stop=lambda: seen[-1] == 16
        )
    newest = tmp_path / "parts" / "step-00000016" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    second = start(recipe, tmp_path / "parts")
    assert second.checkpoints.resume(second.model, second.optimizer, second.track) == 14
    train(second)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_reaches_no_checkpoint(tmp_path: Path) -> None:
    run = start(recipe_of(SparseForge()), tmp_path)

    def poison(progress: Any) -> None:
        if progress.step == 8:
            with torch.no_grad():
                run.model.model.norm.weight[0] = torch.nan

    with pytest.raises(Diverged, match="step 9"):
        train(run, on_step=poison)
    assert run.checkpoints.steps() == [7]


def test_journalled_masks_end_hard_and_annealing_follows_its_schedule(tmp_path: Path) -> None:
    run = start(recipe_of(SparseForge()), tmp_path)
    train(run)
    tracker = run.tracker
    assert isinstance(tracker, MemoryTracker)
    last = tracker.scalars_at(STEPS)
    assert last["mask/soft_hard_gap"] == 0.0
    assert last["anneal/softness"] == 0.0
    temperatures = [tracker.scalars_at(step)["anneal/temperature"] for step in range(1, STEPS + 1)]
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[-1] == pytest.approx(0.05)


def test_compensation_brings_the_projected_model_closer_to_the_soft_one(tmp_path: Path) -> None:
    """Of two equal runs up to the projection, the one with compensation changes its logits less by it."""
    jumps = []
    for method in (dataclasses.replace(COMPENSATED, compensation=None), COMPENSATED):
        run = start(recipe_of(method), tmp_path / str(len(jumps)))
        seen: list[int] = []
        with pytest.raises(Interrupted):
            train(run, on_step=lambda p: seen.append(p.step), should_stop=lambda: seen[-1] == 13)  # noqa: B023
        assert not run.track.frozen  # type: ignore[attr-defined]
        with torch.no_grad():
            before = run.model(tokens(4, 16, seed=1)).logits
            run.track.after_update(14, run.optimizer)
            jumps.append(float((run.model(tokens(4, 16, seed=1)).logits - before).square().mean()))
        assert run.track.frozen  # type: ignore[attr-defined]
    assert jumps[1] < 0.8 * jumps[0]


def test_phases_are_fractions_of_the_budget() -> None:
    phases = Phases.of(SparseForge(), 1000)
    assert (phases.quench, phases.freeze, phases.period) == (700, 900, 2)
    assert [phases.softness(s) for s in (1, 700, 800, 900, 1000)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert Phases.of(SparseForge(), 20_000).period == 10
    made = [step for step in range(1, 1000) if phases.is_update(step)]
    assert made == list(range(2, 900, 2))
    assert phases.updates(899) == len(made) == 449


def test_updates_may_come_late_and_more_seldom_at_first() -> None:
    method = SparseForge(update_every=10, early_update_every=30, early_until=0.1, first_update=0.05)
    phases = Phases.of(method, 1000)
    made = [step for step in range(1, 1000) if phases.is_update(step)]
    assert made == [60, 90, *range(110, 900, 10)]
    assert [phases.updates(step) for step in (59, 60, 100, 110, 999)] == [0, 1, 2, 3, len(made)]
    with pytest.raises(RecipeError, match="no mask update before the projection"):
        Phases.of(SparseForge(update_every=95), 100)
    with pytest.raises(RecipeError, match="too few"):
        Phases.of(SparseForge(), 1)


@pytest.mark.parametrize("criterion", [HessianOBD(), HessianRatio(), Magnitude()])
def test_statistics_of_the_last_update_are_those_that_it_saw(criterion: Criterion, tmp_path: Path) -> None:
    method = SparseForge(criterion=criterion, statistics_of="last-update", update_every=1, quench_begin=0.8)
    run = start(recipe_of(method), tmp_path)
    track: Any = run.track
    for site in track.sites:
        site.weight.grad = torch.randn_like(site.weight)
    batch: dict[str, Any] = {"tokens": tokens(), "loss": None, "predictions": None, "optimizer": run.optimizer}
    track.observe(Batch(step=1, model=run.model, **batch))
    wanted = [observed(track._scores(s, track._statistic(s)), track._statistic(s), log=True) for s in track.sites]
    track._update_masks(1)
    assert torch.allclose(track.known, torch.stack(wanted), rtol=1e-5)
    seen = track.known.clone()
    with torch.no_grad():
        for site in track.sites:
            site.weight.mul_(3.0)
    track._update_masks(2)  # by what was seen before; what it sees itself is for the third
    power = 1.0 if isinstance(criterion, Magnitude | HessianRatio) else 2.0
    assert torch.allclose(track.known[:, 1], seen[:, 1] * 3.0**power, rtol=1e-4)
    assert torch.allclose(track.known[:, 2], seen[:, 2], rtol=1e-2)  # the floor under the logarithm is the old one


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"quench_begin": 0.95}, "quench_begin"),
        ({"freeze_at": 1.5}, "freeze_at"),
        ({"update_every": 0}, "update_every"),
        ({"target_freeze": 0.0}, "target_freeze"),
        ({"early_until": 1.0}, "early_until"),
        ({"early_update_every": -1}, "early_update_every"),
        ({"first_update": -0.1}, "first_update"),
        ({"cooling": 1.0}, "cooling"),
        ({"mask_rate": Constant(value=1.1)}, "mask_rate"),
        ({"structure_mix": Linear(first=0.0, last=-0.1)}, "structure_mix"),
        ({"mid_push": Constant(value=-0.1)}, "mid_push"),
        ({"hysteresis": Constant(value=-0.1)}, "hysteresis"),
        ({"statistics_rows": 4, "statistics_of": "last-update"}, "statistics_rows=4: with statistics_of"),
    ],
)
def test_constants_out_of_range_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        SparseForge(**changes)


def test_temperature_must_stay_positive_and_names_are_suggested() -> None:
    with pytest.raises(RecipeError, match="above 0"):
        SparseForge(temperature=Geometric(first=1.0, last=0.0))
    with pytest.raises(RecipeError, match="Did you mean 'wanda'"):
        method_named("wnada")


@given(period=st.integers(1, 20), early=st.integers(1, 40), steps=st.integers(400, 3000))
@settings(max_examples=25, deadline=None)
def test_the_temperature_reaches_its_floor_at_its_fraction_whatever_the_periods(
    period: int, early: int, steps: int
) -> None:
    method = SparseForge(update_every=period, early_update_every=early)
    phases = Phases.of(method, steps)
    reached = next(s for s in range(1, steps) if method.temperature.at(phases.progress(s)) <= 0.05 + 1e-12)
    assert reached == pytest.approx(0.6 * phases.freeze, abs=1)
    made = sum(phases.is_update(s) for s in range(1, phases.freeze))
    assert made == phases.updates(phases.freeze)


@pytest.mark.parametrize("method", [SRSTE(decay=0.1), SparseForge(pruned_decay=Constant(value=0.1), update_every=1)])
def test_decay_of_pruned_weights_never_touches_kept_ones(method: Method, tmp_path: Path) -> None:
    run = start(recipe_of(method), tmp_path)
    track = run.track
    assert isinstance(track, MaskedTrack)
    for site in track.sites:
        site.mask.harden(site.weight.detach().abs(), nm(2, 4))
        site.mask.mask.copy_(site.mask.hard)
        site.weight.grad = torch.zeros_like(site.weight)
    track.before_update(1)
    for site in track.sites:
        assert site.weight.grad is not None
        expected = torch.where(site.mask.hard, torch.zeros_like(site.weight), 0.1 * site.weight)
        assert torch.allclose(site.weight.grad, expected)


@pytest.mark.parametrize("method", [MagnitudePruning(), SparseForge(criterion=Magnitude())], ids=lambda m: m.kind)
def test_a_score_that_is_not_finite_is_refused_by_its_site(method: Method, tmp_path: Path) -> None:
    run = start(recipe_of(SparseForge(criterion=Magnitude())), tmp_path)
    site = run.track.sites[3]
    with torch.no_grad():
        site.weight[0, 0] = torch.nan
    if method.trains:
        with pytest.raises(CurvatureUnavailable, match=f"site {site.name}: a score is not finite"):
            run.track.after_update(1, run.optimizer)
    else:
        assert isinstance(run.track, MaskedTrack)
        with pytest.raises(PatternViolation, match=f"site {site.name}: a score is not finite"):
            run.track.harden(site, site.weight.detach().abs())
