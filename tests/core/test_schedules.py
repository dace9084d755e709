"""Schedules: worked values at the ends and in the middle, and what holds for every progress."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseforge_core.errors import RecipeError
from sparseforge_core.schedules import (
    Constant,
    Geometric,
    Linear,
    Product,
    Schedule,
    SmoothStep,
    Switch,
    WarmupCosine,
    WarmupLinear,
)
from sparseforge_core.specs import SPECS, decode, encode

progress = st.floats(min_value=0.0, max_value=1.0)
level = st.floats(min_value=1e-6, max_value=1e3)
edges = st.tuples(progress, progress).filter(lambda pair: pair[1] - pair[0] > 1e-3)
windowed = st.one_of(
    *(
        st.builds(
            lambda kind, first, last, window: kind(first=first, last=last, begin=window[0], end=window[1]),
            st.just(kind),
            level,
            level,
            edges,
        )
        for kind in (Linear, Geometric, SmoothStep)
    )
)
warmed = st.one_of(
    *(
        st.builds(kind, peak=level, warmup=st.floats(min_value=0.0, max_value=0.9), last=level)
        for kind in (WarmupLinear, WarmupCosine)
    )
)
plain = st.one_of(st.builds(Constant, value=level), windowed, warmed)
schedules = st.one_of(
    plain,
    st.builds(Switch, before=plain, after=plain, switch_at=st.floats(min_value=0.01, max_value=0.99)),
    st.builds(Product, first=plain, second=plain),
)


@pytest.mark.parametrize(
    ("schedule", "at_0", "at_half", "at_1"),
    [
        (Constant(value=3.0), 3.0, 3.0, 3.0),
        (Linear(first=1.0, last=5.0), 1.0, 3.0, 5.0),
        (Linear(first=1.0, last=5.0, begin=0.25, end=0.5), 1.0, 5.0, 5.0),
        (Geometric(first=4.0, last=0.25), 4.0, 1.0, 0.25),
        (SmoothStep(first=0.0, last=1.0), 0.0, 0.5, 1.0),
        (SmoothStep(first=0.0, last=1.0, begin=0.25, end=1.0), 0.0, 7 / 27, 1.0),  # u = 1/3: 3/9 - 2/27
        (WarmupLinear(peak=2.0, warmup=0.5), 0.0, 2.0, 0.0),
        (WarmupLinear(peak=2.0, warmup=0.0, last=1.0), 2.0, 1.5, 1.0),
        (WarmupCosine(peak=2.0, warmup=0.5, last=1.0), 0.0, 2.0, 1.0),
        (WarmupCosine(peak=2.0, warmup=0.0), 2.0, 1.0, 0.0),
        (WarmupLinear(peak=2.0, warmup=0.0, last=1.0, end=0.5), 2.0, 1.0, 1.0),
        (WarmupCosine(peak=2.0, warmup=0.25, last=1.0, end=0.75), 0.0, 1.5, 1.0),
        (Switch(before=Linear(first=0.0, last=8.0), after=Constant(value=1.0), switch_at=0.6), 0.0, 4.0, 1.0),
        (Switch(before=Constant(value=2.0), after=Linear(first=0.0, last=8.0), switch_at=0.5), 2.0, 4.0, 8.0),
        (Product(first=Linear(first=0.2, last=1.0), second=Linear(first=0.0, last=0.3)), 0.0, 0.09, 0.3),
    ],
)
def test_worked_values(schedule: Schedule, at_0: float, at_half: float, at_1: float) -> None:
    assert [schedule.at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([at_0, at_half, at_1], abs=1e-12)


def test_smooth_step_is_level_at_both_ends() -> None:
    beta, h = SmoothStep(first=0.0, last=1.0), 1e-4
    assert beta.at(h) < 4 * h * h
    assert 1.0 - beta.at(1.0 - h) < 4 * h * h


@given(schedule=windowed, p=progress)
def test_a_window_stays_between_its_ends(schedule: Linear | Geometric | SmoothStep, p: float) -> None:
    low, high = sorted((schedule.first, schedule.last))
    rounding = 1e-12 * high
    assert low - rounding <= schedule.at(p) <= high + rounding


@given(schedule=windowed, one=progress, two=progress)
def test_a_window_never_turns_back(schedule: Linear | Geometric | SmoothStep, one: float, two: float) -> None:
    rising = 1 if schedule.last >= schedule.first else -1
    step = rising * (schedule.at(max(one, two)) - schedule.at(min(one, two)))
    assert step >= -1e-9 * max(schedule.first, schedule.last)


@given(schedule=windowed)
def test_a_window_holds_its_ends_outside(schedule: Linear | Geometric | SmoothStep) -> None:
    assert schedule.at(0.0) == schedule.at(schedule.begin) == pytest.approx(schedule.first)
    assert schedule.at(schedule.end) == schedule.at(1.0) == pytest.approx(schedule.last)


@given(schedule=schedules, beyond=st.floats(min_value=1e-3, max_value=10.0))
def test_progress_is_clamped(schedule: Schedule, beyond: float) -> None:
    assert schedule.at(-beyond) == schedule.at(0.0)
    assert schedule.at(1.0 + beyond) == schedule.at(1.0)


@given(schedule=warmed)
def test_warmup_peaks_once_and_has_no_jump(schedule: WarmupLinear | WarmupCosine) -> None:
    assert schedule.at(schedule.warmup) == pytest.approx(schedule.peak)
    assert schedule.at(1.0) == pytest.approx(schedule.last)
    if schedule.warmup > 1e-3:
        assert schedule.at(0.0) == 0.0
        before, after = (schedule.at(schedule.warmup + side) for side in (-1e-6, 1e-6))
        slope = max(schedule.peak, schedule.last) * (1 / schedule.warmup + 20.0)
        assert abs(after - before) <= 2e-6 * slope


@given(first=level, last=level, p=st.floats(min_value=0.0, max_value=0.9))
def test_geometric_shrinks_by_a_constant_factor(first: float, last: float, p: float) -> None:
    schedule = Geometric(first=first, last=last)
    assert schedule.at(p + 0.1) / schedule.at(p) == pytest.approx((last / first) ** 0.1)


@given(schedule=schedules)
def test_a_schedule_survives_its_json(schedule: Schedule) -> None:
    assert decode(encode(schedule), Schedule) == schedule


@given(schedule=schedules, points=st.lists(progress, min_size=1, max_size=5))
def test_asking_changes_nothing(schedule: Schedule, points: list[float]) -> None:
    once = [schedule.at(p) for p in points]
    assert [schedule.at(p) for p in reversed(points)] == once[::-1]
    assert all(math.isfinite(value) for value in once)


@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
@pytest.mark.parametrize("kind", [Linear, Geometric, SmoothStep])
def test_windows_out_of_order_are_refused(kind: type[Linear], begin: float, end: float) -> None:
    with pytest.raises(RecipeError, match="needs 0 <= begin < end <= 1"):
        kind(first=1.0, last=2.0, begin=begin, end=end)


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 2.0])
@pytest.mark.parametrize("kind", [WarmupLinear, WarmupCosine])
def test_a_warmup_that_never_ends_is_refused(kind: type[WarmupLinear], warmup: float) -> None:
    with pytest.raises(RecipeError, match=r"needs 0 <= warmup < 1"):
        kind(peak=1.0, warmup=warmup)


@pytest.mark.parametrize("end", [0.2, 1.1])
@pytest.mark.parametrize("kind", [WarmupLinear, WarmupCosine])
def test_a_decay_that_ends_before_its_warmup_is_refused(kind: type[WarmupLinear], end: float) -> None:
    with pytest.raises(RecipeError, match=r"end=.*needs warmup=0.2 < end <= 1"):
        kind(peak=1.0, warmup=0.2, end=end)


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_a_geometric_schedule_cannot_touch_zero(first: float, last: float) -> None:
    with pytest.raises(RecipeError, match="both must be above 0"):
        Geometric(first=first, last=last)


@pytest.mark.parametrize("switch_at", [0.0, 1.0])
def test_a_switch_that_leaves_no_room_for_a_side_is_refused(switch_at: float) -> None:
    with pytest.raises(RecipeError, match="switch_at="):
        Switch(before=Constant(value=0.0), after=Constant(value=1.0), switch_at=switch_at)


def test_every_schedule_is_tested_here() -> None:
    tested = {Constant, Linear, Geometric, SmoothStep, WarmupLinear, WarmupCosine, Switch, Product}
    assert {cls for cls in SPECS.values() if issubclass(cls, Schedule)} == tested
