"""Mixed sparsity: another pattern for each kind of site, for instance attention 2:4 and the MLP 4:8."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from sparseforge_core.errors import RecipeError
from sparseforge_core.sparsity.patterns import Pattern, PatternChoice
from sparseforge_core.specs import spec


@spec("pattern-rule")
class PatternRule:
    """Sites and their pattern."""

    sites: str
    """A kind of site as the family names it ('attention', 'mlp', 'experts'), or a glob of parameter names."""
    pattern: Pattern | None = None
    """None leaves these sites dense: they carry no mask, and coverage counts them as left out by the recipe."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise RecipeError("sites: must name a kind of site or a glob of parameter names")

    def matches(self, name: str, kind: str) -> bool:
        """Whether the rule speaks of a site."""
        return self.sites == kind or fnmatch.fnmatchcase(name, self.sites)


@spec("by-rule")
class ByRule(PatternChoice):
    """A pattern by rule. Every site must be matched by exactly one rule, every rule must match a site."""

    rules: tuple[PatternRule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise RecipeError("rules: at least one is needed")
        if all(rule.pattern is None for rule in self.rules):
            raise RecipeError("rules: every one leaves its sites dense; give at least one a pattern")

    @property
    def name(self) -> str:
        return ", ".join(f"{rule.sites} {rule.pattern.name if rule.pattern else 'dense'}" for rule in self.rules)

    def for_sites(self, sites: Sequence[tuple[str, str]]) -> list[Pattern | None]:
        found: list[Pattern | None] = []
        idle = {rule.sites for rule in self.rules}
        for name, kind in sites:
            claims = [rule for rule in self.rules if rule.matches(name, kind)]
            if len(claims) != 1:
                said = " and ".join(repr(rule.sites) for rule in claims) or "none"
                raise RecipeError(f"pattern.rules: site {name} ({kind}) is matched by {said}, not by one rule")
            idle.discard(claims[0].sites)
            found.append(claims[0].pattern)
        if idle:
            kinds = ", ".join(sorted({kind for _, kind in sites}))
            raise RecipeError(f"pattern.rules: {sorted(idle)} match no site; the kinds of site here are {kinds}")
        return found
