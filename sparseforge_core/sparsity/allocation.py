"""Sharing a density out: other patterns for some sites, with the recipe's overall density kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparseforge_core.errors import RecipeError
from sparseforge_core.sparsity.patterns import GroupPattern, Pattern, Unstructured


def allocate(pattern: Pattern, wanted: Sequence[float], sizes: Sequence[int]) -> list[Pattern]:
    """A pattern of the same form for each site, near its `wanted` density; `sizes` are the sites' entries.

    The densities are first shifted together so that their mean, weighted by size, is the pattern's. Unstructured
    sparsity takes them as they are. Groups keep whole numbers, 1 to M - 1 of M: all are rounded down, and what is left
    of the budget goes one by one to the largest remainders that it still pays for, so the overall density is never
    above the recipe's, and equal to it where the sites are of one size. Raises RecipeError if an unstructured density
    leaves (0, 1).
    """
    total = sum(sizes)
    mean = sum(density * size for density, size in zip(wanted, sizes, strict=True)) / total
    shifted = [density + pattern.density - mean for density in wanted]
    if isinstance(pattern, Unstructured):
        if not all(0.0 < density < 1.0 for density in shifted):
            raise RecipeError(
                f"an allocation asks for densities from {min(shifted):.3f} to {max(shifted):.3f}; "
                "choose a smaller spread"
            )
        return [replace(pattern, density=density) for density in shifted]
    if isinstance(pattern, GroupPattern):
        group = pattern.rows * pattern.cols
        keeps = _whole([density * group for density in shifted], sizes, group, pattern.keep * total)
        return [replace(pattern, keep=keep) for keep in keeps]
    raise RecipeError(f"pattern {pattern.name}: its density cannot be shared out; use N:M, a block or unstructured")


def _whole(wanted: Sequence[float], sizes: Sequence[int], group: int, budget: int) -> list[int]:
    """Whole numbers in [1, group - 1] near `wanted` whose sum, weighted by size, is at most `budget`."""
    keeps = [min(max(int(value + 1e-9), 1), group - 1) for value in wanted]
    left = budget - sum(keep * size for keep, size in zip(keeps, sizes, strict=True))

    def lacking(site: int) -> float:
        return wanted[site] - keeps[site]

    while left < 0:  # floors were lifted to 1: take from those that are furthest above what they asked for
        site = min((s for s in range(len(keeps)) if keeps[s] > 1), key=lacking)
        keeps[site] -= 1
        left += sizes[site]
    while payable := [s for s in range(len(keeps)) if keeps[s] < group - 1 and sizes[s] <= left]:
        site = max(payable, key=lacking)
        keeps[site] += 1
        left -= sizes[site]
    return keeps
