"""What a one-shot method makes of a model, for methods that start from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseforge_core.methods.base import MaskedTrack, Method, Surroundings


@dataclass(frozen=True)
class Solution:
    """One site as a one-shot method left it, both in the weight's stored layout."""

    hard: Tensor
    """Keep mask, bool."""
    weight: Tensor
    """The weight, pruned entries included."""


@torch.no_grad()
def one_shot_solution(method: Method, around: Surroundings) -> dict[str, Solution]:
    """Masks and weights that a one-shot method finds, by site name; the model is left dense, as it was."""
    dense = {site.name: site.weight.detach().clone() for site in around.sites}
    track = method.start(replace(around, slorb=None, passing=False))
    assert isinstance(track, MaskedTrack), "one-shot methods mask their sites"
    found = {site.name: Solution(site.mask.hard.detach().clone(), site.weight.detach().clone()) for site in track.sites}
    track.finish()
    for site in around.sites:
        site.weight.copy_(dense[site.name])
    return found
