"""Sparsity patterns: which entries compete with each other, and how many of them survive.

2:4, N:M and the paper's block-16 all say *tile the matrix, keep the best k of each tile*; unstructured sparsity has
one long row, or one matrix, for a tile. A pattern turns a
weight `[..., out, in]` into groups `[..., tiles, size]`; everything after that works on the last dimension, for
matrices and for stacks of expert matrices alike. N:M groups run along the input dimension, the axis that the
sparse tensor core contracts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sparseforge_core.errors import PatternViolation, RecipeError
from sparseforge_core.specs import spec


class PatternChoice(ABC):
    """What a recipe says about sparsity: one pattern for every site, or a pattern by rule (`rules.ByRule`)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it: '2:4', 'block-16'."""

    @abstractmethod
    def for_sites(self, sites: Sequence[tuple[str, str]]) -> list[Pattern | None]:
        """The pattern of each site, given as (parameter name, kind of site); None leaves a site dense.

        Raises RecipeError if the choice does not fit the sites.
        """


class Pattern(PatternChoice):
    """How entries of a weight `[..., out, in]` are grouped, and how many of a group are kept."""

    def for_sites(self, sites: Sequence[tuple[str, str]]) -> list[Pattern | None]:
        return [self] * len(sites)

    @property
    @abstractmethod
    def density(self) -> float:
        """Share of entries kept."""

    @abstractmethod
    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this `[..., out, in]` shape does not fit, or None."""

    @abstractmethod
    def groups(self, x: Tensor) -> Tensor:
        """`[..., out, in]` -> `[..., tiles, size]`. Raises PatternViolation if the shape does not divide."""

    @abstractmethod
    def ungroup(self, grouped: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `groups` for a weight of `shape`."""

    @abstractmethod
    def keep_of(self, size: int) -> int:
        """Entries kept in a group of `size`, the last dimension of `groups`."""


@spec("group-pattern")
class GroupPattern(Pattern):
    """Keep `keep` entries of every `rows` x `cols` tile."""

    rows: int
    cols: int
    keep: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise RecipeError(f"rows={self.rows}, cols={self.cols}: a tile has at least one row and one column")
        if not 0 < self.keep < self.rows * self.cols:
            raise RecipeError(f"keep={self.keep}: must lie between 0 and {self.rows * self.cols}, both excluded")

    @property
    def name(self) -> str:
        if self.rows == 1:
            return f"{self.keep}:{self.cols}"
        if self.rows == self.cols and 2 * self.keep == self.rows * self.cols:
            return f"block-{self.rows}"
        return f"{self.keep} of {self.rows}x{self.cols}"

    @property
    def density(self) -> float:
        return self.keep / (self.rows * self.cols)

    def keep_of(self, size: int) -> int:
        return self.keep

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) < 2:
            return f"shape {tuple(shape)} is no matrix"
        out, inp = shape[-2], shape[-1]
        if out % self.rows or inp % self.cols:
            return f"pattern {self.name} needs out divisible by {self.rows} and in by {self.cols}; found {out} x {inp}"
        return None

    def groups(self, x: Tensor) -> Tensor:
        refusal = self.refusal(tuple(x.shape))
        if refusal:
            raise PatternViolation(refusal)
        *lead, out, inp = x.shape
        tiled = x.reshape(*lead, out // self.rows, self.rows, inp // self.cols, self.cols)
        return tiled.transpose(-3, -2).reshape(*lead, -1, self.rows * self.cols)

    def ungroup(self, grouped: Tensor, shape: torch.Size) -> Tensor:
        *lead, out, inp = shape
        tiled = grouped.reshape(*lead, out // self.rows, inp // self.cols, self.rows, self.cols)
        return tiled.transpose(-3, -2).reshape(shape)


def nm(keep: int, size: int) -> GroupPattern:
    """N:M along the input dimension: `nm(2, 4)` is NVIDIA's 2:4."""
    return GroupPattern(rows=1, cols=size, keep=keep)


BLOCK_16 = GroupPattern(rows=16, cols=16, keep=128)
"""The paper's block-16 (appendix B): 128 of the 256 entries of every 16 x 16 tile."""


@spec("unstructured")
class Unstructured(Pattern):
    """The same share of entries everywhere, wherever they lie: in each output row, or in each whole matrix."""

    density: float = 0.5
    """Share of entries kept, rounded to whole entries in each group."""
    scope: Literal["row", "matrix"] = "row"
    """What competes: the entries of an output row (Wanda's default), or all of a matrix (of each expert's matrix)."""

    def __post_init__(self) -> None:
        if not 0.0 < self.density < 1.0:
            raise RecipeError(f"density={self.density}: must lie between 0 and 1, both excluded")

    @property
    def name(self) -> str:
        return f"{self.density:.0%} by {self.scope}"

    def keep_of(self, size: int) -> int:
        return round(self.density * size)

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) < 2:
            return f"shape {tuple(shape)} is no matrix"
        size = shape[-1] if self.scope == "row" else shape[-2] * shape[-1]
        kept = self.keep_of(size)
        if not 0 < kept < size:
            return f"pattern {self.name} keeps {kept} of the {size} entries of a {self.scope}; choose another density"
        return None

    def groups(self, x: Tensor) -> Tensor:
        refusal = self.refusal(tuple(x.shape))
        if refusal:
            raise PatternViolation(refusal)
        return x if self.scope == "row" else x.reshape(*x.shape[:-2], 1, -1)

    def ungroup(self, grouped: Tensor, shape: torch.Size) -> Tensor:
        return grouped.reshape(shape)


