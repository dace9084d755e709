"""SparseForge: anneal a soft mask into an exact pattern while the weights retrain (algorithm 1 and sections 4.1-4.4).

The token budget is one line with three phases, given as fractions: *heating* [0, quench_begin), where the mask is
soft and the equations (3)-(5) move it; *quench* [quench_begin, freeze_at), where the forward slides from the soft
mask m to its hard projection while the updates go on; *finetune* [freeze_at, 1], where the pattern is exact, the
mask is frozen and only kept weights train. Every annealed constant is a pure function of progress.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.annealing import SparseForgeTrack
from sparseforge_core.methods.base import Method, MethodCard, Surroundings
from sparseforge_core.observe.curvature import AdamSecondMoment, Curvature, Fisher
from sparseforge_core.schedules import Constant, Geometric, Linear, Schedule, SmoothStep
from sparseforge_core.sparsity.compensation import Compensation
from sparseforge_core.sparsity.criteria import Criterion, HessianOBD
from sparseforge_core.sparsity.gate import GateForm, Order, PushTarget, Scope, Threshold
from sparseforge_core.sparsity.masking import Storage
from sparseforge_core.specs import spec


@spec("sparseforge", revision=2)
class SparseForge(Method):
    """The paper's method; the defaults are the decided ones (docs/architecture.md, decisions)."""

    criterion: Criterion = HessianOBD()
    """Importance of an entry (section 4.1)."""
    curvature: Curvature = Fisher()
    """Estimator of diag(H), used by criteria that need curvature."""
    log_scores: bool = True
    """Standardise log-scores instead of raw scores."""
    threshold: Threshold = "midpoint"
    """tau: midway between the N-th and the next score, the N-th score itself (eq. 3 to the letter), or exact sums."""
    gate_scope: Scope = "group"
    """Who shares a tau: a group (eq. 3), or the whole layer (the published code)."""
    order: Order = "blend-then-push"
    """Blend, then eq. (4) on the result (section 4.3), or eq. (4) alone (algorithm 1, line 11 to the letter)."""
    push_target: PushTarget = "scores"
    """What eq. (4) pulls to: the top N of the scores (the paper), or of the gate (the published code)."""
    temperature: Schedule = Geometric(first=1.0, last=0.05, end=0.6)
    """T over the progress of heating and quench."""
    cooling: float | None = None
    """gamma: T <- gamma T once a mask update (line 13), from the schedule's first value down to its last; None
    follows the schedule, which reaches its end at the same progress however many updates there are."""
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
    """T_update, steps between mask updates; None: 10, fewer in short runs, so that there are at least 350 updates."""
    early_update_every: int | None = None
    """T_update in the first `early_until` of the budget, where it differs."""
    early_until: float = 0.1
    first_update: float = 0.0
    """Progress of heating and quench before which the masks stay at one."""
    quench_begin: float = 0.7
    freeze_at: float = 0.9
    quench_view: Literal["top-n", "threshold"] = "top-n"
    """What the forward hardens to: the top N of m in each group, or 1[m > 1/2] (section 4.4 to the letter)."""
    project_on: Literal["mask", "scores"] = "mask"
    """What the hard mask is the top N of: m, ties told apart by the scores, or the scores themselves."""
    rescale_rows: bool = False
    """Whether each output row of the effective weight keeps the norm that it has without a mask."""
    start_from: Method | None = None
    """A one-shot method whose solution is where annealing starts: m is its mask, kept weights are as it left them, and
    pruned ones stay dense behind the mask. None: m = 1 and the dense weights (algorithm 1, line 1)."""
    compensation: Compensation | None = None
    """At the projection: whether survivors take over what the view still let through (optimal brain surgeon)."""
    pruned_decay: Schedule = Constant(value=0.0)
    """lambda over the same progress: (1 - m) W times this is added to the gradient, as in SR-STE."""
    calibration_samples: int = 32
    """Sequences for criteria that need statistics of inputs."""
    mask_storage: Storage = "float32"
    """How m is kept: 9 bytes an entry with its hard mask and view, or 2 ('int16', steps of 1/32767)."""
    statistics_rows: int = 1
    """A layer's mean curvature, and mean and spread of its scores, are those of every n-th stored row; 1: of all."""
    statistics_of: Literal["this-update", "last-update"] = "this-update"
    """Whose scores these are: the update's own, which takes two passes more, or those that the update before saw."""

    card: ClassVar[MethodCard] = MethodCard("SparseForge, arXiv 2605.06402", "retraining")

    def __post_init__(self) -> None:
        if not 0.0 < self.quench_begin < self.freeze_at <= 1.0:
            raise RecipeError(
                f"quench_begin={self.quench_begin}, freeze_at={self.freeze_at}: the phases must be in order, "
                "0 < quench_begin < freeze_at <= 1"
            )
        if not 0.0 < self.target_freeze <= 1.0:
            raise RecipeError(f"target_freeze={self.target_freeze}: must lie in (0, 1]")
        for name in ("early_until", "first_update"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise RecipeError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        for name in ("update_every", "early_update_every", "statistics_rows"):
            period = getattr(self, name)
            if period is not None and period < 1:
                raise RecipeError(f"{name}={period}: must be at least 1")
        if self.mask_storage == "int16" and (self.rescale_rows or self.quench_view != "top-n"):
            raise RecipeError(
                "mask_storage='int16': its view is x m + (1 - x) TopN(m) and nothing else; with rescale_rows or "
                "quench_view='threshold' use 'float32'"
            )
        if self.statistics_of == "last-update" and self.statistics_rows != 1:
            raise RecipeError(
                f"statistics_rows={self.statistics_rows}: with statistics_of='last-update' an update gathers its "
                "statistics from all rows, as it passes them anyway; leave it at 1"
            )
        if self.compensation is not None and self.rescale_rows:
            raise RecipeError("rescale_rows: with compensation the survivors are fitted already; choose one of the two")
        if self.start_from is not None and (self.start_from.trains or not self.start_from.sparsifies):
            raise RecipeError(f"start_from: {type(self.start_from).__name__} is no one-shot method")
        if self.cooling is not None and not 0.0 < self.cooling < 1.0:
            raise RecipeError(f"cooling={self.cooling}: gamma must lie between 0 and 1, both excluded")
        self._check_schedules()

    def _check_schedules(self) -> None:
        for name in ("mask_rate", "structure_mix"):
            low, high = _range_of(getattr(self, name))
            if low < 0.0 or high > 1.0:
                raise RecipeError(f"{name}: runs from {low} to {high}; must stay in [0, 1]")
        for name in ("mid_push", "hysteresis", "pruned_decay"):
            low, _ = _range_of(getattr(self, name))
            if low < 0.0:
                raise RecipeError(f"{name}: falls to {low}; must not be negative")
        if _range_of(self.temperature)[0] <= 0:
            raise RecipeError("temperature: must stay above 0")

    @property
    def form(self) -> GateForm:
        """How eqs. (3) and (4) are read."""
        return GateForm(threshold=self.threshold, scope=self.gate_scope, order=self.order, push_target=self.push_target)

    @property
    def reads_moments(self) -> bool:
        return self.criterion.needs == "curvature" and isinstance(self.curvature, AdamSecondMoment)

    def begins_from(self) -> Method | None:
        return self.start_from

    def unshardable(self) -> str | None:
        if self.start_from is not None:
            return "start_from prunes whole blocks before anything is sharded"
        if self.compensation is not None:
            return "compensation carries calibration text through whole blocks at the projection"
        if self.criterion.needs == "curvature" and not self.curvature.shards:
            return (
                f"curvature {type(self.curvature).__name__} differentiates twice, which sharded weights do not survive"
            )
        return None

    def start(self, around: Surroundings) -> SparseForgeTrack:
        return SparseForgeTrack(self, around)


def _range_of(schedule: Schedule) -> tuple[float, float]:
    """The least and the greatest value of a schedule, on a fine grid of progress."""
    values = [schedule.at(i / 200) for i in range(201)]
    return min(values), max(values)
