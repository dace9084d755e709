"""SparseForge: anneal a soft mask into an exact pattern while the weights retrain (algorithm 1 and sections 4.1-4.4).

The token budget is one line with three phases, given as fractions: *heating* [0, quench_begin), where the mask is
soft and the equations (3)-(5) move it; *quench* [quench_begin, freeze_at), where the forward slides from the soft
mask m to its hard projection while the updates go on; *finetune* [freeze_at, 1], where the pattern is exact, the
mask is frozen and only kept weights train. Every annealed constant is a pure function of progress.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparseforge_core.distributed import whole as gathered_whole
from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, MaskTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.one_shot import Solution, one_shot_solution
from sparseforge_core.methods.phases import Phases
from sparseforge_core.methods.shards import all_whole, each_part, each_whole
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.activations import input_norms
from sparseforge_core.observe.blocks import stream_blocks
from sparseforge_core.observe.curvature import AdamSecondMoment, Batch, Curvature, Estimate, Fisher
from sparseforge_core.observe.grams import Grams
from sparseforge_core.observe.input_gram import inverse_gram_diagonals
from sparseforge_core.schedules import Constant, Geometric, Linear, Schedule, SmoothStep
from sparseforge_core.sparsity.arriving import Arriving
from sparseforge_core.sparsity.compensation import Compensation, compensate
from sparseforge_core.sparsity.criteria import Criterion, HessianOBD, Magnitude, not_finite, observed, standardize
from sparseforge_core.sparsity.fused import Entry, Way, refusal, update_masks
from sparseforge_core.sparsity.gate import (
    AnnealPoint,
    GateForm,
    Order,
    PushTarget,
    Scope,
    Threshold,
    hard_target,
    project,
    update_mask,
)
from sparseforge_core.sparsity.masking import Storage, set_softness
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


class SparseForgeTrack(MaskedTrack):
    """The mask's own track: algorithm 1 from line 7 on."""

    def __init__(self, method: SparseForge, around: Surroundings) -> None:
        self.norms: dict[str, Tensor] = {}
        if method.criterion.needs in ("input_norms", "inverse_gram"):
            observe = input_norms if method.criterion.needs == "input_norms" else inverse_gram_diagonals
            self.norms = observe(around.model, around.sites, around.calibration(method.calibration_samples, 2048))
        begun = None if method.start_from is None else one_shot_solution(method.start_from, around)
        super().__init__(around, storage=method.mask_storage)
        self.method, self.around = method, around
        self.reported: Arriving | None = None
        self._order: list[Site] = []
        self.known: Tensor | None = None
        """What the last update gathered of each site (`criteria.observed`), float64 `[sites, 3]`, in their order."""
        self.seen: dict[str, float] | None = None
        """What is worth logging of the masks since the last update, where the kernels said it."""
        self.places = {site.name: place for place, site in enumerate(self.sites)}
        self.phases = Phases.of(method, around.steps)
        self.slorb = around.slorb
        self.step = 0
        self.curvature: Estimate | None = None
        if begun is not None:
            self._begin_from(begun)
        self.placed()

    @torch.no_grad()
    def _begin_from(self, solution: dict[str, Solution]) -> None:
        """m and the kept weights become those of a one-shot solution."""
        for site in self.sites:
            found = solution[site.name]
            hard = site.mask.matrix(found.hard)
            site.weight.copy_(torch.where(found.hard, found.weight, site.weight))
            site.mask.move(hard.to(site.weight.dtype), hard)
        self._show(0, self.sites)

    def placed(self) -> None:
        if self.method.criterion.needs == "curvature":
            self.curvature = self.method.curvature.start(self.sites, self.around.seed)
        self.norms = {site.name: self.norms[site.name].to(site.weight.device) for site in self.sites if self.norms}

    def observe(self, batch: Batch) -> None:
        if self.curvature is not None and not self.frozen:
            self.curvature.observe(batch)

    def before_update(self, step: int) -> None:
        decay = self.method.pruned_decay.at(self.phases.progress(step))
        if decay and not self.frozen:
            self._decay_pruned(decay)

    @torch.no_grad()
    def _decay_pruned(self, decay: float) -> None:
        for site in each_part(self.sites):
            gradient = site.weight.grad
            assert gradient is not None
            gradient.addcmul_(site.weight, 1.0 - site.mask.mask, value=decay)

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.step = step
        if self.frozen:
            return
        if self.phases.is_update(step):  # line 7: t mod T_update = 0
            self._update_masks(step)
        if step >= self.phases.freeze:
            if self.method.compensation is not None:
                self._compensate(self.method.compensation)
            self.freeze(optimizer)
        elif step >= self.phases.quench:
            self._set_views(step, self.sites)
            if step == self.phases.quench:
                self._start_branches("quench")

    @torch.no_grad()
    def _update_masks(self, step: int) -> None:
        self._settle()
        first = self.phases.updates(step) == 1
        way = self._way(step)
        reports: list[Tensor] = []
        self._order = []
        gathered = self._unknown() if self.method.statistics_of == "last-update" else None
        # Shards: one site at a time is whole, and what is done to it is what is done to all of them on one rank.
        for sites in [[site] for site in self.sites] if self.sharded else [self.sites]:
            with all_whole(sites):
                reports += self._update_sites(sites, way, step, gathered)
        self.known = gathered
        self.reported = Arriving(torch.cat(reports))
        if first:
            self._start_branches("first-mask")

    def _unknown(self) -> Tensor:
        """Room for what is known of each site."""
        return torch.zeros(len(self.sites), 3, dtype=torch.float64, device=self.sites[0].weight.device)

    def _update_sites(self, sites: list[Site], way: Way, step: int, gathered: Tensor | None) -> list[Tensor]:
        """Lines 8-13 for some sites, by the fused kernels where these can; what is to be read of them later."""
        together = [site for site in sites if self._refusal(site) is None]
        names = {site.name for site in together}
        alone = [site for site in sites if site.name not in names]
        reports = [self._update_together(together, way, gathered)] if together else []
        for site in alone:
            flipped = self._update_site(site, way, gathered)
            # What only a look at all masks would say is left to `summary`, which takes one if it must.
            reports.append(torch.stack([flipped, *[torch.full_like(flipped, math.inf)] * 2])[None])
        self._show(step, sites if self.method.mask_storage == "int16" else alone)
        self._order += [*together, *alone]
        return reports

    def _update_together(self, sites: list[Site], way: Way, gathered: Tensor | None) -> Tensor:
        """Lines 8-13 for sites that the fused kernels cover."""
        entries = [self._entry(site) for site in sites]
        if gathered is None:
            return update_masks(entries, way)
        everything = len(sites) == len(self.sites)
        places = [self.places[site.name] for site in sites]
        known = self.known if self.known is None or everything else self.known[places]
        found = gathered if everything else gathered[places]
        report = update_masks(entries, way, known=known, gathered=found)
        for i, (site, entry) in enumerate(zip(sites, entries, strict=True)):
            if entry.scores is not None and self.curvature is not None:  # which the kernels were given no curvature of
                found[i, 0] = gathered_whole(self.curvature.of(site)).mean()
        if not everything:
            gathered[places] = found
        return report

    def _way(self, step: int) -> Way:
        """What an update after `step` does."""
        method, progress = self.method, self.phases.progress(step)
        first = self.phases.updates(step) == 1 and method.start_from is None
        return Way(
            at=self.anneal_point(step),
            form=method.form,
            log=method.log_scores,
            softness=self.phases.softness(step),
            criterion=method.criterion,
            # At the first update every entry is kept, and nothing has a place to defend.
            margin=0.0 if first else method.hysteresis.at(progress),
            fixed_target=progress >= method.target_freeze and not first,
            project_on=method.project_on,
            quench_view=method.quench_view,
            rows=method.statistics_rows,
        )

    def _refusal(self, site: Site) -> str | None:
        """Why the site's update is not one for the fused kernels, or None."""
        if self.method.rescale_rows:
            return "its view is scaled by rows"
        return refusal(site.weight, site.mask, site.pattern, self.method.form)

    def _entry(self, site: Site) -> Entry:
        """The site for the fused kernels: with its statistic as it is kept, or with scores."""
        known: dict[str, Any] = {"weight": site.weight.detach(), "soft": site.mask, "pattern": site.pattern}
        if isinstance(self.method.criterion, Magnitude):
            return Entry(**known)
        if isinstance(self.method.criterion, HessianOBD) and self.curvature is not None:
            statistic, scale = self.curvature.kept(site)
            return Entry(**known, statistic=gathered_whole(statistic), scale=scale)
        return Entry(**known, scores=site.matrix(self._scores(site, self._statistic(site))).contiguous())

    def _update_site(self, site: Site, way: Way, gathered: Tensor | None = None) -> Tensor:
        """Lines 8-13 for one site; returns the share of its hard mask that flipped."""
        soft, pattern, place = site.mask, site.pattern, self.places[site.name]
        statistic, known = self._statistic(site), None if self.known is None else self.known[place]
        scores = self._scores(site, statistic)
        looked = self._looked_at(site.matrix(scores))
        where = f"site {site.name}"
        z = standardize(scores, log=way.log, where=where, looked=looked, known=known)  # line 8, section 4.1
        if gathered is not None:
            curvature = None if self.curvature is None else statistic
            gathered[place] = observed(scores, curvature, log=way.log, known=known)
        z = pattern.groups(z)
        keep = pattern.keep_of(z.shape[-1])
        mask, old = pattern.groups(soft.matrix(soft.mask)), pattern.groups(soft.matrix(soft.hard))
        target = old if way.fixed_target else hard_target(z, keep, old, way.margin)
        new = soft.rounded(update_mask(mask, z, target, keep, way.at, way.form))  # lines 9-12
        hard = project(new, z, keep) if way.project_on == "mask" else target
        flipped = (hard != old).float().mean()
        shape = soft.matrix(site.weight).shape
        soft.move(pattern.ungroup(new, shape), pattern.ungroup(hard, shape))
        return flipped

    def _looked_at(self, x: Tensor) -> Tensor | None:
        """Every n-th stored row of a tensor in its stored layout; None where all are looked at."""
        every = self.method.statistics_rows
        return None if every == 1 else x.flatten(0, -2)[::every]

    def _settle(self) -> None:
        """Look at what the last update reported. Raises NotFinite, naming the first site it could not do."""
        if self.reported is None:
            return
        numbers = self.reported.read()
        self.reported = None
        flips, middle, gap = numbers[::3], numbers[1::3], numbers[2::3]
        if any(math.isnan(share) for share in flips):
            bad = [site.name for site, share in zip(self._order, flips, strict=True) if math.isnan(share)]
            raise not_finite(f"site {bad[0]}")
        self.flip_rate = sum(flips) / len(flips)
        sizes = [site.weight.numel() for site in self._order]
        means = [sum(s * x for s, x in zip(sizes, values, strict=True)) / sum(sizes) for values in (middle, gap)]
        names = ("mask/mid_fraction", "mask/soft_hard_gap")
        self.seen = dict(zip(names, means, strict=True)) if all(map(math.isfinite, means)) else None

    @torch.no_grad()
    def _compensate(self, how: Compensation) -> None:
        """Before the projection: kept weights become those whose outputs are closest to what the view still gives.

        Block after block, so that each sees what the blocks before it put out then.
        """
        batches = self.around.calibration(how.samples, how.length)
        for block in stream_blocks(self.around.model, self.sites, batches):
            grams = Grams(block, block.sites)
            for site in block.sites:
                soft, weight = site.mask, site.weight.detach()
                hard, target = soft.matrix(soft.hard), soft.matrix(weight * soft.view)
                found = compensate(target, hard, grams.of(site), damping=how.damping)
                soft.matrix(weight).copy_(torch.where(hard, found, soft.matrix(weight)))
                site.mask.set_view(0.0)

    def _set_views(self, step: int, sites: list[Site]) -> None:
        """The forward sees m as soft as it is after `step`."""
        if not self.sharded:
            self._show(step, sites)
            return
        # Row norms need whole rows, and a stored row may be an input's; all else is elementwise.
        for site in (each_whole if self.method.rescale_rows else each_part)(sites):
            self._show(step, [site])

    def _show(self, step: int, sites: list[Site]) -> None:
        softness = self.phases.softness(step)
        if self.method.mask_storage == "int16":
            set_softness([site.mask for site in sites], softness)
            return
        for site in sites:
            dense = site.weight.detach() if self.method.rescale_rows else None
            site.mask.set_view(softness, hard=self.method.quench_view, keep_norm_of=dense)

    def _start_branches(self, when: Literal["quench", "first-mask"]) -> None:
        if self.slorb is not None and self.slorb.begin == when:
            for site in each_whole(self.sites):
                site.mask.start_branch(site.weight)

    @torch.no_grad()
    def freeze_site(self, site: Site) -> None:
        if self.method.rescale_rows:
            site.mask.set_view(0.0, keep_norm_of=site.weight.detach())
        site.mask.freeze(site.weight, site.pattern, site.name, rows_rescaled=self.method.rescale_rows)

    def _statistic(self, site: Site) -> Tensor | None:
        """What the criterion observes of a site, as `[..., out, in]`."""
        if self.curvature is not None:
            return site.matrix(gathered_whole(self.curvature.of(site)))
        return self.norms.get(site.name)

    def _scores(self, site: Site, statistic: Tensor | None) -> Tensor:
        """s of a site as `[..., out, in]`: curvature and weight in, importance out."""
        looked = None
        if self.known is not None:
            looked = self.known[self.places[site.name], :1].to(site.weight.dtype)  # the mean itself
        elif self.curvature is not None and statistic is not None:
            looked = self._looked_at(site.matrix(statistic))
        return self.method.criterion.score(site.matrix(site.weight.detach()), statistic, looked=looked)

    def anneal_point(self, step: int) -> AnnealPoint:
        """The annealed constants of an update after `step` (line 13)."""
        m, progress = self.method, self.phases.progress(step)
        temperature = m.temperature.at(progress)
        if m.cooling is not None:
            done = max(0, self.phases.updates(step) - 1)
            temperature = max(m.temperature.at(1.0), m.temperature.at(0.0) * m.cooling**done)
        return AnnealPoint(
            temperature=temperature,
            structure_mix=m.structure_mix.at(progress),
            mid_push=m.mid_push.at(progress),
            mask_rate=m.mask_rate.at(progress),
        )

    def freeze(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._settle()
        super().freeze(optimizer)

    def summary(self) -> dict[str, float]:
        self._settle()
        at = self.anneal_point(self.step)
        known = self.seen is not None and not self.frozen
        masks = {**self.seen, "mask/flip_rate": self.flip_rate} if known and self.seen else super().summary()
        return {
            **masks,
            "anneal/temperature": at.temperature,
            "anneal/structure_mix": at.structure_mix,
            "anneal/softness": self.phases.softness(self.step),
        }

    def state(self) -> dict[str, Tensor]:
        self._settle()
        state = {**super().state(), "step": torch.tensor(self.step)}
        state.update({f"norms/{name}": value for name, value in self.norms.items()})
        if self.method.statistics_of == "last-update":  # there from the first step on, so that every reader asks for it
            state["known"] = self._unknown().fill_(math.nan) if self.known is None else self.known
        if self.curvature is not None:
            state.update({f"curvature/{name}": value for name, value in self.curvature.state().items()})
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.step = int(state["step"])
        if self.method.statistics_of == "last-update":
            known = state["known"].to(self.sites[0].weight.device)
            self.known = None if bool(known.isnan().all()) else known
        for name in self.norms:
            self.norms[name].copy_(state[f"norms/{name}"])
        if self.curvature is not None:
            prefix = "curvature/"
            self.curvature.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


__all__ = ["MaskTrack", "Phases", "SparseForge", "SparseForgeTrack"]
