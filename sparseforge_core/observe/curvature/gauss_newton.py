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
    no_gradient,
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
    """Averages of both factors: E[x_j^2], `[1, in]`, and E[d_i^2], `[out, 1]`, by site name and '|in' or '|out'."""

    def __init__(self, sites: list[Site], seed: int, spec: KFACDiagonal) -> None:
        self.seed = seed
        super().__init__(sites, spec.decay, spec.every)

    def zeros(self) -> dict[str, Tensor]:
        found = {}
        for site in self.sites:
            outputs, inputs = site.matrix(site.weight).shape
            for key, shape in (("in", (1, inputs)), ("out", (outputs, 1))):
                zero = torch.zeros(shape, device=site.weight.device, dtype=site.weight.dtype)
                found[f"{site.name}|{key}"] = zero
        return found

    def look(self, batch: Batch) -> dict[str, Tensor]:
        found = {key: torch.zeros_like(zero) for key, zero in self.average.items()}
        for piece, place, share in batch.pieces():
            with (
                _watched(self.sites) as calls,
                batch.autocast(),
            ):  # not the backward: checkpointed blocks run again there
                loss, tokens = sampled_loss(batch, piece, place, self)
            self._add(found, calls, loss, share, tokens)
        return found

    def _add(self, found: dict[str, Tensor], calls: _Calls, loss: Tensor, share: float, tokens: int) -> None:
        """Add this piece's moments. Of a mean loss, d_t is `tokens` times smaller than the token's own gradient."""
        reached = [(s.name, x, z) for s in self.sites for x, z in calls[s.name] if z.requires_grad]
        slopes = torch.autograd.grad(loss, [z for _, _, z in reached], allow_unused=True) if reached else ()
        seen = {name: sum(x.shape[0] for x, _ in calls[name]) for name in calls}
        answered = set()
        for (name, x, _), slope in zip(reached, slopes, strict=True):
            if slope is not None:
                answered.add(name)
                inputs, outputs = found[f"{name}|in"], found[f"{name}|out"]
                d = slope.reshape(-1, slope.shape[-1]).to(outputs.dtype)
                inputs.add_(x.to(inputs.dtype).square().sum(0, keepdim=True), alpha=share / seen[name])
                outputs.add_(d.square().sum(0).unsqueeze(-1), alpha=share * tokens)
        blind = [site.name for site in self.sites if site.name not in answered]
        if blind:
            raise no_gradient(blind, self.sites)

    def of(self, site: Site) -> Tensor:
        outer = self.mean(site, f"{site.name}|out") * self.mean(site, f"{site.name}|in")
        return checked(laid_out_like(site.matrix(outer), site.weight), site)


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
