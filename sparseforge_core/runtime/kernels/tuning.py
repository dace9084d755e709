"""Measuring the ways to compute a product on this machine, for the table that `choices` reads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime.kernels import choices, cusparselt, table
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.choices import FEW
from sparseforge_core.runtime.kernels.expanding import expand
from sparseforge_core.runtime.kernels.fragments import to_fragments
from sparseforge_core.runtime.kernels.measure import COLD, seconds
from sparseforge_core.runtime.kernels.nvrtc import compile_ahead
from sparseforge_core.runtime.kernels.plans import Plan
from sparseforge_core.runtime.kernels.rehearsal import random_packed
from sparseforge_core.runtime.kernels.support import check_memory, supported
from sparseforge_core.runtime.kernels.table import Choice, Table

log = logging.getLogger(__name__)

Fragments = tuple[Tensor, Tensor]

CUSPARSELT_FROM = 65
"""Rows below which cuSPARSELt is not measured: there it never won."""

LARGE_ROWS = (96, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Rows that are measured to decide what a weight holds in mode "throughput"; between them the next larger decides."""

MOST = 256
"""Weights that are rotated: those of less than 0.2 MB may be found in the cache, but are launched rather than read."""

TOLERANCE = 2e-2
"""Largest relative error against the dense product of the same type; both round each output once."""


def tune(
    shapes: Iterable[tuple[int, int]], dtype: torch.dtype, rows: Iterable[int], *, device: int = 0, copies: bool = False
) -> Table:
    """Measure what the table lacks for weights `[out, in]` and numbers of rows, write it down, and return it.

    Args:
        shapes: of the weights; random ones are measured, so none need be loaded.
        dtype: of values and x.
        rows: of x; each stands for its bucket.
        device: which GPU.
        copies: measure cuSPARSELt too, for mode "throughput".

    Raises ExportError if a shape is not supported, if the device has no room to try it, or if a product is wrong.
    """
    found: Table = {}
    for out, inputs in dict.fromkeys(shapes):
        why = supported(torch.device("cuda", device), dtype, (out, inputs))
        if why is not None:
            raise ExportError(why)
        missing = [
            size
            for size in dict.fromkeys(table.bucket(n) for n in rows)
            if not _covers(table.table(device).get(table.key(out, inputs, size, dtype), ()), size, copies=copies)
        ]
        if missing:
            needed = trial_bytes(out, inputs, dtype, max(missing), copies=copies)
            check_memory(needed, torch.device("cuda", device), f"measuring products {out}x{inputs}")
            with torch.cuda.device(device), torch.no_grad():
                trial = _Trial(out, inputs, dtype)
                for size in missing:
                    found[table.key(out, inputs, size, dtype)] = trial.measure(size, copies=copies)
    if found:
        choices.record(device, found)
    return found


def _covers(known: tuple[Choice, ...], rows: int, *, copies: bool) -> bool:
    kinds = {choice.kind for choice in known}
    compressed = not copies or rows < CUSPARSELT_FROM or "cusparselt" in kinds
    return bool(kinds & choices.ALWAYS) and "dense" in kinds and compressed