SMALL = 16
"""Groups up to this size are ranked by comparing pairs of entries, larger ones are sorted."""


def all_finite(x: Tensor) -> bool:
    """Whether every entry is finite. The sum says so in one pass unless it overflows; then all are looked at."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def columns_of(grouped: Tensor) -> tuple[Tensor, ...]:
    """The entries of all groups by their place, each contiguous: elementwise work on them is as fast as copying."""
    return grouped.movedim(-1, 0).contiguous().unbind(0)


def ranks(grouped: Tensor, ties: Tensor | None = None) -> Tensor:
    """Rank of each entry within its group, 0 for the largest, int32 for large groups, else int8 `[..., groups, size]`.

    Equal entries are ranked by `ties` (larger first), then by place (lower first); negative zero equals zero. Raises
    PatternViolation on a score that is not finite.
    """
    keys = [grouped] if ties is None else [grouped, ties]
    if not all(all_finite(key) for key in keys):
        raise PatternViolation("a score is not finite; nothing can be ranked by it")
    if grouped.shape[-1] > SMALL:
        return _ranks_by_sorting(keys)
    # Whole columns are compared, six times for 2:4: no reduction over a tiny last dimension, which is slow.
    columns = [columns_of(key) for key in keys]
    found = torch.zeros((grouped.shape[-1], *grouped.shape[:-1]), dtype=torch.int8, device=grouped.device)
    for i in range(len(found)):
        for j in range(i + 1, len(found)):
            later_wins = columns[0][j] > columns[0][i]
            if ties is not None:
                later_wins |= (columns[0][j] == columns[0][i]) & (columns[1][j] > columns[1][i])
            found[i] += later_wins
            found[j] += later_wins.logical_not_()
    return found.movedim(0, -1).contiguous()


def _ranks_by_sorting(keys: list[Tensor]) -> Tensor:
    """Stable sorts from the last key to the first leave equal entries in the order of the keys before."""
    order = torch.argsort(keys[-1], dim=-1, descending=True, stable=True)
    for key in reversed(keys[:-1]):
        order = order.gather(-1, torch.argsort(key.gather(-1, order), dim=-1, descending=True, stable=True))
    places = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, places)


def keep_top(grouped: Tensor, keep: int) -> Tensor:
    """Boolean indicator of the `keep` largest entries of the last dimension; exactly `keep` in every group.

    Ties and scores that are not finite are treated as `ranks` does.
    """
    return ranks(grouped) < keep


def top_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Hard mask of `scores` `[..., out, in]`: boolean, the same shape, exactly the pattern."""
    grouped = pattern.groups(scores)
    return pattern.ungroup(keep_top(grouped, pattern.keep_of(grouped.shape[-1])), scores.shape)


def check_mask(mask: Tensor, pattern: Pattern, where: str) -> None:
    """Raise PatternViolation unless every group of the 0/1 `mask` keeps exactly the pattern's count."""
    grouped = pattern.groups(mask != 0)
    kept, wanted = grouped.sum(-1), pattern.keep_of(grouped.shape[-1])
    _refuse(kept != wanted, kept, pattern.name, where, f"exactly {wanted}")


def check_weight(weight: Tensor, pattern: Pattern, where: str) -> None:
    """Raise PatternViolation if a group of `weight` holds more non-zeros than the pattern keeps."""
    grouped = pattern.groups(weight != 0)
    kept, wanted = grouped.sum(-1), pattern.keep_of(grouped.shape[-1])
    _refuse(kept > wanted, kept, pattern.name, where, f"at most {wanted}")


def _refuse(wrong: Tensor, kept: Tensor, pattern: str, where: str, wanted: str) -> None:
    count = int(wrong.sum())
    if count:
        first = int(kept[wrong].flatten()[0])
        raise PatternViolation(
            f"site {where}: {count:,} of {wrong.numel():,} groups break {pattern}; the first keeps {first} entries "
            f"instead of {wanted}"
        )
