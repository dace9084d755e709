"""Plans worth measuring for a shape and a number of rows: those that won somewhere in a sweep of all, with a few spare.

The sweep had three times as many, on one H100, at LLaMA-2-7B's shapes; `benchmarks/kernel_sweep.py` measures what is
left of them, with the switches of the kernels on and off.
"""

from __future__ import annotations

from sparseforge_core.runtime.kernels.plans import BLOCK_BYTES, STAGE_ROW, Plan
from sparseforge_core.runtime.kernels.support import COLUMNS, ROWS

ROOM = 226 * 1024
"""Bytes of shared memory that the blocks of threads of a multiprocessor divide among them."""

AT_ONCE = 64
"""Most rows of x that one pass multiplies."""

IN_CLUSTERS = 120
"""Multiprocessors of 132 that clusters of four can fill: they do not cross the chip's groups of 16 or 18."""

STREAMS = ((8, 40, 1), (4, 20, 2), (12, 36, 1), (4, 44, 1), (8, 16, 2))
"""Warps, slots and blocks of threads per multiprocessor of `stream` for one row."""

VECTORS = ((8, 1, 3), (4, 2, 4), (11, 1, 2), (8, 2, 2), (16, 1, 2))
"""Warps, depth and blocks of threads per multiprocessor of `gemv`."""


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
        found += _tiles(out, inputs, size, -(-rows // size), processors)
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
            waves = -(-count // tiles) * split * passes / min(processors, IN_CLUSTERS if split == 4 else processors)
            filled = waves / -(-waves // 1)
            steps = -(-blocks // split) * split / blocks  # what an uneven share of the inputs costs
            for each in (1, 2) if tiles % 2 == 0 and tiles >= 8 else (1,):
                plan = Plan(kernel="tiles", rows=size, warps=tiles // each, depth=int(depth), tiles=tiles, split=split)
                ranked.append((-filled / steps * min(1.0, 0.8 + tiles / 40), each, plan))
    return [plan for *_, plan in sorted(ranked, key=lambda found: found[:2])[:12]]
