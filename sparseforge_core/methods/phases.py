"""The phases of an annealing run as steps: when the forward hardens, when the pattern is fixed, when masks move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparseforge_core.errors import RecipeError

if TYPE_CHECKING:
    from sparseforge_core.methods.sparseforge import SparseForge


@dataclass(frozen=True)
class Phases:
    """Steps at which the phases of a run of `steps` begin, and at which the masks are updated."""

    steps: int
    quench: int
    freeze: int
    period: int
    """Steps between updates, which happen at multiples of it; `early_period` until the step `early`."""
    early: int
    early_period: int
    first: int
    """No update before this step."""

    @classmethod
    def of(cls, method: SparseForge, steps: int) -> Phases:
        """Phases of this method for a run of `steps`. Raises RecipeError if the run is too short to have them."""
        quench, freeze = round(method.quench_begin * steps), round(method.freeze_at * steps)
        if not 0 < quench < freeze:
            raise RecipeError(f"train.steps={steps}: too few for heating, quench and finetune; use at least 10")
        period = method.update_every or max(1, min(10, freeze // 350))
        early_period = method.early_update_every or period
        early = round(method.early_until * steps) if early_period != period else 0
        phases = cls(steps, quench, freeze, period, early, early_period, math.ceil(method.first_update * freeze))
        if phases.updates(freeze - 1) == 0:
            raise RecipeError(
                f"train.steps={steps}, update_every={period}: no mask update before the projection at step {freeze}"
            )
        return phases

    def updates(self, step: int) -> int:
        """Mask updates up to and including `step`."""
        return max(0, self._multiples(min(step, self.freeze - 1)) - self._multiples(max(0, self.first - 1)))

    def is_update(self, step: int) -> bool:
        """Whether the masks move after `step`."""
        return self.updates(step) > self.updates(step - 1)

    def _multiples(self, step: int) -> int:
        if step <= self.early:
            return step // self.early_period
        return self.early // self.early_period + step // self.period - self.early // self.period

    def progress(self, step: int) -> float:
        """Share of heating and quench that lies behind, in [0, 1]."""
        return min(1.0, step / self.freeze)

    def softness(self, step: int) -> float:
        """x: 1 through heating, linear to 0 over the quench (section 4.4)."""
        return min(1.0, max(0.0, (self.freeze - step) / (self.freeze - self.quench)))

    def name(self, step: int) -> Literal["heating", "quench", "finetune"]:
        """The phase that `step` belongs to."""
        return "heating" if step < self.quench else "quench" if step < self.freeze else "finetune"
