"""The search for an order of channels: it loses nothing, finds what was hidden, and says what it cannot do."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.errors import PatternViolation, RecipeError
from sparseforge_core.sparsity.permutation import ChannelPermutation, _matched, best_order, kept


def scores_of(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(seed)).square()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 6), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]), st.integers(0, 99)
)
def test_an_order_is_a_permutation_that_never_keeps_less(
    rows: int, groups: int, pattern: tuple[int, int], seed: int
) -> None:
    keep, size = pattern
    scores = scores_of(rows, groups * size, seed)
    order = best_order(scores, keep=keep, size=size, rounds=4)
    assert sorted(order.tolist()) == list(range(groups * size))
    given_order = torch.arange(groups * size)
    assert kept(scores, order, keep=keep, size=size) >= kept(scores, given_order, keep=keep, size=size) - 1e-9
    again = best_order(scores, keep=keep, size=size, rounds=4)
    assert torch.equal(order, again), "the same bits each time"


def test_small_cases_come_close_to_the_best_of_all_orders() -> None:
    worst = 1.0
    for seed in range(12):
        scores = scores_of(5, 8, seed)
        best = max(
            kept(scores, torch.tensor([*first, *(i for i in range(8) if i not in first)]), keep=2, size=4)
            for first in itertools.combinations(range(8), 4)
        )
        found = kept(scores, best_order(scores, keep=2, size=4, rounds=8), keep=2, size=4)
        assert found <= best + 1e-9
        worst = min(worst, found / best)
    assert worst > 0.97


def test_what_a_bad_order_hides_is_found() -> None:
    """Two channels of four carry everything in each group of an order; shuffled, groups would lose half of it."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(16)
    scores = torch.rand(64, 64, generator=generator) * weights
    shuffled = scores[:, weights.argsort(descending=True, stable=True)]  # all that matters stands together
    whole = float(shuffled.sum(dtype=torch.float64))
    before = kept(shuffled, torch.arange(64), keep=2, size=4)
    after = kept(shuffled, best_order(shuffled, keep=2, size=4, rounds=8), keep=2, size=4)
    assert before < 0.75 * whole
    assert after == pytest.approx(whole)


def test_pieces_of_a_comparison_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = scores_of(40, 32, 3)
    whole = best_order(scores, keep=2, size=4, rounds=3)
    monkeypatch.setattr("sparseforge_core.sparsity.permutation.AT_ONCE", 100)
    assert torch.equal(best_order(scores, keep=2, size=4, rounds=3), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.sampled_from([1, 4, 1000]), st.integers(0, 99))
def test_those_exchange_who_are_each_others_best_of_who_is_left(count: int, levels: int, seed: int) -> None:
    """`levels`: few of them, and gains tie."""
    gain = (scores_of(count, count, seed) * levels).ceil() - levels / 4
    gain = gain + gain.T
    gain.fill_diagonal_(0.0)
    left, expected = set(range(count)), list(range(count))
    while left:
        best = {one: max(sorted(left), key=lambda other, one=one: float(gain[one, other])) for one in left}
        pairs = {(a, b) for a, b in best.items() if a < b and best[b] == a and gain[a, b] > 0.5}
        if not pairs:
            break
        for a, b in pairs:
            expected[a], expected[b] = b, a
            left -= {a, b}
    assert _matched(gain.clone(), torch.tensor(0.5)).tolist() == expected


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(PatternViolation, match="6 channels do not divide into groups of 4"):
        best_order(scores_of(2, 6, 0), keep=2, size=4, rounds=1)
    with pytest.raises(RecipeError, match="rounds=0: must be at least 1"):
        ChannelPermutation(rounds=0)
