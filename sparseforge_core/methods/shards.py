"""Sites whose weights are sharded, made ordinary for a moment.

Masks are decided by what a whole matrix says: its mean and deviation, its rows, groups and blocks, in either storage
order. So a mask update gathers one site at a time on every rank, decides as a single process does, and keeps its own
shard of the result: no shard boundary can cut a group, and all ranks agree to the bit. What is elementwise works on
the shards where they are. Sites that are not sharded pass through untouched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparseforge_core.distributed import is_sharded, part, put_back, stands_for
from sparseforge_core.distributed import whole as gathered
from sparseforge_core.models.sites import Site

Holder = tuple[nn.Module, str]
"""A module and the name of a parameter of its own."""


MOST = 2**27
"""Entries that are worked on together: what that takes beside them, a few times their size, is to stay small."""

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in order, as many at a time as hold MOST entries together, and at least one."""
    batch: list[Item] = []
    held = 0
    for item in items:
        if batch and held + size(item) > MOST:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += size(item)
    if batch:
        yield batch


def each_whole(sites: Iterable[Site]) -> Iterator[Site]:
    """The sites one by one, each with its weight, mask and branch whole, in plain tensors; changes are kept.

    Collective: every rank must ask for the same sites. Gradients are out of reach meanwhile; what is kept of a weight
    elsewhere is kept under `distributed.itself(weight)`, in shards.
    """
    for site in sites:
        with whole(site):
            yield site


def each_part(sites: Iterable[Site]) -> Iterator[Site]:
    """The sites one by one, each with what this rank holds of it in plain tensors, gradients included; in place."""
    for site in sites:
        if not is_sharded(site.weight):
            yield site
            continue
        with _instead(site, _as_part):
            yield site


@contextlib.contextmanager
def whole(site: Site) -> Iterator[None]:
    """Within: everything of the site is whole. Collective; the memory of one full site is needed."""
    if not is_sharded(site.weight):
        yield
        return
    with _instead(site, _as_whole) as pairs:
        yield
        with torch.no_grad():
            for made, sharded in pairs:
                put_back(made, sharded)


@contextlib.contextmanager
def _instead(site: Site, make: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[list[tuple[Tensor, nn.Parameter]]]:
    """Within: other parameters in the places of the site's sharded ones; gives (made, sharded) pairs."""
    kept = [(module, name, module._parameters[name]) for module, name in _holders(site)]
    pairs: list[tuple[Tensor, nn.Parameter]] = []
    try:
        for module, name, sharded in kept:
            assert sharded is not None
            module._parameters[name] = made = make(sharded)
            pairs.append((made, sharded))
        yield pairs
    finally:
        for module, name, sharded in kept:
            module._parameters[name] = sharded


def _holders(site: Site) -> list[Holder]:
    behind = site.module.parametrizations[site.parameter]  # type: ignore[index,union-attr]
    places: list[Holder] = [(behind, "original")]  # type: ignore[list-item]
    places += [(module, name) for module in site.mask.modules() for name in module._parameters]
    return [(m, name) for m, name in places if m._parameters[name] is not None and is_sharded(m._parameters[name])]  # type: ignore[arg-type]


def _as_whole(sharded: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(gathered(sharded.detach()), requires_grad=sharded.requires_grad)
    stands_for(made, sharded)
    return made


def _as_part(sharded: nn.Parameter) -> nn.Parameter:
    mine = nn.Parameter(part(sharded.detach()), requires_grad=sharded.requires_grad)
    if sharded.grad is not None:
        mine.grad = part(sharded.grad)
    return mine
