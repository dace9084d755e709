"""How long what is left of a grid will take: from what was measured in its store, else from the plan's cost.

A stage takes what finished stages of its kind took (median). Where none of its kind has finished, it takes what the
plan says, corrected by how this store's finished stages compare with their plan. The end of the grid is found by
playing the queue: cells start as workers fall free, after the cells that they read.
"""

from __future__ import annotations

import collections
import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparseforge_core.store.rows import AttemptRecord, StageState

TRAIN = "train"
TRAINING = 0.8
"""Share of a trained cell's planned cost that is its training; the suites share the rest."""
HOUR = 3600.0

How = Literal["measured", "scaled", "planned"]
Kind = tuple[str, ...]


@dataclass(frozen=True)
class Guess:
    """How long a stage takes, and how that is known."""

    seconds: float
    how: How


class Pace:
    """What stages take, learned from the finished ones of a grid."""

    def __init__(self, states: Sequence[StageState], attempts: Iterable[AttemptRecord]) -> None:
        taken = seconds_taken(attempts)
        self._stages = collections.Counter(state.cell_key for state in states)
        by_kind: dict[Kind, list[float]] = {}
        measured, planned = 0.0, 0.0
        for state in states:
            seconds = taken.get((state.cell_key, state.stage))
            if state.status != "done" or seconds is None:
                continue
            by_kind.setdefault(kind_of(state), []).append(seconds)
            measured, planned = measured + seconds, planned + self.planned(state)
        self._known = {kind: statistics.median(found) for kind, found in by_kind.items()}
        self._factor = measured / planned if planned > 0 else None

    def planned(self, state: StageState) -> float:
        """Seconds of a stage by the plan: its share of the cell's cost."""
        total, count = state.cost_hours * HOUR, self._stages[state.cell_key]
        if not state.tokens or count < 2:
            return total / max(count, 1)
        return total * (TRAINING if state.stage == TRAIN else (1 - TRAINING) / (count - 1))

    def of(self, state: StageState) -> Guess:
        """A stage that has not finished."""
        known = self._known.get(kind_of(state))
        if known is not None:
            return Guess(known, "measured")
        if self._factor is not None:
            return Guess(self.planned(state) * self._factor, "scaled")
        return Guess(self.planned(state), "planned")


def kind_of(state: StageState) -> Kind:
    """Stages of one kind take alike: the same training at another seed, the same suite on the same model."""
    if state.stage == TRAIN:
        return TRAIN, state.pool, state.model, state.method, state.variant, str(state.tokens)
    return state.stage, state.pool, state.model


def seconds_taken(attempts: Iterable[AttemptRecord]) -> dict[tuple[str, str], float]:
    """Seconds of work behind each finished stage, by cell key and stage: its last attempt and those it goes on from.

    One that was ingested took what its own machine measured, not the moment of recording it.
    """
    found: dict[tuple[str, str], float] = {}
    done = set()
    for attempt in attempts:
        place = attempt.cell_key, attempt.stage
        if attempt.status == "done":
            done.add(place)
        if attempt.status in ("done", "interrupted"):
            found[place] = found.get(place, 0.0) + spent(attempt)
    return {place: seconds for place, seconds in found.items() if place in done}


def spent(attempt: AttemptRecord) -> float:
    """Seconds that an attempt has kept its devices busy; of a lost one, until it was last heard of."""
    end = attempt.heartbeat if attempt.status in ("lost", "running") else attempt.finished or attempt.heartbeat
    lasted = max(0.0, (end - attempt.started).total_seconds())
    return max(lasted, float((attempt.context or {}).get("wall_seconds", 0.0)))


def devices(pool: str) -> int:
    """Devices that one worker of a pool holds: eight GPUs of `gpu-8`, one worker of `cpu`."""
    count = pool.removeprefix("gpu-")
    return int(count) if count != pool and count.isdigit() else 1


def makespan(seconds: Mapping[str, float], requires: Mapping[str, Sequence[str]], workers: int) -> float:
    """When the last of some cells ends if `workers` take them, the longest first, each after those it requires.

    Requirements that are not among the cells count as done.
    """
    waiting = {key: {name for name in requires.get(key, ()) if name in seconds} for key in seconds}
    after: dict[str, list[str]] = {}
    for key, names in waiting.items():
        for name in names:
            after.setdefault(name, []).append(key)
    ready = [(-seconds[key], key) for key, names in waiting.items() if not names]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            _, key = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[key], key))
        now, ended = heapq.heappop(running)
        for key in after.get(ended, ()):
            waiting[key].discard(ended)
            if not waiting[key]:
                heapq.heappush(ready, (-seconds[key], key))
    return now


def clock(seconds: float) -> str:
    """A duration for people: 0:07, 12:30, 3 h 05 min, 4 days 2 h."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d}"
