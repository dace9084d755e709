"""The running state of SparseForge: masks that anneal while the weights train (algorithm 1 from line 7 on)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparseforge_core.distributed import is_sharded
from sparseforge_core.distributed import whole as gathered_whole
from sparseforge_core.methods.base import MaskedTrack, Surroundings
from sparseforge_core.methods.one_shot import Solution, one_shot_solution
from sparseforge_core.methods.phases import Phases
from sparseforge_core.methods.shards import each_part, each_whole, whole
from sparseforge_core.methods.together import Together
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.activations import input_norms
from sparseforge_core.observe.blocks import stream_blocks
from sparseforge_core.observe.curvature import Batch, Estimate
from sparseforge_core.observe.grams import Grams
from sparseforge_core.observe.input_gram import inverse_gram_diagonals
from sparseforge_core.sparsity.arriving import Arriving
from sparseforge_core.sparsity.compensation import Compensation, compensate
from sparseforge_core.sparsity.criteria import HessianOBD, Magnitude, not_finite, observed, standardize
from sparseforge_core.sparsity.fused import Entry, Way, refusal
from sparseforge_core.sparsity.gate import AnnealPoint, hard_target, project, update_mask
from sparseforge_core.sparsity.masking import set_softness

if TYPE_CHECKING:
    from sparseforge_core.methods.sparseforge import SparseForge


class SparseForgeTrack(MaskedTrack):
    """The mask's own track: equations (3)-(5) at each update, the view that hardens, the projection."""

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
        self.together = Together(self._refusal, self._kept, self._entry)
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
        if self.sharded:
            # One site at a time is whole, and what is done to it is what is done to all of them on one rank.
            for site in self.sites:
                with whole(site):
                    reports += self._update_sites([site], way, step, gathered)
        else:
            reports += self._update_sites(self.sites, way, step, gathered)
        self.known = gathered
        self.reported = Arriving(reports[0] if len(reports) == 1 else torch.cat(reports))
        if first:
            self._start_branches("first-mask")

    def _unknown(self) -> Tensor:
        """Room for what is known of each site."""
        return torch.zeros(len(self.sites), 3, dtype=torch.float64, device=self.sites[0].weight.device)

    def _update_sites(self, sites: list[Site], way: Way, step: int, gathered: Tensor | None) -> list[Tensor]:
        """Lines 8-13 for some sites, by the fused kernels where these can; what is to be read of them later."""
        together, alone = self.together.split(sites)
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
        if gathered is None:
            return self.together.update(sites, way)
        everything = len(sites) == len(self.sites)
        places = [self.places[site.name] for site in sites]
        known = self.known if self.known is None or everything else self.known[places]
        found = gathered if everything else gathered[places]
        report = self.together.update(sites, way, known=known, gathered=found)
        if self.curvature is not None and not isinstance(self.method.criterion, HessianOBD):
            for i, site in enumerate(sites):  # the kernels were given scores, and no curvature
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

    def _kept(self, site: Site) -> tuple[Tensor | None, float]:
        """The curvature that the fused kernels are given, and what it is to be multiplied by."""
        if self.curvature is None or not isinstance(self.method.criterion, HessianOBD):
            return None, 1.0
        statistic, scale = self.curvature.kept(site)
        return gathered_whole(statistic) if is_sharded(statistic) else statistic, scale

    def _entry(self, site: Site, kept: tuple[Tensor | None, float] | None = None) -> Entry:
        """The site for the fused kernels: with its statistic as `kept` (asked for unless given), or with scores."""
        known: dict[str, Any] = {"weight": site.weight.detach(), "soft": site.mask, "pattern": site.pattern}
        statistic, scale = kept or self._kept(site)
        if statistic is not None or isinstance(self.method.criterion, Magnitude):
            return Entry(**known, statistic=statistic, scale=scale)
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
        self.together.forget()
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
