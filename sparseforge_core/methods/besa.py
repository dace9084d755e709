"""BESA: each block learns how much each of its layers may lose, then prunes by a one-shot score (arXiv 2402.16880).

A site's pruning rate is a mixture of candidates p_d = d / D with learned weights beta = softmax(theta): alpha =
sum beta_d p_d. An entry whose score ranks at the share r of its row is pruned by every candidate with p_d > r, so with
probability P = sum_{p_d > r} beta_d; it goes if P >= alpha, and gradients pass straight through to P. Block after
block, theta minimises ||F(W, X) - F(W * M, X)||^2 / ||F(W, X)||^2 + penalty (rate of the block - target)^2 on the
outputs of the pruned blocks before. Then the block's rates become patterns that meet the recipe's density exactly as
`sparsity/allocation.py` says: any density for unstructured recipes, mixed N:M for N:M ones.

The rates here are one a site (the paper's layer-wise form), and the error is taken relative to the output, so that one
penalty serves blocks of any scale.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import MaskedTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.owl import share_out
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.blocks import Block, stream_blocks
from sparseforge_core.sparsity.criteria import Magnitude, WandaScore
from sparseforge_core.specs import spec


@spec("besa")
class BESA(Method):
    """Block-wise learned sparsity allocation over Wanda's or magnitude's scores."""

    scores: Literal["wanda", "magnitude"] = "wanda"
    """What ranks the entries of a row."""
    candidates: int = 100
    """D: pruning rates that are mixed."""
    epochs: int = 1
    """Passes over the calibration text for each block."""
    rate: float = 1e-2
    """Adam's learning rate of theta."""
    penalty: float = 8.0
    """Weight of the squared distance of the block's pruning rate from its target."""
    samples: int = 128
    """Calibration sequences."""
    length: int = 2048
    """Tokens per calibration sequence; cut to what the model and the corpus allow by the loader."""

    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("Xu et al., arXiv 2402.16880", "one-shot")

    def __post_init__(self) -> None:
        for name, least in (("candidates", 2), ("epochs", 1), ("samples", 1), ("length", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.rate <= 0 or self.penalty < 0:
            raise RecipeError(f"rate={self.rate}, penalty={self.penalty}: needs rate > 0, penalty >= 0")

    def calibrates(self) -> bool:
        return True

    def start(self, around: Surroundings) -> MaskedTrack:
        track = MaskedTrack(around, by_block=True)
        batches = around.calibration(self.samples, self.length)
        for block in stream_blocks(around.model, track.sites, batches, device=around.device):
            scores = self._scores(block)
            with track.masked(block.sites):
                rates = learned_rates(self, block, scores)
                share_out(block.sites, {site.name: 1.0 - rate - site.pattern.density for site, rate in rates})
                for site in block.sites:
                    track.harden(site, site.matrix(scores[site.name]))
                    site.mask.set_view(0.0)
        return track

    @torch.no_grad()
    def _scores(self, block: Block) -> dict[str, Tensor]:
        """Importance of each entry of each site, `[..., out, in]`."""
        weights = {site.name: site.matrix(site.weight.detach()) for site in block.sites}
        if self.scores == "magnitude":
            return {name: Magnitude().score(weight, None) for name, weight in weights.items()}
        norms = block.input_norms()
        return {name: WandaScore().score(weight, norms[name]) for name, weight in weights.items()}


class LearnedRate(nn.Module):
    """The effective weight of a site under its present pruning rate; gradients reach theta `[candidates]`."""

    def __init__(self, site: Site, scores: Tensor, candidates: int) -> None:
        super().__init__()
        self.site = site
        order = scores.argsort(dim=-1).argsort(dim=-1)  # 0 for the least important entry of its row
        # The candidates that prune an entry are those from its place on: p_d > r, as d > r D.
        self.place = order * candidates // scores.shape[-1]
        p = torch.arange(1, candidates + 1, device=scores.device) / candidates
        self.rates = p
        target = 1.0 - site.pattern.density
        # A narrow bell at the recipe's rate, so that learning starts from equal rates.
        self.theta = nn.Parameter(-((p - target) / 0.1).square())

    def alpha(self) -> Tensor:
        """The mixture's pruning rate."""
        return (torch.softmax(self.theta, 0) * self.rates).sum()

    def mask(self) -> Tensor:
        """1 for entries that stay, `[..., out, in]`; backward as if it were 1 - P."""
        beta = torch.softmax(self.theta, 0)
        pruned = beta.flip(0).cumsum(0).flip(0)[self.place]
        hard = (pruned < self.alpha()).to(pruned.dtype)
        return hard + (pruned.detach() - pruned)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.site.matrix(self.mask())


def learned_rates(method: BESA, block: Block, scores: dict[str, Tensor]) -> list[tuple[Site, float]]:
    """The pruning rate that each site of a block learns."""
    laws = [LearnedRate(site, scores[site.name], method.candidates) for site in block.sites]
    sizes = torch.tensor([float(site.weight.numel()) for site in block.sites], device=block.device)
    densities = torch.tensor([site.pattern.density for site in block.sites], device=block.device)
    shares = sizes / sizes.sum()
    target = 1.0 - float((shares * densities).sum())
    optimizer = torch.optim.Adam([law.theta for law in laws], lr=method.rate)
    for _ in range(method.epochs):
        for batch, hidden in enumerate(block.inputs()):
            with torch.no_grad():
                wanted = block.call(batch, hidden)
            for site, law in zip(block.sites, laws, strict=True):
                site.mask.law = law
            try:
                found = block.call(batch, hidden)
                error = (found - wanted).float().square().sum() / wanted.float().square().sum()
                pruned = (shares * torch.stack([law.alpha() for law in laws])).sum()
                loss = error + method.penalty * (pruned - target).square()
                _step(optimizer, loss, laws)
            finally:
                for site in block.sites:
                    site.mask.law = None
    return [(site, float(law.alpha().detach())) for site, law in zip(block.sites, laws, strict=True)]


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, laws: list[LearnedRate]) -> None:
    """One update of the thetas alone: the block's weights get no gradient."""
    thetas: list[Any] = [law.theta for law in laws]
    for theta, gradient in zip(thetas, torch.autograd.grad(loss, thetas), strict=True):
        theta.grad = gradient
    optimizer.step()
