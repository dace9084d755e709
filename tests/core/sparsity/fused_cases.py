"""Cases in which fused kernels and plain torch are compared; run by test_fused.py in Triton's interpreter.

TRITON_INTERPRET=1 python tests/core/sparsity/fused_cases.py [every-way ...]
DEVICE=cuda python tests/core/sparsity/fused_cases.py [every-way ...]
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from sparseforge_core.models.heads import split
from sparseforge_core.objective import Distill, TaskOnly, batch, batch_losses
from sparseforge_core.objective import fused as losses_fused
from sparseforge_core.sparsity import fused
from sparseforge_core.sparsity.criteria import Criterion, HessianOBD, Magnitude, WandaScore, observed, standardize
from sparseforge_core.sparsity.fused import Entry, Way, update_masks
from sparseforge_core.sparsity.gate import AnnealPoint, GateForm, hard_target, project, update_mask
from sparseforge_core.sparsity.masking import PackedMask, SoftMask
from sparseforge_core.sparsity.patterns import check_mask, nm
from sparseforge_core.sparsity.report import mask_summary
from tests.interpreted import run_cases
from tests.tiny import tiny_model, tokens

DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))
ROUNDING = 2e-6 if DEVICE.type == "cpu" else 2e-5
"""How far masks in float32 may be apart; a GPU's own logarithm is good to 2^-22."""

AT = AnnealPoint(temperature=0.3, structure_mix=0.4, mid_push=0.2, mask_rate=0.1)
PLAIN = Way(at=AT, form=GateForm(), log=True, softness=1.0, criterion=HessianOBD())


