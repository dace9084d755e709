"""What a suite yields: measurements, the items behind them, and the circumstances."""

from __future__ import annotations

import math
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
