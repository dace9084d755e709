"""Criteria: how important an entry of a weight is. A criterion names the statistic it must observe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparseforge_core.errors import CurvatureUnavailable, NotFinite
from sparseforge_core.sparsity.patterns import all_finite
from sparseforge_core.specs import spec

Statistic = Literal["nothing", "curvature", "input_norms", "inverse_gram"]


class Criterion(ABC):
    """Importance of each entry of a weight `[..., out, in]`; larger is more worth keeping."""

    needs: ClassVar[Statistic] = "nothing"

    @abstractmethod
    def score(self, weight: Tensor, statistic: Tensor | None, *, looked: Tensor | None = None) -> Tensor:
        """Non-negative scores of the weight's shape; the mean of a statistic is that of `looked`, if given."""


@spec("magnitude-score")
class Magnitude(Criterion):
    """|W|."""

    def score(self, weight: Tensor, statistic: Tensor | None, *, looked: Tensor | None = None) -> Tensor:
        return weight.abs()


@spec("wanda-score")
class WandaScore(Criterion):
    """|W_ij| ||x_j||, `statistic` = l2 norm of each input over the calibration tokens, `[..., 1, in]` (Wanda)."""

    needs: ClassVar[Statistic] = "input_norms"

    def score(self, weight: Tensor, statistic: Tensor | None, *, looked: Tensor | None = None) -> Tensor:
        return weight.abs() * _present(statistic, self)


@spec("hessian-obd")
class HessianOBD(Criterion):
    """(H + eps) W^2 (paper, section 4.1), eps relative to the layer's mean curvature."""

    needs: ClassVar[Statistic] = "curvature"
    relative_eps: float = 1e-3

    def score(self, weight: Tensor, statistic: Tensor | None, *, looked: Tensor | None = None) -> Tensor:
        curvature = _present(statistic, self)
        return (curvature + self.relative_eps * _of(curvature, looked).mean()) * weight.square()


@spec("hessian-ratio")
class HessianRatio(Criterion):
    """|W| / sqrt(H + eps): what the published LLaMA script ranks by. It falls with curvature; for ablation only."""

    needs: ClassVar[Statistic] = "curvature"
    relative_eps: float = 1e-3

    def score(self, weight: Tensor, statistic: Tensor | None, *, looked: Tensor | None = None) -> Tensor:
        curvature = _present(statistic, self)
        eps = self.relative_eps * _of(curvature, looked).mean()
        return weight.abs() / (curvature + eps).clamp_min(1e-38).sqrt()


@spec("sparsegpt-score")
class SparseGPTScore(Criterion):
    """w_ij^2 / [H^-1]_jj, `statistic` = diagonal of the inverse of the damped input Gram matrix, `[..., 1, in]`.

    What removing an entry costs once the rest of its row has made up for it (SparseGPT, arXiv 2301.00774). Unlike there
    nothing is made up for: it is a score, to start from or to anneal by.
    """

    needs: ClassVar[Statistic] = "inverse_gram"

    def score(self, weight: Tensor, statistic: Tensor | None, *, looked: Tensor | None = None) -> Tensor:
        return weight.square() / _present(statistic, self)


def _present(statistic: Tensor | None, criterion: Criterion) -> Tensor:
    if statistic is None:
        raise CurvatureUnavailable(f"{type(criterion).__name__} needs {criterion.needs}, and none was observed")
    return statistic


def _of(everything: Tensor, looked: Tensor | None) -> Tensor:
    return everything if looked is None else looked


def standardize(
    scores: Tensor, *, log: bool, where: str = "a layer", looked: Tensor | None = None, known: Tensor | None = None
) -> Tensor:
    """Layer-wise z-scores (section 4.1), of the scores or of their logarithm.

    Raw products of curvature and weight are heavy-tailed: a few columns set sigma and the gaps inside groups
    vanish against the temperature. The logarithm keeps the order and makes the gaps comparable. Constant scores
    become zeros. `looked` is the part of the scores whose mean and spread are taken, if not all. With `known`
    (`observed`, of an earlier update) floor and sigma are those, and the mean, which no difference of z-scores shows,
    is that of these scores. Raises NotFinite, naming `where`, if a score is not finite.
    """
    s = scores.float()
    seen = s if looked is None else looked.float()
    mean = seen.mean() if known is None else known[1].float()
    if log:
        s = _log(s, mean)
        seen = s if looked is None else _log(seen, mean)
    if not all_finite(s):
        raise not_finite(where)
    spread = seen.std(correction=0) if known is None else known[2].float()
    return (s - seen.mean()) / (spread + 1e-6)


def _log(scores: Tensor, mean: Tensor) -> Tensor:
    return (scores + 1e-10 * mean + 1e-38).log()


def observed(scores: Tensor, curvature: Tensor | None, *, log: bool, known: Tensor | None = None) -> Tensor:
    """What another update may standardise by: mean curvature, mean score, deviation; float64 `[3]`.

    The deviation is that of the scores or of their logarithms, above the floor that `known` says, or their own mean.
    """
    s = scores.float()
    mean = s.mean()
    x = _log(s, mean if known is None else known[1].float()) if log else s
    h = mean.new_zeros(()) if curvature is None else curvature.float().mean()
    return torch.stack([h, mean, x.std(correction=0)]).double()


def not_finite(where: str) -> NotFinite:
    """The error for scores that nothing can be ranked by."""
    return NotFinite(f"{where}: a score is not finite; the curvature or weight behind it has diverged")
