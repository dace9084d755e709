"""The mask update of many sites at once, on a GPU: the same numbers as `gate.py`, each tensor read and written once.

The statistics of a layer (mean curvature, mean and spread of the scores) take two passes over weight and curvature, or
over every n-th row of them, or are those that the last update gathered; everything else (scores, standardisation,
threshold, gate, blend, push, average, top N, quenched view) is one pass. All sites of a model share six kernel
launches, or three. What the kernels do not cover is said by `refusal`, and is computed by `gate.py`: there is no third
way.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
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

TILE, REPEAT, WARPS = 1024, 8, 4
"""Entries that a program of the update works on at once, how often it does, and its warps."""

LOOK = 2048
"""Entries of a program that only adds up or averages."""

ADDED, ADDING_WARPS = 2048, 16
"""Rows of sums that are added at once, and by how many warps: one program a site, so it must not be a slow one."""

ALIGNED = 64
"""Bytes: 16 entries of float32, of which a thread reads four at once."""

SETTINGS = 8
"""Numbers of an update that the kernels read from the device (`fused_kernels.SETTINGS`)."""

ROW = 16
"""Entries of which a stored row must hold a multiple."""


@dataclass(kw_only=True, eq=False)
class Entry:
    """One site as the kernels see it; tensors in the stored layout. All but `scale` stays what it is."""

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

    def kind(self) -> tuple[Any, ...]:
        """All of it that the launches depend on: updates that agree in this differ in numbers alone."""
        choices = self.fixed_target, self.margin > 0.0, self.project_on, self.quench_view
        return self.form, self.log, self.criterion, *choices, self.rows


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


def update_masks(
    entries: Sequence[Entry], way: Way, *, known: Tensor | None = None, gathered: Tensor | None = None
) -> Tensor:
    """Move the masks, hard masks and views of all entries.

    Returns means over the entries of each, `[sites, 3]`: of what flipped in the hard mask, of what lies between 0.1 and
    0.9 in m, and of |m - m_hat|. Nothing waits for the device. A site with a score that is not finite reports NaN for
    its flips, and the groups in question (all, where the site's statistics are not finite) stay as they are. Raises
    ValueError for entries that `refusal` refuses.

    Args:
        entries: the sites.
        way: what is done to them.
        known: what scores are standardised by, float64 `[sites, 3]` (`criteria.observed`); None: by what this
            update's passes find.
        gathered: where this update's own such numbers are written, over all rows; None: nowhere.
    """
    update = _Update(entries, way, known, gathered)
    update.set(way)
    update.run()
    return update.found


Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Turns work into what does it again with the tensors of the first time; on a GPU `on_gpu`."""


class Updater:
    """`update_masks` of the same entries again and again, whose launches the host starts by one call.

    A kernel costs a slow host more time than the device needs for it. The second update of a kind is recorded as a CUDA
    graph, which holds the very launches of the first one. It holds addresses too, so the caller gives the same entries
    (the same list) as long as their tensors lie where they lay, and others once one has moved. What changes from
    update to update is read by the kernels from the device: temperature, mix, rates, softness, scales.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or on_gpu
        self.forget()

    def forget(self) -> None:
        """Let go of the entries, and of what was recorded."""
        self._entries: Sequence[Entry] | None = None
        self._kind: tuple[Any, ...] = ()
        self._update: _Update | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(
        self, entries: Sequence[Entry], way: Way, *, known: Tensor | None = None, gathered: Tensor | None = None
    ) -> Tensor:
        """What `update_masks` does and raises; what it returns is overwritten by the next call."""
        kind = (*way.kind(), known is None, gathered is None)
        if entries is not self._entries or kind != self._kind or not self._scaled_as_recorded():
            self.forget()
            self._entries, self._kind = entries, kind
            # As launches of its own: what is compiled or loaded at first use must not be recorded.
            return update_masks(entries, way, known=known, gathered=gathered)
        if self._update is None or self._replay is None:
            rooms = (None if room is None else torch.empty_like(room) for room in (known, gathered))
            self._update = _Update(entries, way, *rooms)
            self._replay = self._capture(self._update.run)
        self._update.set(way)
        if known is not None and self._update.known is not None:
            self._update.known.copy_(known)
        self._replay()
        if gathered is not None and self._update.gathered is not None:
            gathered.copy_(self._update.gathered)
        return self._update.found

    def _scaled_as_recorded(self) -> bool:
        """Whether entries that share a launch still share their scale."""
        return self._update is None or all(
            entry.scale == batch.entries[0].scale for batch in self._update.batches for entry in batch.entries
        )


def on_gpu(work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph of the current device. Its tensors stay in memory as long as what is returned."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # Not by torch.cuda.graph: that waits for the device and gives back memory that training asks for again at once.
    with torch.cuda.stream(side):
        # Threads that load batches call the driver meanwhile; that is none of the recording's business.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    replay: Any = graph.replay
    return replay  # type: ignore[no-any-return]


class _Update:
    """The launches of one kind of update of some entries, and all the memory that they need beside the entries'."""

    def __init__(self, entries: Sequence[Entry], way: Way, known: Tensor | None, gathered: Tensor | None) -> None:
        places: dict[tuple[Any, ...], list[int]] = {}
        for place, entry in enumerate(entries):
            places.setdefault(_kind(entry), []).append(place)
        device = entries[0].weight.device
        self.known, self.gathered = known, gathered
        self.found = torch.empty(len(entries), 3, device=device)
        self.batches = [_Batch([entries[place] for place in some], way) for some in places.values()]
        self.settings = torch.empty(len(places), SETTINGS, device=device)
        self.places: list[Tensor] = []
        if len(places) > 1:
            self.places = [on_host(some, torch.int64, device).to(device) for some in places.values()]

    def set(self, way: Way) -> None:
        """Write what `run` reads besides tensors of the entries and `known`."""
        numbers = [batch.settings(way) for batch in self.batches]
        self.settings.copy_(on_host(numbers, torch.float32, self.settings.device), non_blocking=True)

    def run(self) -> None:
        """Launch: entries move, `found` and `gathered` are written."""
        if not self.places:
            self.batches[0].launch(self.settings[0], self.known, self.gathered, self.found)
            return
        for batch, settings, places in zip(self.batches, self.settings, self.places, strict=True):
            known = None if self.known is None else self.known.index_select(0, places)
            gathered = None if self.gathered is None else torch.empty_like(self.gathered[: len(places)])
            found = torch.empty_like(self.found[: len(places)])
            batch.launch(settings, known, gathered, found)
            self.found.index_copy_(0, places, found)
            if self.gathered is not None and gathered is not None:
                self.gathered.index_copy_(0, places, gathered)


def _kind(entry: Entry) -> tuple[Any, ...]:
    """Entries that share a launch: all that the kernels are specialised for, and what they take by value."""
    if not isinstance(entry.pattern, GroupPattern):
        raise ValueError(f"pattern {entry.pattern.name} is not one for the kernels; ask `refusal` first")
    dtype = None if entry.statistic is None else entry.statistic.dtype
    packed = isinstance(entry.soft, PackedMask)
    return entry.weight.device, entry.pattern, entry.soft.transposed, packed, dtype, entry.scale, entry.scores is None


class _Batch:
    """The launches of entries that share them."""

    def __init__(self, entries: list[Entry], way: Way) -> None:
        from sparseforge_core.sparsity import fused_kernels as kernels

        first = entries[0]
        if first.scores is None and not isinstance(way.criterion, (HessianOBD, Magnitude)):
            raise ValueError(f"{type(way.criterion).__name__}: the kernels need its scores")
        obd = first.scores is None and isinstance(way.criterion, HessianOBD)
        self.criterion = kernels.OBD if obd else kernels.MAGNITUDE if first.scores is None else kernels.GIVEN
        self.entries, self.way = entries, way
        self.plan, self.anchors = _plan_of(entries, way.rows), _anchors(first)
        device, programs = first.weight.device, max(len(self.plan.owner), len(self.plan.looked))
        self.partial = torch.empty(programs, kernels.SUMS.value, device=device)
        self.standard = torch.empty(len(entries), kernels.CONSTANTS.value, device=device)
        self.found = torch.empty(len(entries), 3, dtype=torch.float64, device=device)
        """What this update's own passes find of each site."""

    def settings(self, way: Way) -> list[float]:
        """The numbers of an update, by their places in `fused_kernels.SETTINGS`."""
        at = way.at
        eps = way.criterion.relative_eps if isinstance(way.criterion, HessianOBD) else 0.0
        numbers = [1.0 / at.temperature, at.structure_mix, at.mid_push, at.mask_rate, way.margin, way.softness]
        return [float(number) for number in (*numbers, self.entries[0].scale, eps)]

    def launch(self, settings: Tensor, known: Tensor | None, gathered: Tensor | None, shares: Tensor) -> None:
        """Move the entries; `settings` has this batch's numbers, `shares` takes its report."""
        import triton

        from sparseforge_core.sparsity import fused_kernels as kernels
        from sparseforge_core.sparsity import statistics_kernels as statistics

        first, way, plan, table = self.entries[0], self.way, self.plan, self.plan.table
        anchors, partial, standard, sites = self.anchors, self.partial, self.standard, (len(self.entries),)
        assert isinstance(first.pattern, GroupPattern)
        by = {"CRITERION": self.criterion, "LOG": way.log}
        if known is None:
            known = self.found
            most = triton.next_power_of_2(plan.most_looked)
            adding = {"LOG": way.log, "MOST": most, "BLOCK": ADDED, "num_warps": ADDING_WARPS}
            looked, of = (len(plan.looked),), (table, plan.looked, *anchors[:2])
            statistics.sum_scores[looked](*of, partial, CRITERION=self.criterion, BLOCK=LOOK, num_warps=4)
            bounds = plan.looked_bounds
            statistics.site_means[sites](
                table, bounds, partial, known, standard, settings, CRITERION=self.criterion, **adding
            )
            statistics.sum_logs[looked](*of, standard, partial, **by, BLOCK=LOOK, num_warps=4)
            statistics.site_spreads[sites](table, bounds, partial, known, standard, **adding)
        else:
            statistics.site_constants[sites](known, standard, settings, **by, num_warps=1)
        form = way.form
        kernels.update[(len(plan.owner),)](
            table, plan.owner, *anchors, standard, partial, settings, **by,
            KEEP=first.pattern.keep, M=first.pattern.cols, TRANSPOSED=first.soft.transposed,
            MIDPOINT=form.threshold == "midpoint", BLEND=form.order == "blend-then-push",
            PULL_GATE=form.push_target == "gate", FIXED=way.fixed_target,
            HYSTERESIS=way.margin > 0.0 and not way.fixed_target, BY_SCORES=way.project_on == "scores",
            ABOVE_HALF=way.quench_view == "threshold", PACKED=isinstance(first.soft, PackedMask),
            HALF=anchors[1].dtype == torch.bfloat16, EVEN=plan.even, GATHER=gathered is not None,
            REPEAT=REPEAT, BLOCK=TILE // first.pattern.cols, num_warps=WARPS,
        )  # fmt: skip
        statistics.site_reports[sites](
            table, plan.bounds, partial, shares, known, known if gathered is None else gathered, settings,
            LOG=way.log, GATHER=gathered is not None, MOST=triton.next_power_of_2(plan.most), BLOCK=ADDED,
            num_warps=ADDING_WARPS,
        )  # fmt: skip


def _anchors(entry: Entry) -> list[Tensor]:
    """What the kernels read and write of a site: weight or scores, statistic, mask, hard mask, view."""
    source = entry.weight if entry.scores is None else entry.scores
    statistic = source if entry.statistic is None else entry.statistic
    if any(x.data_ptr() % ALIGNED or not x.is_contiguous() for x in (source, statistic)):
        raise ValueError(f"weight, scores and statistic must be contiguous and begin at multiples of {ALIGNED} bytes")
    return [source, statistic, *entry.soft.stored()]


def distances(tensors: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[int]:
    """How many entries each tensor begins after its anchor."""
    pairs = zip(tensors, anchors, strict=True)
    return [(tensor.data_ptr() - anchor.data_ptr()) // tensor.element_size() for tensor, anchor in pairs]


@dataclass(frozen=True)
class _Plan:
    """Where everything is, and whose each program is, on the device."""

    table: Tensor
    owner: Tensor
    bounds: Tensor
    """The first program of each site in the update, and the number of programs."""
    looked: Tensor
    looked_bounds: Tensor
    """The same for the passes over looked at rows."""
    most: int
    most_looked: int
    """The most programs of one site."""
    even: bool
    """Whether the update's tiles hold all their groups, everywhere."""


def _plan_of(entries: list[Entry], every: int) -> _Plan:
    """The plan of these entries, made anew when a tensor or a shape is another."""
    anchors = _anchors(entries[0])
    places = tuple((*distances(_anchors(entry), anchors), *entry.weight.shape) for entry in entries)
    pattern = entries[0].pattern
    assert isinstance(pattern, GroupPattern)
    return _plan(
        places, pattern.cols, entries[0].soft.transposed, every, (TILE, REPEAT, LOOK), entries[0].weight.device
    )


@functools.lru_cache(maxsize=64)
def _plan(
    places: tuple[tuple[int, ...], ...], m: int, transposed: bool, every: int, sizes: tuple[int, int, int],
    device: torch.device,
) -> _Plan:  # fmt: skip
    tile, repeat, look = sizes
    rows: list[list[int]] = []
    programs, looks, even = [0], [0], True
    for place in places:
        shape, size = place[5:], math.prod(place[5:])
        columns, groups, block = shape[-1], size // m, tile // m
        tiles = groups // columns * math.ceil(columns / block) if transposed else math.ceil(groups / block)
        # All rows together are one long row: only where some are left out must a tile end with its row.
        length, kept = (size, 1) if every == 1 else (columns, math.ceil(size // columns / every))
        about = [groups, columns, tiles, size, length, columns * every, looks[-1], length * kept]
        rows.append([*place[:5], programs[-1], *about])
        even = even and tiles % repeat == 0 and (columns if transposed else groups) % block == 0
        programs.append(programs[-1] + math.ceil(tiles / repeat))
        looks.append(looks[-1] + kept * math.ceil(length / look))
    counts, looked = ([b - a for a, b in itertools.pairwise(ends)] for ends in (programs, looks))
    table, bounds, looked_bounds = (
        on_host(values, torch.int64, device).to(device, non_blocking=True) for values in (rows, programs, looks)
    )
    owner, owner_of_looks = owners(tuple(counts), device), owners(tuple(looked), device)
    return _Plan(table, owner, bounds, owner_of_looks, looked_bounds, max(counts), max(looked), even)


def on_host(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host tensor that can travel while the host goes on."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


@functools.lru_cache(maxsize=64)
def owners(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """Whose each tile is; kept, for a model asks for the same again and again."""
    return torch.arange(len(tiles), dtype=torch.int32).repeat_interleave(torch.tensor(tiles)).to(device)


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
    from sparseforge_core.sparsity import statistics_kernels as kernels

    averages, gradients = pairs[0]
    tiles = [math.ceil(average.numel() / LOOK) for average, _ in pairs]
    first = [0, *itertools.accumulate(tiles)]
    rows = [
        [*distances([average, gradient], [averages, gradients]), first[i], average.numel()]
        for i, (average, gradient) in enumerate(pairs)
    ]
    device = averages.device
    table = on_host(rows, torch.int64, device).to(device, non_blocking=True)
    owner = owners(tuple(tiles), device)
    kernels.average_squares[(len(owner),)](table, owner, averages, gradients, decay, BLOCK=LOOK, num_warps=4)
