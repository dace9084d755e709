"""Curvature from Hessian-vector products: diag(H) = E[(H v) * v] over Rademacher v (paper, section 4.1).

Both estimators draw the same vectors. `Hutchinson` differentiates twice; `FiniteDifference` differences two ordinary
gradients, so that it keeps fused attention and sharding. Both work in the weights' own precision; the former, which
 takes no differences, with products in TF32 on a GPU.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparseforge_core.distributed import is_sharded, laid_out_like, mean_over_ranks, total
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
from sparseforge_core.observe.curvature.effective import effective_weights, gradients, taken
from sparseforge_core.specs import spec
from sparseforge_core.tf32 import products_in_tf32

Signs = Literal["before", "after", "mean"]
"""Where negative estimates become 0: each probe's before it is averaged, the final average, or each step's mean.

'before' biases H upwards where it is small or noisy, which no averaging removes; 'after' needs 8 probes or a long
average (App. B). H itself may be indefinite; scores need it non-negative.
"""

DOUBLE_BACKWARD_TOKENS = 2048
"""Tokens that are differentiated twice at once. The graph of a backward keeps eager attention's matrices several times
over: of a model of 135 M parameters, 16 sequences of 1,024 took 129 GiB, and 4 of them 57 GiB."""

Add = Callable[[int, Site, Tensor], None]


@spec("hutchinson")
class Hutchinson(Curvature):
    """diag(H) = E[(H v) * v] by double backward (paper, section 4.1). Attention is eager during its passes only.

    Per observed step it costs a forward and backward that keep their graph, and about two backwards a probe.
    """

    probes: int = 8
    """n: Rademacher vectors per observed step."""
    joint: bool = True
    """Whether a vector spans all sites (one product each), or one site at a time (less noise, a product a site)."""
    signs: Signs = "after"
    every: int = 10
    """Steps between observations."""
    decay: float = 0.98
    """Of the moving average, per observation."""

    shards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_pace(self.decay, self.every)
        if self.probes < 1:
            raise RecipeError(f"probes={self.probes}: must be at least 1")

    def start(self, sites: list[Site], seed: int = 0) -> CurvatureAverage:
        return _DoubleBackward(sites, seed, self)


@spec("finite-difference")
class FiniteDifference(Curvature):
    """(H v) * v with H v ~ (g(w + e v) - g(w - e v)) / 2 e: two ordinary backwards a probe.

    e is `eps` times the root mean square of all sites' weights. Exact on a quadratic, O(e^2) elsewhere. Not
    for ReLU networks (OPT): a kink that is crossed adds 1/e.
    """

    probes: int = 8
    """n: Rademacher vectors per observed step."""
    eps: float = 1e-2
    """Step relative to the weights."""
    signs: Signs = "after"
    every: int = 10
    """Steps between observations."""
    decay: float = 0.98
    """Of the moving average, per observation."""

    def __post_init__(self) -> None:
        check_pace(self.decay, self.every)
        if self.probes < 1:
            raise RecipeError(f"probes={self.probes}: must be at least 1")
        if not 0.0 < self.eps < 1.0:
            raise RecipeError(f"eps={self.eps}: must lie in (0, 1)")

    def start(self, sites: list[Site], seed: int = 0) -> CurvatureAverage:
        return _Differences(sites, seed, self)


class _Probed(CurvatureAverage):
    """Averages of (H v) * v, with the three treatments of signs."""

    def __init__(self, sites: list[Site], seed: int, spec: Hutchinson | FiniteDifference) -> None:
        super().__init__(sites, spec.decay, spec.every)
        self.seed = seed
        self.probes = spec.probes
        self.signs = spec.signs

    def at_once(self, batch: Batch) -> int | None:
        """Sequences of a batch that are differentiated together; None: as many as fit into memory."""
        return None

    @abstractmethod
    def products(self, batch: Batch, piece: Tensor, place: int, add: Add) -> set[str]:
        """Call `add(probe, site, (H v) * v)` for the loss of `piece`; returns the names of the sites it depends on."""

    def look(self, batch: Batch) -> dict[str, Tensor]:
        apart = self.probes if self.signs == "before" else 1
        sums: list[dict[str, Tensor]] = [{} for _ in range(apart)]
        reached: set[str] = set()
        for piece, place, share in batch.pieces(self.at_once(batch)):

            def add(probe: int, site: Site, product: Tensor, share: float = share) -> None:
                into = sums[probe % apart]
                part = laid_out_like(product.mul_(share / self.probes), site.weight)
                into[site.name] = into[site.name].add_(part) if site.name in into else part

            reached |= self.products(batch, piece, place, add)
        refuse_blind(self.sites, reached)
        if self.signs == "after":
            return sums[0]
        # Clamping is not linear: the ranks' parts of the batch must be averaged before it.
        return {name: sum_of(mean_over_ranks(s[name]).clamp_min(0.0) for s in sums) for name in sums[0]}

    def of(self, site: Site) -> Tensor:
        return checked(self.mean(site, site.name).clamp_min(0.0), site)

    def probe(self, batch: Batch, site: Site, number: int, like: Tensor) -> Tensor:
        """v: entries of +-1 in the shape of `like`, a function of (seed, step, site, number) alone."""
        source = generator(like.device, self.seed, batch.step, site.name, number)
        return torch.empty_like(like, requires_grad=False).bernoulli_(0.5, generator=source).mul_(2.0).sub_(1.0)


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """The sum of some tensors, in place of the first."""
    total = next(parts)
    for part in parts:
        total += part
    return total


class _DoubleBackward(_Probed):
    def __init__(self, sites: list[Site], seed: int, spec: Hutchinson) -> None:
        super().__init__(sites, seed, spec)
        self.joint = spec.joint

    def at_once(self, batch: Batch) -> int:
        bound = max(1, DOUBLE_BACKWARD_TOKENS // batch.tokens.shape[1])
        return bound if batch.micro_batch is None else min(bound, batch.micro_batch)

    def products(self, batch: Batch, piece: Tensor, place: int, add: Add) -> set[str]:
        sharded = [site.name for site in self.sites if is_sharded(site.weight)]
        if sharded:
            raise CurvatureUnavailable(
                f"Hutchinson differentiates twice, which sharded weights do not survive ({len(sharded)} sites: "
                f"{named(sharded)}); use FiniteDifference, which needs ordinary backwards only"
            )
        # Nothing is differenced here, as in `FiniteDifference`: a relative error of 1e-3 stays one.
        with (
            eager_attention(batch.model),
            effective_weights(self.sites) as weights,
            products_in_tf32(piece.device),
        ):
            slopes = gradients(batch.loss(piece, place), weights, self.sites, create_graph=True)
            sites = [site for site in self.sites if site.name in slopes]
            together = [sites] if self.joint else [[site] for site in sites]
            for number in range(self.probes if sites else 0):
                for chosen in together:
                    probes = {s.name: self.probe(batch, s, number, weights[s.name]) for s in chosen}
                    for site, product in zip(chosen, _times(slopes, probes, weights), strict=True):
                        add(number, site, product.mul_(probes[site.name]))
            return set(slopes)

    def look(self, batch: Batch) -> dict[str, Tensor]:
        found = super().look(batch)
        if batch.tokens.is_cuda:
            torch.cuda.empty_cache()  # far more than a step needs, and others may share the device
        return found


def _times(slopes: dict[str, Tensor], probes: dict[str, Tensor], weights: dict[str, Tensor]) -> list[Tensor]:
    """H v of the sites in `probes`, from gradients that kept their graph."""
    along = torch.stack([(slopes[name] * v).sum() for name, v in probes.items()]).sum()
    found: tuple[Tensor | None, ...] = (None,) * len(probes)
    if along.requires_grad:
        inputs = [weights[name] for name in probes]
        try:
            found = torch.autograd.grad(along, inputs, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise CurvatureUnavailable(
                f"the forward cannot be differentiated twice, so {len(probes)} sites have no curvature "
                f"({named(probes)}): {error}. Use FiniteDifference"
            ) from error
    blind = [name for name, product in zip(probes, found, strict=True) if product is None]
    if blind:
        raise CurvatureUnavailable(
            f"no second gradient for {len(blind)} of {len(probes)} sites ({named(blind)}); their curvature would stay "
            "zero. Something in the forward cannot be differentiated twice: use FiniteDifference"
        )
    # A copy: autograd may hand out the same tensor to two, and the caller multiplies in place.
    return [product.clone() for product in found if product is not None]


class _Differences(_Probed):
    def __init__(self, sites: list[Site], seed: int, spec: FiniteDifference) -> None:
        super().__init__(sites, seed, spec)
        self.eps = spec.eps

    def products(self, batch: Batch, piece: Tensor, place: int, add: Add) -> set[str]:
        step = self._step()
        reached: set[str] = set()
        for number in range(self.probes):
            up = self._slopes(batch, piece, place, number, step)
            down = self._slopes(batch, piece, place, number, -step)
            reached |= up.keys() | down.keys()
            for site in self.sites:
                difference = taken(up, site) - taken(down, site)
                v = self.probe(batch, site, number, difference)
                add(number, site, difference.mul_(v).div_(2.0 * step))
        return reached

    def _step(self) -> float:
        """e: one number for all sites, as v is one vector; steps of their own would inflate the noise between sites."""
        squares = sum(total(site.weight.detach().square()) for site in self.sites)
        step = self.eps * math.sqrt(squares / sum(site.weight.numel() for site in self.sites))
        if not 0.0 < step < math.inf:
            raise CurvatureUnavailable(
                f"the weights of {len(self.sites)} sites ({named(s.name for s in self.sites)}) have the root mean "
                f"square {step / self.eps}; no finite step relative to it exists"
            )
        return step

    def _slopes(self, batch: Batch, piece: Tensor, place: int, number: int, step: float) -> dict[str, Tensor]:
        """Gradients at the effective weights moved by `step` v."""

        def shift(site: Site, weight: Tensor) -> Tensor:
            return weight + self.probe(batch, site, number, weight).mul_(step)

        with effective_weights(self.sites, shift) as weights:
            return gradients(batch.loss(piece, place), weights, self.sites)


@contextlib.contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Within: attention as plain matrix products, since fused kernels have no second derivative."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before is None or before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
