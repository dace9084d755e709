"""SparseForge: anneal a soft mask into an exact pattern while the weights retrain (algorithm 1 and sections 4.1-4.4).

The token budget is one line with three phases, given as fractions: *heating* [0, quench_begin), where the mask is
soft and the equations (3)-(5) move it; *quench* [quench_begin, freeze_at), where the forward slides from the soft
mask m to its hard projection while the updates go on; *finetune* [freeze_at, 1], where the pattern is exact, the
mask is frozen and only kept weights train. Every annealed constant is a pure function of progress.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, MaskTrack, Method, MethodCard, Surroundings
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.activations import input_norms
from sparseforge_core.observe.curvature import Curvature, CurvatureAverage, Fisher
from sparseforge_core.schedules import Constant, Geometric, Linear, Schedule, SmoothStep
from sparseforge_core.sparsity.criteria import Criterion, HessianOBD, standardize
from sparseforge_core.sparsity.gate import AnnealPoint, Threshold, hard_target, project, update_mask
from sparseforge_core.specs import spec


@spec("sparseforge")
class SparseForge(Method):
    """The paper's method; the defaults are the decided ones (docs/architecture.md, decisions)."""

    criterion: Criterion = HessianOBD()
    """Importance of an entry (section 4.1)."""
    curvature: Curvature = Fisher()
    """Estimator of diag(H), used by criteria that need curvature."""
    log_scores: bool = True
    """Standardise log-scores instead of raw scores."""
    threshold: Threshold = "midpoint"
    """tau: midway between the N-th and the next score, or the N-th score itself (eq. 3 to the letter)."""
    temperature: Schedule = Geometric(first=1.0, last=0.05, end=0.6)
    """T over the progress of heating and quench."""
    structure_mix: Schedule = SmoothStep(first=0.0, last=1.0, begin=0.1, end=0.85)
    """beta over the same progress."""
    mid_push: Schedule = Linear(first=0.0, last=0.3)
    """kappa = eta_pen lambda_mid over the same progress."""
    mask_rate: Schedule = Linear(first=0.01, last=0.1, end=0.025)
    """alpha over the same progress: a short ramp, so that early, poorly informed scores move little."""
    hysteresis: Schedule = Constant(value=0.0)
    """Margin in standardised score that a challenger needs to replace a kept entry, over the same progress."""
    target_freeze: float = 0.9
    """Progress of heating and quench after which the hard target no longer changes."""
    update_every: int | None = None
    """Steps between mask updates; None: 10, fewer in short runs, so that there are at least 350 updates."""
    quench_begin: float = 0.7
    freeze_at: float = 0.9
    calibration_samples: int = 32
    """Sequences for criteria that need input norms."""

    card: ClassVar[MethodCard] = MethodCard("SparseForge, arXiv 2605.06402", "retraining")

    def __post_init__(self) -> None:
        if not 0.0 < self.quench_begin < self.freeze_at <= 1.0:
            raise RecipeError(
                f"quench_begin={self.quench_begin}, freeze_at={self.freeze_at}: the phases must be in order, "
                "0 < quench_begin < freeze_at <= 1"
            )
        if not 0.0 < self.target_freeze <= 1.0:
            raise RecipeError(f"target_freeze={self.target_freeze}: must lie in (0, 1]")
        if self.update_every is not None and self.update_every < 1:
            raise RecipeError(f"update_every={self.update_every}: must be at least 1")
        for name in ("mask_rate", "structure_mix"):
            ends = [getattr(self, name).at(p) for p in (0.0, 1.0)]
            if not all(0.0 <= value <= 1.0 for value in ends):
                raise RecipeError(f"{name}: runs from {ends[0]} to {ends[1]}; must stay in [0, 1]")
        if min(self.temperature.at(0.0), self.temperature.at(1.0)) <= 0:
            raise RecipeError("temperature: must stay above 0")

    def start(self, around: Surroundings) -> SparseForgeTrack:
        return SparseForgeTrack(self, around)


