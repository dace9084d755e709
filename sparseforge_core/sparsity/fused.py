"""The mask update of many sites at once, on a GPU: the same numbers as `gate.py`, each tensor read and written once.

The statistics of a layer (mean curvature, mean and spread of the scores) take two passes over weight and curvature, or
over every n-th row of them; everything else (scores, standardisation, threshold, gate, blend, push, average, top N,
quenched view) is one pass. All sites of a model share five kernel launches. What the kernels do not cover is said by
`refusal`, and is computed by `gate.py`: there is no third way.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparseforge_core.sparsity.criteria import Criterion, HessianOBD, Magnitude
from sparseforge_core.sparsity.gate import AnnealPoint, GateForm
from sparseforge_core.sparsity.masking import PackedMask, SoftMask
from sparseforge_core.sparsity.patterns import GroupPattern, Pattern

SIZES = (2, 4, 8, 16)
"""Group sizes that the kernels hold in registers."""

TILE = 2048
"""Entries that one program works on."""

ALIGNED = 64
"""Bytes: 16 entries of float32, of which a thread reads four at once."""

ROW = 16
"""Entries of which a stored row must hold a multiple."""

LOG_FLOOR, SMALLEST, SPREAD_FLOOR = 1e-10, 1e-38, 1e-6
"""The constants of `criteria.standardize`."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One site as the kernels see it; tensors in the stored layout."""

    weight: Tensor
    soft: SoftMask
    pattern: Pattern
    statistic: Tensor | None = None
    """Curvature up to `scale`, where the criterion is (H + eps) W^2."""
    scores: Tensor | None = None
    """Scores, where the criterion is one that the kernels do not know."""
    scale: float = 1.0
    """What `statistic` is to be multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What an update does, the same for all sites."""

    at: AnnealPoint
    form: GateForm
    log: bool
    softness: float
    criterion: Criterion
    margin: float = 0.0
    fixed_target: bool = False
    project_on: Literal["mask", "scores"] = "mask"
    quench_view: Literal["top-n", "threshold"] = "top-n"
    rows: int = 1
    """The statistics of a layer are those of every n-th stored row."""


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def refusal(weight: Tensor, soft: SoftMask, pattern: Pattern, form: GateForm, *, on: str = "cuda") -> str | None:
    """Why this site's update is not one for the kernels, or None. `on` is the kind of device that they run on."""
    if weight.device.type != on:
        return f"its weight is on {weight.device.type}"
    if type(weight.data) is not Tensor or weight.dtype != torch.float32 or not weight.is_contiguous():
        return "its weight is sharded, strided or not float32"
    if any(tensor.data_ptr() % ALIGNED or not tensor.is_contiguous() for tensor in (weight, *soft.stored())):
        return f"its tensors do not begin at multiples of {ALIGNED} bytes"
    if not isinstance(pattern, GroupPattern) or pattern.rows != 1 or pattern.cols not in SIZES:
        return f"pattern {pattern.name} is not N:M with M in {SIZES}"
    if weight.shape[-1] % ROW:
        return f"its stored rows have {weight.shape[-1]} entries, no multiple of {ROW}"
    if form.threshold == "exact-sum" or form.scope == "layer":
        return f"threshold {form.threshold!r} by {form.scope} is an iteration or a sort"
    return None if available() else "Triton is not installed"


def update_masks(entries: Sequence[Entry], way: Way) -> Tensor:
    """Move the masks, hard masks and views of all entries.

    Returns means over the entries of each, `[sites, 3]`: of what flipped in the hard mask, of what lies between 0.1 and
    0.9 in m, and of |m - m_hat|. Nothing waits for the device. A site with a score that is not finite reports NaN for
    its flips, and the groups in question (all, where the site's statistics are not finite) stay as they are. Raises
    ValueError for entries that `refusal` refuses.
    """
    flips: list[Tensor | None] = [None] * len(entries)
    batches: dict[tuple[Any, ...], list[int]] = {}
    for place, entry in enumerate(entries):
        batches.setdefault(_kind(entry), []).append(place)
    for places in batches.values():
        shares = _update_batch([entries[place] for place in places], way)
        for place, share in zip(places, shares.unbind(), strict=True):
            flips[place] = share
    return torch.stack([share for share in flips if share is not None])


def _kind(entry: Entry) -> tuple[Any, ...]:
    """Entries that share a launch: all that the kernels are specialised for, and what they take by value."""
    if not isinstance(entry.pattern, GroupPattern):
        raise ValueError(f"pattern {entry.pattern.name} is not one for the kernels; ask `refusal` first")
    dtype = None if entry.statistic is None else entry.statistic.dtype
    packed = isinstance(entry.soft, PackedMask)
    return entry.weight.device, entry.pattern, entry.soft.transposed, packed, dtype, entry.scale, entry.scores is None


