"""Cases in which the fused column sweep and the plain one are compared; run by test_fused_sweep.py in the interpreter.

TRITON_INTERPRET=1 python tests/core/sparsity/sweep_cases.py [patterns ...]

Without the variable the kernel itself runs, on a GPU.
"""

from __future__ import annotations

import math
import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseforge_core.errors import PatternViolation
from sparseforge_core.methods import SparseGPT
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.sparsity import fused_sweep
from sparseforge_core.sparsity.fused_sweep import sweep_together
from sparseforge_core.sparsity.patterns import BLOCK_16, GroupPattern, Pattern, Unstructured, check_mask, nm
from sparseforge_core.sparsity.second_order import Factor, inverse_factor, sweep
from tests.interpreted import run_cases
from tests.tiny import sites_of, tiny_model, tokens

ON = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

PATTERNS: tuple[Pattern, ...] = (
    nm(2, 4),
    nm(4, 8),
    nm(1, 3),
    GroupPattern(rows=2, cols=4, keep=3),
    BLOCK_16,
    Unstructured(density=0.4),
    Unstructured(density=0.4, scope="matrix"),
)


def factor_of(inputs: int, seed: int, dead: tuple[int, ...] = ()) -> Factor:
    """Of inputs that depend on each other, some of them always zero."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inputs, inputs, generator=made) @ torch.randn(inputs, inputs, generator=made)
    x[:, list(dead)] = 0.0
    return inverse_factor((2.0 * x.T @ x).to(ON), 0.01, "here")


def weights_of(rows: tuple[int, ...], inputs: int, seed: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(out, inputs, generator=made).to(ON) for out in rows]


def compare(weights: list[Tensor], factor: Factor, pattern: Pattern, width: int) -> None:
    """Both ways: exact patterns, masks alike but for scores that rounding ties, weights alike where masks are."""
    found = sweep_together(weights, factor, pattern, width, on=ON)
    for weight, (new, keep) in zip(weights, found, strict=True):
        expected, kept = sweep(weight, factor, pattern, width)
        assert new.shape == weight.shape
        assert keep.dtype == torch.bool
        check_mask(keep, pattern, "a site")
        assert bool((new[~keep] == 0).all())
        same = (keep == kept).all(1)
        assert same.float().mean() >= 0.98, f"{pattern.name}: {int((~same).sum())} of {len(same)} rows differ"
        assert torch.allclose(new[same], expected[same], rtol=1e-4, atol=1e-5 * float(weight.abs().max()))


def patterns() -> None:
    """Every kind of pattern, blocks that divide the columns and blocks that do not, inputs that are always zero."""
    for pattern in PATTERNS:
        for width in (4, 20, 128) if ON == "cpu" else (20,):  # each width is compiled anew
            compare(weights_of((32, 16, 48), 48, seed=1), factor_of(48, 2, dead=(3, 17, 18)), pattern, width)


def properties() -> None:
    """Any sizes: rows that do not fill a program, columns that do not fill a block."""

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 9),
        st.integers(1, 40), st.sampled_from([nm(1, 2), nm(2, 4), nm(3, 4), nm(3, 8), Unstructured(density=0.5)]),
        st.sets(st.integers(0, 7), max_size=3),
    )  # fmt: skip
    def hold(seed: int, rows: list[int], groups: int, width: int, pattern: Pattern, dead: set[int]) -> None:
        inputs = 8 * groups
        compare(weights_of(tuple(rows), inputs, seed), factor_of(inputs, seed, tuple(dead)), pattern, width)

    hold()


def ties() -> None:
    """Equal scores go by place in both ways: inputs that do not depend on each other leave the weights as they are."""

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 10_000), st.sampled_from([nm(2, 4), nm(1, 4), nm(3, 8), BLOCK_16]), st.sampled_from([16, 24]))
    def hold(seed: int, pattern: Pattern, width: int) -> None:
        made = torch.Generator().manual_seed(seed)
        weight = torch.randint(-2, 3, (16, 48), generator=made).float() * (1 - 2 * torch.eye(16, 48))  # -0.0 too
        weight, factor = weight.to(ON), inverse_factor(torch.eye(48, device=ON) * 3.0, 0.01, "here")
        ((new, keep),) = sweep_together([weight], factor, pattern, width, on=ON)
        expected, kept = sweep(weight, factor, pattern, width)
        assert torch.equal(keep, kept)
        assert torch.equal(new, expected)
        assert torch.equal(new, weight * keep)

    hold()


def neighbours() -> None:
    """What stands beside a weight does not change it by a bit, where no product of matrices is involved."""
    factor, weights = factor_of(16, 5), weights_of((3, 8, 2), 16, seed=6)
    together = sweep_together(weights, factor, nm(2, 4), 16, on=ON)
    for weight, (new, keep) in zip(weights, together, strict=True):
        ((alone, kept),) = sweep_together([weight], factor, nm(2, 4), 16, on=ON)
        assert torch.equal(new, alone)
        assert torch.equal(keep, kept)


def not_finite() -> None:
    """A score that is not finite is refused, wherever it comes up."""
    for value, pattern in ((math.nan, nm(2, 4)), (math.inf, nm(2, 4)), (1e30, nm(2, 4)), (math.nan, BLOCK_16)):
        for place in (0, 13, 31):
            weight = torch.ones(16, 32, device=ON)
            weight[15, place] = value
            try:
                sweep_together([weight], factor_of(32, 7), pattern, 16, on=ON)
            except PatternViolation as error:
                assert "not finite" in str(error)  # noqa: PT017
            else:
                raise AssertionError(f"{value} at {place} was ranked")


def model() -> None:
    """SparseGPT on a model both ways: q, k, v and gate, up each in one sweep."""
    asked, swept = fused_sweep.refusal, fused_sweep._sweep
    tall: list[int] = []

    def counted(weight: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        tall.append(len(weight))
        return swept(weight, *rest)  # type: ignore[arg-type]

    tracks = []
    for on in (ON, "meta"):  # the kernel, and what it refuses
        fused_sweep.refusal = lambda *given, device=on, **_: asked(*given, on=device)  # type: ignore[assignment]
        fused_sweep._sweep = counted
        made = tiny_model("llama").to(ON)
        around = Surroundings(
            model=made,
            sites=assign_patterns(sites_of(made), nm(2, 4)),
            slorb=None,
            steps=0,
            calibration=lambda samples, length: list(tokens(samples, 16, seed=5).split(4)),
        )
        tracks.append(SparseGPT(samples=12, length=16).start(around))
    fused_sweep.refusal, fused_sweep._sweep = asked, swept
    ours, plain = tracks
    blocks = [[s for s in ours.sites if f".{i}." in s.name] for i in range(2)]
    rows = [[len(s.weight) for s in block] for block in blocks]
    assert tall == [n for q, k, v, o, gate, up, down in rows for n in (q + k + v, o, gate + up, down)]
    agreed = [float((s.mask.hard == t.mask.hard).float().mean()) for s, t in zip(ours.sites, plain.sites, strict=True)]
    assert sum(agreed) / len(agreed) >= 0.999, agreed


CASES = {
    "patterns": patterns, "properties": properties, "ties": ties, "neighbours": neighbours, "not-finite": not_finite,
    "model": model,
}  # fmt: skip

if __name__ == "__main__":
    fused_sweep.TILE = 4096
    run_cases(CASES)
