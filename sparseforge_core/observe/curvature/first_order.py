"""Curvature from gradients that one backward gives: squares of them stand in for second derivatives.

Thanks to the straight-through backward, a site's gradient *is* the gradient in its effective weight, so an entry whose
mask is near 0 is still seen and can return. No second derivative: attention stays fused, sharding is safe.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparseforge_core.distributed import itself, laid_out_like, mean_over_ranks
from sparseforge_core.errors import CurvatureUnavailable, RecipeError
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.curvature.base import (
    Batch,
    Curvature,
    CurvatureAverage,
    Estimate,
    check_pace,
    checked,
    no_gradient,
    refuse_blind,
)
from sparseforge_core.observe.curvature.effective import effective_weights, gradients, taken
from sparseforge_core.sparsity.fused import average_square, average_squares, averages_together
from sparseforge_core.specs import spec


@spec("fisher")
class Fisher(Curvature):
    """diag(H) ~ E[g * g], averaged with decay `decay` per observed gradient (section 4.1's EMA, Fisher's estimate).

    g is the gradient of the whole batch, which the step has at hand: free, but it contains the square of the mean
    gradient, so far from an optimum it overstates H ("Fishers for free?", arXiv 2507.18807).
    """

    decay: float = 0.98
    storage: Literal["float32", "bfloat16"] = "float32"
    """How the average is kept; it is added to in float32 either way."""

    looks_again: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_pace(self.decay, 1)

    def start(self, sites: list[Site], seed: int = 0) -> CurvatureAverage:
        return _BatchSquares(sites, self.decay, torch.bfloat16 if self.storage == "bfloat16" else None)


class _BatchSquares(CurvatureAverage):
    """Squares of the gradients that the step's backward left."""

    def __init__(self, sites: list[Site], decay: float, kept_as: torch.dtype | None) -> None:
        self.kept_as = kept_as
        self.weights = {site.name: site.weight for site in sites}  # found once: a step has no time to look for hundreds
        super().__init__(sites, decay)

    def zeros(self) -> dict[str, Tensor]:
        return {name: zeros.to(self.kept_as or zeros.dtype) for name, zeros in super().zeros().items()}

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        pairs = [(self.average[name], weight.grad) for name, weight in self.weights.items() if weight.grad is not None]
        if len(pairs) < len(self.sites):
            raise no_gradient([name for name, weight in self.weights.items() if weight.grad is None], self.sites)
        if all(averages_together(average, gradient) for average, gradient in pairs):
            average_squares(pairs, self.decay)
        else:
            for average, gradient in pairs:
                average_square(average, gradient, self.decay)
        self.count += 1

    def kept(self, site: Site) -> tuple[Tensor, float]:
        self._refuse_nothing_seen(site)
        return mean_over_ranks(self.average[site.name]), 1.0 / (1.0 - self.decay**self.count)

    def look(self, batch: Batch) -> dict[str, Tensor]:
        return {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}


@spec("micro-batch-fisher")
class MicroBatchFisher(Curvature):
    """diag(H) ~ mean over micro-batches of g_b * g_b, each of `sequences` sequences, before anything is accumulated.

    The empirical Fisher of algorithms I1 and section 5.3, step 4; WoodFisher's diagonal (arXiv 2004.14340). The
    micro-batch is a field of its own, not the one the steps happen to use: how a run is placed must not change it.
    Costs one more forward and backward of the batch at each observed step.
    """

    sequences: int = 1
    """Sequences in each squared gradient, all in memory at once."""
    every: int = 10
    """Steps between observations."""
    decay: float = 0.98
    """Of the moving average, per observation."""

    def __post_init__(self) -> None:
        check_pace(self.decay, self.every)
        if self.sequences < 1:
            raise RecipeError(f"sequences={self.sequences}: must be at least 1")

    def start(self, sites: list[Site], seed: int = 0) -> CurvatureAverage:
        return _MicroBatchSquares(sites, self.decay, self.every, self.sequences)


class PieceSquares(CurvatureAverage):
    """Mean over pieces of the batch of a multiple of the squared gradient of the piece's loss.

    Being a mean over sequences, it is the same on one rank and on many. Of sharded weights, one full gradient of all
    sites exists at a time.
    """

    def __init__(self, sites: list[Site], decay: float, every: int, sequences: int) -> None:
        super().__init__(sites, decay, every)
        self.sequences = sequences

    @abstractmethod
    def scaled_loss(self, batch: Batch, piece: Tensor, place: int) -> tuple[Tensor, int]:
        """The loss of `piece`, whose first sequence has this place in the batch, and the square's factor."""

    def look(self, batch: Batch) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        reached: set[str] = set()
        for piece, place, share in batch.pieces(self.sequences):
            with effective_weights(self.sites) as weights:
                with batch.autocast():
                    loss, factor = self.scaled_loss(batch, piece, place)
                found = gradients(loss, weights, self.sites)
            reached |= found.keys()
            for site in self.sites:
                square = laid_out_like(taken(found, site).square().mul_(share * factor), site.weight)
                sums[site.name] = sums[site.name].add_(square) if site.name in sums else square
        refuse_blind(self.sites, reached)
        return sums


class _MicroBatchSquares(PieceSquares):
    def scaled_loss(self, batch: Batch, piece: Tensor, place: int) -> tuple[Tensor, int]:
        return batch.loss(piece, place), 1


@spec("adam-second-moment")
class AdamSecondMoment(Curvature):
    """diag(H) ~ v_hat, Adam's own average of squared gradients, bias-corrected by its own step ("Fishers for free?").

    No state and no cost. Its decay is the optimizer's beta_2, and its gradients are those after clipping.
    """

    looks_again: ClassVar[bool] = False

    def start(self, sites: list[Site], seed: int = 0) -> Estimate:
        return _SecondMoment(sites)


class _SecondMoment(Estimate):
    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = 1

    def observe(self, batch: Batch) -> None:
        self.optimizer, self.steps = batch.optimizer, batch.step

    @torch.no_grad()
    def kept(self, site: Site) -> tuple[Tensor, float]:
        moment, group, _ = self._moment(site)
        # Not Adam's own count, which lies on the device: a factor common to all entries is lost in standardising.
        return moment, 1.0 / (1.0 - group["betas"][1] ** self.steps)

    @torch.no_grad()
    def of(self, site: Site) -> Tensor:
        moment, group, step = self._moment(site)
        correction = 1.0 - group["betas"][1] ** float(step)
        return checked(moment / correction, site)

    def _moment(self, site: Site) -> tuple[Tensor, dict[str, Any], Tensor]:
        weight = itself(site.weight)
        state = self.optimizer.state.get(weight, {}) if self.optimizer is not None else {}
        if self.optimizer is None or "exp_avg_sq" not in state:
            raise CurvatureUnavailable(
                f"site {site.name}: the optimizer keeps no second moment of it (exp_avg_sq); AdamSecondMoment needs an "
                "Adam that has taken a step on every site"
            )
        group = next(g for g in self.optimizer.param_groups if any(p is weight for p in g["params"]))
        return state["exp_avg_sq"], group, state["step"]

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing: the optimizer's state is in the checkpoint already."""
