"""A model's free channels put in an order in which N:M groups lose less, before anything is pruned.

What a group loses is what SparseGPT's score says of the entries that it does not keep. The order is found once from
calibration text and kept under HOME/permutations, so that all ranks of a cell and all cells of a seed have the same.
That the model still computes what it did is checked by running it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core import files, specs
from sparseforge_core.data.cache import content_key
from sparseforge_core.errors import DataError, RecipeError, UnsupportedModel
from sparseforge_core.models.channels import Channels, free_channels, permute
from sparseforge_core.models.families import Family
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.blocks import stream_blocks
from sparseforge_core.observe.input_gram import block_inverse_diagonals
from sparseforge_core.sparsity.criteria import SparseGPTScore
from sparseforge_core.sparsity.patterns import GroupPattern
from sparseforge_core.sparsity.permutation import ChannelPermutation, best_order, kept

log = logging.getLogger(__name__)

FORMAT = 1
MOST_ROWS = 16_384
"""Outputs that the search for one order looks at, evenly chosen where there are more."""
PROBE = 64
"""Tokens by which the model is compared before and after."""
TOLERANCE = 5e-3
"""Largest change of a logit, in their standard deviations: sums in another order differ by less, other sums by more."""


@dataclass(frozen=True)
class _Reader:
    """A masked weight that has channels among its inputs, from column `start` of its `[out, in]` matrix on."""

    site: Site
    start: int
    expert: int | None = None
    """Which of the experts that its tensor holds; None for a weight of one matrix, or for all of them."""

    @property
    def outputs(self) -> int:
        """Rows that read the channels."""
        weight = self.site.weight
        whole = weight.numel() // self.site.matrix(weight).shape[-1]
        return whole if self.expert is None else whole // len(weight)

    def rows(self, x: Tensor) -> Tensor:
        """Rows `[outputs, in]` of a tensor of the weight's layout that read the channels."""
        mine = x if self.expert is None else x[self.expert]
        return mine.reshape(-1, mine.shape[-1])


