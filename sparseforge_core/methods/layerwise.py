"""One-shot methods that treat each layer as a least-squares problem in its inputs, and update what they keep."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparseforge_core.methods.base import MaskedTrack, Surroundings
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.blocks import stream_blocks
from sparseforge_core.observe.grams import Grams, in_order

Prepared = TypeVar("Prepared")


class LayerwiseTrack(MaskedTrack, Generic[Prepared]):
    """Prunes block after block, each on the outputs of the pruned blocks before it; holds masks and updated weights."""

    def __init__(self, around: Surroundings, *, samples: int, length: int, true_sequential: bool) -> None:
        super().__init__(around, by_block=True)
        self.samples = samples
        batches = around.calibration(samples, length)
        for block in stream_blocks(around.model, self.sites, batches, device=around.device):
            with self.masked(block.sites):
                for group in in_order(block) if true_sequential else [block.sites]:
                    self._prune(group, Grams(block, group))

    @abstractmethod
    def prepare(self, hessian: Tensor, site: Site) -> Prepared:
        """What every weight with these inputs needs of H = (2/n) sum x x^T, `[in, in]`; done once for all of them."""

    @abstractmethod
    def solve(self, weight: Tensor, prepared: Prepared, site: Site) -> tuple[Tensor, Tensor]:
        """The pruned, updated weight `[out, in]` and its keep mask (bool)."""

    @torch.no_grad()
    def _prune(self, sites: list[Site], grams: Grams) -> None:
        shared: Tensor | None = None
        prepared: list[Prepared] = []
        for site in sites:
            gram = grams.of(site)
            if gram is not shared:
                shared = gram
                prepared = [self.prepare(h * (2.0 / self.samples), site) for h in _each(gram)]
            matrices, masks = _each(site.matrix(site.weight)), _each(site.matrix(site.mask.hard))
            for weight, mask, ready in zip(matrices, masks, prepared, strict=True):
                new, keep = self.solve(weight, ready, site)
                weight.copy_(new)
                mask.copy_(keep)
            site.mask.set_view(0.0)


def _each(x: Tensor) -> list[Tensor]:
    """A matrix, or the matrices of a stack of experts, as views."""
    return [x] if x.ndim == 2 else list(x)
