"""Outcomes of single items as arrays: what the paired tests compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sparseforge_core.store.outcomes import NONE, SMALL, expand

Array = np.ndarray[Any, np.dtype[Any]]
Key = tuple[str, str, str]
"""Cell key, stage, metric."""
Strata = tuple[tuple[Key, ...], ...]
"""For each task the keys of its seeds."""


@dataclass(frozen=True)
class Items:
    """What every item of one row's metric gave at every seed.

    `strata` holds one array `[seeds, items]` for each task, of bytes for answers (0 wrong, 1 right) and of doubles for
    anything else: a mean over tasks weighs its tasks alike, however many items they have. Two rows pair item by item
    where their identities are equal.
    """

    strata: tuple[Array, ...]
    identity: tuple[str, ...]

    @property
    def seeds(self) -> int:
        """How many seeds are in."""
        return int(self.strata[0].shape[0])

    @property
    def n(self) -> int:
        """Items of one seed, over all strata."""
        return sum(int(part.shape[1]) for part in self.strata)

    @cached_property
    def by_seed(self) -> Array:
        """The mean of each seed: `[seeds]`."""
        return np.mean([part.mean(axis=1) for part in self.strata], axis=0)

    @cached_property
    def variance(self) -> float:
        """Between seeds, of which there must be two."""
        return float(self.by_seed.var(ddof=1))

    @cached_property
    def by_item(self) -> tuple[Array, ...]:
        """The mean over seeds of each item, by stratum: `[items]`."""
        return tuple(part.mean(axis=0) for part in self.strata)


class Bank:
    """Packed outcomes by (cell, stage, metric), unpacked once and only when asked for."""

    def __init__(self, packed: Mapping[Key, tuple[str, bytes]]) -> None:
        self._packed = packed
        self._known: dict[Key, tuple[str, Array] | None] = {}
        self._stacked: dict[Strata, Items | None] = {}

    def get(self, key: Key) -> tuple[str, Array] | None:
        """(identity, outcomes `[items]`); None if the store has none, or an item has no answer."""
        if key not in self._known:
            self._known[key] = self._unpacked(key)
        return self._known[key]

    def _unpacked(self, key: Key) -> tuple[str, Array] | None:
        if key not in self._packed:
            return None
        identity, body = self._packed[key]
        kind, data = expand(body)
        if kind == SMALL:
            return None if NONE in data else (identity, np.frombuffer(data, np.uint8))
        values: Array = np.frombuffer(data, "<f8").astype(np.float64)
        return None if np.isnan(values).any() else (identity, values)

    def stack(self, strata: Strata) -> Items | None:
        """Items of a row; None unless all are there and every seed had the same. Rows of the same cells share them."""
        if strata not in self._stacked:
            self._stacked[strata] = self._stack(strata)
        return self._stacked[strata]

    def _stack(self, strata: Strata) -> Items | None:
        arrays, identities = [], []
        for keys in strata:
            found = [self.get(key) for key in keys]
            known = [one for one in found if one is not None]
            if not known or len(known) < len(found) or len({identity for identity, _ in known}) > 1:
                return None
            arrays.append(np.array([values for _, values in known]))
            identities.append(known[0][0])
        return Items(tuple(arrays), tuple(identities)) if arrays else None
