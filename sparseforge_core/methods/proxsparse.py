"""ProxSparse: learn a 2:4 mask by proximal steps on a regulariser that is zero exactly at 2:4 (arXiv 2502.00258).

For a group of four, Reg(w) = sum over its four triples of |w_i||w_j||w_k|: zero if and only if at most two entries are
not. The masked weights follow the loss, each step ends in the regulariser's proximal map, and in the end only the mask
is kept: the model is its original weights under it. An optional anchor,
lambda_2 ||W (W - W0) / (W0 + eps sgn W0)||^2, is zero for every entry that is 0 or its original value.

One choice of ours: the paper tunes lambda_1 for each model; here `strength` is in units of each tensor's root mean
square, so that one value means the same for large and small weights.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor

from sparseforge_core.errors import RecipeError
from sparseforge_core.methods.base import Method, MethodCard, Surroundings
from sparseforge_core.methods.magnitude import MagnitudeTrack
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.specs import spec


@spec("proxsparse")
class ProxSparse(Method):
    """A mask learned by regularisation on the recipe's text; 2:4 only, no weight is updated in the end."""

    strength: float = 10.0
    """lambda_1 times the tensor's root mean square; each step applies it times the learning rate."""
    anchor: float = 0.0
    """lambda_2: pull of every entry to 0 or its original value."""
    anchor_eps: float = 1e-4
    """eps of the anchor."""

    branches: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("Liu et al., arXiv 2502.00258", "retraining")

    def __post_init__(self) -> None:
        if self.strength <= 0 or self.anchor < 0 or self.anchor_eps <= 0:
            raise RecipeError(
                f"strength={self.strength}, anchor={self.anchor}, anchor_eps={self.anchor_eps}: needs strength > 0, "
                "anchor >= 0, anchor_eps > 0"
            )

    def start(self, around: Surroundings) -> ProxSparseTrack:
        return ProxSparseTrack(self, around)


TRIPLES = tuple(itertools.combinations(range(4), 3))


def regulariser(groups: Tensor) -> Tensor:
    """Reg of each group `[..., 4]`."""
    size = groups.abs()
    return torch.stack([size[..., list(triple)].prod(-1) for triple in TRIPLES]).sum(0)


def proximal(groups: Tensor, weight: Tensor | float, sweeps: int = 12) -> Tensor:
    """argmin_z 1/2 ||z - y||^2 + weight Reg(z) for each group y `[..., 4]`.

    A minimiser keeps the signs of y and leaves two, three or four entries: each of the three cases starts at the
    largest entries of |y| and is descended one coordinate at a time, z_i = max(y_i - weight sum_pairs z_j z_k, 0), the
    exact minimiser in that coordinate; the case with the lowest value is taken.
    """
    y = groups.abs()
    order = y.argsort(dim=-1, descending=True, stable=True)
    ranked = y.gather(-1, order)
    best = torch.zeros_like(ranked)
    best[..., :2] = ranked[..., :2]  # two entries: Reg is zero whatever they are
    value = 0.5 * ranked[..., 2:].square().sum(-1)
    for count in (3, 4):
        z = _descend(ranked, count, weight, sweeps)
        cost = 0.5 * (z - ranked).square().sum(-1) + weight * regulariser(z)
        better = cost < value
        best = torch.where(better.unsqueeze(-1), z, best)
        value = torch.where(better, cost, value)
    return torch.zeros_like(y).scatter_(-1, order, best) * groups.sign()


def _descend(ranked: Tensor, count: int, weight: Tensor | float, sweeps: int) -> Tensor:
    """Coordinate descent over the first `count` of the ranked entries, the others at zero."""
    y = ranked.unbind(-1)
    z = [entry if i < count else torch.zeros_like(entry) for i, entry in enumerate(y)]
    for _ in range(sweeps):
        for i in range(count):
            a, b, c = (z[j] for j in range(4) if j != i)
            z[i] = (y[i] - weight * (a * b + b * c + c * a)).clamp_min(0.0)
    return torch.stack(z, dim=-1)


class ProxSparseTrack(MagnitudeTrack):
    """Dense forwards; a proximal map after each update of the masked weights, the only ones that train."""

    def __init__(self, method: ProxSparse, around: Surroundings) -> None:
        for site in around.sites:
            if site.pattern != nm(2, 4):
                raise RecipeError(
                    f"pattern {site.pattern.name}: ProxSparse's regulariser is for 2:4 (site {site.name})"
                )
        super().__init__(around)
        self.method = method
        self.originals = [site.weight.detach().clone() for site in self.sites]
        self.unit = [float(weight.square().mean().sqrt()) for weight in self.originals]
        ours = {id(site.weight) for site in self.sites}
        self.resting = [p for p in around.model.parameters() if p.requires_grad and id(p) not in ours]
        for parameter in self.resting:
            parameter.requires_grad_(False)
        self.select()

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        if self.method.anchor:
            for site, original in zip(self.sites, self.originals, strict=True):
                assert site.weight.grad is not None, "masked weights train"
                site.weight.grad += self.method.anchor * self._anchor_gradient(site.weight, original)

    def _anchor_gradient(self, weight: Tensor, original: Tensor) -> Tensor:
        """Of (w (w - w0) / d)^2, d = w0 + eps sgn(w0); zero where w0 is zero, which is its own 2:4."""
        d = original + self.method.anchor_eps * original.sign()
        share = torch.where(d == 0, torch.zeros_like(d), 1.0 / d)
        return 2.0 * weight * (weight - original) * share * (2.0 * weight - original) * share

    @torch.no_grad()
    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        rate = next(
            float(g["lr"]) for g in optimizer.param_groups if any(p is self.sites[0].weight for p in g["params"])
        )
        for site, unit in zip(self.sites, self.unit, strict=True):
            matrix = site.matrix(site.weight)
            near = proximal(site.pattern.groups(matrix), rate * self.method.strength / unit)
            matrix.copy_(site.pattern.ungroup(near, matrix.shape))
        self.select()

    @torch.no_grad()
    def finish(self) -> dict[str, Branch]:
        if not self.frozen:
            for site, original in zip(self.sites, self.originals, strict=True):
                site.weight.copy_(original)
            for parameter in self.resting:
                parameter.requires_grad_(True)
        return super().finish()

    def summary(self) -> dict[str, float]:
        """With the share of groups that are 2:4 already."""
        groups = [site.pattern.groups(site.matrix(site.weight.detach())) for site in self.sites]
        done = sum(int(((group != 0).sum(-1) <= 2).sum()) for group in groups)
        return {**super().summary(), "mask/settled": done / sum(group[..., 0].numel() for group in groups)}
