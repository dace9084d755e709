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
from sparseforge_core.sparsity.patterns import Pattern

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

    def solve_together(
        self, weights: list[Tensor], prepared: Prepared, sites: list[Site]
    ) -> list[tuple[Tensor, Tensor]]:
        """`solve` of the weights of several sites that share inputs and pattern."""
        return [self.solve(weight, prepared, site) for weight, site in zip(weights, sites, strict=True)]

    @torch.no_grad()
    def _prune(self, sites: list[Site], grams: Grams) -> None:
        for gram, sharing in _by_input(sites, grams):
            prepared = [self.prepare(h * (2.0 / self.samples), sharing[0]) for h in _each(gram)]
            for alike in _by_pattern(sharing):
                matrices = [_each(site.matrix(site.weight)) for site in alike]
                masks = [_each(site.matrix(site.mask.hard)) for site in alike]
                for index, ready in enumerate(prepared):  # of the experts of a stack each has its own
                    found = self.solve_together([matrix[index] for matrix in matrices], ready, alike)
                    for matrix, mask, (new, keep) in zip(matrices, masks, found, strict=True):
                        matrix[index].copy_(new)
                        mask[index].copy_(keep)
                for site in alike:
                    site.mask.set_view(0.0)


def _by_input(sites: list[Site], grams: Grams) -> list[tuple[Tensor, list[Site]]]:
    """Each sum of x x^T with the sites whose inputs are in it."""
    found: dict[int, tuple[Tensor, list[Site]]] = {}
    for site in sites:
        gram = grams.of(site)
        found.setdefault(id(gram), (gram, []))[1].append(site)
    return list(found.values())


def _by_pattern(sites: list[Site]) -> list[list[Site]]:
    found: dict[Pattern, list[Site]] = {}
    for site in sites:
        found.setdefault(site.pattern, []).append(site)
    return list(found.values())


def _each(x: Tensor) -> list[Tensor]:
    """A matrix, or the matrices of a stack of experts, as views."""
    return [x] if x.ndim == 2 else list(x)
