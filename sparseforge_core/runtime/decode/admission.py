"""How many rows a step may have: none for which weights that are only packed would be slower than dense ones."""

from __future__ import annotations

from sparseforge_core.runtime.decode.parts import Parts
from sparseforge_core.runtime.kernels.choices import LARGEST_OURS, WORST


def refusal(parts: Parts, rows: int) -> str | None:
    """Why a decode step of so many rows is not run in mode `decode`, or None.

    Up to 64 rows our kernels read the packed weight alone. Beyond, a weight in mode `decode` is unpacked for each
    product; that is refused where it is not measured to be within 1 % of dense over the products of a step.
    """
    unpacking = [product for product in parts.products if product.unpacks]
    if rows <= LARGEST_OURS or not unpacking:
        return None
    times = [product.times(rows) for product in unpacking]
    known = [pair for pair in times if pair is not None]
    dense, taken = sum(pair[0] for pair in known), sum(pair[1] for pair in known)
    if len(known) == len(times) and dense >= WORST * taken:
        return None
    how = f"took {taken / dense:.2f} times as long as dense ones" if known else "were not measured against dense ones"
    return (
        f"a step of {rows} rows: products in mode 'decode' {how} at this size; decode at most {LARGEST_OURS} rows at a "
        "time, or load with mode='throughput', which holds what larger batches need"
    )
