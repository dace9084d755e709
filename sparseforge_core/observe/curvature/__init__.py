"""Estimators of diag(H), the curvature of the loss in the effective weights, by their kind.

| kind | needs | estimates |
|---|---|---|
| fisher | the step's own gradient (free) | E[g g], g of the whole batch |
| adam-second-moment | the optimizer (free) | the same, as Adam averages it |
| micro-batch-fisher | a forward and backward more | E[g g], g of each micro-batch |
| gauss-newton-bartlett | the same, with sampled labels | diagonal of the Gauss-Newton matrix |
| kfac-diagonal | the same; matrices only | its factored approximation |
| finite-difference | two forwards and backwards a probe | diagonal of the Hessian |
| hutchinson | double backward, eager attention, no sharding | the same |

An estimator that cannot answer raises CurvatureUnavailable naming the sites; none falls back to another.
"""

from __future__ import annotations

from sparseforge_core.observe.curvature.base import Batch, Curvature, CurvatureAverage, Estimate
from sparseforge_core.observe.curvature.first_order import AdamSecondMoment, Fisher, MicroBatchFisher
from sparseforge_core.observe.curvature.gauss_newton import GaussNewtonBartlett, KFACDiagonal
from sparseforge_core.observe.curvature.second_order import FiniteDifference, Hutchinson

__all__ = [
    "ESTIMATORS",
    "AdamSecondMoment",
    "Batch",
    "Curvature",
    "CurvatureAverage",
    "Estimate",
    "FiniteDifference",
    "Fisher",
    "GaussNewtonBartlett",
    "Hutchinson",
    "KFACDiagonal",
    "MicroBatchFisher",
]

ESTIMATORS: dict[str, type[Curvature]] = {
    str(getattr(cls, "kind")): cls  # noqa: B009 (`kind` is set by @spec)
    for cls in (
        Fisher,
        MicroBatchFisher,
        AdamSecondMoment,
        GaussNewtonBartlett,
        KFACDiagonal,
        FiniteDifference,
        Hutchinson,
    )
}