@dataclass
class _Ordered:
    """Channels on their way to an order."""

    channels: Channels
    readers: list[_Reader]
    pattern: GroupPattern
    scores: list[Tensor] = field(default_factory=list)

    @cached_property
    def every(self) -> int:
        """Of so many outputs one is looked at."""
        return -(-sum(reader.outputs for reader in self.readers) // MOST_ROWS)


@torch.no_grad()
def put_in_order(
    model: nn.Module,
    family: Family,
    sites: list[Site],
    permutation: ChannelPermutation,
    *,
    calibration: Callable[[int, int], list[Tensor]],
    device: torch.device,
    home: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Permute the channels of `model` in place; returns what was found, for the records.

    `about` is what determines the order besides the permutation. Raises UnsupportedModel for a family whose channels
    are not declared, or declared wrongly; RecipeError for a pattern without groups of inputs.
    """
    ordered = _orderable(free_channels(model, family), sites)
    identity = {"format": FORMAT, "permutation": specs.encode(permutation), **about}
    path = home / "permutations" / f"{content_key(identity)}.json"
    batches = calibration(permutation.samples, permutation.length)
    found = _read(path, ordered)
    if found is None:
        with files.only_one(path):  # one process searches while others wait for what it finds
            found = _read(path, ordered)
            if found is None:
                found = _search(model, sites, ordered, batches, permutation.rounds, device)
                files.write_json(path, files.seal({"found": found, "identity": identity}))
    probe = batches[0][:1, :PROBE]
    before = _logits(model, probe)
    for one in ordered:
        permute(model, one.channels, torch.tensor(found["orders"][one.channels.name]))
    change = float((_logits(model, probe) - before).abs().max() / before.std())
    if not change <= TOLERANCE:
        raise UnsupportedModel(
            f"permutation: the {family.name} model computes something else with its channels in another order (a logit "
            f"changed by {change:.2g} standard deviations): its declaration in models/channel_layouts.py is "
            "wrong for it, or it turns on less than rounding (a router's near tie); leave `permutation` out"
        )
    lost = [100 * share for share in found["lost"]]
    log.info("channels in another order: groups lose %.2f %% of all scores, not %.2f %%", lost[1], lost[0])
    return {"key": path.stem, "lost_before": found["lost"][0], "lost_after": found["lost"][1]}


def _orderable(channels: list[Channels], sites: list[Site]) -> list[_Ordered]:
    """Those that masked weights read, with their readers.

    Raises RecipeError where the pattern knows no groups, UnsupportedModel where nothing is declared of what a masked
    weight reads.
    """
    found = []
    read = set()
    for one in channels:
        readers = _readers(one, sites)
        if not readers:
            continue
        read |= {reader.site.name for reader in readers}
        patterns = {reader.site.pattern for reader in readers}
        pattern = patterns.pop()
        if patterns or not isinstance(pattern, GroupPattern) or pattern.rows != 1:
            said = ", ".join(sorted({reader.site.pattern.name for reader in readers}))
            raise RecipeError(
                f"permutation: {one.name} is read under pattern {said}; channels are put in order for one N:M pattern "
                "of inputs. Leave `permutation` out, or give all that reads these channels the same"
            )
        starts = [reader.start for reader in readers]
        if one.size % pattern.cols or any(start % pattern.cols for start in starts):
            raise RecipeError(
                f"permutation: {one.name}, {one.size} channels, do not divide into groups of {pattern.cols}; leave "
                "`permutation` out"
            )
        found.append(_Ordered(one, readers, pattern))
    if unread := [site.name for site in sites if site.name not in read]:
        raise UnsupportedModel(
            f"permutation: nothing is declared of what {len(unread)} masked weights read, such as {unread[0]}; add it "
            "to sparseforge_core/models/channel_layouts.py, or leave `permutation` out"
        )
    return found


def _readers(channels: Channels, sites: list[Site]) -> list[_Reader]:
    by_name = {site.name: site for site in sites}
    found = []
    for place in channels.places:
        site = by_name.get(place.parameter)
        if site is None:
            continue
        inputs = site.weight.ndim - (2 if site.transposed else 1) - (place.expert is not None)
        if place.dim == inputs:
            assert place.step == 1, "groups are of neighbours"
            found.append(_Reader(site, place.start, place.expert))
    return found


def _search(
    model: nn.Module,
    sites: list[Site],
    ordered: list[_Ordered],
    batches: list[Tensor],
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """The orders by name, and the share of all scores that groups lose before and after."""
    criterion = SparseGPTScore()
    orders: dict[str, list[int]] = {}
    total = before = after = 0.0
    for block in stream_blocks(model, sites, batches, device=device):
        inverse = block_inverse_diagonals(block)
        scored = {site.name: criterion.score(site.matrix(site.weight), inverse[site.name]) for site in block.sites}
        for one in ordered:
            for reader in one.readers:
                if reader.site.name in scored:
                    columns = slice(reader.start, reader.start + one.channels.size)
                    one.scores.append(reader.rows(scored[reader.site.name])[:: one.every, columns])
            if len(one.scores) < len(one.readers):
                continue  # the residual stream is read by every block
            scores = torch.cat(one.scores)
            shape = {"keep": one.pattern.keep, "size": one.pattern.cols}
            order = best_order(scores, rounds=rounds, **shape)
            whole = float(scores.sum(dtype=torch.float64))
            total += whole
            before += whole - kept(scores, torch.arange(len(order), device=order.device), **shape)
            after += whole - kept(scores, order, **shape)
            orders[one.channels.name] = order.tolist()
            one.scores.clear()
    return {"orders": orders, "lost": [before / total, after / total]}


def _logits(model: Any, tokens: Tensor) -> Tensor:
    training = model.training
    logits: Tensor = model.eval()(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
    model.train(training)
    return logits.float()


def _read(path: Path, ordered: list[_Ordered]) -> dict[str, Any] | None:
    """Kept orders; None where there are none, or they are damaged: that is reported, and they are found anew."""
    if not path.is_file():
        return None
    try:
        body = files.read_json(path)
        if not files.seal_fits(body):
            raise ValueError("it was altered")
        found: dict[str, Any] = body["found"]
        for one in ordered:
            if sorted(found["orders"][one.channels.name]) != list(range(one.channels.size)):
                raise ValueError(f"{one.channels.name}: no order of {one.channels.size} channels")
    except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); the order of channels is searched again", path, error)
        return None
    return found
