"""Which channels share a group: an order of a layer's inputs in which N:M pruning loses less (Pool & Yu, NeurIPS 2021).

A pattern of N of M inputs prunes within groups of neighbours, and which inputs are neighbours is often free: a model
whose channels stand in another order computes the same (`models/channels.py` says where). The order is searched by
exchanges between groups, which never lose anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_core.errors import PatternViolation, RecipeError
from sparseforge_core.specs import spec

AT_ONCE = 2**26
"""Numbers that are compared at once."""
LEAST = 1e-6
"""Share of what is kept that an exchange must gain: below lies rounding."""
UNSEEN = 4
"""Rounds of agreement before one asks whether there was any: an answer has to wait for the device, which others may
share, and a round too many changes nothing."""


@spec("channel-permutation")
class ChannelPermutation:
    """Before anything is pruned, put channels in an order in which groups lose less by SparseGPT's score.

    What the dense model computes stays the same, and so does the shape of every weight: it costs nothing at inference.
    """

    samples: int = 128
    """Calibration sequences."""
    length: int = 1024
    """Tokens per calibration sequence; cut to what the model allows."""
    rounds: int = 8
    """Passes over the places of a group, at the most; the search ends sooner where no exchange gains anything."""

    def __post_init__(self) -> None:
        for name in ("samples", "length", "rounds"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least 1")


def kept(scores: Tensor, order: Tensor, *, keep: int, size: int) -> float:
    """What groups of `size` neighbours keep of `scores` `[out, in]` in an order `[in]`, the `keep` largest of each."""
    grouped = scores[:, order].unflatten(1, (-1, size))
    return float(grouped.topk(keep, dim=2).values.sum(dtype=torch.float64))


@torch.no_grad()
def best_order(scores: Tensor, *, keep: int, size: int, rounds: int) -> Tensor:
    """An order `[in]` (int64) of the inputs of `scores` `[out, in]` >= 0 in which groups keep more; never less.

    It begins with the given order, or with inputs dealt over groups by what they weigh in all, whichever keeps more.
    Then, place by place, each group holds one input that may be exchanged for that of another group: such exchanges do
    not disturb each other, so that all the best ones are made at once. Raises PatternViolation unless groups divide
    the inputs.
    """
    count = scores.shape[1]
    if count % size:
        raise PatternViolation(f"{count} channels do not divide into groups of {size}")
    given = torch.arange(count, device=scores.device)
    dealt = scores.sum(0).argsort(descending=True, stable=True).view(size, -1).T.reshape(-1)
    order = max((given, dealt), key=lambda one: kept(scores, one, keep=keep, size=size))
    if size == keep or count == size:
        return order
    best = kept(scores, order, keep=keep, size=size)
    for _ in range(rounds):
        for place in range(size):
            order = _exchanged(scores, order, place, keep=keep, size=size)
        now = kept(scores, order, keep=keep, size=size)
        if now - best <= LEAST * best:
            break
        best = now
    return order


def _exchanged(scores: Tensor, order: Tensor, place: int, *, keep: int, size: int) -> Tensor:
    """The order after the best exchanges of what groups hold at one place."""
    groups = order.view(-1, size).clone()
    others = [index for index in range(size) if index != place]
    mine = groups[:, place]
    # A group keeps the keep - 1 largest of its other entries in any case, and the larger of the next one and mine.
    last = scores[:, groups[:, others]].sort(dim=2, descending=True).values[:, :, keep - 1]
    worth = _largest(scores[:, mine], last)  # [input, group]
    own = worth.diagonal()
    gain = worth + worth.T - own[:, None] - own[None]
    groups[:, place] = mine[_matched(gain, LEAST * own.mean().abs())]
    return groups.reshape(-1)


def _matched(gain: Tensor, least: Tensor) -> Tensor:
    """Whom each exchanges with, `[n]`, itself if with nobody: again and again those that are each other's best of
    `gain` `[n, n]`, which is overwritten, and gain more than `least`."""
    number = torch.arange(len(gain), device=gain.device)
    found = number.clone()
    while True:
        agreed = number < 0
        for _ in range(UNSEEN):
            value, partner = gain.max(dim=1)
            mutual = partner[partner] == number
            lower = mutual & (value > least) & (number < partner)
            now = mutual & (lower | lower[partner])
            found = torch.where(now, partner, found)
            gain.masked_fill_(now[:, None] | now[None], -torch.inf)
            agreed |= now
        if not bool(agreed.any()):
            return found


def _largest(mine: Tensor, last: Tensor) -> Tensor:
    """Sum over rows of max(mine[row, i], last[row, g]), `[i, g]` float64."""
    rows = max(1, AT_ONCE // (mine.shape[1] * last.shape[1]))
    total = torch.zeros(mine.shape[1], last.shape[1], dtype=torch.float64, device=mine.device)
    for first in range(0, len(mine), rows):
        some, limit = mine[first : first + rows], last[first : first + rows]
        total += torch.maximum(some[:, :, None], limit[:, None, :]).sum(dim=0)
    return total
