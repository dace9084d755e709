"""The presets against the constants of the specification, and each of them as a run."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from flows.grids.study_grid import ORDERED
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.errors import RecipeError
from sparseforge_core.identity import canonical
from sparseforge_core.methods import SparseForge
from sparseforge_core.methods.phases import Phases
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.objective import Distill, TaskOnly
from sparseforge_core.observe.curvature import Fisher
from sparseforge_core.presets import PAPER, PRESETS, RELEASED, Preset, preset_named
from sparseforge_core.recipe import Recipe
from sparseforge_core.sparsity.patterns import BLOCK_16, PatternChoice, Unstructured, nm
from sparseforge_core.sparsity.permutation import ChannelPermutation
from sparseforge_core.sparsity.rules import ByRule, PatternRule
from sparseforge_core.specs import decode, encode
from sparseforge_core.train.loop import train
from tests.contract.test_methods import start
from tests.tiny import sites_of, tiny_source


def recipe(preset: Preset, steps: int) -> Recipe:
    return preset.recipe(tiny_source("llama"), Synthetic(documents_count=10), steps=steps, sequences=4, length=16)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_a_preset_is_a_recipe_that_survives_its_json_and_ends_in_the_exact_pattern(
    preset: Preset, tmp_path: Path
) -> None:
    made = recipe(preset, 40)
    assert canonical(decode(encode(made, omit_defaults=False), Recipe)) == canonical(made)
    run = start(made, tmp_path)
    train(run)
    assert bool(run.track.finish()) == (preset.slorb is not None)
    for site in assign_patterns(sites_of(run.model), made.pattern):  # type: ignore[arg-type]
        assert float((site.weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-6)


def test_lean_is_the_defaults_kept_in_few_bytes() -> None:
    lean = SparseForge(mask_storage="int16", statistics_rows=16, curvature=Fisher(storage="bfloat16"))
    assert recipe(PRESETS["lean"], 40).method == lean
    assert recipe(PRESETS["lean"], 40).objective == Distill()


def test_improved_is_the_study_s_own_row_as_it_is_to_be_trained_anew() -> None:
    row, preset = ORDERED.contender("improved"), PRESETS["improved"]
    assert recipe(preset, 40).permutation == row.permutation == ChannelPermutation(samples=128, length=1024)
    assert (preset.method, preset.objective, preset.lr) == (row.method, row.objective, row.lr)
    assert recipe(preset, 40).train.unmasked_rate == row.unmasked_rate == 0.25


MIXED = ByRule(rules=(PatternRule(sites="attention", pattern=nm(2, 4)), PatternRule(sites="mlp", pattern=nm(1, 4))))


@pytest.mark.parametrize("pattern", [BLOCK_16, Unstructured(), MIXED, nm(1, 4)], ids=lambda pattern: pattern.name)
def test_channels_are_put_in_order_for_one_pattern_of_inputs_alone(
    pattern: PatternChoice, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_source("llama")
    caplog.set_level(logging.INFO)
    made = PRESETS["improved"].recipe(
        source, Synthetic(documents_count=10), steps=40, sequences=4, length=16, pattern=pattern
    )
    assert (made.permutation is None) == (pattern != nm(1, 4))
    assert ("channels stay as they stand" in caplog.text) == (pattern != nm(1, 4))


def test_channels_may_be_left_as_they_stand() -> None:
    text = Synthetic(documents_count=10)
    preset = PRESETS["improved"]
    made = preset.recipe(tiny_source("llama"), text, steps=40, sequences=4, length=16, in_order=False)
    assert made == replace(recipe(preset, 40), permutation=None)


@pytest.mark.parametrize("preset", [PAPER, RELEASED], ids=lambda p: p.name)
def test_the_script_s_phases_fall_on_its_steps(preset: Preset) -> None:
    phases = Phases.of(preset.method, 20_000)
    assert phases.freeze == 17_000
    assert (phases.early, phases.early_period, phases.period) == (2000, 30, 10)
    made = [step for step in range(1, 20_000) if phases.is_update(step)]
    assert made[-1] == 16_990
    assert {b - a for a, b in itertools.pairwise(made) if b > 2010} == {10}
    if preset is RELEASED:
        assert phases.quench == 2000
        assert made[0] == 510
        assert len(made) in range(1540, 1560), "the design counts 1,550"
    assert preset.lr.at(0.05) == pytest.approx(1e-4)
    assert preset.lr.at(0.85) == preset.lr.at(1.0) == pytest.approx(1e-5)
    assert preset.objective.at(0.84) == Distill(task_weight=1.0, kl_weight=1.0, temperature=2.0)
    assert preset.objective.at(0.85) == TaskOnly()


def test_the_paper_cools_by_gamma_an_update_and_the_script_jumps_to_its_floor(tmp_path: Path) -> None:
    track = start(recipe(PAPER, 20_000), tmp_path).track
    first = next(step for step in range(1, 100) if track.phases.is_update(step))  # type: ignore[attr-defined]
    point = track.anneal_point  # type: ignore[attr-defined]
    assert point(first).temperature == 1.0
    assert point(first + 30).temperature == pytest.approx(0.98)
    assert point(16_990).temperature == pytest.approx(0.05)
    assert point(17_000).mid_push == pytest.approx(0.3)
    released = start(recipe(RELEASED, 20_000), tmp_path).track.anneal_point  # type: ignore[attr-defined]
    assert released(1990).temperature == pytest.approx(0.264, abs=2e-3)
    assert released(2010).temperature == 0.05
    assert released(16_990).mid_push == pytest.approx(0.3, abs=1e-3)


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'paper'"):
        preset_named("papers")
