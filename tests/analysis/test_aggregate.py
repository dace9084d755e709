from __future__ import annotations

import math

import pytest

from analysis.aggregate import Estimate, difference, half_width, over_seeds, ratio


def test_mean_spread_and_interval_of_two_seeds() -> None:
    found = over_seeds([25.0, 26.0])
    assert found is not None
    assert (found.mean, found.n) == (25.5, 2)
    assert found.std == pytest.approx(math.sqrt(0.5))
    # t(0.975, 1) = 12.7062, standard error 0.5.
    assert found.half == pytest.approx(6.3531)


def test_one_value_has_no_interval_and_none_is_none() -> None:
    assert over_seeds([3.0]) == Estimate(3.0, None, 1, None)
    assert over_seeds([]) is None


@pytest.mark.parametrize(
    ("n", "quantile"), [(2, 12.7062), (3, 4.3027), (31, 2.0423), (32, 2.0395), (101, 1.9840), (10_001, 1.9602)]
)
def test_quantiles_of_t(n: int, quantile: float) -> None:
    assert half_width(1.0, n) == pytest.approx(quantile, abs=1.5e-4)


def test_differences_pair_equal_seeds() -> None:
    found = difference({0: 25.0, 1: 26.0, 2: 99.0}, {0: 24.0, 1: 25.0})
    assert found is not None
    assert (found.mean, found.n, found.std) == (1.0, 2, 0.0)


def test_a_single_planned_seed_is_a_constant() -> None:
    below = difference({0: 25.0, 1: 27.0}, {0: 20.0}, one_to=True)
    above = difference({0: 20.0}, {0: 25.0, 1: 27.0}, one_of=True)
    assert below is not None
    assert above is not None
    assert (below.mean, below.n) == (6.0, 2)
    assert (above.mean, above.half) == (-6.0, below.half)


def test_a_seed_that_is_not_in_yet_is_no_constant() -> None:
    found = difference({0: 25.0, 1: 27.0}, {1: 20.0})
    assert found == Estimate(7.0, None, 1, None)
    assert difference({0: 25.0}, {1: 20.0}) is None


def test_ratio() -> None:
    found = ratio(Estimate(3.0, None, 2, None), Estimate(2.0, None, 3, None))
    assert found == Estimate(1.5, None, 2, None)
    assert ratio(found, Estimate(0.0, None, 1, None)) is None
    assert ratio(None, found) is None
