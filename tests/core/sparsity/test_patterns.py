"""Patterns: exact counts, round trips, ties, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.errors import PatternViolation, RecipeError
from sparseforge_core.sparsity.patterns import (
    BLOCK_16,
    GroupPattern,
    Unstructured,
    check_mask,
    check_weight,
    keep_top,
    nm,
    top_mask,
)
from sparseforge_core.sparsity.rules import ByRule, PatternRule

PATTERNS = [nm(2, 4), nm(4, 8), nm(1, 4), nm(6, 8), BLOCK_16, GroupPattern(rows=2, cols=4, keep=3)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_groups_round_trip_and_run_along_the_input(pattern: GroupPattern, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, 32, 48)
    grouped = pattern.groups(x)
    assert grouped.shape == (*lead, 32 * 48 // (pattern.rows * pattern.cols), pattern.rows * pattern.cols)
    assert torch.equal(pattern.ungroup(grouped, x.shape), x)
    first = x[..., : pattern.rows, : pattern.cols].reshape(*lead, -1)
    assert torch.equal(grouped[..., 0, :], first)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@given(seed=st.integers(0, 2**31), levels=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_top_mask_is_exact_even_with_ties(pattern: GroupPattern, seed: int, levels: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randint(0, levels, (32, 32)).float()
    mask = top_mask(scores, pattern)
    check_mask(mask, pattern, "here")
    kept, dropped = (
        pattern.groups(torch.where(mask, scores, torch.inf)),
        pattern.groups(torch.where(mask, -torch.inf, scores)),
    )
    assert bool((kept.amin(-1) >= dropped.amax(-1)).all())


def test_ties_go_to_the_lower_index_and_negative_zero_is_zero() -> None:
    assert keep_top(torch.tensor([0.0, -0.0, 0.0, -0.0]), 2).tolist() == [True, True, False, False]
    assert keep_top(torch.full((256,), 3.0), 128).tolist() == [True] * 128 + [False] * 128


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(PatternViolation, match="not finite"):
        keep_top(torch.tensor([1.0, bad, 0.0, 2.0]), 2)


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PatternViolation, match="in by 4; found 8 x 6"):
        nm(2, 4).groups(torch.zeros(8, 6))
    with pytest.raises(PatternViolation, match="out divisible by 16"):
        BLOCK_16.groups(torch.zeros(8, 16))


@pytest.mark.parametrize(("keep", "size"), [(0, 4), (4, 4), (5, 4)])
def test_a_pattern_keeps_some_and_drops_some(keep: int, size: int) -> None:
    with pytest.raises(RecipeError, match="keep="):
        nm(keep, size)


def test_checks_count_the_groups_that_break_the_pattern() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    with pytest.raises(PatternViolation, match=r"site w: 1 of 2 groups break 2:4; the first keeps 3"):
        check_weight(weight, nm(2, 4), "w")
    with pytest.raises(PatternViolation, match="2 of 2 groups"):
        check_mask(weight, nm(2, 4), "w")


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_unstructured_keeps_a_share_of_each_row_or_matrix(scope: str, lead: tuple[int, ...]) -> None:
    pattern = Unstructured(density=0.3, scope=scope)  # type: ignore[arg-type]
    scores = torch.rand(*lead, 16, 20)
    mask = top_mask(scores, pattern)
    check_mask(mask, pattern, "here")
    assert torch.equal(pattern.ungroup(pattern.groups(scores), scores.shape), scores)
    assert float(mask.float().mean()) == pytest.approx(0.3)
    if scope == "row":
        assert bool((mask.sum(-1) == 6).all())
    else:
        threshold = scores.flatten(-2).sort(-1, descending=True).values[..., 95]
        assert torch.equal(mask, scores >= threshold[..., None, None])


def test_a_pattern_that_leaves_a_layer_with_no_survivor_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"density=1\.0"):
        Unstructured(density=1.0)
    with pytest.raises(PatternViolation, match="keeps 0 of the 20 entries of a row"):
        Unstructured(density=0.02).groups(torch.zeros(4, 20))


SITES = [("l.0.attn.q", "attention"), ("l.0.mlp.up", "mlp"), ("l.1.attn.q", "attention"), ("l.1.mlp.up", "mlp")]


def test_rules_give_each_site_its_own_pattern() -> None:
    mixed = ByRule(
        rules=(
            PatternRule(sites="attention", pattern=nm(2, 4)),
            PatternRule(sites="l.0.mlp.*", pattern=nm(4, 8)),
            PatternRule(sites="l.1.mlp.*"),
        )
    )
    assert mixed.for_sites(SITES) == [nm(2, 4), nm(4, 8), nm(2, 4), None]
    assert mixed.name == "attention 2:4, l.0.mlp.* 4:8, l.1.mlp.* dense"
    assert nm(2, 4).for_sites(SITES) == [nm(2, 4)] * 4


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (("attention",), "site l.0.mlp.up .mlp. is matched by none"),
        (("attention", "mlp", "l.0.*"), "site l.0.attn.q .attention. is matched by 'attention' and 'l.0.[*]'"),
        (("attention", "mlp", "experts"), "'experts'. match no site; the kinds of site here are attention, mlp"),
    ],
)
def test_rules_that_overlap_or_match_nothing_are_refused(rules: tuple[str, ...], said: str) -> None:
    mixed = ByRule(rules=tuple(PatternRule(sites=name, pattern=nm(2, 4)) for name in rules))
    with pytest.raises(RecipeError, match=said):
        mixed.for_sites(SITES)


def test_rules_must_say_something() -> None:
    with pytest.raises(RecipeError, match="at least one is needed"):
        ByRule(rules=())
    with pytest.raises(RecipeError, match="every one leaves its sites dense"):
        ByRule(rules=(PatternRule(sites="mlp"),))
