"""What a suite yields: measurements, the items behind them, and the circumstances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SuiteResult:
    """Measurements as JSON objects, one record per item, and what else defines the numbers."""

    measurements: tuple[dict[str, Any], ...]
    items: tuple[dict[str, Any], ...]
    context: dict[str, Any]


def measurement(
    metric: str, value: float | None, stderr: float | None, n: int, detail: dict[str, Any]
) -> dict[str, Any]:
    """One measurement; a value that is missing or not finite is recorded as diverged, never dropped."""
    if value is None or not math.isfinite(value):
        return {"metric": metric, "value": None, "stderr": None, "n": n, "detail": {**detail, "status": "diverged"}}
    error = stderr if stderr is not None and math.isfinite(stderr) else None
    return {"metric": metric, "value": value, "stderr": error, "n": n, "detail": detail}


def mean_and_error(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and its standard error; both None if an item has no answer (the model diverged)."""
    known = [value for value in values if value is not None]
    if len(known) != len(values) or not known:
        return None, None
    mean = sum(known) / len(known)
    if len(known) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1) / len(known))
