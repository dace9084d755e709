"""What a one-shot method makes of a model, for methods that start from it; found once where solutions are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseforge_core.methods.base import MaskedTrack, Method, Solved, Surroundings


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
    track = one_shot_track(method, replace(around, slorb=None, passing=False))
    found = {site.name: Solution(site.mask.hard.detach().clone(), site.weight.detach().clone()) for site in track.sites}
    track.finish()
    for site in around.sites:
        site.weight.copy_(dense[site.name])
    return found


def one_shot_track(method: Method, around: Surroundings) -> MaskedTrack:
    """`method.start` with masks that stay, or a track at the very state in which an equal start left one before.

    `around.solutions` says whether there is one: the method runs where there is none, or nobody keeps them.
    """
    if around.solutions is None or not method.calibrates():
        return _started(method, around)
    made: list[MaskedTrack] = []

    def make() -> Solved:
        made.append(_started(method, around))
        return _solved(method, made[0])

    solved = around.solutions(method, make)
    return made[0] if made else SolvedTrack(around, solved)


class SolvedTrack(MaskedTrack):
    """Masks and weights as a one-shot method left them some time before."""

    @torch.no_grad()
    def __init__(self, around: Surroundings, solved: Solved) -> None:
        for site in around.sites:
            site.chosen = solved.patterns[site.name]
        super().__init__(around)
        self.solved = solved
        for site in self.sites:
            site.mask.hard.copy_(solved.masks[site.name])
            site.mask.set_view(0.0)
            if site.name in solved.weights:
                site.weight.copy_(solved.weights[site.name])

    def findings(self) -> dict[str, float]:
        return dict(self.solved.findings)


def _started(method: Method, around: Surroundings) -> MaskedTrack:
    track = method.start(around)
    assert isinstance(track, MaskedTrack), "one-shot methods mask their sites"
    return track


def _solved(method: Method, track: MaskedTrack) -> Solved:
    """The state of a track that has just started, on the CPU."""
    return Solved(
        masks={site.name: site.mask.hard.detach().cpu() for site in track.sites},
        weights={site.name: site.weight.detach().cpu() for site in track.sites} if method.moves_weights() else {},
        patterns={site.name: site.pattern for site in track.sites},
        findings=track.findings(),
    )
