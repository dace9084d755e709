"""The rows of a stage: what training and machine say of themselves, and the file that says it."""

from __future__ import annotations

import math
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from sparseforge_core import measured, specs
from sparseforge_core.identity import cell_key
from sparseforge_core.models.sites import Coverage
from sparseforge_core.recipe import Cell, Recipe
from sparseforge_core.sparsity.masking import Branch
from sparseforge_core.train.loop import Outcome

STORED_BYTES = 2
"""Of a value of a side branch at inference (bfloat16)."""


def train_rows(
    recipe: Recipe,
    cover: Coverage,
    outcome: Outcome,
    branches: dict[str, Branch],
    gap: float,
    findings: dict[str, float],
) -> list[dict[str, Any]]:
    """Everything that a finished training says; `gap` is the last mean |m - m_hat|, NaN where there was none."""
    values: dict[str, float] = {
        "extra_parameters": sum(branch.cost.parameters for branch in branches.values()),
        "extra_bytes": sum(branch.cost.parameters for branch in branches.values()) * STORED_BYTES,
        "extra_flops_per_token": sum(branch.cost.flops for branch in branches.values()),
        "tokens": recipe.train.tokens,
    }
    if recipe.train.steps:
        values |= {
            "final_loss": outcome.final_loss,
            "train_seconds": outcome.seconds,
            "tokens_per_second": recipe.train.tokens / max(outcome.seconds, 1e-9),
        }
    if math.isfinite(gap):
        values["soft_hard_gap"] = gap
    values |= findings
    return facts(recipe, cover) + [row(name, float(value)) for name, value in values.items()]


def facts(recipe: Recipe, cover: Coverage) -> list[dict[str, Any]]:
    """What is masked, which no training changes."""
    about = {"family": cover.family, "included": cover.included, "excluded": cover.excluded}
    return [
        row("coverage", cover.share if recipe.pattern else 0.0, about),
        row("masked_parameters", float(cover.masked if recipe.pattern else 0)),
        row("total_parameters", float(cover.total)),
    ]


def row(metric: str, value: float | None, detail: dict[str, Any] | None = None) -> dict[str, Any]:
    """A measurement of one thing; a value of None says that it diverged."""
    return {"metric": metric, "value": value, "stderr": None, "n": 1, "detail": detail or {}}


def context_of(device: torch.device) -> dict[str, Any]:
    """The machine and the libraries behind a measurement."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": name,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def write_stage(
    directory: Path,
    cell: Cell,
    stage: str,
    suite: object | None,
    rows: list[dict[str, Any]],
    context: dict[str, Any],
    *,
    diverged: str | None = None,
) -> Path:
    """Write the measurements file of a stage; `suite` is its specification, None of a training."""
    body = {
        "cell": cell_key(cell),
        "stage": stage,
        "suite": None if suite is None else specs.encode(suite, omit_defaults=False),
        "context": context,
        "measurements": rows,
    }
    if diverged is not None:
        body["diverged"] = diverged
    return measured.write(directory, body)
