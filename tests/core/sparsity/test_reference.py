"""The fast mask update against the float64 reference, over ten thousand random groups of every pattern."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from sparseforge_core.sparsity import reference
from sparseforge_core.sparsity.criteria import observed, standardize
from sparseforge_core.sparsity.gate import AnnealPoint, GateForm, hard_target, project, update_mask
from sparseforge_core.sparsity.patterns import BLOCK_16, GroupPattern, nm
from sparseforge_core.sparsity.reference import Constants

GROUPS = 10_000
PATTERNS = [nm(2, 4), nm(4, 8), nm(1, 4), nm(6, 8)]

SCHEDULE = [
    Constants(temperature=1.0, structure_mix=0.0, mid_push=0.05, mask_rate=0.1),
    Constants(temperature=0.3, structure_mix=0.4, mid_push=0.2, mask_rate=0.5),
    Constants(temperature=0.05, structure_mix=0.9, mid_push=0.3, mask_rate=0.3),
]
"""Three updates, early, middle and late, with steps large enough that every term moves the masks."""


def scores_of(pattern: GroupPattern, groups: int) -> list[torch.Tensor]:
    """Heavy-tailed scores that change from update to update, as `[groups, size]` in float64."""
    generator = torch.Generator().manual_seed(pattern.keep * 1000 + pattern.cols)
    size = pattern.rows * pattern.cols
    first = torch.randn(groups, size, generator=generator, dtype=torch.float64).mul(2.0).exp()
    noise = [torch.randn(groups, size, generator=generator, dtype=torch.float64).mul(0.3).exp() for _ in SCHEDULE]
    return [first * n for n in noise]


def fast(
    scores: list[torch.Tensor], keep: int, constants: list[Constants], log: bool, by_the_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a track does to one site, in the dtype of the product: float32."""
    mask = torch.ones(scores[0].shape)
    hard = torch.ones_like(mask, dtype=torch.bool)
    known: torch.Tensor | None = None
    for s, at in zip(scores, constants, strict=True):
        z = standardize(s, log=log, known=known)
        known = observed(s, None, log=log, known=known) if by_the_last else None
        values: dict[str, Any] = dataclasses.asdict(at)
        form = GateForm(**{name: values.pop(name) for name in ("threshold", "order", "push_target")})
        mask = update_mask(mask, z, hard_target(z, keep), keep, AnnealPoint(**values), form)
        hard = project(mask, z, keep)
    return mask, hard


def assert_agree(
    pattern: GroupPattern, groups: int, constants: list[Constants], *, log: bool, by_the_last: bool = False
) -> None:
    scores = scores_of(pattern, groups)
    given = [s.numpy() for s in scores]
    m, m_hat = reference.anneal(given, pattern.keep, constants, log=log, by_the_last=by_the_last)
    mask, hard = fast(scores, pattern.keep, constants, log, by_the_last)
    # Relative to the scale of a mask, which is 1: float32 cannot say more of an entry near 0.
    assert float((mask.double() - torch.from_numpy(m)).abs().max()) < TOLERANCE
    assert np.array_equal(hard.numpy(), m_hat.astype(bool))


TOLERANCE = 1e-6


@pytest.mark.parametrize(
    "pattern",
    [
        *(pytest.param(pattern, id=pattern.name) for pattern in PATTERNS),
        pytest.param(nm(20, 40), id="unstructured, rows of 40"),
        pytest.param(BLOCK_16, marks=pytest.mark.slow, id="block-16"),
    ],
)
def test_ten_thousand_groups_agree_with_the_reference(pattern: GroupPattern) -> None:
    assert_agree(pattern, GROUPS, SCHEDULE, log=True)


@pytest.mark.parametrize("log", [True, False])
def test_updates_by_the_statistics_of_the_last_agree_with_the_reference(log: bool) -> None:
    assert_agree(nm(2, 4), 500, SCHEDULE, log=log, by_the_last=True)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("threshold", ["midpoint", "nth", "exact-sum"])
@pytest.mark.parametrize(
    ("order", "push_target"), [("blend-then-push", "scores"), ("blend-then-push", "gate"), ("push-only", "scores")]
)
def test_every_reading_of_the_text_agrees_with_the_reference(
    log: bool, threshold: str, order: str, push_target: str
) -> None:
    changed = [dataclasses.replace(c, threshold=threshold, order=order, push_target=push_target) for c in SCHEDULE]
    assert_agree(nm(2, 4), 100, changed, log=log)
