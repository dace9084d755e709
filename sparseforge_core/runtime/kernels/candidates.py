"""Plans worth measuring for a shape and a number of rows: those that won somewhere in a sweep of all, with a few spare.

The sweep had three times as many, on one H100, at LLaMA-2-7B's shapes; `benchmarks/kernel_sweep.py` measures what is
left of them, with the switches of the kernels on and off. Those of `wide` are ranked by what they should take: on an
H200 the fastest was among the first two of the ranking for two in three of 46 sizes, and among those measured for all.
"""

from __future__ import annotations

import functools

from sparseforge_core.runtime.kernels.nvrtc import SHARED_MEMORY
from sparseforge_core.runtime.kernels.plans import BLOCK_BYTES, IN_FOURS, PAIRED, STAGE_ROW, WIDE_ROW, Plan
from sparseforge_core.runtime.kernels.support import COLUMNS, ROWS

ROOM = 226 * 1024
"""Bytes of shared memory that the blocks of threads of a multiprocessor divide among them."""

AT_ONCE = 64
"""Most rows of x that one pass multiplies."""

STREAMS = ((8, 40, 1), (4, 20, 2), (12, 36, 1), (4, 44, 1), (8, 16, 2))
"""Warps, slots and blocks of threads per multiprocessor of `stream` for one row."""

VECTORS = ((8, 1, 3), (4, 2, 4), (11, 1, 2), (8, 2, 2), (16, 1, 2))
"""Warps, depth and blocks of threads per multiprocessor of `gemv`."""

WIDE_FROM = 17
"""Rows from which warpgroups are tried: below, a block of threads has little to do beside reading its weights."""

TILES_UP_TO = 256
"""Rows up to which `tiles` is tried, 64 rows at a time."""

MOST_WIDE = 12
"""Plans of `wide` that are measured for a shape and a number of rows."""

FROM_CACHE, AROUND, BOTH = 32, 3000, 1.15
"""Bytes a cycle that a multiprocessor has of the L2 cache, cycles before and after the products of a tile, and how many
times longer than counted two instructions side by side in a warpgroup were measured to take."""

TWO = ((1, 1), (2, 1))
"""Blocks of a cluster that share x, and the inputs."""

SPLIT = (*TWO, (1, 2), (1, 3), (1, 4), (2, 2))
"""The same where a product has few tiles."""

SIZES = (
    (256, 8, 1, 1, (*TWO, (4, 1))),
    (192, 8, 1, 1, TWO),
    (128, 8, 2, 1, (*TWO, (4, 1))),
    (128, 8, 1, 1, SPLIT),
    (96, 8, 2, 1, TWO),
    (96, 8, 1, 1, SPLIT),
    (64, 8, 1, 1, SPLIT),
    (48, 8, 1, 1, SPLIT),
    (32, 8, 1, 1, SPLIT),
    (256, 4, 1, 1, SPLIT),
    (192, 4, 1, 1, SPLIT),
    (128, 4, 1, 2, (*SPLIT, (4, 1))),
    (96, 4, 1, 3, (*SPLIT, (4, 1))),
    (64, 4, 1, 3, (*SPLIT, (4, 1))),
    (48, 4, 1, 3, SPLIT),
    (32, 4, 1, 3, (*SPLIT, (4, 1))),
)
"""Of `wide`: rows of a tile, warps, 64 outputs for each warpgroup, blocks of threads per multiprocessor, and clusters.
Others need more registers than there are."""


