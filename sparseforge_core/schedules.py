"""Schedules: pure functions of progress in [0, 1]. Nothing here counts its own calls, so resuming is exact."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from sparseforge_core.errors import RecipeError
from sparseforge_core.specs import spec


class Schedule(ABC):
    """A number that changes over a phase; `at(progress)` with progress clamped to [0, 1]."""

    @abstractmethod
    def at(self, progress: float) -> float:
        """Value at `progress`."""


@spec("constant")
class Constant(Schedule):
    """The same value throughout."""

    value: float

    def at(self, progress: float) -> float:
        return self.value


def _check_warmup(warmup: float, end: float) -> None:
    if not 0.0 <= warmup < 1.0:
        raise RecipeError(f"warmup={warmup}: needs 0 <= warmup < 1")
    if not warmup < end <= 1.0:
        raise RecipeError(f"end={end}: needs warmup={warmup} < end <= 1")


def _share(progress: float, begin: float, end: float) -> float:
    return min(1.0, max(0.0, (progress - begin) / (end - begin)))


class _Window(Schedule):
    first: float
    last: float
    begin: float
    end: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise RecipeError(f"window begin={self.begin}, end={self.end}: needs 0 <= begin < end <= 1")

    def _share(self, progress: float) -> float:
        return _share(progress, self.begin, self.end)


@spec("linear")
class Linear(_Window):
    """From `first` to `last`, straight, between the fractions `begin` and `end`."""

    first: float
    last: float
    begin: float = 0.0
    end: float = 1.0

    def at(self, progress: float) -> float:
        return self.first + (self.last - self.first) * self._share(progress)


@spec("geometric")
class Geometric(_Window):
    """From `first` to `last` by a constant factor per unit of progress (the paper's T <- gamma T)."""

    first: float
    last: float
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first <= 0 or self.last <= 0:
            raise RecipeError(f"geometric schedule from {self.first} to {self.last}: both must be above 0")

    def at(self, progress: float) -> float:
        return float(self.first * (self.last / self.first) ** self._share(progress))


@spec("smooth-step")
class SmoothStep(_Window):
    """From `first` to `last` along the cubic Hermite 3u^2 - 2u^3 (the paper's beta, section 4.3)."""

    first: float
    last: float
    begin: float = 0.0
    end: float = 1.0

    def at(self, progress: float) -> float:
        u = self._share(progress)
        return self.first + (self.last - self.first) * u * u * (3.0 - 2.0 * u)


@spec("warmup-linear")
class WarmupLinear(Schedule):
    """Linear warm-up to `peak` over the fraction `warmup`, then linear to `last` at progress `end`."""

    peak: float
    warmup: float = 0.05
    last: float = 0.0
    end: float = 1.0
    """Progress from which on it stays at `last`."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup, self.end)

    def at(self, progress: float) -> float:
        p = min(1.0, max(0.0, progress))
        if p < self.warmup:
            return self.peak * p / self.warmup
        return self.peak + (self.last - self.peak) * _share(p, self.warmup, self.end)


@spec("warmup-cosine")
class WarmupCosine(Schedule):
    """Linear warm-up to `peak` over the fraction `warmup`, then half a cosine down to `last` at progress `end`."""

    peak: float
    warmup: float = 0.05
    last: float = 0.0
    end: float = 1.0
    """Progress from which on it stays at `last`."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup, self.end)

    def at(self, progress: float) -> float:
        p = min(1.0, max(0.0, progress))
        if p < self.warmup:
            return self.peak * p / self.warmup
        u = _share(p, self.warmup, self.end)
        return self.last + (self.peak - self.last) * 0.5 * (1.0 + math.cos(math.pi * u))


@spec("switch")
class Switch(Schedule):
    """One schedule before the fraction `switch_at`, another from it on; both are functions of the whole progress."""

    before: Schedule
    after: Schedule
    switch_at: float

    def __post_init__(self) -> None:
        if not 0.0 < self.switch_at < 1.0:
            raise RecipeError(f"switch_at={self.switch_at}: must lie between 0 and 1, both excluded")

    def at(self, progress: float) -> float:
        return (self.before if progress < self.switch_at else self.after).at(progress)


@spec("product")
class Product(Schedule):
    """The product of two schedules, such as kappa = eta_pen lambda_mid with a ramp for each."""

    first: Schedule
    second: Schedule

    def at(self, progress: float) -> float:
        return self.first.at(progress) * self.second.at(progress)
