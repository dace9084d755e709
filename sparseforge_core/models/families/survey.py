"""What every family does to a small model of its own: sites, coverage, and what stays dense under which rule.

Each tiny configuration is instantiated and its weights are counted, so that the answer comes from the architecture
as the installed transformers builds it and not from the declaration alone.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseforge_core.models.families import FAMILIES

if TYPE_CHECKING:
    from torch import nn

    from sparseforge_core.models.families import Family

WIDTH, LAYERS, HEADS, POSITIONS, VOCABULARY = 64, 2, 2, 64, 256


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """One model type under its family."""

    model_type: str
    family: str
    """'automatic' where nobody declared it."""
    sites: dict[str, int]
    """Masked weights, by rule."""
    share: float
    """Parameters under a mask over all parameters, of the tiny model."""
    excluded: dict[str, list[str]]
    """Weights that stay dense, by rule, with # for every number in a name."""

    @property
    def about(self) -> str:
        """One line."""
        by_rule = ", ".join(f"{name} {count}" for name, count in self.sites.items())
        dense = ", ".join(self.excluded)
        total = sum(self.sites.values())
        return f"family {self.family}: {total} sites ({by_rule}), {self.share:.1%} of parameters; dense: {dense}"


def survey() -> list[Surveyed]:
    """Every declared model type, then the tiny models that only the automatic family knows."""
    from sparseforge_core.data.corpora import Synthetic
    from sparseforge_core.models.families.automatic import automatic_family
    from sparseforge_core.models.hub import from_config
    from sparseforge_core.models.sources import Tiny, TrainedBPE
    from sparseforge_core.models.tiny import CONFIGURATIONS, tiny_config

    tokenizer = TrainedBPE(corpus=Synthetic(documents_count=1), size=VOCABULARY)
    found = {}
    for architecture in CONFIGURATIONS:
        source = Tiny(
            architecture=architecture,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            width=WIDTH,
            layers=LAYERS,
            heads=HEADS,
            positions=POSITIONS,
        )
        model = from_config(tiny_config(source, VOCABULARY, 0))
        model_type = model.config.model_type
        family = FAMILIES.get(model_type) or automatic_family(model)
        found[model_type] = _surveyed(model_type, model, family)
    return [found[model_type] for model_type in sorted(found, key=lambda m: (m not in FAMILIES, m))]


def _surveyed(model_type: str, model: nn.Module, family: Family) -> Surveyed:
    from sparseforge_core.models.families.automatic import generalised
    from sparseforge_core.models.sites import coverage, find_sites

    excluded: dict[str, list[str]] = {}
    sites = find_sites(model, family)
    masked = {site.name for site in sites}
    for name, _ in model.named_parameters():
        if name not in masked:
            owner = next((rule.name for rule in family.exclude if rule.matches(name)), "vectors")
            names = excluded.setdefault(owner, [])
            if generalised(name) not in names:
                names.append(generalised(name))
    return Surveyed(
        model_type=model_type,
        family=family.name,
        sites=dict(collections.Counter(site.group for site in sites)),
        share=coverage(model, family).share,
        excluded=excluded,
    )
