"""Magnitude pruning, one-shot: keep the largest |W| of each group; and the track of methods that select anew."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor

from sparseforge_core.distributed import part
from sparseforge_core.errors import PatternViolation
from sparseforge_core.methods.base import MaskedTrack, MaskTrack, Method, MethodCard, Surroundings
from sparseforge_core.methods.shards import batched, each_part, each_whole
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.blocks import blocks_of
from sparseforge_core.sparsity.patterns import Pattern, all_finite, keep_top
from sparseforge_core.specs import spec


@spec("magnitude")
class MagnitudePruning(Method):
    """No data, no training."""

    trains: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard("the classic baseline; Han et al., arXiv 1506.02626", "one-shot")

    def start(self, around: Surroundings) -> MaskTrack:
        track = MaskedTrack(around, by_block=True)
        for sites in blocks_of(track.sites):
            with track.masked(sites):
                for site in sites:
                    track.harden(site, site.weight.detach().abs())
        return track


class MagnitudeTrack(MaskedTrack):
    """A track whose hard masks are those of the largest |W|, each time that it selects."""

    @torch.no_grad()
    def select(self) -> None:
        """Re-select every hard mask; what the forward sees is left as it is."""
        if self.sharded:  # one site at a time is whole
            counts = []
            for site in each_whole(self.sites):
                counts.append(self.harden(site, site.weight.detach().abs()))
                site.mask.mask.copy_(site.mask.hard)
            self.count_flips(torch.stack(counts))
            return
        found: dict[str, Tensor] = {}
        for sites in _alike(self.sites):
            for batch in batched(sites, lambda site: site.weight.numel()):
                found |= zip((site.name for site in batch), self._select(batch).unbind(), strict=True)
        self.count_flips(torch.stack([found[site.name] for site in self.sites]))

    def _select(self, sites: list[Site]) -> Tensor:
        """Re-select hard masks of one pattern and size of groups; how many entries of each flipped.

        Together: a model has hundreds of small matrices, and a device is asked once whether all scores are finite.
        """
        pattern = sites[0].pattern
        sizes = torch._foreach_abs([site.weight.detach() for site in sites])
        grouped = [pattern.groups(site.matrix(size)) for site, size in zip(sites, sizes, strict=True)]
        before = [pattern.groups(site.matrix(site.mask.hard)) for site in sites]
        size = grouped[0].shape[-1]
        try:
            keep = keep_top(_rows(grouped), pattern.keep_of(size))
        except PatternViolation as error:
            where = next((site.name for site, x in zip(sites, grouped, strict=True) if not all_finite(x)), "unknown")
            raise PatternViolation(f"site {where}: {error}") from error
        ends = [*itertools.accumulate(x.numel() // size for x in grouped)]
        flips = (keep != _rows(before)).sum(-1).cumsum(0)
        parts = [
            pattern.ungroup(rows.view(x.shape), site.matrix(site.weight).shape)
            for site, rows, x in zip(sites, keep.tensor_split(ends[:-1]), grouped, strict=True)
        ]
        torch._foreach_copy_([site.matrix(site.mask.hard) for site in sites], parts)
        torch._foreach_copy_([site.matrix(site.mask.mask) for site in sites], parts)
        return torch.stack([flips[end - 1] for end in ends]).diff(prepend=flips.new_zeros(1))

    @torch.no_grad()
    def show(self) -> None:
        """Let the forward see the hard masks."""
        if self.sharded:
            for site in each_part(self.sites):
                site.mask.set_view(0.0)
        else:
            torch._foreach_copy_([site.mask.view for site in self.sites], [site.mask.hard for site in self.sites])


def _alike(sites: list[Site]) -> list[list[Site]]:
    """Sites by their pattern and the size of its groups."""
    found: dict[tuple[Pattern, int], list[Site]] = {}
    for site in sites:
        size = site.pattern.groups(site.matrix(site.mask.hard)).shape[-1]
        found.setdefault((site.pattern, size), []).append(site)
    return [*found.values()]


def _rows(grouped: list[Tensor]) -> Tensor:
    """All groups under one another, `[groups, size]`."""
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in grouped])


def pruned(sites: list[Site]) -> list[Tensor]:
    """(1 - m) W of what this rank holds of each site, m the hard mask that `select` left."""
    weights = [part(site.weight.detach()) for site in sites]
    return [*torch._foreach_sub(weights, torch._foreach_mul(weights, [part(site.mask.mask) for site in sites]))]
