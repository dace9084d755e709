"""What a method is: a frozen spec that starts a mask track, and the track's six moments in the training loop."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseforge_core.distributed import any_sharded, part, sums_over_ranks
from sparseforge_core.errors import PatternViolation
from sparseforge_core.methods.shards import whole
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.curvature import Batch
from sparseforge_core.recorded import Capture
from sparseforge_core.sparsity.arriving import Arriving
from sparseforge_core.sparsity.masking import Branch, Storage
from sparseforge_core.sparsity.patterns import Pattern, check_weight
from sparseforge_core.sparsity.report import mask_histogram, mask_summary
from sparseforge_core.sparsity.slorb import SLoRB


@dataclass(frozen=True, kw_only=True)
class Solved:
    """All that a one-shot method decides about a model, by site name; tensors in the stored layout."""

    masks: dict[str, Tensor]
    """Keep masks, bool."""
    weights: dict[str, Tensor]
    """Weights, pruned entries included; empty where the method moves none."""
    patterns: dict[str, Pattern]
    """Of each site: some methods share densities out."""
    findings: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a method is given to start with."""

    model: nn.Module
    sites: list[Site]
    """Those that are to be masked, each with its pattern."""
    slorb: SLoRB | None
    steps: int
    """Optimizer steps that will follow; 0 for one-shot methods."""
    calibration: Callable[[int, int], list[Tensor]]
    """(number of sequences, length) -> batches of token ids, from the recipe's corpus and the cell's seed."""
    device: torch.device | None = None
    """Where one-shot methods compute, a block at a time; None computes where the model is."""
    seed: int = 0
    """The cell's seed: what a method draws at random is a function of it and the step."""
    solutions: Callable[[Method, Callable[[], Solved]], Solved] | None = None
    """(one-shot method, how to run it here) -> what it decides on this very model, pattern, text and seed: kept from
    before, or made and kept. None where nobody keeps solutions."""
    passing: bool = False
    """Whether masks may go as soon as their block is pruned: nothing trains on them and no branch restores anything."""


