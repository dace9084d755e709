"""How many rows a step may have: none for which 2:4 weights were measured to be slower than dense ones."""

from __future__ import annotations

from sparseforge_core.runtime.decode.parts import Parts
from sparseforge_core.runtime.kernels.choices import FEW, WORST


def refusal(parts: Parts, rows: int) -> str | None:
    """Why a decode step of so many rows is not run, or None.

    It is refused where its products, with the forms that their weights hold, were measured to take more than 1 % longer
    than dense ones. Up to 64 rows are always run.
    """
    times = [known for product in parts.products if (known := product.times(rows)) is not None]
    dense, taken = sum(pair[0] for pair in times), sum(pair[1] for pair in times)
    if rows <= FEW or dense >= WORST * taken:
        return None
    return (
        f"a step of {rows} rows: its products took {taken / dense:.2f} times as long as dense ones at this size; "
        f"decode at most {FEW} rows at a time, or load with mode='throughput', which holds what larger batches need"
    )
