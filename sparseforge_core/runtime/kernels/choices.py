"""Which way a product takes, and what a weight must hold for it: decided from measurements, or by a stated default."""

from __future__ import annotations

import functools

import torch

from sparseforge_core.runtime.kernels import table
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.support import COLUMNS
from sparseforge_core.runtime.kernels.table import BUCKETS, Choice, Kind, Table

FEW = 64
"""Rows that are bound by reading the weights: no form beside the packed one is held for them."""

MARGIN = 1.02
"""How much faster than dense another way must be: two measurements of one product differ by about a percent."""

WORTH = 1.05
"""How many times faster a product must be somewhere for a form of 0.56 of a dense weight's bytes to be held for it."""

WORST = 0.99
"""Of dense: what a product may lose before a dense copy is held for it, or before a batch is refused."""

Forms = frozenset[Kind]
"""What is held of a weight beside its packed form: "dense", "cusparselt", both or neither."""

NONE: Forms = frozenset()
BOTH: Forms = frozenset({"dense", "cusparselt"})
FORMS: dict[tuple[bool, bool], Forms] = {
    (False, False): NONE,
    (True, False): frozenset({"dense"}),
    (False, True): frozenset({"cusparselt"}),
    (True, True): BOTH,
}
"""Whether there is a dense copy, and cuSPARSELt's form -> their names."""

ALWAYS: Forms = frozenset({"kernel", "expand"})
"""Ways that need the packed form alone."""


@functools.lru_cache(maxsize=8192)
def choose(out: int, inputs: int, rows: int, dtype: torch.dtype, device: int | None, forms: Forms = NONE) -> Choice:
    """The fastest measured way for `rows` rows, of those that the packed weight and its other forms allow.

    Without a device, as the committed table has it.
    """
    allowed = [
        choice
        for choice in table.line(out, inputs, rows, dtype, device)
        if choice.seconds is not None and choice.kind in ALWAYS | forms
    ]
    return min(allowed, key=_handicapped) if allowed else default(out, inputs, rows, forms)


def record(device: int, found: Table) -> None:
    """Add measurements to the table of a device; the next product looks at it again."""
    table.record(device, found)
    choose.cache_clear()


def _handicapped(choice: Choice) -> float:
    assert choice.seconds is not None
    return choice.seconds * (1.0 if choice.kind == "dense" else MARGIN)


@functools.cache
def default(out: int, inputs: int, rows: int, forms: Forms = NONE) -> Choice:
    """What is taken where nothing was measured: a dense copy for many rows, where one is held, else our kernel."""
    if rows > FEW and "dense" in forms:
        return Choice("dense")
    return Choice("kernel", candidates(out, inputs, rows)[0])


def against_dense(
    out: int, inputs: int, rows: int, dtype: torch.dtype, device: int | None, forms: Forms = NONE
) -> tuple[float, float] | None:
    """Seconds of the dense product and of the way taken; None where one of them was not measured."""
    known = table.line(out, inputs, rows, dtype, device)
    dense = next((choice.seconds for choice in known if choice.kind == "dense"), None)
    taken = choose(out, inputs, rows, dtype, device, forms).seconds
    return None if dense is None or taken is None else (dense, taken)


def large_sizes(out: int, inputs: int, dtype: torch.dtype, device: int | None) -> list[int]:
    """The numbers of rows beyond a few for which something was measured."""
    return [size for size in BUCKETS if size > FEW and table.line(out, inputs, size, dtype, device)]


def forms_for(out: int, inputs: int, dtype: torch.dtype, device: int | None) -> Forms:
    """What a weight holds for batches beyond a few rows in mode `throughput`: only forms that are worth their memory.

    cuSPARSELt's form where some size takes WORTH less with it than by the packed weight alone, a dense copy where
    without it some size would take more than 1 % longer than dense. Both where nothing was measured, as nothing is then
    known of either.
    """
    sizes = large_sizes(out, inputs, dtype, device)
    if not sizes:
        return BOTH
    found: set[Kind] = set()
    for size in sizes:
        alone = choose(out, inputs, size, dtype, device).seconds
        best = choose(out, inputs, size, dtype, device, frozenset({"cusparselt"}))
        if best.kind == "cusparselt" and (alone is None or best.seconds is None or alone >= WORTH * best.seconds):
            found.add("cusparselt")
        times = against_dense(out, inputs, size, dtype, device, frozenset({"cusparselt"}))
        if times is not None and times[0] < WORST * times[1]:
            found.add("dense")
    return frozenset(found)


def held_bytes(out: int, inputs: int, forms: Forms = NONE, itemsize: int = 2) -> int:
    """Bytes of a 2:4 weight on a GPU: half its values and two bits for each, inputs filled up to 256; and its forms."""
    dense = out * inputs * itemsize
    filled = out * -(-inputs // COLUMNS) * COLUMNS
    packed = filled * itemsize // 2 + filled // 8
    compressed = out * inputs * itemsize // 2 + out * inputs // 8
    return packed + ("dense" in forms) * dense + ("cusparselt" in forms) * compressed