class MaskTrack:
    """A method's running state. The base class masks nothing and never changes."""

    def __init__(self, around: Surroundings) -> None:
        self.sites = around.sites
        self.steps = around.steps

    def placed(self) -> None:
        """The model's parameters have given way to their shards: whatever was kept of the old ones is made anew.

        Called once, before the first step and before any checkpoint is restored.
        """

    def record(self, capture: Capture) -> None:
        """Steps are recorded: what the track itself does in each may be recorded too, by `capture`.

        Called before the first step, and after a checkpoint was restored.
        """

    def optimizer(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """The update rule of everything that trains, given as groups with their weight decay: AdamW, or the method's.

        A group may carry `rate_scale`, a factor on the plan's learning rate. What a rule keeps for a parameter in
        its `state` is checkpointed with it.
        """
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def observe(self, batch: Batch) -> None:
        """After backward: the step's gradients and its batch may be looked at, and nothing changed."""

    def before_update(self, step: int) -> None:
        """Before clipping and the optimizer's update: gradients may be changed."""

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After the weights moved: the masks may move."""

    def finish(self) -> dict[str, Branch]:
        """Make the model exactly sparse, take the masks off; returns side branches by site name."""
        return {}

    def findings(self) -> dict[str, float]:
        """What is worth storing with the cell's result about how its masks were found, by metric."""
        return {}

    def summary(self) -> dict[str, float]:
        """A few scalars for the journal; cheap enough for every logged step."""
        return {}

    def histograms(self) -> dict[str, list[int]]:
        """Mask values by kind of site, counted in `report.HISTOGRAM_EDGES`."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beyond the model's parameters."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up `state()`, after the model's parameters were restored."""


class MaskedTrack(MaskTrack):
    """A track whose sites all carry masks; subclasses decide when these move."""

    def __init__(self, around: Surroundings, storage: Storage = "float32", *, by_block: bool = False) -> None:
        """`by_block` says that whoever decides the masks does so inside `masked`, a block at a time."""
        super().__init__(around)
        self.frozen = False
        self._flip_rate = 0.0
        self._flips: tuple[Arriving, list[int]] | None = None
        self.passing = by_block and around.passing
        if not self.passing:
            for site in self.sites:
                site.attach(around.slorb, storage)

    @contextlib.contextmanager
    def masked(self, sites: list[Site]) -> Iterator[None]:
        """The sites of a block carry masks inside; where masks pass, they come here and the weights leave pruned.

        So a large model needs the masks of one block, which are larger than its weights, and not those of all.
        """
        if not self.passing:
            yield
            return
        for site in sites:
            site.attach(None)
        yield
        for site in sites:
            self.freeze_site(site)
            self._squash(site)

    @property
    def flip_rate(self) -> float:
        """Share of the hard masks' entries that flipped when they last moved, a mean over sites."""
        if self._flips is not None:
            counts, sizes = self._flips
            self.flip_rate = sum(n / of for n, of in zip(counts.read(), sizes, strict=True)) / len(sizes)
        return self._flip_rate

    @flip_rate.setter
    def flip_rate(self, share: float) -> None:
        self._flip_rate, self._flips = share, None

    def count_flips(self, counts: Tensor) -> None:
        """Say how many entries of each site's hard mask flipped; the host reads it when it is asked, and not before."""
        self._flips = Arriving(counts.double()), [site.weight.numel() for site in self.sites]

    @property
    def sharded(self) -> bool:
        """Whether this rank holds but a part of each mask."""
        # Asked of the weight, beside whose shards those of the mask lie: a packed mask would be unpacked to answer.
        return any_sharded(site.weight for site in self.sites)

    def freeze(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Project: fix every hard mask, zero pruned weights and their optimizer moments."""
        for site in self.sites:
            with whole(site):
                self.freeze_site(site)
            if optimizer is not None:
                for moment in optimizer.state.get(site.weight, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == site.weight.shape:
                        moment.mul_(site.mask.hard)
        self.frozen = True

    def freeze_site(self, site: Site) -> None:
        """Project one site."""
        site.mask.freeze(site.weight, site.pattern, site.name)

    def finish(self) -> dict[str, Branch]:
        if self.passing:
            return {}
        if not self.frozen:
            self.freeze(None)
        branches = {site.name: self._squash(site) for site in self.sites}
        return {name: branch for name, branch in branches.items() if branch is not None}

    def _squash(self, site: Site) -> Branch | None:
        """Take a site's mask off and check what is left."""
        branch = site.squash()
        check_weight(site.matrix(site.weight.detach()), site.pattern, site.name)
        return branch

    def findings(self) -> dict[str, float]:
        densities = [site.pattern.density for site in self.sites]
        if len(set(densities)) < 2:
            return {}
        kept = sum(site.pattern.density * site.weight.numel() for site in self.sites)
        total = sum(site.weight.numel() for site in self.sites)
        return {"density": kept / total, "density_least": min(densities), "density_most": max(densities)}

    def summary(self) -> dict[str, float]:
        if self.frozen:  # m is the hard mask then: nothing to look at, in every site at every logged step
            return {**mask_summary([]), "mask/flip_rate": self.flip_rate}
        pairs = ((part(site.mask.mask), part(site.mask.hard)) for site in self.sites)
        return {**self.over_parts(mask_summary(pairs)), "mask/flip_rate": self.flip_rate}

    def over_parts(self, shares: dict[str, float]) -> dict[str, float]:
        """Shares of all entries of the masks, from each rank's of the entries that it holds (collective if sharded)."""
        if not self.sharded:
            return shares
        held = float(sum(part(site.mask.mask).numel() for site in self.sites))
        *sums, total = sums_over_ranks([*(share * held for share in shares.values()), held])
        return {name: summed / max(total, 1.0) for name, summed in zip(shares, sums, strict=True)}

    def histograms(self) -> dict[str, list[int]]:
        groups = sorted({site.group for site in self.sites})
        found = {
            f"mask/{group}": mask_histogram(part(site.mask.mask) for site in self.sites if site.group == group)
            for group in groups
        }
        if not self.sharded:
            return found
        return {
            name: [int(count) for count in sums_over_ranks([*map(float, counts)])] for name, counts in found.items()
        }

    def harden(self, site: Site, scores: Tensor) -> Tensor:
        """Re-select the site's hard mask by `scores` (stored layout); how many entries flipped, on the device."""
        before = site.mask.hard.clone()
        try:
            site.mask.harden(scores, site.pattern)
        except PatternViolation as error:
            raise PatternViolation(f"site {site.name}: {error}") from error
        return (before != site.mask.hard).sum()

    def state(self) -> dict[str, Tensor]:
        on = all(site.mask.branch_on for site in self.sites)
        flips = torch.tensor(self.flip_rate, dtype=torch.float64)
        return {"frozen": torch.tensor(self.frozen), "branch_on": torch.tensor(on), "flip_rate": flips}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.frozen = bool(state["frozen"])
        self.flip_rate = float(state.get("flip_rate", 0.0))  # checkpoints of before it was shown to the bit lack it
        for site in self.sites:
            site.mask.frozen = self.frozen
            site.mask.branch_on = bool(state["branch_on"])


@dataclass(frozen=True)
class MethodCard:
    """What a listing says about a method."""

    source: str
    stage: Literal["dense", "one-shot", "retraining"] = field(default="retraining")


class Method(ABC):
    """Spec of how a mask comes to be. `start` returns the running state that the training loop drives."""

    kind: ClassVar[str]
    """Set by `@spec`."""
    sparsifies: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = True
    """Whether it is the model's weights that train, where something does."""
    branches: ClassVar[bool] = True
    """Whether a side branch (the recipe's `slorb`) can be trained beside it."""
    card: ClassVar[MethodCard]

    @property
    def reads_moments(self) -> bool:
        """Whether it looks at the optimizer's second moments, and so needs them as they are."""
        return False

    def calibrates(self) -> bool:
        """Whether it passes calibration text through the model: what it then decides is worth keeping."""
        return False

    def moves_weights(self) -> bool:
        """Whether a one-shot method changes the weights that it keeps."""
        return False

    def begins_from(self) -> Method | None:
        """The one-shot method from whose solution it starts, if any."""
        return None

    def unshardable(self) -> str | None:
        """Why its state cannot be sharded with the weights, or None where it can. A method that says nothing cannot."""
        return "it reads weights or masks as a whole where only shards are"

    @abstractmethod
    def start(self, around: Surroundings) -> MaskTrack:
        """Attach masks (one-shot methods also decide them) and return the track."""
