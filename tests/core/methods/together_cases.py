"""Recorded mask updates of a running track against updates whose kernels are launched each time, to the bit.

TRITON_INTERPRET=1 python tests/core/methods/together_cases.py [schedules ...]
DEVICE=cuda python tests/core/methods/together_cases.py [schedules ...]
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from benchmarks.train import track_of
from sparseforge_core.methods import SparseForge, annealing
from sparseforge_core.methods.annealing import SparseForgeTrack
from sparseforge_core.observe.curvature import Batch
from sparseforge_core.presets import preset_named
from sparseforge_core.schedules import Constant
from sparseforge_core.sparsity import fused
from sparseforge_core.sparsity.criteria import Magnitude
from sparseforge_core.sparsity.fused import Updater, update_masks
from sparseforge_core.sparsity.patterns import nm
from tests.interpreted import run_cases

DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))
LEAN = dataclasses.replace(preset_named("lean").method, update_every=10)
SHAPES = [(16, 32), (16, 16)]


class Counted:
    """Records, and counts how often; without a GPU it is done again, with the tensors of the first time."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        replay = fused.on_gpu(work) if DEVICE.type == "cuda" else work

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


class Launched(Updater):
    """Records nothing."""

    def __call__(self, *given: Any, **named: Any) -> torch.Tensor:
        return update_masks(*given, **named)


class Pair:
    """Two tracks in one state: the first records its updates, the second launches each kernel each time."""

    def __init__(self, method: SparseForge, *, patterns: tuple[tuple[int, int], ...] = ((2, 4),)) -> None:
        self.recorder = Counted()
        self.tracks = [track_of(SHAPES, method, DEVICE) for _ in range(2)]
        self.tracks[0].together.updater = Updater(self.recorder)
        self.tracks[1].together.updater = Launched()
        for track in self.tracks:
            for i, site in enumerate(track.sites):
                site.chosen = nm(*patterns[i % len(patterns)])
        self.turn = 0

    def update(self, steps: range) -> None:
        """An update at each of the steps, of weights and curvature that have moved since the last."""
        for step in steps:
            self.turn += 1
            for track in self.tracks:
                torch.manual_seed(self.turn)
                self.move(track, step)
                track._update_masks(step)
            self.compare()

    @staticmethod
    def move(track: SparseForgeTrack, step: int) -> None:
        """What a training does between two updates: weights move in place, and a gradient is seen."""
        with torch.no_grad():
            for site in track.sites:
                site.weight.add_(torch.randn_like(site.weight), alpha=0.3)
                site.weight.grad = torch.randn_like(site.weight)
        unused: dict[str, Any] = {"tokens": torch.zeros(1, 1), "loss": None, "predictions": None}
        track.observe(Batch(step=step, model=None, optimizer=None, **unused))  # type: ignore[arg-type]

    def compare(self) -> None:
        """Masks, what is known for the next update, and what is reported: equal to the bit."""
        ours, theirs = self.tracks
        for one, other in zip(ours.sites, theirs.sites, strict=True):
            for a, b in zip(one.mask.stored(), other.mask.stored(), strict=True):
                assert torch.equal(a, b), one.name
        assert (ours.known is None) == (theirs.known is None)
        assert ours.known is None or torch.equal(ours.known, theirs.known)  # type: ignore[arg-type]
        assert ours.reported is not None
        assert theirs.reported is not None
        assert ours.reported.read() == theirs.reported.read()


def schedules() -> None:
    """Every preset's kind of state: one recording serves updates of all temperatures, mixes and scales."""
    for method in (
        LEAN,
        dataclasses.replace(LEAN, statistics_rows=1, statistics_of="last-update"),
        SparseForge(update_every=10),
        SparseForge(update_every=10, criterion=Magnitude()),
    ):
        pair = Pair(method)
        before = [site.mask.hard.clone() for site in pair.tracks[0].sites]
        pair.update(range(10, 6000, 1200))
        # The first two go by launches: entries are kept from the second on, and what is recorded has run before.
        assert (pair.recorder.recordings, pair.recorder.replays) == (1, 3)
        assert not all(torch.equal(a, site.mask.hard) for a, site in zip(before, pair.tracks[0].sites, strict=True)), (
            "nothing moved"
        )


