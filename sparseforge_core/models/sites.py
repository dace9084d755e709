"""Sites: the maskable weights of a loaded model, found by its family's rules, with nothing left unaccounted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sparseforge_core.errors import PatternViolation, UnsupportedModel
from sparseforge_core.models.families import Family, Rule
from sparseforge_core.models.layouts import is_transposed
from sparseforge_core.sparsity import masking
from sparseforge_core.sparsity.masking import Branch, SoftMask, Storage
from sparseforge_core.sparsity.patterns import Pattern, PatternChoice
from sparseforge_core.sparsity.slorb import SLoRB


@dataclass(eq=False)
class Site:
    """One maskable weight tensor of a model: where it is, how it is stored, and its mask once attached."""

    name: str
    """The parameter's name in the untouched model, as in its state dict."""
    module: nn.Module
    parameter: str
    transposed: bool
    group: str
    """The name of the rule that includes it: 'attention', 'mlp', 'experts'."""
    soft: SoftMask | None = None
    chosen: Pattern | None = None
    """What the recipe's pattern says about this site; set by `assign_patterns`."""

    @property
    def pattern(self) -> Pattern:
        """The pattern of this site."""
        if self.chosen is None:
            raise PatternViolation(f"site {self.name} was given no pattern; call assign_patterns first")
        return self.chosen

    @property
    def weight(self) -> nn.Parameter:
        """The trained tensor, behind the mask if one is attached, in its stored layout."""
        if self.soft is not None:
            return masking.original(self.module, self.parameter)
        weight = getattr(self.module, self.parameter)
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def mask(self) -> SoftMask:
        """The attached mask."""
        if self.soft is None:
            raise PatternViolation(f"site {self.name} has no mask attached")
        return self.soft

    def matrix(self, x: Tensor) -> Tensor:
        """A tensor of the weight's layout as `[..., out, in]`."""
        return x.transpose(-1, -2) if self.transposed else x

    def attach(self, slorb: SLoRB | None, storage: Storage = "float32") -> SoftMask:
        """Put a mask of ones on the weight."""
        self.soft = masking.attach(
            self.module, self.parameter, transposed=self.transposed, slorb=slorb, storage=storage
        )
        return self.soft

    def squash(self) -> Branch | None:
        """Take the mask off, leaving the pruned weight; returns the side branch, if any."""
        branch = masking.squash(self.module, self.parameter)
        self.soft = None
        return branch


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of a model is under a mask, by which family, and which rule left the rest out."""

    family: str
    """'automatic' where nobody declared the architecture."""
    included: dict[str, int]
    """Parameters under a mask, by the name of the rule."""
    excluded: dict[str, int]
    """Parameters left dense, by the name of the rule."""

    @property
    def masked(self) -> int:
        """Parameters under a mask."""
        return sum(self.included.values())

    @property
    def total(self) -> int:
        """All parameters."""
        return self.masked + sum(self.excluded.values())

    @property
    def share(self) -> float:
        """Parameters under a mask over all parameters."""
        return self.masked / self.total

    def __str__(self) -> str:
        dense = ", ".join(f"{name} {count:,}" for name, count in self.excluded.items())
        return f"family {self.family}: {self.masked:,} of {self.total:,} parameters masked; dense: {dense}"


def find_sites(model: nn.Module, family: Family) -> list[Site]:
    """Every included weight of `model`, in the model's order.

    Raises UnsupportedModel if a matrix is claimed by no rule or by two, a required rule matches nothing, a module
    stores its weight in another orientation than the rule says, or an included weight serves in two places.
    """
    sites: list[Site] = []
    matched: set[str] = set()
    for name, weight in model.named_parameters():
        rule = _claim(name, weight, family)
        if rule is None:
            continue
        matched.add(rule.name)
        if rule in family.include:
            path, _, parameter = name.rpartition(".")
            site = Site(name, model.get_submodule(path), parameter, rule.transposed, rule.name)
            _check_orientation(site, family)
            sites.append(site)
    required = {rule.name: None for rule in (*family.include, *family.exclude) if not rule.optional}
    empty = [name for name in required if name not in matched]
    if empty:
        raise UnsupportedModel(f"{family.name}: rules {', '.join(empty)} match no weight of this model")
    _check_untied(model, sites, family)
    return sites


def _claim(name: str, weight: Tensor, family: Family) -> Rule | None:
    """The one rule that names this parameter; None for a vector that needs none."""
    claims = [rule for rule in (*family.include, *family.exclude) if rule.matches(name)]
    if len(claims) > 1:
        said = " and ".join(f"{rule.name} ({rule.pattern})" for rule in claims)
        raise UnsupportedModel(f"{family.name}: {name} is claimed by {said}")
    if not claims and weight.ndim >= 2:
        raise UnsupportedModel(
            f"{family.name}: no rule covers or excludes {name} {tuple(weight.shape)}. Add it to include or "
            "exclude in the family's file; a weight is never left dense silently."
        )
    return claims[0] if claims else None


def _check_orientation(site: Site, family: Family) -> None:
    stored = is_transposed(site.module, site.weight)
    if stored is not None and stored != site.transposed:
        raise UnsupportedModel(
            f"{family.name}: rule {site.group} says transposed={site.transposed}, but {type(site.module).__name__} "
            f"stores {site.name} {tuple(site.weight.shape)} with transposed={stored}; groups would not run along its "
            "inputs"
        )


def _check_untied(model: nn.Module, sites: list[Site], family: Family) -> None:
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for site in sites:
        if len(names[id(site.weight)]) > 1:
            raise UnsupportedModel(
                f"{family.name}: {' and '.join(names[id(site.weight)])} are one tied weight; a mask on one name would "
                "untie it. Exclude it by a rule."
            )


def assign_patterns(sites: list[Site], choice: PatternChoice) -> list[Site]:
    """Give each site its pattern; returns those that have one, the others stay dense.

    Raises RecipeError if the choice's rules do not fit the sites, PatternViolation, naming the first site, unless
    each pattern divides its weight.
    """
    for site, pattern in zip(sites, choice.for_sites([(s.name, s.group) for s in sites]), strict=True):
        site.chosen = pattern
    masked = [site for site in sites if site.chosen is not None]
    refusals = [(site, site.pattern.refusal(tuple(site.matrix(site.weight).shape))) for site in masked]
    wrong = [(site.name, why) for site, why in refusals if why]
    if wrong:
        raise PatternViolation(f"{len(wrong)} of {len(masked)} sites do not fit; {wrong[0][0]}: {wrong[0][1]}")
    return masked


def coverage(model: nn.Module, family: Family, choice: PatternChoice | None = None) -> Coverage:
    """Count what is masked and what stays dense, and by which rule, in a model without attached masks.

    A `choice` that leaves sites dense is a rule too, called "recipe"; without one, the family's rules alone count.
    Raises as `find_sites` does.
    """
    sites = find_sites(model, family)
    masked = {site.name: site.group for site in (assign_patterns(sites, choice) if choice else sites)}
    left = {site.name for site in sites} - set(masked)
    included: dict[str, int] = {}
    excluded: dict[str, int] = {}
    for name, weight in model.named_parameters():
        if name in masked:
            counts, owner = included, masked[name]
        else:
            own = next((rule.name for rule in family.exclude if rule.matches(name)), "vectors")
            counts, owner = excluded, "recipe" if name in left else own
        counts[owner] = counts.get(owner, 0) + weight.numel()
    return Coverage(family=family.name, included=included, excluded=excluded)