def pass_rows(rows: int) -> int:
    """Rows of x in one pass: 1, or a multiple of 8 up to 64, all passes about equally full."""
    return 1 if rows == 1 else -(-rows // (-(-rows // AT_ONCE) * 8)) * 8


def candidates(out: int, inputs: int, rows: int, processors: int = 132) -> list[Plan]:
    """Plans that fit a multiprocessor, for a weight `[out, in]` and `rows` rows of x; the first is the default."""
    size = pass_rows(rows)
    if size == 1:
        found = [_stream(inputs, 1, *sizes) for sizes in STREAMS] + _vector(inputs)
    else:
        found = [_stream(inputs, size, warps, 44, 1) for warps in (8, 4)] if rows <= 16 else []
        if rows <= TILES_UP_TO:
            found += _tiles(out, inputs, size, -(-rows // size), processors)
        wide = _wide(out, inputs, rows, processors) if rows >= WIDE_FROM else []
        found = found + wide if rows <= AT_ONCE else wide + found
    return [plan for plan in dict.fromkeys(found) if plan.fits(inputs)]


def _vector(inputs: int) -> list[Plan]:
    return [
        Plan(kernel="gemv", rows=1, warps=warps, depth=depth, resident=resident)
        for warps, depth, resident in VECTORS
        if warps <= -(-inputs // COLUMNS)
    ]


def _stream(inputs: int, size: int, warps: int, slots: int, resident: int) -> Plan:
    """As many slots as there is room for, up to `slots`; none where x alone takes all of it."""
    fixed = Plan(kernel="stream", rows=size, warps=warps, depth=0).shared(inputs) + 1024
    depth = min(max(0, ROOM // resident - fixed) // (BLOCK_BYTES + 16), slots) // warps * warps
    return Plan(kernel="stream", rows=size, warps=warps, depth=depth, resident=resident)


def _tiles(out: int, inputs: int, size: int, passes: int, processors: int) -> list[Plan]:
    """Those whose blocks of threads fill the multiprocessors best, larger tiles first where equal."""
    count, blocks, ranked = -(-out // ROWS), -(-inputs // COLUMNS), []
    for split in (1, 2, 4):
        for tiles in (2, 4, 6, 8, 9, 10, 11, 12, 16):
            most = max(2, -(-blocks // split))  # a ring has two stages at least, also where one block is all there is
            depth = min((ROOM - 1024) // (size * STAGE_ROW + tiles * BLOCK_BYTES), 6, most)
            if depth < 2 or split > blocks:
                continue
            reached = processors if split <= PAIRED else int(processors * IN_FOURS)
            waves = -(-count // tiles) * split * passes / reached
            filled = waves / -(-waves // 1)
            steps = -(-blocks // split) * split / blocks  # what an uneven share of the inputs costs
            for each in (1, 2) if tiles % 2 == 0 and tiles >= 8 else (1,):
                plan = Plan(kernel="tiles", rows=size, warps=tiles // each, depth=int(depth), tiles=tiles, split=split)
                ranked.append((-filled / steps * min(1.0, 0.8 + tiles / 40), each, plan))
    return [plan for *_, plan in sorted(ranked, key=lambda found: found[:2])[:12]]


def _wide(out: int, inputs: int, rows: int, processors: int) -> list[Plan]:
    """Those that should take the fewest cycles, by what passes through shared memory, L2 cache and tensor cores."""
    ranked = []
    for size, warps, each, resident, clusters in SIZES:
        for share, split in clusters:
            if split > -(-inputs // COLUMNS) or size >= 2 * -(-rows // 16) * 16 or size < min(rows, AT_ONCE):
                continue
            plan = _wide_plan(size, warps, each, resident, share, split)
            ranked.append((_cycles(plan, out, inputs, rows, processors), plan))
    return [plan for _, plan in sorted(ranked, key=lambda found: found[0])[:MOST_WIDE]]


@functools.cache
def _wide_plan(size: int, warps: int, each: int, resident: int, share: int, split: int) -> Plan:
    """One of few, which every new number of rows ranks anew while a product waits."""
    return Plan(
        kernel="wide", rows=size, warps=warps, depth=_stages(size, warps, warps * each, resident), tiles=warps * each,
        split=split, resident=resident, share=share,
    )  # fmt: skip


def _stages(size: int, warps: int, tiles: int, resident: int) -> int:
    """As many stages as there is room for beside the weights and the outputs on their way, up to eight."""
    one = Plan(
        kernel="wide", rows=size, warps=warps, depth=1, tiles=tiles, resident=resident
    )  # with room for outputs on their way
    fixed = one.shared(COLUMNS) - size * WIDE_ROW
    return min(8, (SHARED_MEMORY // resident - (1024 if resident > 1 else 0) - fixed) // (size * WIDE_ROW + 16))


def _cycles(plan: Plan, out: int, inputs: int, rows: int, processors: int) -> float:
    """Of a multiprocessor: the fullest has as many tiles as there are for each, and each tile begins and ends once."""
    outputs = plan.tiles * ROWS
    count = -(-out // (outputs * plan.share)) * plan.share * -(-rows // plan.rows) * plan.split
    x, weights = plan.rows * 64, outputs * 36  # bytes of 32 inputs
    tensor = outputs * plan.rows / 128
    shared = (outputs // 64 * x + x + weights) / 128
    cache = (x / plan.share + weights) / FROM_CACHE
    step = max(tensor, shared, cache) * (BOTH if plan.tiles > plan.warps else 1.0)
    each = step * inputs / 32 / plan.split + AROUND / plan.resident
    return -(-count // plan.reached(processors)) * each
