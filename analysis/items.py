"""Outcomes of single items as arrays: what the paired tests compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sparseforge_core.store.outcomes import NONE, SMALL, expand

Array = np.ndarray[Any, np.dtype[np.float64]]
Key = tuple[str, str, str]
"""Cell key, stage, metric."""


@dataclass(frozen=True)
class Items:
    """What every item of one row's metric gave at every seed.

    `strata` holds one array `[seeds, items]` for each task: a mean over tasks weighs its tasks alike, however many
    items they have. Two rows pair item by item where their identities are equal.
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


class Bank:
    """Packed outcomes by (cell, stage, metric), unpacked once and only when asked for."""

    def __init__(self, packed: Mapping[Key, tuple[str, bytes]]) -> None:
        self._packed = packed
        self._known: dict[Key, tuple[str, Array] | None] = {}

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
            small = np.frombuffer(data, np.uint8)
            return None if (small == NONE).any() else (identity, small.astype(np.float64))
        values: Array = np.frombuffer(data, "<f8").astype(np.float64)
        return None if np.isnan(values).any() else (identity, values)


def stack(bank: Bank, strata: list[list[Key]]) -> Items | None:
    """Items of a row: for each stratum the keys of its seeds. None unless all are there and every seed had the same."""
    arrays, identities = [], []
    for keys in strata:
        found = [bank.get(key) for key in keys]
        known = [one for one in found if one is not None]
        if not known or len(known) < len(found) or len({identity for identity, _ in known}) > 1:
            return None
        arrays.append(np.stack([values for _, values in known]))
        identities.append(known[0][0])
    return Items(tuple(arrays), tuple(identities)) if arrays else None