def _update_batch(entries: list[Entry], way: Way) -> Tensor:
    import triton

    from sparseforge_core.sparsity import fused_kernels as kernels

    first, pattern = entries[0], entries[0].pattern
    assert isinstance(pattern, GroupPattern)
    device, m = first.weight.device, pattern.cols
    given = first.scores is not None
    criterion = kernels.GIVEN if given else kernels.OBD if isinstance(way.criterion, HessianOBD) else kernels.MAGNITUDE
    if not given and not isinstance(way.criterion, (HessianOBD, Magnitude)):
        raise ValueError(f"{type(way.criterion).__name__}: the kernels need its scores")
    eps = way.criterion.relative_eps if isinstance(way.criterion, HessianOBD) and not given else 0.0
    packed, transposed = isinstance(first.soft, PackedMask), first.soft.transposed
    plan = _Plan(entries, m, transposed, way.rows)
    table, owner, sampled = plan.table, plan.owner, plan.looked

    def total(partial: Tensor, ends: Tensor) -> Tensor:
        sums = torch.empty(len(entries), 3, dtype=torch.float64, device=device)
        most = triton.next_power_of_2(plan.most)
        kernels.add_up[(len(entries),)](partial, ends[:-1], ends[1:], sums, MOST=most, BLOCK=1024)
        return sums

    partial = torch.empty(max(len(owner), len(sampled)), 3, device=device)
    looked = {"CRITERION": criterion, "SAMPLED": way.rows > 1, "BLOCK": TILE, "num_warps": 4}
    anchors = _anchors(first)
    kernels.sum_scores[(len(sampled),)](table, sampled, *anchors[:2], partial, first.scale, **looked)
    averages = total(partial, plan.looked_bounds) / plan.counts[:, None]
    means = _means(averages, eps, obd=criterion == kernels.OBD, log=way.log)
    kernels.sum_logs[(len(sampled),)](table, sampled, *anchors[:2], partial, means, first.scale, LOG=way.log, **looked)
    spread = _spread(total(partial, plan.looked_bounds) / plan.counts[:, None])
    at, form = way.at, way.form
    kernels.update[(len(owner),)](
        table, owner, *anchors, means, spread, partial, first.scale,
        1.0 / at.temperature, float(at.structure_mix), float(at.mid_push), float(at.mask_rate),
        float(way.margin), float(way.softness),
        KEEP=pattern.keep, M=m, TRANSPOSED=transposed, CRITERION=criterion, LOG=way.log,
        MIDPOINT=form.threshold == "midpoint", BLEND=form.order == "blend-then-push",
        PULL_GATE=form.push_target == "gate", FIXED=way.fixed_target,
        HYSTERESIS=way.margin > 0.0 and not way.fixed_target, BY_SCORES=way.project_on == "scores",
        ABOVE_HALF=way.quench_view == "threshold", PACKED=packed,
        BLOCK=TILE // m, num_warps=4,
    )  # fmt: skip
    return (total(partial, plan.bounds) / plan.sizes[:, None]).float()


def _means(mean: Tensor, relative_eps: float, *, obd: bool, log: bool) -> Tensor:
    """Of each site: eps, the floor under the logarithm, and the pivot, float32 `[sites, 3]`."""
    if obd:
        eps = relative_eps * mean[:, 0]
        score = mean[:, 1] + eps * mean[:, 2]
    else:
        eps, score = torch.zeros_like(mean[:, 0]), mean[:, 0]
    floor = LOG_FLOOR * score + SMALLEST
    return torch.stack([eps, floor, (score + floor).log() if log else score], dim=1).float()


def _spread(mean: Tensor) -> Tensor:
    """Of each site: mean, and one over the standard deviation, float32 `[sites, 3]`."""
    variance = (mean[:, 1] - mean[:, 0].square()).clamp_min(0.0)
    return torch.stack([mean[:, 0], 1.0 / (variance.sqrt() + SPREAD_FLOOR), mean[:, 2]], dim=1).float()


def _anchors(entry: Entry) -> list[Tensor]:
    """What the kernels read and write of a site: weight or scores, statistic, mask, hard mask, view."""
    source = entry.weight if entry.scores is None else entry.scores
    statistic = source if entry.statistic is None else entry.statistic
    if any(x.data_ptr() % ALIGNED or not x.is_contiguous() for x in (source, statistic)):
        raise ValueError(f"weight, scores and statistic must be contiguous and begin at multiples of {ALIGNED} bytes")
    return [source, statistic, *entry.soft.stored()]