def entry(
    shape: tuple[int, ...],
    keep: int,
    size: int,
    *,
    transposed: bool,
    packed: bool,
    criterion: Criterion,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Entry:
    """A site in the middle of an annealing."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=made).to(DEVICE)
    soft = (PackedMask if packed else SoftMask)(weight, transposed=transposed, slorb=None)
    m, hard = (torch.rand(shape, generator=made).to(DEVICE) for _ in range(2))
    soft.move(soft.matrix(m), soft.matrix(hard > 0.5))
    statistic = scores = None
    if isinstance(criterion, HessianOBD):
        statistic = torch.randn(shape, generator=made).square().to(DEVICE, dtype)
    elif not isinstance(criterion, Magnitude):
        scores = torch.rand(shape, generator=made).to(DEVICE) + 0.1
    return Entry(weight=weight, soft=soft, pattern=nm(keep, size), statistic=statistic, scores=scores, scale=3.0)


def plainly(site: Entry, way: Way, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The update by `gate.py`, as the method does it site by site: share of flips, and what it could standardise by."""
    soft, pattern = site.soft, site.pattern
    statistic = None if site.statistic is None else soft.matrix(site.statistic.float() * site.scale)

    def looked(x: Tensor) -> Tensor:
        return soft.matrix(x).flatten(0, -2)[:: way.rows]

    if site.scores is not None:
        scores = soft.matrix(site.scores)
    else:
        seen = None if statistic is None else looked(statistic)
        scores = way.criterion.score(soft.matrix(site.weight), statistic, looked=seen if known is None else known[:1])
    z = standardize(scores, log=way.log, looked=looked(scores), known=known)
    found = observed(scores, statistic, log=way.log, known=known)
    z = pattern.groups(z)
    keep = pattern.keep_of(z.shape[-1])
    mask, old = pattern.groups(soft.matrix(soft.mask)), pattern.groups(soft.matrix(soft.hard))
    target = old if way.fixed_target else hard_target(z, keep, old, way.margin)
    new = soft.rounded(update_mask(mask, z, target, keep, way.at, way.form))
    hard = project(new, z, keep) if way.project_on == "mask" else target
    flips = (hard != old).float().mean()
    shape = soft.matrix(site.weight).shape
    soft.move(pattern.ungroup(new, shape), pattern.ungroup(hard, shape))
    soft.set_view(way.softness, hard=way.quench_view)
    return flips, found


def compare(entries: list[Entry], way: Way, known: Tensor | None = None) -> Tensor:
    """Both ways from one state: masks to rounding, hard masks equal except where m and z are as good as tied.

    Returns what the next update may standardise by.
    """
    others = copy.deepcopy(entries)
    gathered = torch.zeros(len(entries), 3, dtype=torch.float64, device=DEVICE)
    reports = update_masks(entries, way, known=known, gathered=gathered).cpu()
    flips = reports[:, 0]
    plain = [plainly(other, way, None if known is None else known[i]) for i, other in enumerate(others)]
    expected, found = (torch.stack(parts) for parts in zip(*plain, strict=True))
    expected = expected.cpu()
    if way.rows == 1:
        assert torch.allclose(gathered, found, rtol=1e-4), (gathered, found)
    for site, other in zip(entries, others, strict=True):
        if isinstance(site.soft, PackedMask):
            site.soft.set_view(way.softness)
        apart = (site.soft.mask - other.soft.mask).abs().max()
        assert apart <= (1.01 / 32767 if isinstance(site.soft, PackedMask) else ROUNDING), float(apart)
        differing = site.soft.hard != other.soft.hard
        assert differing.float().mean() <= 2e-3, int(differing.sum())
        assert ((site.soft.view - other.soft.view).abs()[~differing] <= 5e-5).all()
        if way.project_on == "mask" or not way.fixed_target:
            check_mask(site.soft.matrix(site.soft.hard), site.pattern, "a site")
    assert (flips - expected).abs().max() <= 2e-3
    said = mask_summary((site.soft.mask, site.soft.hard) for site in entries)
    sizes = torch.tensor([site.weight.numel() for site in entries])
    means = (reports[:, 1:] * sizes[:, None]).sum(0) / sizes.sum()
    assert torch.allclose(means, torch.tensor([said["mask/mid_fraction"], said["mask/soft_hard_gap"]]), atol=1e-5)
    return gathered


def by_the_last() -> None:
    """An update that is standardised by what the one before it gathered, of weights that have moved since."""
    for transposed, packed, log in itertools.product((False, True), repeat=3):
        for criterion in (HessianOBD(), Magnitude(), WandaScore()):
            common: dict[str, Any] = {"transposed": transposed, "packed": packed, "criterion": criterion}
            way = dataclasses.replace(PLAIN, log=log, criterion=criterion)
            entries = [entry(shape, 2, 4, **common, seed=i) for i, shape in enumerate([(16, 32), (2, 16, 16)])]
            known = None
            for _ in range(2):
                known = compare(entries, way, known)
                for site in entries:
                    (site.weight if site.scores is None else site.scores).mul_(1.1).add_(0.01)


def every_way() -> None:
    """Each option of the update, with each size of group and orientation, sites of several sizes in one launch."""
    forms = [
        {},
        {"form": GateForm(threshold="nth", order="push-only", push_target="gate"), "softness": 0.3},
        {"margin": 0.5, "log": False, "project_on": "scores"},
        {"fixed_target": True, "quench_view": "threshold", "softness": 0.6},
        {"rows": 4, "softness": 0.0},
    ]
    sizes = itertools.cycle([(1, 2), (2, 4), (3, 4), (3, 8)])
    for i, (changes, transposed) in enumerate(itertools.product(forms, (False, True))):
        (keep, size), packed = next(sizes), i % 3 == 0 and "quench_view" not in changes
        criterion: Criterion = Magnitude() if i == 7 else HessianOBD()
        common: dict[str, Any] = {"transposed": transposed, "packed": packed, "criterion": criterion}
        dtype = torch.bfloat16 if packed else torch.float32
        shapes = [(32, 48), (3, 16, 16)]
        entries = [entry(shape, keep, size, **common, seed=i, dtype=dtype) for shape in shapes]
        compare(entries, dataclasses.replace(PLAIN, criterion=criterion, **changes))
    for transposed in (False, True):
        site = entry((16, 32), 9, 16, transposed=transposed, packed=False, criterion=HessianOBD())
        compare([site], PLAIN)


def whole_tiles() -> None:
    """Sites of which every program has all its groups: nothing is asked before it is read."""
    for transposed, packed in itertools.product((False, True), repeat=2):
        common: dict[str, Any] = {"transposed": transposed, "packed": packed, "criterion": HessianOBD()}
        entries = [entry(shape, 2, 4, **common, seed=i) for i, shape in enumerate([(32, 64), (64, 64)])]
        assert fused._plan_of(entries, 1).even
        compare(entries, PLAIN)


def properties() -> None:
    """Any point of the annealing, any state."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    share = st.floats(0, 1, width=32, allow_subnormal=False)  # as a kernel is given it

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(0, 10_000), st.floats(0.0625, 2.0, width=32), share, share, share, st.booleans(), share,
        st.sampled_from([0.0, 0.4]), st.booleans(),
    )  # fmt: skip
    def hold(
        seed: int, temperature: float, mix: float, push: float, rate: float, packed: bool, softness: float,
        margin: float, transposed: bool,
    ) -> None:  # fmt: skip
        at = AnnealPoint(temperature=temperature, structure_mix=mix, mid_push=push, mask_rate=rate)
        site = entry((16, 16), 2, 4, transposed=transposed, packed=packed, criterion=HessianOBD(), seed=seed)
        compare([site], dataclasses.replace(PLAIN, at=at, softness=softness, margin=margin))

    hold()


def not_finite() -> None:
    """A site with a score that is not finite says so, and its groups stay as they were; its neighbour moves."""
    common: dict[str, Any] = {"transposed": False, "packed": False, "criterion": HessianOBD()}
    bad, good = entry((16, 16), 2, 4, **common), entry((16, 16), 2, 4, **common)
    bad.weight[3, 5] = math.nan
    before = copy.deepcopy(bad.soft)
    flips = update_masks([bad, good], PLAIN)[:, 0]
    assert bool(flips.isnan()[0])
    assert not bool(flips.isnan()[1])
    assert torch.equal(bad.soft.mask, before.mask)
    assert torch.equal(bad.soft.hard, before.hard)


def averages() -> None:
    """The running squares of all sites in one launch."""
    for kept_as in (torch.float32, torch.bfloat16):
        made = [
            (torch.rand(shape).to(DEVICE, kept_as), torch.randn(shape).to(DEVICE))
            for shape in [(16, 16), (48, 64), (3, 16, 32)]
        ]
        others = copy.deepcopy(made)
        fused.average_squares(made, 0.98)
        for (average, _), (other, gradient) in zip(made, others, strict=True):
            fused.average_square(other, gradient, 0.98)
            assert torch.allclose(average.float(), other.float(), rtol=1e-2 if kept_as == torch.bfloat16 else 1e-6)


def losses() -> None:
    """Losses and gradients of the head against those of the chunks that compute logits twice."""
    losses_fused.BLOCK, losses_fused.CHUNK = 16, 64 * 10
    model, teacher = tiny_model("llama").to(DEVICE), tiny_model("llama", seed=1).requires_grad_(False).to(DEVICE)
    asked = batch.refusal
    batch.refusal = lambda *given: asked(*given, on=DEVICE.type)
    taught = split(teacher)
    cases = (Distill(), 64), (Distill(temperature=2.0, task_weight=1.0, kl_weight=0.7), 48), (TaskOnly(), 48)
    for objective, losses_fused.ALIGNED in cases:  # a vocabulary of 64 gets 32 logits more to be a multiple of 48
        found = []
        for fused_too in (False, True):
            parts = dataclasses.replace(split(model), fused=fused_too)
            assert (batch.refusal(parts, taught, objective) is None) is fused_too
            model.zero_grad()
            got = batch_losses(parts, taught, objective, tokens().to(DEVICE))
            (0.5 * got.total).backward()
            found.append((got, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        (plain, expected), (ours, gradients) = found
        assert torch.allclose(ours.total, plain.total)
        assert torch.allclose(ours.task, plain.task)
        assert (ours.kl is None) == (plain.kl is None)
        for one, other in zip(gradients, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


CASES = {
    "every-way": every_way, "by-the-last": by_the_last, "whole-tiles": whole_tiles, "properties": properties,
    "not-finite": not_finite, "averages": averages, "losses": losses,
}  # fmt: skip

if __name__ == "__main__":
    fused.TILE, fused.REPEAT, fused.LOOK = 256, 4, 256
    run_cases(CASES)
