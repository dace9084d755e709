"""Sites: the maskable weights of a loaded model, found by its family's rules, with nothing left unaccounted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sparseforge_core.errors import PatternViolation, UnsupportedModel
from sparseforge_core.models.families import Family
from sparseforge_core.sparsity import masking
from sparseforge_core.sparsity.masking import Branch, SoftMask
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

    def attach(self, slorb: SLoRB | None) -> SoftMask:
        """Put a mask of ones on the weight."""
        self.soft = masking.attach(self.module, self.parameter, transposed=self.transposed, slorb=slorb)
        return self.soft

    def squash(self) -> Branch | None:
        """Take the mask off, leaving the pruned weight; returns the side branch, if any."""
        branch = masking.squash(self.module, self.parameter)
        self.soft = None
        return branch


@dataclass(frozen=True)
class Coverage:
    """How much of a model is under a mask, and which rule left the rest out."""

    masked: int
    total: int
    excluded: dict[str, int]
    """Parameters left dense, by the name of the rule."""

    @property
    def share(self) -> float:
        """Parameters under a mask over all parameters."""
        return self.masked / self.total


def find_sites(model: nn.Module, family: Family) -> list[Site]:
    """Every included weight of `model`, in the model's order.

    Raises UnsupportedModel if a matrix is claimed by no rule or by two, or a required rule matches nothing.
    """
    sites: list[Site] = []
    rules = {rule.name: 0 for rule in (*family.include, *family.exclude)}
    for name, weight in model.named_parameters():
        claims = [rule for rule in (*family.include, *family.exclude) if rule.matches(name)]
        if len(claims) > 1:
            raise UnsupportedModel(f"{family.name}: {name} is claimed by {' and '.join(r.name for r in claims)}")
        if not claims:
            if weight.ndim >= 2:
                raise UnsupportedModel(
                    f"{family.name}: no rule covers or excludes {name} {tuple(weight.shape)}. Add it to include or "
                    "exclude in the family's file; a weight is never left dense silently."
                )
            continue
        rules[claims[0].name] += 1
        if claims[0] in family.include:
            path, _, parameter = name.rpartition(".")
            sites.append(Site(name, model.get_submodule(path), parameter, family.transposed, claims[0].name))
    required = [rule.name for rule in (*family.include, *family.exclude) if not rule.optional]
    empty = [name for name in required if rules[name] == 0]
    if empty:
        raise UnsupportedModel(f"{family.name}: rules {', '.join(empty)} match no weight of this model")
    return sites


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
    """
    sites = find_sites(model, family)
    masked = {site.name for site in (assign_patterns(sites, choice) if choice else sites)}
    left = {site.name for site in sites} - masked
    excluded: dict[str, int] = {}
    total = covered = 0
    for name, weight in model.named_parameters():
        total += weight.numel()
        if name in masked:
            covered += weight.numel()
        else:
            own = next((rule.name for rule in family.exclude if rule.matches(name)), "vectors")
            owner = "recipe" if name in left else own
            excluded[owner] = excluded.get(owner, 0) + weight.numel()
    return Coverage(covered, total, excluded)