def _distances(tensors: list[Tensor], anchors: list[Tensor]) -> list[int]:
    """How many entries each tensor begins after its anchor."""
    pairs = zip(tensors, anchors, strict=True)
    return [(tensor.data_ptr() - anchor.data_ptr()) // tensor.element_size() for tensor, anchor in pairs]


class _Plan:
    """Where everything is, and which tile belongs to whom, on the device."""

    def __init__(self, entries: list[Entry], m: int, transposed: bool, every: int) -> None:
        rows: list[list[int]] = []
        anchors = _anchors(entries[0])
        first = sampled_first = 0
        tiles, sampled_tiles = [], []
        for entry in entries:
            weight = entry.weight
            columns = weight.shape[-1]
            kept_rows = math.ceil(weight.numel() // columns / every)
            block = TILE // m
            groups = weight.numel() // m
            tiles.append(groups // columns * math.ceil(columns / block) if transposed else math.ceil(groups / block))
            sampled_tiles.append(math.ceil(kept_rows * columns / TILE))
            sizes = [groups, columns, kept_rows, columns * every, sampled_first]
            rows.append([*_distances(_anchors(entry), anchors), first, *sizes])
            first, sampled_first = first + tiles[-1], sampled_first + sampled_tiles[-1]
        device = entries[0].weight.device
        self.most = max(tiles)
        self.table = _host(rows, torch.int64, device).to(device, non_blocking=True)
        self.bounds, self.owner = _bounds(tuple(tiles), device), _owners(tuple(tiles), device)
        looked = tuple(sampled_tiles)
        self.looked_bounds, self.looked = _bounds(looked, device), _owners(looked, device)
        counts = [[entry.weight.numel(), row[7] * row[8]] for entry, row in zip(entries, rows, strict=True)]
        self.sizes, self.counts = _host(counts, torch.float64, device).to(device, non_blocking=True).unbind(1)


def _host(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host tensor that can travel while the host goes on."""
    made = torch.tensor(values, dtype=dtype)
    return made.pin_memory() if device.type == "cuda" else made


@functools.lru_cache(maxsize=64)
def _owners(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """Whose each tile is; kept, for a model asks for the same again and again."""
    return torch.arange(len(tiles), dtype=torch.int32).repeat_interleave(torch.tensor(tiles)).to(device)


@functools.lru_cache(maxsize=64)
def _bounds(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """The first tile of each site, and the number of tiles."""
    return torch.tensor([0, *tiles]).cumsum(0).to(device)


def average_square(average: Tensor, gradient: Tensor, decay: float) -> None:
    """average <- decay average + (1 - decay) g g, in the gradient's precision whatever the average is kept as."""
    if average.dtype == gradient.dtype:
        average.mul_(decay).addcmul_(gradient, gradient, value=1.0 - decay)
    else:
        wide = average.to(gradient.dtype)
        average.copy_(wide.mul_(decay).addcmul_(gradient, gradient, value=1.0 - decay))


def averages_together(average: Tensor, gradient: Tensor, *, on: str = "cuda") -> bool:
    """Whether `average_squares` covers this pair; `average_square` covers every other."""
    plain = type(gradient) is Tensor and type(average) is Tensor and gradient.dtype == torch.float32
    aligned = all(
        x.data_ptr() % ALIGNED == 0 and x.is_contiguous() and x.numel() % ROW == 0 for x in (average, gradient)
    )
    return available() and plain and aligned and gradient.device.type == on


def average_squares(pairs: Sequence[tuple[Tensor, Tensor]], decay: float) -> None:
    """`average_square` of all (average, gradient) pairs in one launch: each read and written once.

    Averages are all of one type. What a pair must be is said by `averages_together`.
    """
    from sparseforge_core.sparsity import fused_kernels as kernels

    averages, gradients = pairs[0]
    tiles = [math.ceil(average.numel() / TILE) for average, _ in pairs]
    first = [0, *itertools.accumulate(tiles)]
    rows = [
        [*_distances([average, gradient], [averages, gradients]), first[i], average.numel()]
        for i, (average, gradient) in enumerate(pairs)
    ]
    device = averages.device
    table = _host(rows, torch.int64, device).to(device, non_blocking=True)
    owner = _owners(tuple(tiles), device)
    kernels.average_squares[(len(owner),)](table, owner, averages, gradients, decay, BLOCK=TILE, num_warps=4)