def kinds() -> None:
    """A target that is fixed and a margin that begins are other kernels, and recorded as such."""
    pair = Pair(dataclasses.replace(LEAN, hysteresis=Constant(value=0.2), target_freeze=0.5))
    pair.update(range(10, 60, 10))  # the first has no margin
    assert pair.recorder.recordings == 1
    pair.update(range(8000, 8030, 10))
    assert pair.recorder.recordings == 2


def patterns() -> None:
    """Sites of several patterns, and so several launches, in one recording."""
    for method in (LEAN, dataclasses.replace(LEAN, statistics_rows=1, statistics_of="last-update")):
        pair = Pair(method, patterns=((2, 4), (4, 8)))
        pair.update(range(10, 50, 10))
        assert pair.recorder.recordings == 1
        assert pair.recorder.replays > 0


def moved() -> None:
    """A tensor that is another, or elsewhere, is not the recorded one: the update is recorded anew."""
    pair = Pair(LEAN)
    pair.update(range(10, 50, 10))
    assert (pair.recorder.recordings, pair.recorder.replays) == (1, 2)
    for count, change in enumerate((elsewhere, another_weight, another_curvature, another_mask), start=2):
        old = change(pair.tracks[0])
        kept = old.clone()
        pair.update(range(50, 80, 10))
        assert pair.recorder.recordings == count, change.__name__
        assert torch.equal(old, kept), f"{change.__name__}: what has moved away was written to"
    pair.tracks[0].together.forget()
    pair.update(range(90, 100, 10))
    assert pair.recorder.recordings == 5


def elsewhere(track: SparseForgeTrack) -> torch.Tensor:
    """The same tensor at another address."""
    state = track.sites[0].mask.state
    old = state.data
    state.data = old.clone()
    return old


def another_weight(track: SparseForgeTrack) -> torch.Tensor:
    """Another parameter in the place of a weight."""
    site = track.sites[1]
    old = site.weight
    behind: Any = site.module.parametrizations
    behind[site.parameter].original = torch.nn.Parameter(old.detach().clone())
    track.curvature.weights[site.name] = site.weight  # type: ignore[union-attr]
    return old.detach()


def another_curvature(track: SparseForgeTrack) -> torch.Tensor:
    """Another tensor in the place of an average of squared gradients."""
    average: dict[str, torch.Tensor] = track.curvature.average  # type: ignore[union-attr]
    name = track.sites[1].name
    old, average[name] = average[name], average[name].clone()
    return old


def another_mask(track: SparseForgeTrack) -> torch.Tensor:
    """Another parameter in the place of a mask's state."""
    soft = track.sites[0].mask
    old = soft.state
    soft.state = torch.nn.Parameter(old.detach().clone(), requires_grad=False)
    return old.detach()


def frozen() -> None:
    """Once masks are frozen nothing of them is kept."""
    pair = Pair(LEAN)
    pair.update(range(10, 50, 10))
    for track in pair.tracks:
        track.freeze(None)
    assert pair.tracks[0].together._entries is None
    assert pair.tracks[0].together.updater._update is None
    for one, other in zip(*(track.sites for track in pair.tracks), strict=True):
        assert torch.equal(one.weight, other.weight)


CASES = {"schedules": schedules, "kinds": kinds, "patterns": patterns, "moved": moved, "frozen": frozen}

if __name__ == "__main__":
    if DEVICE.type == "cpu":
        fused.TILE, fused.REPEAT, fused.LOOK = 256, 4, 256
        annealing.refusal = functools.partial(fused.refusal, on="cpu")  # type: ignore[assignment]
    run_cases(CASES)