@dataclass(frozen=True)
class Phases:
    """Steps at which the phases of a run of `steps` begin; updates happen at multiples of `period`."""

    steps: int
    quench: int
    freeze: int
    period: int

    @classmethod
    def of(cls, method: SparseForge, steps: int) -> Phases:
        """Phases of this method for a run of `steps`. Raises RecipeError if the run is too short to have them."""
        quench, freeze = round(method.quench_begin * steps), round(method.freeze_at * steps)
        if not 0 < quench < freeze:
            raise RecipeError(f"train.steps={steps}: too few for heating, quench and finetune; use at least 10")
        return cls(steps, quench, freeze, method.update_every or max(1, min(10, freeze // 350)))

    def progress(self, step: int) -> float:
        """Share of heating and quench that lies behind, in [0, 1]."""
        return min(1.0, step / self.freeze)

    def softness(self, step: int) -> float:
        """x: 1 through heating, linear to 0 over the quench (section 4.4)."""
        return min(1.0, max(0.0, (self.freeze - step) / (self.freeze - self.quench)))

    def name(self, step: int) -> Literal["heating", "quench", "finetune"]:
        """The phase that `step` belongs to."""
        return "heating" if step < self.quench else "quench" if step < self.freeze else "finetune"


class SparseForgeTrack(MaskedTrack):
    """The mask's own track: algorithm 1 from line 7 on."""

    def __init__(self, method: SparseForge, around: Surroundings) -> None:
        self.norms: dict[str, Tensor] = {}
        if method.criterion.needs == "input_norms":
            length = 2048
            self.norms = input_norms(around.model, around.sites, around.calibration(method.calibration_samples, length))
        super().__init__(around)
        self.method = method
        self.phases = Phases.of(method, around.steps)
        self.step = 0
        self.curvature: CurvatureAverage | None = None
        if method.criterion.needs == "curvature":
            self.curvature = method.curvature.start(self.sites)

    def before_update(self, step: int) -> None:
        if self.curvature is not None and not self.frozen:
            self.curvature.observe()

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.step = step
        if self.frozen:
            return
        if step % self.phases.period == 0 and step < self.phases.freeze:
            self._update_masks(step)
        if step >= self.phases.freeze:
            self.freeze(optimizer)
        elif step >= self.phases.quench:
            for site in self.sites:
                site.mask.set_view(self.phases.softness(step))

    @torch.no_grad()
    def _update_masks(self, step: int) -> None:
        progress = self.phases.progress(step)
        flips = 0.0
        for site in self.sites:
            flips += self._update_site(site, progress, first=step == self.phases.period)
            site.mask.set_view(self.phases.softness(step))
        self.flip_rate = flips / len(self.sites)

    def _update_site(self, site: Site, progress: float, *, first: bool) -> float:
        """Lines 8-13 for one site; returns the share of its hard mask that flipped."""
        soft, pattern = site.mask, site.pattern
        z = pattern.groups(standardize(self._scores(site), log=self.method.log_scores))
        keep = pattern.keep_of(z.shape[-1])
        mask, old = pattern.groups(soft.matrix(soft.mask)), pattern.groups(soft.matrix(soft.hard))
        if progress >= self.method.target_freeze and not first:
            target = old
        else:
            margin = 0.0 if first else self.method.hysteresis.at(progress)
            target = hard_target(z, keep, old, margin)
        new = update_mask(mask, z, target, keep, self.anneal_point(progress), self.method.threshold)
        hard = project(new, z, keep)
        shape = soft.matrix(soft.mask).shape
        soft.matrix(soft.mask).copy_(pattern.ungroup(new, shape))
        soft.matrix(soft.hard).copy_(pattern.ungroup(hard, shape))
        if first:
            soft.start_branch(site.weight)
        return float((hard != old).float().mean())

    def _scores(self, site: Site) -> Tensor:
        """s of a site as `[..., out, in]`: curvature and weight in, importance out."""
        if self.curvature is not None:
            statistic: Tensor | None = site.matrix(self.curvature.of(site))
        else:
            statistic = self.norms.get(site.name)
        return self.method.criterion.score(site.matrix(site.weight.detach()), statistic)

    def anneal_point(self, progress: float) -> AnnealPoint:
        """The annealed constants at a progress of heating and quench."""
        m = self.method
        return AnnealPoint(
            temperature=m.temperature.at(progress),
            structure_mix=m.structure_mix.at(progress),
            mid_push=m.mid_push.at(progress),
            mask_rate=m.mask_rate.at(progress),
        )

    def summary(self) -> dict[str, float]:
        at = self.anneal_point(self.phases.progress(self.step))
        return {
            **super().summary(),
            "anneal/temperature": at.temperature,
            "anneal/structure_mix": at.structure_mix,
            "anneal/softness": self.phases.softness(self.step),
        }

    def state(self) -> dict[str, Tensor]:
        state = {**super().state(), "step": torch.tensor(self.step)}
        state.update({f"norms/{name}": value for name, value in self.norms.items()})
        if self.curvature is not None:
            state.update({f"curvature/{name}": value for name, value in self.curvature.state().items()})
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.step = int(state["step"])
        for name in self.norms:
            self.norms[name].copy_(state[f"norms/{name}"])
        if self.curvature is not None:
            prefix = "curvature/"
            self.curvature.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


__all__ = ["MaskTrack", "Phases", "SparseForge", "SparseForgeTrack"]
