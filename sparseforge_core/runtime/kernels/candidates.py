"""Plans worth measuring for a shape and a number of rows, most promising first."""

from __future__ import annotations

from sparseforge_core.runtime.kernels.plans import BLOCK_BYTES, STAGE_ROW, Plan
from sparseforge_core.runtime.kernels.support import COLUMNS, ROWS

REGISTERS = 65536
"""Of one multiprocessor."""

ROOM = 226 * 1024
"""Bytes of shared memory that the blocks of threads of a multiprocessor divide among them."""


def bucket(rows: int) -> int:
    """The number of rows that a plan is made for: 1, 8, 16, 32 or 64, and 64 at a time beyond."""
    return 1 if rows == 1 else next((size for size in (8, 16, 32) if rows <= size), 64)


def candidates(out: int, inputs: int, rows: int, processors: int = 132) -> list[Plan]:
    """Plans that fit a multiprocessor, for a weight `[out, in]` and `rows` rows of x."""
    size = bucket(rows)
    found = _vector(inputs) if size == 1 else []
    if size <= 16:
        found += _stream(inputs, size)
    if size > 1:
        found += _tiles(out, inputs, size, max(1, -(-rows // size)), processors)
    return [plan for plan in dict.fromkeys(found) if plan.fits(inputs)]


def _vector(inputs: int) -> list[Plan]:
    blocks, found = -(-inputs // COLUMNS), []
    for warps in (4, 8, 11, 2, 16):
        if warps > blocks:
            continue
        for depth, registers in ((1, 80), (2, 128), (1, 64)):
            for tiles in (1, 2) if warps <= 4 else (1,):
                resident = REGISTERS // (registers * 32 * warps * tiles)
                if resident:
                    found.append(
                        Plan(kernel="gemv", rows=1, warps=warps, depth=depth, tiles=tiles, resident=min(resident, 24))
                    )
    return found


def _stream(inputs: int, size: int) -> list[Plan]:
    found = []
    for resident, parts in ((1, 1), (1, 2), (2, 2), (2, 4), (3, 3), (1, 3)):
        for warps in (4, 8, 12) if size == 1 else (4, 8):
            fixed = Plan(kernel="stream", rows=size, warps=warps, depth=0).shared(inputs) + 1024
            depth = min((ROOM // parts - fixed) // (BLOCK_BYTES + 16), 44) // warps * warps
            if depth > 0:
                found.append(Plan(kernel="stream", rows=size, warps=warps, depth=depth, resident=resident))
    return found


def _tiles(out: int, inputs: int, size: int, passes: int, processors: int) -> list[Plan]:
    """Those whose blocks of threads fill the multiprocessors in one to three waves, best filled first.

    Where shared memory is for two of them and one is resident, the next kernel's can fetch its weights meanwhile.
    """
    count, blocks, ranked = -(-out // ROWS), -(-inputs // COLUMNS), []
    for split in (1, 2, 4):
        for tiles in (2, 3, 4, 6, 8, 11, 12, 16):
            for resident, parts in ((1, 1), (1, 2), (2, 2)):
                stage = size * STAGE_ROW + tiles * BLOCK_BYTES
                depth = min((ROOM // parts - 1024) // stage, 6, -(-blocks // split))
                waves = -(-count // tiles) * split * passes / (processors * resident)
                if depth < 2 or split > blocks or waves > 3:
                    continue
                filled = waves / -(-waves // 1)
                for per_warp in (1, 2) if tiles % 2 == 0 and tiles > 2 else (1,):
                    plan = Plan(
                        kernel="tiles",
                        rows=size,
                        warps=tiles // per_warp,
                        depth=int(depth),
                        tiles=tiles,
                        split=split,
                        resident=resident,
                    )
                    ranked.append((-filled, plan))
    return [plan for _, plan in sorted(ranked, key=lambda pair: pair[0])[:28]]
