"""The sites whose masks the fused kernels move, and what these need of each: kept for as long as nothing has moved.

Asking a site whether the kernels cover it, and for its tensors, takes the host longer than the device needs for its
update; so does starting kernel after kernel. Both are done once: while every tensor is the very same and lies where it
lay, the last update's answers hold, and its launches are started by one call (`fused.Updater`). A tensor that is made
for each update, such as scores, a mean over ranks or a gathered shard, is never the same, and nothing is kept of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from sparseforge_core.models.sites import Site
from sparseforge_core.sparsity.fused import Entry, Updater, Way, update_masks


class Together:
    """Fused updates of a track's sites."""

    def __init__(
        self,
        refusal: Callable[[Site], str | None],
        kept: Callable[[Site], tuple[Tensor | None, float]],
        entry: Callable[[Site, tuple[Tensor | None, float]], Entry],
        *,
        updater: Updater | None = None,
    ) -> None:
        """
        Args:
            refusal: why a site's update is not one for the kernels, or None.
            kept: the statistic of a site as it is kept, if that is what the kernels are given, and its factor.
            entry: a site as the kernels see it, from what `kept` said of it.
            updater: what updates entries that have not moved.
        """
        self._refusal, self._kept, self._entry = refusal, kept, entry
        self.updater = updater or Updater()
        self._of_sites, self._of_statistics = _Places(), _Places()
        self._split: tuple[list[Site], list[Site]] = ([], [])
        self._entries: list[Entry] | None = None

    def forget(self) -> None:
        """Let go of all that is kept: sites that are frozen need no update, and their masks' memory is wanted."""
        self.updater.forget()
        self._of_sites, self._of_statistics = _Places(), _Places()
        self._split, self._entries = ([], []), None

    def split(self, sites: list[Site]) -> tuple[list[Site], list[Site]]:
        """(the sites that the kernels cover, all others), each in the order of `sites`."""
        parts: list[Tensor] = []
        for site in sites:
            parts.append(site.weight)
            parts += [part for part in site.mask._parameters.values() if part is not None]
        if not self._of_sites.hold(parts):
            refused = [self._refusal(site) is not None for site in sites]
            covered = [site for site, no in zip(sites, refused, strict=True) if not no]
            self._split = covered, [site for site, no in zip(sites, refused, strict=True) if no]
            self._entries = None
        return self._split

    def update(
        self, sites: list[Site], way: Way, *, known: Tensor | None = None, gathered: Tensor | None = None
    ) -> Tensor:
        """`fused.update_masks` of the sites that `split` has just found covered; the next one overwrites the report."""
        statistics = [self._kept(site) for site in sites]
        kept = [statistic for statistic, _ in statistics if statistic is not None]
        same = self._of_statistics.hold(kept) and self._of_sites.held
        if not same:
            self._entries = None
        elif self._entries is not None:
            for entry, (_, scale) in zip(self._entries, statistics, strict=True):
                entry.scale = scale
        entries = self._entries
        if entries is None:
            entries = [self._entry(site, statistic) for site, statistic in zip(sites, statistics, strict=True)]
        if not same or any(entry.scores is not None for entry in entries):
            return update_masks(entries, way, known=known, gathered=gathered)
        self._entries = entries
        return self.updater(entries, way, known=known, gathered=gathered)


class _Places:
    """Where some tensors lay when they were last asked about; it keeps none of them in memory."""

    def __init__(self) -> None:
        self._seen: list[weakref.ref[Tensor]] = []
        self._addresses: list[int] = []
        self.held = False
        """The last answer of `hold`."""

    def hold(self, tensors: list[Tensor]) -> bool:
        """Whether these are the tensors of the last question, each where it was."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        self.held = addresses == self._addresses and all(
            ref() is tensor for ref, tensor in zip(self._seen, tensors, strict=True)
        )
        if not self.held:
            self._seen, self._addresses = [weakref.ref(tensor) for tensor in tensors], addresses
        return self.held
