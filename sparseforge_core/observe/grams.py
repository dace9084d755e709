"""Second moments of the inputs of every site of a block: the Hessian of its layer-wise reconstruction error."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from sparseforge_core.errors import CurvatureUnavailable, NotFinite
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.blocks import Block


class Grams:
    """Sum of x x^T over all tokens of each site, float32 `[..., in, in]`; sites that receive one tensor share it."""

    def __init__(self, block: Block, sites: list[Site]) -> None:
        self.sites = sites
        self.device = block.device
        self.owner: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        self._seen: list[tuple[str, weakref.ref[Tensor], int]] = []
        block.observe(self._see, sites)
        self._seen.clear()
        self._check()

    def of(self, site: Site) -> Tensor:
        """The sum of a site; shared with others, so not to be changed."""
        return self.sums[self.owner[site.name]]

    def _see(self, site: Site, expert: int | None, x: Tensor) -> None:
        if site.name not in self.owner:
            self.owner[site.name] = self._owner(x) or site.name if expert is None else site.name
        if self.owner[site.name] != site.name:
            return
        if expert is None and site.name not in self.sums:
            self._seen.append((site.name, weakref.ref(x), x._version))
        if site.name not in self.sums:
            *lead, _, inputs = site.matrix(site.weight).shape
            self.sums[site.name] = torch.zeros((*lead, inputs, inputs), device=self.device)
        flat = x.reshape(-1, x.shape[-1]).float()
        total = self.sums[site.name] if expert is None else self.sums[site.name][expert]
        total.addmm_(flat.T, flat)

    def _owner(self, x: Tensor) -> str | None:
        """The site that received this very tensor, not changed since, in the forward that runs."""
        return next((name for name, seen, version in self._seen if seen() is x and version == x._version), None)

    def _check(self) -> None:
        """Raises CurvatureUnavailable naming a site, or an expert of one, without finite inputs."""
        for site in self.sites:
            if site.name not in self.owner:
                raise CurvatureUnavailable(f"site {site.name}: its module saw no calibration input")
            total = self.of(site)
            energy = total.diagonal(dim1=-2, dim2=-1).sum(-1)
            if not bool(torch.isfinite(total).all()):
                raise NotFinite(f"site {site.name}: calibration inputs are not finite")
            blind = torch.nonzero(energy.reshape(-1) == 0).flatten().tolist()
            if blind:
                which = f"expert {blind[0]} of {energy.numel()}" if energy.numel() > 1 else "its module"
                raise CurvatureUnavailable(
                    f"site {site.name}: {which} saw no calibration input; give it more calibration samples"
                )


def in_order(block: Block) -> list[list[Site]]:
    """The block's sites by the order in which they run; those that receive the very same tensor belong together."""
    groups: list[list[Site]] = []
    last: list[Tensor] = []

    def see(site: Site, expert: int | None, x: Tensor) -> None:
        if any(site is known for group in groups for known in group):
            return
        if last and last[0] is x:
            groups[-1].append(site)
        else:
            groups.append([site])
        last[:] = [x]

    block.observe(see, batches=1)
    missing = [site.name for site in block.sites if not any(site is known for group in groups for known in group)]
    if missing:
        raise CurvatureUnavailable(f"site {missing[0]}: its module saw no calibration input")
    return groups