def counts(out: int, inputs: int) -> tuple[int, int]:
    """How many packed weights of a shape are rotated, and how many dense ones, so that none is found in the cache."""
    packed = min(MOST, max(2, -(-COLD // (out * inputs * 9 // 8))))
    return packed, min(packed, max(2, -(-COLD // (out * inputs * 2))))


def trial_bytes(out: int, inputs: int, dtype: torch.dtype, rows: int, *, copies: bool) -> int:
    """Memory of a trial: its weights in every form, one more that is unpacked, x, and three outputs."""
    packed, dense = counts(out, inputs)
    forms = choices.FORMS[True, copies]
    held = dense * choices.held_bytes(out, inputs, forms, dtype.itemsize)
    held += (packed - dense + 1) * choices.held_bytes(out, inputs, itemsize=dtype.itemsize)
    return held + (out * inputs + rows * (inputs + 3 * out)) * dtype.itemsize


class _Trial:
    """Weights of one shape."""

    def __init__(self, out: int, inputs: int, dtype: torch.dtype) -> None:
        self.out, self.inputs, self.dtype = out, inputs, dtype
        packed, dense = counts(out, inputs)
        self.fragments = [to_fragments(*random_packed(out, inputs, dtype, "cuda")) for _ in range(packed)]
        self.dense = [expand(*pair, (out, inputs)) for pair in self.fragments[:dense]]

    @functools.cached_property
    def compressed(self) -> list[Tensor]:
        """Weights as cuSPARSELt wants them."""
        return [cusparselt.compress(weight) for weight in self.dense]

    def measure(self, rows: int, *, copies: bool) -> tuple[Choice, ...]:
        """The fastest of each kind for `rows` rows."""
        x = torch.randn(rows, self.inputs, dtype=self.dtype, device="cuda")
        exact = torch.nn.functional.linear(x, self.dense[0])
        y = torch.empty_like(exact)
        plans = candidates(self.out, self.inputs, rows)
        shape = (self.out, self.inputs, self.dtype)
        compile_ahead([(plan.kernel, plan.constants(*shape)) for plan in plans], x.device.index)
        found = [self._best([self._kernel(plan, x, y, exact) for plan in plans])]
        if rows > FEW:
            expanded = [functools.partial(self._expanded, x, pair) for pair in self.fragments]
            found.append(Choice("expand", seconds=self._seconds(expanded)))
        dense = [functools.partial(torch.nn.functional.linear, x, weight) for weight in self.dense]
        found.append(Choice("dense", seconds=self._seconds(dense)))
        if copies and rows >= CUSPARSELT_FROM:
            tried = self._best([self._cusparselt(n, x, exact) for n in range(cusparselt.ALGORITHMS)])
            found.append(tried or Choice("cusparselt"))
        kept = tuple(choice for choice in found if choice is not None)
        log.info("%dx%d, %d rows: %s", self.out, self.inputs, rows, kept)
        return kept

    def _kernel(self, plan: Plan, x: Tensor, y: Tensor, exact: Tensor) -> Choice:
        y.fill_(float("nan"))
        plan.run(x, *self.fragments[0], None, y)
        _check(y, exact, plan)
        calls = [functools.partial(plan.run, x, *pair, None, y) for pair in self.fragments]
        return Choice("kernel", plan, seconds=self._seconds(calls))

    def _cusparselt(self, algorithm: int, x: Tensor, exact: Tensor) -> Choice | None:
        try:
            y = cusparselt.run(x, self.compressed[0], None, self.out, algorithm)
        except ExportError as e:
            log.debug("algorithm %d: %s", algorithm, e)
            return None
        _check(y, exact, f"cuSPARSELt algorithm {algorithm}")
        calls = [functools.partial(cusparselt.run, x, w, None, self.out, algorithm) for w in self.compressed]
        return Choice("cusparselt", algorithm=algorithm, seconds=self._seconds(calls))

    def _expanded(self, x: Tensor, pair: Fragments) -> Tensor:
        return torch.nn.functional.linear(x, expand(*pair, (self.out, self.inputs)))

    def _seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        first = seconds(calls[:1], replays=1, least=1)
        return seconds(calls, replays=5, least=max(1, min(24, int(1e-3 / first))))

    @staticmethod
    def _best(found: Sequence[Choice | None]) -> Choice | None:
        measured = [choice for choice in found if choice is not None]
        return min(measured, key=lambda choice: choice.seconds or 0.0, default=None)


def _check(y: Tensor, exact: Tensor, what: object) -> None:
    wrong = float((y.float() - exact.float()).norm() / exact.float().norm())
    if not wrong < TOLERANCE:
        raise ExportError(f"the product of {what} differs from the dense one by {wrong:.3g}; nothing was measured")
