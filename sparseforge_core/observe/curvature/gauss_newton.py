"""Curvature from labels that the model draws itself: the diagonal of the generalised Gauss-Newton matrix (GGN).

With labels sampled from the model's own distribution, the expected square of a token's gradient is its GGN diagonal
(Bartlett's identity), which is never negative and needs no second derivative.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseforge_core.distributed import finite_everywhere, laid_out_like
from sparseforge_core.errors import CurvatureUnavailable, RecipeError
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.curvature.base import (
    Batch,
    Curvature,
    CurvatureAverage,
    check_pace,
    checked,
    generator,
    named,
    refuse_blind,
)
from sparseforge_core.observe.curvature.first_order import PieceSquares
from sparseforge_core.specs import spec


@spec("gauss-newton-bartlett")
class GaussNewtonBartlett(Curvature):
    """diag(GGN) = E[B g * g]: B sampled tokens, g the gradient of their mean cross-entropy (Sophia, arXiv 2305.14342).

    The cross terms of different tokens vanish in expectation, since each sampled token's gradient has mean zero. The
    matrix is that of the cross-entropy, whatever the recipe's objective is: a divergence at temperature 1 has the same.
    Costs one more forward and backward of the batch at each observed step.
    """

    sequences: int = 1
    """Sequences in each squared gradient; fewer give less noise for the same work, in smaller passes."""
    every: int = 10
    """Steps between observations."""
    decay: float = 0.98
    """Of the moving average, per observation."""

    def __post_init__(self) -> None:
        check_pace(self.decay, self.every)
        if self.sequences < 1:
            raise RecipeError(f"sequences={self.sequences}: must be at least 1")

    def start(self, sites: list[Site], seed: int = 0) -> CurvatureAverage:
        return _BartlettSquares(sites, seed, self)


class _BartlettSquares(PieceSquares):
    def __init__(self, sites: list[Site], seed: int, spec: GaussNewtonBartlett) -> None:
        super().__init__(sites, spec.decay, spec.every, spec.sequences)
        self.seed = seed

    def scaled_loss(self, batch: Batch, piece: Tensor, place: int) -> tuple[Tensor, int]:
        return sampled_loss(batch, piece, place, self)


@spec("kfac-diagonal")
class KFACDiagonal(Curvature):
    """diag(GGN)_ij ~ E[x_j^2] E[d_i^2]: input times output-gradient second moments (K-FAC, arXiv 1503.05671).

    Exact where inputs and output gradients are independent. Within a group of one output row the second factor cancels,
    so a score by it ranks like Wanda's; across rows and against other terms it does not. Its state is two vectors a
    site. Labels are sampled, as in GaussNewtonBartlett; costs one more forward and backward at each observed step.
    """

    every: int = 10
    """Steps between observations."""
    decay: float = 0.98
    """Of the moving averages of both factors, per observation."""

    def __post_init__(self) -> None:
        check_pace(self.decay, self.every)

    def start(self, sites: list[Site], seed: int = 0) -> CurvatureAverage:
        fused = [site.name for site in sites if site.weight.ndim != 2]
        if fused:
            raise CurvatureUnavailable(
                f"KFACDiagonal needs what goes into and out of each matrix, and {len(fused)} of {len(sites)} sites are "
                f"fused experts, whose products no module shows ({named(fused)}); use MicroBatchFisher or "
                "GaussNewtonBartlett"
            )
        return _Factors(sites, seed, self)


class _Factors(CurvatureAverage):
    """Averages by site name and what they are of: '|in' sum_t x_j^2 / T, `[1, in]`; '|out' sum_t d_i^2 / N, `[out, 1]`;
    '|seen' the share of the T tokens that the matrix received, which is 1 but for an expert's own matrix, `[1, 1]`.

    d_t is the gradient of the sum over the N predicted tokens. All three are means over sequences, so equal on any
    number of ranks; diag(GGN) is their in * out / seen.
    """

    def __init__(self, sites: list[Site], seed: int, spec: KFACDiagonal) -> None:
        self.seed = seed
        super().__init__(sites, spec.decay, spec.every)

    def zeros(self) -> dict[str, Tensor]:
        found = {}
        for site in self.sites:
            outputs, inputs = site.matrix(site.weight).shape
            for key, shape in (("in", (1, inputs)), ("out", (outputs, 1)), ("seen", (1, 1))):
                zero = torch.zeros(shape, device=site.weight.device, dtype=site.weight.dtype)
                found[f"{site.name}|{key}"] = zero
        return found

    def look(self, batch: Batch) -> dict[str, Tensor]:
        found = {key: torch.zeros_like(zero) for key, zero in self.average.items()}
        reached: set[str] = set()
        for piece, place, share in batch.pieces():
            # Watched in the forward only: checkpointed blocks run again in the backward.
            with _watched(self.sites) as calls, batch.autocast():
                loss, labels = sampled_loss(batch, piece, place, self)
            reached |= self._add(found, calls, loss, share / piece.numel(), share * labels)
        refuse_blind(self.sites, reached)
        return found

    def _add(
        self, found: dict[str, Tensor], calls: _Calls, loss: Tensor, per_token: float, per_slope: float
    ) -> set[str]:
        """Add a piece's sums to `found`; returns the names of the sites that its loss depends on.

        The slopes of a mean loss are N times smaller than those of the sum: their squares over N are `per_slope` times
        the squares at hand.
        """
        watched = [(s.name, x, z) for s in self.sites for x, z in calls[s.name] if z.requires_grad]
        slopes = torch.autograd.grad(loss, [z for _, _, z in watched], allow_unused=True) if watched else ()
        reached = set()
        for (name, x, _), slope in zip(watched, slopes, strict=True):
            if slope is not None:
                reached.add(name)
                inputs, outputs, seen = (found[f"{name}|{key}"] for key in ("in", "out", "seen"))
                d = slope.reshape(-1, slope.shape[-1]).to(outputs.dtype)
                inputs.add_(x.to(inputs.dtype).square().sum(0, keepdim=True), alpha=per_token)
                outputs.add_(d.square().sum(0).unsqueeze(-1), alpha=per_slope)
                seen.add_(x.shape[0] * per_token)
        return reached

    def of(self, site: Site) -> Tensor:
        inputs, outputs, seen = (self.mean(site, f"{site.name}|{key}") for key in ("in", "out", "seen"))
        return checked(laid_out_like(site.matrix(outputs * (inputs / seen)), site.weight), site)


_Calls = dict[str, list[tuple[Tensor, Tensor]]]
"""By site: (input `[tokens, in]` without its graph, output `[..., out]` with it) of each call of its module."""


@contextlib.contextmanager
def _watched(sites: list[Site]) -> Iterator[_Calls]:
    calls: _Calls = {site.name: [] for site in sites}

    def tap(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            calls[name].append((x.detach().reshape(-1, x.shape[-1]), output))

        return hook

    handles = [site.module.register_forward_hook(tap(site.name), with_kwargs=True) for site in sites]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def sampled_loss(batch: Batch, piece: Tensor, place: int, asking: _BartlettSquares | _Factors) -> tuple[Tensor, int]:
    """Mean cross-entropy of `piece` with labels drawn from the model's distribution, and their number.

    Each sequence's labels are a function of (seed, step, its place in the batch), however the batch is cut. Raises
    CurvatureUnavailable where there is no distribution to draw from.
    """
    logits = batch.predictions(piece)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not all(finite_everywhere([logits.detach()])):
        raise CurvatureUnavailable(
            f"step {batch.step}: the logits are not finite, so no labels can be drawn for the curvature of "
            f"{len(asking.sites)} sites ({named(s.name for s in asking.sites)}); none of it was kept"
        )
    labels = []
    for number, sequence in enumerate(logits.detach(), start=place):
        source = generator(logits.device, asking.seed, batch.step, "labels", number)
        labels.append(torch.multinomial(sequence.softmax(-1), 1, generator=source).squeeze(-1))
    drawn = torch.cat(labels)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), drawn), drawn.numel()
